"""What draft and front cost a device: speed and memory of a process that does nothing else. Run as a module, prints JSON."""

from __future__ import annotations

import json
import resource
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgecloud.partitioner.child import run_module
from edgecloud.partitioner.graph import DraftGraph, FrontGraph

NUM_PREFILL_TOKENS = 64
NUM_ROWS = (2, 5, 9)  # a front runs no single row (edge/front.py); a draft of 4 and of 8 tokens, and the token before


@dataclass(frozen=True, slots=True)
class DeviceFigures:
    """Medians of one run on this machine."""

    num_threads: int
    load_ms: float
    prefill_ms_per_token: float  # over 64 tokens
    decode_ms: float  # one step, greedy, at 64 to 128 tokens of context
    tokens_per_s: float
    peak_rss_bytes: int


@dataclass(frozen=True, slots=True)
class FrontFigures:
    """The same of a front."""

    num_threads: int
    load_ms: float
    prefill_ms_per_token: float  # over 64 tokens
    rows_ms: dict[str, float]  # a run over so many rows, at 64 tokens of context
    peak_rss_bytes: int


def measure_device(graph: Path, *, num_threads: int = 1, num_steps: int = 50) -> DeviceFigures:
    """Load and decode in a fresh process. Raises child.ChildError."""
    output = run_module(__name__, ["draft", str(graph), str(num_threads), str(num_steps)])
    return DeviceFigures(**json.loads(output.splitlines()[-1]))


def measure_front(graph: Path, *, num_threads: int = 1, num_runs: int = 15) -> FrontFigures:
    """Load and compute rows in a fresh process. Raises child.ChildError."""
    output = run_module(__name__, ["front", str(graph), str(num_threads), str(num_runs)])
    return FrontFigures(**json.loads(output.splitlines()[-1]))


def _run_draft(graph: Path, num_threads: int, num_steps: int) -> dict[str, Any]:
    begin = time.perf_counter()
    model = DraftGraph(graph, NUM_PREFILL_TOKENS + num_steps + 1, num_threads)
    load_ms = 1e3 * (time.perf_counter() - begin)
    vocab_size = len(model.extend([0]))
    model.crop_to(0)
    begin = time.perf_counter()
    token = int(model.extend([i % vocab_size for i in range(NUM_PREFILL_TOKENS)]).argmax())
    prefill_ms = 1e3 * (time.perf_counter() - begin)
    steps_ms = []
    for _ in range(num_steps):
        begin = time.perf_counter()
        token = int(model.extend([token]).argmax())
        steps_ms.append(1e3 * (time.perf_counter() - begin))
    decode_ms = statistics.median(steps_ms)
    return {
        "num_threads": num_threads,
        "load_ms": round(load_ms, 1),
        "prefill_ms_per_token": round(prefill_ms / NUM_PREFILL_TOKENS, 3),
        "decode_ms": round(decode_ms, 3),
        "tokens_per_s": round(1e3 / decode_ms, 1),
        "peak_rss_bytes": _peak_rss_bytes(),
    }


def _run_front(graph: Path, num_threads: int, num_runs: int) -> dict[str, Any]:
    begin = time.perf_counter()
    model = FrontGraph(graph, NUM_PREFILL_TOKENS + max(NUM_ROWS), num_threads)
    load_ms = 1e3 * (time.perf_counter() - begin)
    model.extend([0, 0])
    model.crop_to(0)
    begin = time.perf_counter()
    model.extend([0] * NUM_PREFILL_TOKENS)
    prefill_ms = 1e3 * (time.perf_counter() - begin)
    rows_ms = {}
    for num_rows in NUM_ROWS:
        runs_ms = []
        for _ in range(num_runs):
            model.crop_to(NUM_PREFILL_TOKENS)
            begin = time.perf_counter()
            model.extend([0] * num_rows)
            runs_ms.append(1e3 * (time.perf_counter() - begin))
        rows_ms[str(num_rows)] = round(statistics.median(runs_ms), 3)
    return {
        "num_threads": num_threads,
        "load_ms": round(load_ms, 1),
        "prefill_ms_per_token": round(prefill_ms / NUM_PREFILL_TOKENS, 3),
        "rows_ms": rows_ms,
        "peak_rss_bytes": _peak_rss_bytes(),
    }


def _peak_rss_bytes() -> int:
    """High-water mark of this process. Linux's ru_maxrss would include the parent's from before exec."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


if __name__ == "__main__":
    run = {"draft": _run_draft, "front": _run_front}[sys.argv[1]]
    sys.stdout.write(json.dumps(run(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))) + "\n")
