"""What the draft costs a device: speed and memory of a process that does nothing else. Run as a module, prints JSON."""

from __future__ import annotations

import json
import resource
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from edgecloud.partitioner.child import run_module
from edgecloud.partitioner.graph import DraftGraph

NUM_PREFILL_TOKENS = 64


@dataclass(frozen=True, slots=True)
class DeviceFigures:
    """Medians of one run on this machine."""

    num_threads: int
    load_ms: float
    prefill_ms_per_token: float  # over 64 tokens
    decode_ms: float  # one step, greedy, at 64 to 128 tokens of context
    tokens_per_s: float
    peak_rss_bytes: int


def measure_device(graph: Path, *, num_threads: int = 1, num_steps: int = 50) -> DeviceFigures:
    """Load and decode in a fresh process. Raises child.ChildError."""
    output = run_module(__name__, [str(graph), str(num_threads), str(num_steps)])
    return DeviceFigures(**json.loads(output.splitlines()[-1]))


def _main(graph: Path, num_threads: int, num_steps: int) -> None:
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
    figures = {
        "num_threads": num_threads,
        "load_ms": round(load_ms, 1),
        "prefill_ms_per_token": round(prefill_ms / NUM_PREFILL_TOKENS, 3),
        "decode_ms": round(decode_ms, 3),
        "tokens_per_s": round(1e3 / decode_ms, 1),
        "peak_rss_bytes": _peak_rss_bytes(),
    }
    sys.stdout.write(json.dumps(figures) + "\n")


def _peak_rss_bytes() -> int:
    """High-water mark of this process. Linux's ru_maxrss would include the parent's from before exec."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


if __name__ == "__main__":
    _main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
