"""Where a device's pass spends its time: ONNX Runtime's own profiler on an exported graph, summed by layer.

The profiler slows what it watches, so it tells the shares, and a run without it the time. Run as a module, prints JSON.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
import time
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnxruntime as ort

from edgecloud.partitioner.child import run_module
from edgecloud.partitioner.graph import DraftGraph

ROWS = (1, 2, 3, 5, 9, 64)  # of the passes that are timed
CONTEXT = 128  # tokens before them
NUM_REPEATS = 9
LAYER = re.compile(r"^/model/layers\.(\d+)/(?!final_norm)")


@dataclass(frozen=True, slots=True)
class NodeTimes:
    """Passes of one graph that yield the last row's logits. The least of several: whatever else the machine does only adds."""

    num_threads: int
    context_tokens: int
    rows: tuple[int, ...]
    pass_ms: tuple[float, ...]  # [rows], without the profiler
    layer_ms: tuple[tuple[float, ...], ...]  # [rows][layer]
    rest_ms: tuple[float, ...]  # [rows]


def measure_nodes(graph: Path, *, num_threads: int = 1, rows: Sequence[int] = ROWS) -> NodeTimes:
    """In a process of its own. Raises child.ChildError."""
    found = json.loads(run_module(__name__, [str(graph), str(num_threads), ",".join(map(str, rows))]).splitlines()[-1])
    lists = {name: tuple(found[name]) for name in ("rows", "pass_ms", "rest_ms")}
    return NodeTimes(**{**found, **lists, "layer_ms": tuple(map(tuple, found["layer_ms"]))})


def least_by_layer(events: Iterable[Mapping[str, Any]], num_runs: int) -> tuple[list[float], float]:
    """-> milliseconds of each layer, and of all other nodes: each its least in the last `num_runs` runs that a profile holds.

    Raises:
        ValueError: the graph has no layers, or the profile fewer runs.
    """
    events = list(events)
    starts = sorted(event["ts"] for event in events if event.get("name") == "model_run")[-num_runs:]
    if len(starts) < num_runs:
        raise ValueError(f"the profile holds {len(starts)} runs, {num_runs} were made")
    sums: dict[int, list[float]] = defaultdict(lambda: [0.0] * num_runs)  # of a layer, by run; -1: the rest
    for event in events:
        run = bisect_right(starts, event.get("ts", 0)) - 1
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time") and run >= 0:
            found = LAYER.match(event["name"])
            sums[int(found[1]) if found else -1][run] += event["dur"] / 1e3
    rest = sums.pop(-1, [0.0] * num_runs)
    if not sums or sorted(sums) != list(range(len(sums))):
        raise ValueError("the graph's nodes are not named by layer; export it with edgecloud partition")
    return [min(sums[layer]) for layer in range(len(sums))], min(rest)


def scaled(layer_ms: Sequence[float], rest_ms: float, pass_ms: float) -> tuple[list[float], float]:
    """Shares of the profiler, and the time of a pass without it."""
    factor = pass_ms / (sum(layer_ms) + rest_ms)
    return [round(ms * factor, 4) for ms in layer_ms], round(rest_ms * factor, 4)


def _timed_ms(model: DraftGraph, num_rows: int) -> list[float]:
    times = []
    model.crop_to(0)
    model.extend([7] * CONTEXT)
    for _ in range(NUM_REPEATS + 1):
        model.crop_to(CONTEXT)
        begin = time.perf_counter()
        model.extend([7] * num_rows)
        times.append(1e3 * (time.perf_counter() - begin))
    return times[1:]


def _profiled(graph: Path, num_threads: int, num_rows: int, folder: Path) -> tuple[list[float], float]:
    options = ort.SessionOptions()
    options.enable_profiling = True
    options.profile_file_prefix = str(folder / "profile")
    model = DraftGraph(graph, CONTEXT + num_rows, num_threads, options)
    model.extend([7] * CONTEXT)
    for _ in range(NUM_REPEATS + 1):  # the first one warms up
        model.crop_to(CONTEXT)
        model.extend([7] * num_rows)
    return least_by_layer(json.loads(Path(model.end_profiling()).read_text("utf-8")), NUM_REPEATS)


def _main(graph: Path, num_threads: int, rows: Sequence[int]) -> None:
    model = DraftGraph(graph, CONTEXT + max(rows), num_threads)
    pass_ms = [round(min(_timed_ms(model, num_rows)), 4) for num_rows in rows]
    del model
    layer_ms, rest_ms = [], []
    with tempfile.TemporaryDirectory() as folder:
        for num_rows, ms in zip(rows, pass_ms, strict=True):
            layers, rest = scaled(*_profiled(graph, num_threads, num_rows, Path(folder)), ms)
            layer_ms.append(tuple(layers))
            rest_ms.append(rest)
    found = NodeTimes(num_threads, CONTEXT, tuple(rows), tuple(pass_ms), tuple(layer_ms), tuple(rest_ms))
    sys.stdout.write(json.dumps(asdict(found)) + "\n")


if __name__ == "__main__":
    _main(Path(sys.argv[1]), int(sys.argv[2]), [int(word) for word in sys.argv[3].split(",")])
