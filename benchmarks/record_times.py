"""What passes of the target and steps of the draft take on one core and one thread: what the replay flies by. float32.

All take turns, many times, and the least time of each counts: whatever else the machine does only adds.
    python benchmarks/record_times.py --repetitions 12
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness

from edgecloud.bundle import Bundle
from edgecloud.edge.model import DraftModel
from edgecloud.sampling import SamplingSettings

ROWS = (*range(1, 18), 20, 24, 32, 40, 48, 64, 96, 128)
CONTEXT = 192  # tokens that a pass attends to
CONTEXTS = (64, 512, 1024)  # of further passes over one row
SESSIONS = ((4, 1), (8, 1), (16, 1), (4, 5), (8, 5))  # sessions in a pass, and rows of each
STEPS, READ_TOKENS = 4, 64


class Engine:
    """Passes as they are asked for, without a service around them."""

    def __init__(self, folder: Path) -> None:
        import torch

        from edgecloud.cloud.engine import Engine as CloudEngine
        from edgecloud.cloud.model import TargetModel

        torch.set_num_threads(1)
        self._engine = CloudEngine(TargetModel(folder, "float32", exact="tolerance"), cache_bytes=1 << 30)
        self._number = 0

    def verifying(self, num_sessions: int, num_rows: int, num_context: int) -> Callable[[], float]:
        """A pass over the last token and `num_rows` - 1 draft tokens of so many sessions.  -> a run's milliseconds"""
        from edgecloud.cloud.work import Extend

        sessions = [os.urandom(16) for _ in range(num_sessions)]
        draft = tuple(17 + i for i in range(num_rows - 1))
        heard: list[Any] = []

        def run() -> float:
            for number, session in enumerate(sessions):
                tokens = tuple(100 + (i * 7 + number * 13) % 900 for i in range(num_context))
                self._number += 1
                self._engine.submit(self._number, Extend(session, 0, tokens, 0, SamplingSettings(), draft), heard.append)
            took_s = 0.0
            while self._engine.has_work:
                start = time.perf_counter()
                self._engine.step()
                took_s = time.perf_counter() - start
            return took_s * 1e3

        run()  # the prompts
        return run


def drafting(model: DraftModel, num_tokens: int) -> Callable[[], float]:
    """Steps one after another, behind a context.  -> milliseconds of one"""

    def run() -> float:
        model.extend_to(list(range(100, 100 + CONTEXT)))
        start = time.perf_counter()
        for length in range(1, num_tokens + 1):
            model.extend_to(list(range(100, 100 + CONTEXT + length)))
        return (time.perf_counter() - start) * 1e3 / num_tokens

    return run


def reading(model: DraftModel, num_tokens: int) -> Callable[[], float]:
    """Many tokens at once.  -> milliseconds of each"""

    def run() -> float:
        model.crop_to(0)
        start = time.perf_counter()
        model.extend_to(list(range(100, 100 + num_tokens)))
        return (time.perf_counter() - start) * 1e3 / num_tokens

    return run


def main() -> None:
    parser = harness.arguments(__doc__, __file__)
    parser.add_argument("--repetitions", type=int, default=12)
    options = parser.parse_args()
    path = harness.find_bundle(options.bundle)
    bundle = Bundle.open(path)
    _, cpu = harness.cores()
    with harness.pinned(cpu):
        engine = Engine(path / "cloud")
        model = DraftModel.of_bundle(bundle, 2048, 1)
        runs: dict[str, Callable[[], float]] = {f"rows {rows}": engine.verifying(1, rows, CONTEXT) for rows in ROWS}
        runs |= {f"context {context}": engine.verifying(1, 1, context) for context in CONTEXTS}
        runs |= {f"sessions {n}x{rows}": engine.verifying(n, rows, CONTEXT) for n, rows in SESSIONS}
        runs |= {"step": drafting(model, STEPS), "read": reading(model, READ_TOKENS)}
        times: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(options.repetitions):
            for name, run in runs.items():
                times[name].append(run())
    least = {name: round(min(values), 2) for name, values in times.items()}
    harness.report(
        options.json_out,
        [],
        {
            "pinning": {"cpu": cpu},
            "repetitions": options.repetitions,
            "rows_context": CONTEXT,
            "step_ms": least["step"],
            "read_ms_per_token": least["read"],
            "pass_ms_by_rows": {rows: least[f"rows {rows}"] for rows in ROWS},
            "pass_ms_by_context": {CONTEXT: least["rows 1"], **{context: least[f"context {context}"] for context in CONTEXTS}},
            "pass_ms_by_sessions": {f"{n}x{rows}": least[f"sessions {n}x{rows}"] for n, rows in SESSIONS},
            "raw_ms": {name: [round(value, 2) for value in values] for name, values in times.items()},
        },
    )


if __name__ == "__main__":
    main()
