"""`edgecloud demo`: its sums, its table, one run on a tiny pair, and that nothing it started outlives it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from pairs import ENTRY, Pair, until
from rich.console import Console

from edgecloud import demo
from edgecloud.cli.app import run
from edgecloud.cli.demo import to_table
from edgecloud.client import Client
from edgecloud.demo import DemoReport, Row, Sample, compare, summarize, verdict
from edgecloud.errors import ServerError
from edgecloud.machine import machine
from edgecloud.processes import listening
from edgecloud.types import Metrics, Mode, Reply, Usage

pytest_plugins = ["pairs"]

COMMAND = [sys.executable, "-P", "-c", ENTRY, "demo", "--max-new-tokens", "6"]
TPOT_MS = {"edge": 10.0, "cloud": 50.0, "speculative": 40.0}


def reply_of(token_ids: list[int], mode: Mode, **changes: Any) -> Reply:
    metrics = {
        "ttft_ms": 100.0, "tpot_ms": TPOT_MS[mode], "total_ms": 1.0, "rtt_ms": None, "num_rounds": 0, "num_draft_tokens": 0,
        "num_accepted_tokens": 0, "mean_acceptance_length": 1.0, "acceptance_histogram": [], "target_passes": 0.0,
        "target_passes_per_token": 0.0, "uplink_bytes": 0, "downlink_bytes": 0, "num_unverified_tokens": 0,
        "first_visible_ms": 50.0, "num_retracted_tokens": 0, "cloud_compute_ms": 0.0, **changes,
    }  # fmt: skip
    return Reply("", token_ids, "length", Usage(5, len(token_ids)), Metrics(**metrics), [])


class FakeClient:
    """Answers like a client; every mode says the same, but `edge`, which errs from the third token on."""

    def __init__(self, log: list[tuple[str, str]], name: str) -> None:
        self._log, self._name = log, name

    def generate(self, prompt: str, mode: Mode, max_new_tokens: int) -> Reply:
        self._log.append((self._name, mode))
        return reply_of([1, 2, 9, 9] if mode == "edge" else [1, 2, 3, 4], mode)


def row_of(rows: list[Row], link: str | None, mode: str) -> Row:
    [row] = [row for row in rows if (row.link, row.mode) == (link, mode)]
    return row


def compared(num_prompts: int) -> tuple[list[Sample], list[tuple[str, str]]]:
    log: list[tuple[str, str]] = []
    device, *links = (cast("Client", FakeClient(log, name)) for name in ("device", "near", "far"))
    clients = dict(zip(("near", "far"), links, strict=True))
    return compare(device, clients, ["a", "b", "c"][:num_prompts], 4, lambda _done, _total: None), log


# The order and the sums


def test_every_prompt_meets_every_mode_on_every_link_and_another_one_first() -> None:
    samples, log = compared(3)
    all_of_them = [("device", "edge")] + [(link, mode) for link in ("near", "far") for mode in ("cloud", "speculative")]
    assert log[:5] == all_of_them  # the warm-up, which is no sample
    for number in range(3):
        of_prompt = [(s.link or "device", s.mode) for s in samples if s.prompt == number]
        assert of_prompt == all_of_them[number:] + all_of_them[:number]


def test_rows_are_medians_of_times_and_totals_of_the_rest() -> None:
    samples = [
        Sample("near", "cloud", 0, reply_of([1, 2, 3, 4], "cloud", target_passes=4.0)),
        Sample("near", "cloud", 1, reply_of([5, 6], "cloud", target_passes=2.0)),
        Sample("near", "speculative", 0, reply_of([1, 2, 3, 4], "speculative", num_rounds=1, num_draft_tokens=4,
               num_accepted_tokens=3, target_passes=2.0, uplink_bytes=50, downlink_bytes=20, rtt_ms=5.0)),
        Sample("near", "speculative", 1, reply_of([5, 7], "speculative", ttft_ms=300.0, num_rounds=1, num_draft_tokens=1,
               num_accepted_tokens=0, target_passes=2.0, uplink_bytes=10, downlink_bytes=10, rtt_ms=7.0)),
        Sample(None, "edge", 0, reply_of([1, 9, 3, 4], "edge")),
        Sample(None, "edge", 1, reply_of([5, 6], "edge")),
    ]  # fmt: skip
    rows = summarize(samples)
    assert [(row.link, row.mode) for row in rows] == [(None, "edge"), ("near", "cloud"), ("near", "speculative")]
    row = row_of(rows, "near", "speculative")
    assert (row.ttft_ms, row.rtt_ms, row.num_tokens) == (200.0, 6.0, 6)
    assert (row.acceptance_rate, row.mean_acceptance_length) == (3 / 5, 2.5)
    assert (row.target_passes_per_token, row.uplink_bytes_per_token, row.downlink_bytes_per_token) == (4 / 6, 10.0, 5.0)
    assert (row.num_identical, row.identical, row.verified) == (1, False, True)
    edge = row_of(rows, None, "edge")
    assert (edge.agreement, edge.acceptance_rate, edge.verified) == (3 / 6, None, False)


def report_of(samples: list[Sample]) -> DemoReport:
    return DemoReport(machine(), "tiny", 1, 4, 0, 1, [], summarize(samples))


def test_an_edge_answer_may_differ_and_a_verified_one_may_not() -> None:
    samples, _ = compared(1)
    assert report_of(samples).identical
    samples[-1] = Sample("far", "speculative", 0, reply_of([1, 2, 3, 5], "speculative"))
    assert not report_of(samples).identical


def test_the_table_says_what_differs() -> None:
    samples, _ = compared(1)
    samples[-1] = Sample("far", "speculative", 0, reply_of([1, 2, 3, 5], "speculative"))
    console = Console(width=100, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(to_table(report_of(samples)))
    console.file.close()
    lines = console.export_text().splitlines()
    assert any("edge" in line and "unverified, 50% agree" in line for line in lines)
    assert any(line.split()[:2] == ["near", "cloud"] and line.rstrip().endswith("yes") for line in lines)
    assert any(line.split()[:2] == ["far", "speculative"] and "no: 1 of 1 differ" in line for line in lines)


@pytest.mark.parametrize(
    ("cloud_ms", "words"), [(50.0, "near: speculative, by 1.25x"), (20.0, "near: cloud, by 2.00x"), (41.0, "about even")]
)
def test_the_verdict_names_the_winner_and_no_winner_by_a_hair(cloud_ms: float, words: str) -> None:
    samples = [
        Sample(None, "edge", 0, reply_of([1], "edge")),
        Sample("near", "cloud", 0, reply_of([1], "cloud", tpot_ms=cloud_ms)),
        Sample("near", "speculative", 0, reply_of([1], "speculative")),
    ]
    assert words in verdict(summarize(samples))


# The command


def test_bad_usage(tiny_pair: Pair, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["demo", "--bundle", str(tiny_pair.bundle), "--prompts", "99"]) == 2
    assert "99" in capsys.readouterr().err
    assert run(["demo", "--bundle", str(tiny_pair.target)]) == 1
    assert "is no bundle" in capsys.readouterr().err


def test_a_difference_is_a_failure(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    samples, _ = compared(1)
    samples[-1] = Sample("far", "speculative", 0, reply_of([1, 2, 3, 5], "speculative"))
    monkeypatch.setattr(demo, "run_demo", lambda *_, **__: report_of(samples))
    assert run(["demo", "--bundle", "any", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["identical"] is False


def test_a_service_that_cannot_start_says_why(tmp_path: Path) -> None:
    with pytest.raises(ServerError, match="no such model folder"), listening(["serve", str(tmp_path / "none")]):
        pass


def descendants(pid: int) -> list[int]:
    """Processes below one, as the kernel knows them."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, task.read_text().split()):
            found += [child, *descendants(child)]
    return found


def lives(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"  # an orphan that nobody has waited for


def test_the_whole_of_it(tiny_pair: Pair) -> None:
    command = [*COMMAND, "--bundle", str(tiny_pair.bundle), "--prompts", "2", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["identical"] is True
    assert {row["link"] for row in report["rows"]} == {None, "same building", "home Wi-Fi", "LTE"}
    for row in report["rows"]:
        assert row["num_prompts"] == 2
        assert row["mode"] == "edge" or row["num_identical"] == 2
    lte = [row for row in report["rows"] if row["link"] == "LTE"]
    assert all(row["rtt_ms"] >= 60 for row in lte)  # the relay never hurries
    assert "$ edgecloud serve" in done.stderr


@pytest.fixture
def started(tiny_pair: Pair) -> Iterator[subprocess.Popen[str]]:
    """A demo under way, past the start of all its processes."""
    command = [*COMMAND, "--bundle", str(tiny_pair.bundle)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "of 84 generations" in line:
                break
        yield process
        process.kill()


def test_a_signal_ends_it_even_where_its_exception_is_dropped() -> None:
    code = """
import time
from edgecloud.cli import interrupt
interrupt.GRACE_S = 0.1
with interrupt.stopped_like_ctrl_c():
    while True:
        try:
            print("ready", flush=True)
            time.sleep(60)
        except KeyboardInterrupt:
            pass
"""
    with subprocess.Popen([sys.executable, "-P", "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.terminate()
        _, remarks = process.communicate()
    assert process.returncode == 130
    assert "most recent call first" in remarks


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 130), (signal.SIGKILL, -9)])
def test_nothing_outlives_it(started: subprocess.Popen[str], number: int, code: int) -> None:
    children = descendants(started.pid)
    assert len(children) == 5  # the service, its engine and three links
    started.send_signal(number)
    started.communicate()
    assert started.returncode == code
    gone: Callable[[], bool] = lambda: not any(map(lives, children))  # noqa: E731
    until(gone)
