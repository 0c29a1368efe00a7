"""`edgecloud partition model.onnx`: profile, plan, cut, check, measure, and a bundle that appears whole or not at all."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path

import onnx

from edgecloud.errors import BundleError, ConfigError
from edgecloud.fingerprint import sha256_file
from edgecloud.graph_bundle import BoundaryTensor, CutInfo, GraphBundle, GraphInfo
from edgecloud.machine import machine
from edgecloud.manifest import MANIFEST, FileInfo
from edgecloud.partitioner.atomic import atomic_folder, link_or_copy
from edgecloud.partitioner.boundary import LOSS_METRICS, LOSSY, Accuracy, LossMetric, encoded_bytes, measure_codecs
from edgecloud.partitioner.cut_planner import NS, Candidate, Choice, CutPlanner
from edgecloud.partitioner.cut_search import Objective, smallest_ram_bytes
from edgecloud.partitioner.dag import Dag, Side, ram_bytes
from edgecloud.partitioner.download import NO_SPACE
from edgecloud.partitioner.graph_report import GraphReport, Region
from edgecloud.partitioner.inputs import check_destination, require_space
from edgecloud.partitioner.link_spec import LinkSpec
from edgecloud.partitioner.node_profile import NodeProfile, median_ms, profile_nodes, read_profile, surviving_tensors
from edgecloud.partitioner.onnx_dag import Structure, analyse, build_dag, crossing_names
from edgecloud.partitioner.onnx_model import OnnxModel, load_model
from edgecloud.partitioner.ort_session import Session
from edgecloud.partitioner.samples import Sample, load_samples
from edgecloud.partitioner.tensor_facts import TensorFact, measure_tensors

Remark = Callable[[str], None]

MAX_CUTS = 6  # in a bundle, edge only and cloud only among them
SWEEP_MBPS = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0)
SWEEP_RTT_MS = (5.0, 20.0, 50.0, 100.0, 200.0)
MARGIN_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class GraphRequest:
    """What a user asks for."""

    model: Path
    bundle: Path
    inputs: tuple[Path, ...] = ()
    objective: Objective = "latency"
    link: LinkSpec = field(default_factory=lambda: LinkSpec(20.0, 20.0, 40.0))
    cloud_speed: float = 4.0  # the cloud computes so many times as fast as this device
    cloud_profile: Path | None = None  # or as this file says
    device_profile: Path | None = None  # None: measured here
    save_profile: Path | None = None
    max_ram_bytes: int | None = None
    max_loss: float = 0.0
    loss_metric: LossMetric = "relative"
    codecs: tuple[str, ...] | None = None  # None: all, if any loss is allowed
    pins: Mapping[str, Side] = field(default_factory=dict)
    num_threads: int = 0  # 0: as many as this process may use
    overwrite: bool = False

    def __post_init__(self) -> None:
        """Check the values."""
        if not 0 < self.cloud_speed < float("inf"):
            raise ConfigError(f"--cloud-speed {self.cloud_speed:g} cannot be; 4 means four times as fast as this device")
        if not 0 <= self.max_loss < float("inf"):
            raise ConfigError(f"--max-loss {self.max_loss:g} cannot be; give 0 or more, such as 0.01")
        if self.max_ram_bytes is not None and self.max_ram_bytes < 1:
            raise ConfigError(f"--max-ram {self.max_ram_bytes} cannot be; give a positive number of bytes, such as 64mb")
        if self.loss_metric not in LOSS_METRICS:
            raise ConfigError(f"--loss {self.loss_metric!r} is unknown; it takes {', '.join(LOSS_METRICS)}")
        for codec in self.codecs or ():
            if codec not in LOSSY:
                raise ConfigError(f"--boundary {codec!r} is unknown; it takes raw, {', '.join(LOSSY)}")
        if self.codecs and not self.max_loss:
            raise ConfigError(f"--boundary {','.join(self.codecs)} loses accuracy; say how much may be lost, such as --max-loss 0.01")
        if self.num_threads < 0:
            raise ConfigError(f"--threads {self.num_threads} cannot be; give 0 for as many as there are, or more")


@dataclass(frozen=True, slots=True)
class Prepared:
    """The model as the search sees it."""

    request: GraphRequest
    model: OnnxModel
    samples: list[Sample]
    structure: Structure
    facts: Mapping[str, TensorFact]
    dag: Dag
    device: NodeProfile
    cloud_share: float  # time of the cloud over that of the device, all nodes
    planner: CutPlanner
    num_threads: int


@dataclass(frozen=True, slots=True)
class Kept:
    """A cut that goes into the bundle."""

    name: str
    candidate: Candidate
    info: CutInfo


def partition_graph(request: GraphRequest, *, dry_run: bool = False, remark: Remark = lambda _: None) -> GraphReport:
    """Do it. With `dry_run` everything is computed, measured and checked, and nothing is written.

    Raises:
        ConfigError: options, samples or profiles that cannot work; a budget of memory that nothing fits.
        ModelError: the file is no model that can be cut, or it does not run.
        BundleError: the bundle cannot be written.
    """
    begin = time.monotonic()
    destination = check_destination(request.bundle, request.overwrite)
    prepared = prepare(request, remark)
    kept, chosen, proven, bound_ms, regions = plan(prepared, remark)
    report = GraphReport(
        bundle=str(destination), model=prepared.model.name, fingerprint=prepared.model.fingerprint, dry_run=dry_run,
        objective=request.objective, link=str(request.link), num_nodes=len(prepared.structure.live), num_groups=prepared.dag.num_nodes,
        total_ms=prepared.device.total_ms, cloud_share=prepared.cloud_share, cuts=[cut.info for cut in kept], chosen=chosen,
        costs_ms={cut.name: round(measured_ms(cut.info, request), 3) for cut in kept}, proven=proven, bound_ms=round(bound_ms, 3),
        regions=regions, max_loss=request.max_loss, loss_metric=request.loss_metric, notes=_notes(prepared),
    )  # fmt: skip
    if not dry_run:
        remark("writing the bundle")
        _write(destination, prepared, kept, report)
    return replace(report, seconds=round(time.monotonic() - begin, 1))


def prepare(request: GraphRequest, remark: Remark) -> Prepared:
    """Load, check, run and time the model."""
    num_threads = request.num_threads or len(os.sched_getaffinity(0))
    remark("reading the model")
    model = load_model(request.model)
    samples = load_samples(request.inputs, model)
    if request.max_loss and not request.inputs:
        raise ConfigError(f"--max-loss {request.max_loss:g} is judged on samples of yours; give --inputs SAMPLE.npz")
    remark("the whole graph on the samples")
    accuracy = Accuracy(model, samples, request.loss_metric, num_threads)
    structure = analyse(model, surviving_tensors(model, num_threads))
    facts = measure_tensors(model, crossing_names(model, structure), samples[0], num_threads)
    dag = build_dag(model, structure, facts, request.pins)
    if request.device_profile is None:
        remark("times of the nodes")
        device = profile_nodes(model, samples[0], num_threads)
    else:
        device = read_profile(request.device_profile, model, samples[0])
    if request.save_profile is not None:
        request.save_profile.write_text(device.to_json(), "utf-8")
    device_ns = group_times(device, model, structure)
    if request.cloud_profile is None:
        cloud_ns = tuple(round(value / request.cloud_speed) for value in device_ns)
    else:
        cloud_ns = group_times(read_profile(request.cloud_profile, model, samples[0]), model, structure)
    codecs = (request.codecs if request.codecs is not None else LOSSY) if request.max_loss else ()
    planner = CutPlanner(
        model, structure, dag, facts, device_ns, cloud_ns, measure_codecs(codecs), accuracy, request.max_loss,
        request.max_ram_bytes, request.objective,
    )  # fmt: skip
    share = sum(cloud_ns) / (sum(device_ns) or 1)
    return Prepared(request, model, samples, structure, facts, dag, device, share, planner, num_threads)


def group_times(profile: NodeProfile, model: OnnxModel, structure: Structure) -> tuple[int, ...]:
    """Nanoseconds of every group of the DAG."""
    nodes = model.proto.graph.node
    return tuple(
        round(NS * sum(profile.tensor_ms.get(name, 0.0) for node in group for name in nodes[node].output))
        for group in structure.groups
    )


def plan(prepared: Prepared, remark: Remark) -> tuple[list[Kept], str, bool, float, list[Region]]:
    """-> the cuts to keep, the name of the chosen one, whether the search has proven it, its bound in ms, and where each wins"""
    request, planner = prepared.request, prepared.planner
    remark(f"the best cut for {request.link}")
    first = planner.choose(request.link)
    if first is None:
        raise ConfigError(_why_nothing_fits(prepared))
    remark(f"the best cuts from {SWEEP_MBPS[0]:g} to {SWEEP_MBPS[-1]:g} Mbit/s")
    choices = [planner.choose(request.link.scaled(mbps, request.link.rtt_ms)) for mbps in SWEEP_MBPS]
    candidates = _select(prepared, first, [choice.candidate for choice in choices if choice is not None])
    kept = []
    for name, candidate in candidates.items():
        remark(f"checking and timing {name}")
        planner.accuracy.require_same_nodes(candidate.halves)
        kept.append(Kept(name, candidate, _measure(prepared, name, candidate)))
    best = min(kept, key=lambda cut: measured_ms(cut.info, request))
    kept = [replace(cut, info=_at(cut, best.name)) for cut in kept]
    return kept, best.name, first.proven, first.bound / NS, _regions(kept, request)


def _select(prepared: Prepared, first: Choice, others: Sequence[Candidate]) -> dict[str, Candidate]:
    """Edge only, cloud only, the best for the stated link, and those that win on most other links."""
    planner, request = prepared.planner, prepared.request
    arms: dict[str, Candidate] = {}
    for name, edge in (("edge", prepared.dag.whole), ("cloud", frozenset[int]())):
        if planner.problem(request.link, {}).allows(edge):
            candidate = planner.try_cut(edge, {})
            if candidate.damage.loss <= request.max_loss:
                arms[name] = candidate
    pool = list(dict.fromkeys([first.candidate, *others, *planner.good()]))
    wins = dict.fromkeys(pool, 0)
    for mbps in SWEEP_MBPS:
        for rtt_ms in SWEEP_RTT_MS:
            link = request.link.scaled(mbps, rtt_ms)
            wins[min(pool, key=lambda candidate, link=link: planner.cost(candidate, link))] += 1  # type: ignore[misc]
    ranked = sorted(pool, key=lambda candidate: (candidate != first.candidate, -wins[candidate]))
    for candidate in ranked:
        if candidate.edge == prepared.dag.whole:
            continue
        if not candidate.edge:  # perhaps with coded inputs
            if planner.cost(candidate, request.link) < planner.cost(arms.get("cloud", candidate), request.link) or "cloud" not in arms:
                arms["cloud"] = candidate
        elif len(arms) < MAX_CUTS and (wins[candidate] or candidate == first.candidate):
            arms[f"cut-{1 + sum(name.startswith('cut-') for name in arms)}"] = candidate
    return arms


def _measure(prepared: Prepared, name: str, candidate: Candidate) -> CutInfo:
    halves, planner, sample = candidate.halves, prepared.planner, prepared.samples[0]
    edge_ms = cloud_ms = codec_ns = 0.0
    held = dict(sample)
    if halves.edge is not None:
        front = Session(halves.edge, prepared.num_threads)
        edge_ms = median_ms(front, sample)
        held |= front.run(sample)
    scale = _device_scale(prepared)
    if halves.cloud is not None:
        cloud_ms = median_ms(Session(halves.cloud, prepared.num_threads), held) * prepared.cloud_share
    boundary = []
    for tensor, codec in candidate.codecs:
        fact = prepared.facts[tensor]
        boundary.append(BoundaryTensor(tensor, fact.dtype, fact.symbolic, codec))
        codec_ns += fact.num_bytes // 4 * (planner.speeds[codec].encode_ns + planner.speeds[codec].decode_ns)
    return CutInfo(
        name=name,
        edge=None if halves.edge is None else "edge/whole.onnx" if name == "edge" else f"edge/cuts/{name}/edge.onnx",
        cloud=None if halves.cloud is None else "cloud/whole.onnx" if name == "cloud" else f"cloud/cuts/{name}/cloud.onnx",
        boundary=boundary,
        edge_outputs=halves.edge_outputs,
        cloud_outputs=halves.cloud_outputs,
        edge_ms=round(edge_ms * scale, 4),
        cloud_ms=round(cloud_ms * scale, 4),
        codec_ms=round(codec_ns / NS, 4),
        boundary_bytes=sum(encoded_bytes(prepared.facts[tensor], codec) for tensor, codec in candidate.codecs),
        output_bytes=sum(prepared.facts[tensor].num_bytes for tensor in halves.cloud_outputs),
        edge_ram_bytes=ram_bytes(prepared.dag, candidate.edge),
        max_error=candidate.damage.max_error,
        loss=candidate.damage.loss,
    )


def _device_scale(prepared: Prepared) -> float:
    """Times are measured here; if the device is another one, its profile says how much slower it is."""
    if prepared.request.device_profile is None:
        return 1.0
    here = median_ms(Session(prepared.model.proto, prepared.num_threads), prepared.samples[0])
    return prepared.device.total_ms / here


def _at(cut: Kept, chosen: str) -> CutInfo:
    """The chosen cut lies where everyone looks first."""
    if cut.name != chosen or cut.info.edge is None or cut.info.cloud is None:
        return cut.info
    return replace(cut.info, edge="edge/edge.onnx", cloud="cloud/cloud.onnx")


def measured_ms(cut: CutInfo, request: GraphRequest, link: LinkSpec | None = None) -> float:
    """Latency of a run, or the slowest stage of a pipeline, from what was measured."""
    link = link or request.link
    up_ms, down_ms = link.up_ms(cut.boundary_bytes), link.down_ms(cut.output_bytes)
    if request.objective == "throughput":
        return max(cut.edge_ms + cut.codec_ms / 2, up_ms, cut.cloud_ms + cut.codec_ms / 2, down_ms)
    return cut.edge_ms + cut.codec_ms + up_ms + cut.cloud_ms + down_ms + (link.rtt_ms if cut.cloud is not None else 0.0)


def _regions(kept: Sequence[Kept], request: GraphRequest) -> list[Region]:
    found = []
    for rtt_ms in SWEEP_RTT_MS:
        for mbps in SWEEP_MBPS:
            link = request.link.scaled(mbps, rtt_ms)
            costs = {cut.name: measured_ms(cut.info, request, link) for cut in kept}
            best = min(costs, key=lambda name: costs[name])
            found.append(Region(link.up_mbps or 0.0, link.down_mbps or 0.0, rtt_ms, best, round(costs[best], 3)))
    return found


def _why_nothing_fits(prepared: Prepared) -> str:
    smallest = smallest_ram_bytes(prepared.dag)
    budget = prepared.request.max_ram_bytes
    if smallest is None:
        return f"no cut of {prepared.model.path} respects the pins {dict(prepared.request.pins)}; drop one of them"
    if budget is not None and smallest > budget:
        return f"--max-ram {budget} bytes is too little for any cut of {prepared.model.path}; the smallest that would do is {smallest} bytes"
    return (
        f"no cut of {prepared.model.path} was found that fits --max-ram {budget} bytes and loses at most {prepared.request.max_loss:g}; "
        "allow more of one of them"
    )


def _notes(prepared: Prepared) -> list[str]:
    notes = []
    if prepared.request.cloud_profile is None:
        notes.append(f"the cloud is taken to be {prepared.request.cloud_speed:g} times as fast as this device; --cloud-profile measures")
    if not prepared.request.inputs:
        notes.append("no --inputs: times and equality are those of made-up inputs")
    return notes


def _write(destination: Path, prepared: Prepared, kept: Sequence[Kept], report: GraphReport) -> None:
    halves = [(cut.info, cut.candidate.halves) for cut in kept]
    needed = sum(m.ByteSize() for _, half in halves for m in (half.edge, half.cloud) if m is not None) + MARGIN_BYTES
    try:
        parent = next(folder for folder in destination.parents if folder.exists())
        require_space(parent, needed)
        with atomic_folder(destination) as folder:
            for info, half in halves:
                for name, proto in ((info.edge, half.edge), (info.cloud, half.cloud)):
                    if name is not None and proto is not None:
                        _save(folder, name, proto, prepared.model.proto)
            files = {
                path.relative_to(folder).as_posix(): FileInfo(sha256_file(path), path.stat().st_size)
                for path in sorted(folder.rglob("*"))
                if path.is_file()
            }
            bundle = GraphBundle(
                path=folder,
                created_by=f"edgecloud {version('edgecloud')}",
                licence=_licence(prepared.model.proto),
                graph=GraphInfo(
                    prepared.model.name, prepared.model.fingerprint, prepared.model.opset, prepared.model.inputs, prepared.model.outputs
                ),
                cuts=[info for info, _ in halves],
                chosen=report.chosen,
                files=files,
                checks={**report.checks(), "num_samples": len(prepared.samples), "machine": machine()},
            )
            (folder / MANIFEST).write_text(bundle.to_json(), "utf-8")
            GraphBundle.open(folder)  # what cannot be read back gets no name
    except OSError as error:
        if error.errno in NO_SPACE:
            raise BundleError(f"no room for {destination}: it takes {needed / 1e6:.0f} MB; free some space") from error
        raise BundleError(f"{destination} cannot be written: {error}") from error


def _save(folder: Path, name: str, proto: onnx.ModelProto, whole: onnx.ModelProto) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    twin = folder / ("edge/whole.onnx" if name == "cloud/whole.onnx" else "cloud/whole.onnx")
    if proto is whole and twin.is_file():
        link_or_copy(twin, path)
    else:
        path.write_bytes(proto.SerializeToString())


def _licence(proto: onnx.ModelProto) -> str | None:
    return next((entry.value for entry in proto.metadata_props if entry.key.lower() in ("license", "licence")), None)

