"""Where the time goes: ONNX Runtime's own profiler over the graph as it really runs, told per tensor of the model.

The runtime fuses nodes and changes layouts; what it runs is mapped back by the names of tensors, which it mostly keeps.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import onnx

from edgecloud.errors import ConfigError
from edgecloud.machine import machine
from edgecloud.partitioner.onnx_model import OnnxModel
from edgecloud.partitioner.ort_session import PORTABLE, Session
from edgecloud.partitioner.samples import Sample

NUM_WARMUPS = 2
MIN_RUNS, MAX_RUNS, ENOUGH_S = 5, 40, 1.5
NCHWC = "_nchwc"  # ONNX Runtime names a convolution in a blocked layout after its output


@dataclass(frozen=True, slots=True)
class NodeProfile:
    """Times of one model with one shape of inputs on one machine."""

    fingerprint: str  # of the model
    shapes: dict[str, list[int]]  # of the inputs
    num_threads: int  # 0: as many as the process may use
    machine: str
    total_ms: float  # median of a run
    tensor_ms: dict[str, float]  # of what makes the tensor, scaled so that the sum is the run

    def to_json(self) -> str:
        """What `read` takes."""
        return json.dumps(asdict(self), indent=1) + "\n"


def read_profile(file: Path, model: OnnxModel, sample: Sample) -> NodeProfile:
    """Times that were measured elsewhere. Raises ConfigError if they cannot be read or are those of another model or shape."""
    try:
        profile = NodeProfile(**json.loads(file.read_text("utf-8")))
        times = [float(profile.total_ms), *(float(value) for value in profile.tensor_ms.values())]
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}; make it with --save-profile") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"{file} is no profile of nodes: {error}; make it with --save-profile") from error
    if profile.fingerprint != model.fingerprint:
        raise ConfigError(f"{file} has times of another model than {model.path}; make it with --save-profile")
    if profile.shapes != (shapes := _shapes(sample)):
        raise ConfigError(f"{file} has times for inputs of {profile.shapes}, the samples have {shapes}; profile with the same")
    if not all(0 <= value < float("inf") for value in times):
        raise ConfigError(f"{file} has a time below 0 or without end; make it with --save-profile")
    return profile


def surviving_tensors(model: OnnxModel, num_threads: int) -> set[str]:
    """Names of the tensors that still exist when ONNX Runtime has fused what it fuses on every machine."""
    with tempfile.TemporaryDirectory() as folder:
        return {name for node in _optimized(model.proto, Path(folder), num_threads) for name in node.output}


def profile_nodes(model: OnnxModel, sample: Sample, num_threads: int, timing_s: float = ENOUGH_S) -> NodeProfile:
    """Medians over runs, for `timing_s` or less each, with the profiler and without. Raises ModelError if it does not run."""
    named = onnx.ModelProto()
    named.CopyFrom(model.proto)
    for index, node in enumerate(named.graph.node):
        node.name = f"edgecloud:{index}"
    plain = Session(named, num_threads)
    enough_s = min(ENOUGH_S, timing_s)
    total_ms = median_ms(plain, sample, enough_s)
    del plain
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        portable = _optimized(named, folder, num_threads)
        session = Session(named, num_threads, optimized=folder / "run.onnx", profile=folder / "times")
        for _ in range(NUM_WARMUPS):
            session.run(sample)
        end = time.monotonic() + enough_s
        for done in range(MAX_RUNS):
            session.run(sample)
            if done + 1 >= MIN_RUNS and time.monotonic() > end:
                break
        events = json.loads(session.end_profiling().read_text("utf-8"))
        running = list(onnx.load(folder / "run.onnx", load_external_data=False).graph.node)
    spent = _durations(events)
    known = {name for node in model.proto.graph.node for name in node.output if name}
    homes = _homes(running, {node.name: node.output[0] for node in portable}, known)
    tensor_ms: dict[str, float] = defaultdict(float)
    for node in running:
        if homes[node.name] is not None:
            tensor_ms[str(homes[node.name])] += spent.get(node.name, 0.0)
    scale = total_ms / (sum(tensor_ms.values()) or 1.0)
    times = {name: round(value * scale, 6) for name, value in tensor_ms.items()}
    return NodeProfile(model.fingerprint, _shapes(sample), num_threads, machine()["cpu"], round(total_ms, 6), times)


def median_ms(session: Session, values: Sample, enough_s: float) -> float:
    """Of a run, after warming up."""
    for _ in range(NUM_WARMUPS):
        session.run(values)
    times: list[float] = []
    end = time.monotonic() + enough_s
    while len(times) < MIN_RUNS or (len(times) < MAX_RUNS and time.monotonic() < end):
        begin = time.perf_counter()
        session.run(values)
        times.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(times)


def _optimized(proto: onnx.ModelProto, folder: Path, num_threads: int) -> list[onnx.NodeProto]:
    Session(proto, num_threads, level=PORTABLE, optimized=folder / "portable.onnx")
    return list(onnx.load(folder / "portable.onnx", load_external_data=False).graph.node)


def _durations(events: Iterable[Mapping[str, object]]) -> dict[str, float]:
    """Name of a node -> median milliseconds of its kernel"""
    spent: dict[str, list[float]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "Node" and str(event["name"]).endswith("_kernel_time"):
            spent[str(event["name"]).removesuffix("_kernel_time")].append(float(str(event["dur"])) / 1e3)
    return {name: statistics.median(times[NUM_WARMUPS:] or times) for name, times in spent.items()}


def _homes(running: list[onnx.NodeProto], portable: Mapping[str, str], known: set[str]) -> dict[str, str | None]:
    """Name of a node that runs -> tensor of the model that it makes, or that it helps to make."""
    homes: dict[str, str | None] = {}
    readers = {name: node.name for node in running for name in node.input}
    for node in reversed(running):  # what follows has its home first
        own = [name for name in node.output if name in known]
        named = portable.get(node.name)
        if own:
            homes[node.name] = own[0]
        elif node.name.endswith(NCHWC) and node.name.removesuffix(NCHWC) in known:
            homes[node.name] = node.name.removesuffix(NCHWC)
        elif named in known:
            homes[node.name] = named
        else:
            homes[node.name] = next((homes.get(readers[name]) for name in node.output if name in readers), None)
    return homes


def _shapes(sample: Sample) -> dict[str, list[int]]:
    return {name: list(array.shape) for name, array in sorted(sample.items())}
