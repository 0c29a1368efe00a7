"""What every benchmark needs: a bundle, pinned cores, a served target, medians, and raw numbers with the machine's facts."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from edgecloud.demo import prepare_bundle
from edgecloud.machine import machine
from edgecloud.processes import listening, pinned, two_cpus

RESULTS = Path(__file__).resolve().parent / "results"
PROMPT = "Explain to a curious teenager how a lighthouse works, and why ships still need them today."

__all__ = [
    "PROMPT",
    "Worker",
    "answer_requests",
    "arguments",
    "cores",
    "find_bundle",
    "listening",
    "pinned",
    "progress",
    "report",
    "serving",
    "spread",
]


def arguments(module_docstring: str | None, script: str) -> argparse.ArgumentParser:
    """A parser with what all scripts take."""
    parser = argparse.ArgumentParser(description=module_docstring, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--bundle", type=Path, help="default: the demo's, fetched and partitioned if need be")
    parser.add_argument("--json-out", type=Path, default=RESULTS / f"{Path(script).stem}.json")
    return parser


def find_bundle(given: Path | None) -> Path:
    return given.resolve() if given else prepare_bundle(progress)


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def cores() -> tuple[int, int]:
    """For the service and for the device; the same one where there is no other."""
    return two_cpus() or (min(os.sched_getaffinity(0)),) * 2


@contextmanager
def serving(bundle: Path, cpu: int) -> Iterator[str]:
    """A service of one thread on one core.  -> its address"""
    with listening(["serve", str(bundle), "--port", "0", "--threads", "1"], cpu) as said:
        yield said["address"]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, _, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return {"median": round(statistics.median(values), 4), "p25": round(low, 4), "p75": round(high, 4)}


def report(out: Path, figures: Sequence[tuple[str, float, str, float]], raw: dict[str, Any]) -> None:
    """Print each figure (name, measured, "<=" or ">=", required) and write all of it. No path of this machine goes in."""
    rows = []
    for name, measured, relation, required in figures:
        reached = measured <= required if relation == "<=" else measured >= required
        rows.append({"figure": name, "measured": round(measured, 4), "required": f"{relation} {required}", "reached": reached})
        print(f"{name}: {measured:.3f} ({relation} {required}: {'reached' if reached else 'MISSED'})")
    command = " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *_public_arguments()])
    content = {"command": command, "figures": rows, "machine": machine(), "load_before": _LOAD_BEFORE, **raw}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(content, indent=1) + "\n", "utf-8")


def _public_arguments() -> list[str]:
    """Of the command line, without what only this machine has: paths become their last part."""
    return [argument.rpartition("/")[2] for argument in sys.argv[1:]]


_LOAD_BEFORE = round(os.getloadavg()[0], 2)  # how busy the machine was with other things


class Worker:
    """The same script as a child on one core (`--worker` and arguments), which answers one JSON line with another."""

    def __init__(self, arguments: Sequence[str], cpu: int) -> None:
        command = [sys.executable, sys.argv[0], "--worker", *arguments]
        self._child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        os.sched_setaffinity(self._child.pid, {cpu})

    def ask(self, **request: Any) -> dict[str, Any]:
        to, back = self._pipes()
        to.write(json.dumps(request) + "\n")
        to.flush()
        line = back.readline()
        if not line:
            raise SystemExit(f"the worker ended with exit code {self._child.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        to, back = self._pipes()
        to.close()  # it reads the end and leaves
        self._child.wait()
        back.close()

    def _pipes(self) -> tuple[IO[str], IO[str]]:
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        return self._child.stdin, self._child.stdout


def answer_requests(answer: Any) -> None:
    """The worker's side: `answer(**request)` for every line, until the end of input."""
    for line in sys.stdin:
        print(json.dumps(answer(**json.loads(line))), flush=True)
