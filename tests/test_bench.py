"""`edgecloud bench`: its arms, links, prompts and sums, the report, and one run on a tiny pair."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, cast
from xml.etree import ElementTree

import pytest
from pairs import ENTRY, Pair

from edgecloud import bench as bench_module
from edgecloud import bench_report, plots
from edgecloud.arms import Arm, check_distinct, parse_arms
from edgecloud.bench import Bench, compare
from edgecloud.cells import Sample, regrets, summarize, survival
from edgecloud.cli.app import run
from edgecloud.client import Client
from edgecloud.errors import ConfigError, EdgecloudError
from edgecloud.links import Link, parse_link
from edgecloud.prompts import read_prompts, spread_evenly
from edgecloud.quality import Risk
from edgecloud.types import Metrics, Mode, ModeSpan, Reply, Usage

pytest_plugins = ["pairs"]

ARMS = parse_arms("cloud,speculative:1,speculative:4,auto")
LINKS = [Link("near", 2), Link("far", 80)]
TOTAL_MS = {"cloud": 100.0, "speculative:1": 80.0, "speculative:4": 60.0, "auto": 75.0}


def reply_of(token_ids: list[int], mode: Mode = "cloud", **changes: Any) -> Reply:
    metrics = {
        "ttft_ms": 30.0, "tpot_ms": 10.0, "total_ms": 100.0, "rtt_ms": 5.0, "num_rounds": 0, "num_draft_tokens": 0,
        "num_accepted_tokens": 0, "mean_acceptance_length": 1.0, "acceptance_histogram": [], "target_passes": 4.0,
        "target_passes_per_token": 1.0, "uplink_bytes": 40, "downlink_bytes": 40, "num_unverified_tokens": 0,
        "first_visible_ms": 10.0, "num_retracted_tokens": 0, "cloud_compute_ms": 5.0, **changes,
    }  # fmt: skip
    timeline = [ModeSpan(0, "cloud", 0), ModeSpan(2, mode, 4 if mode == "speculative" else 0)]
    return Reply("", token_ids, "length", Usage(5, len(token_ids)), Metrics(**metrics), timeline)


class FakeClient:
    """Answers like a client, and the same in every mode; keeps what it was asked."""

    def __init__(self, log: list[tuple[str, str, str]], link: str) -> None:
        self._log, self._link = log, link

    def generate(
        self, prompt: str, *, mode: Mode, max_new_tokens: int, num_draft_tokens: int | None = None, objective: str | None = None
    ) -> Reply:
        name = f"{mode}:{num_draft_tokens}" if num_draft_tokens else mode
        self._log.append((self._link, name, prompt))
        histogram = [1, 0, 2, 0, 1] if num_draft_tokens == 4 else [1, 1] if num_draft_tokens else []
        rounds = sum(histogram)
        return reply_of(
            [1, 2, 3, 4], "speculative", total_ms=TOTAL_MS.get(name, 1.0), acceptance_histogram=histogram, num_rounds=rounds,
            num_draft_tokens=rounds * (num_draft_tokens or 0),
            num_accepted_tokens=sum(i * count for i, count in enumerate(histogram)),
        )  # fmt: skip


def compared(repeats: int = 1) -> tuple[list[Sample], list[tuple[str, str, str]]]:
    log: list[tuple[str, str, str]] = []
    ways = {(link.name, arm.name): cast("Client", FakeClient(log, link.name)) for link in LINKS for arm in ARMS}
    return compare(ways, ARMS, LINKS, ["a", "b", "c"], 4, repeats, lambda _done, _total: None), log


def bench_of(samples: list[Sample], arms: list[Arm] | None = None) -> Bench:
    cells = summarize(samples, arms or ARMS)
    return Bench(
        "edgecloud bench tiny", {"cpu": "a & b", "date": "today", "versions": {"numpy": "2"}, "python": "3", "system": "L"},
        "<tiny>", "bitwise", ["a", "b", "c"], 4, 1, 0, 1, LINKS, arms or ARMS, cells, regrets(cells, arms or ARMS), samples,
    )  # fmt: skip


def with_another_answer(samples: list[Sample]) -> list[Sample]:
    at = next(at for at, sample in enumerate(samples) if (sample.link, sample.arm) == ("far", "auto"))
    old = samples[at]
    return [*samples[:at], Sample(old.link, old.arm, old.prompt, old.repeat, reply_of([1, 2, 3, 5])), *samples[at + 1 :]]


# The order and the sums


def test_the_arms_of_a_prompt_and_link_stand_together_and_each_is_first_at_times() -> None:
    samples, log = compared()
    names = [arm.name for arm in ARMS]
    groups = [samples[at : at + len(ARMS)] for at in range(0, len(samples), len(ARMS))]
    assert len(groups) == 3 * len(LINKS)
    for group in groups:
        assert len({(sample.link, sample.prompt, sample.repeat) for sample in group}) == 1
        assert sorted(sample.arm for sample in group) == sorted(names)
    assert len({group[0].arm for group in groups}) == len(ARMS)
    measured = [(link, prompt) for link, name, prompt in log if name != "edge" and prompt != bench_module.WARM_UP_PROMPT]
    assert measured == [(sample.link, "abc"[sample.prompt]) for sample in samples]
    for (_, name, prompt), before in zip(log[1:], log, strict=False):
        if prompt != bench_module.WARM_UP_PROMPT and name != "cloud":
            assert before[1:] == ("edge", bench_module.WARM_UP_PROMPT)  # the device has read something else since


def test_cells_are_medians_and_totals() -> None:
    samples, _ = compared(repeats=2)
    cells = {(cell.link, cell.arm): cell for cell in summarize(samples, ARMS)}
    assert list(cells) == [(link.name, arm.name) for link in LINKS for arm in ARMS]
    cell = cells["far", "speculative:4"]
    assert (cell.num_samples, cell.num_tokens, cell.total_ms) == (6, 24, 3 * 60.0)
    assert (cell.acceptance_rate, cell.mean_acceptance_length) == (8 / 16, 3.0)
    assert cell.survival == [0.75, 0.75, 0.25, 0.25]
    assert (cell.target_passes_per_token, cell.uplink_bytes_per_token) == (1.0, 10.0)
    assert (cell.num_identical, cell.identical) == (6, True)


def test_survival_adds_histograms_of_any_length() -> None:
    assert survival([]) == []
    assert survival([[], [2, 2], [0, 0, 4]]) == [6 / 8, 4 / 8]


def test_regret_is_against_the_best_fixed_arm_of_the_link() -> None:
    samples, _ = compared()
    for row in regrets(summarize(samples, ARMS), ARMS):
        assert (row.arm, row.best, row.ratio) == ("auto", "speculative:4", 75 / 60)


def test_an_answer_that_differs_is_found() -> None:
    samples, _ = compared()
    assert bench_of(samples).identical
    bench = bench_of(with_another_answer(samples))
    assert not bench.identical
    [cell] = [cell for cell in bench.cells if not cell.identical]
    assert (cell.link, cell.arm, cell.num_identical) == ("far", "auto", 2)


def test_an_edge_answer_may_differ() -> None:
    arms = parse_arms("cloud,edge")
    samples = [Sample("near", "cloud", 0, 0, reply_of([1, 2])), Sample("near", "edge", 0, 0, reply_of([1, 3], "edge"))]
    assert bench_of(samples, arms).identical


# What a user may write


def test_arms_by_name() -> None:
    arms = parse_arms("cloud, speculative:8,speculative,auto,auto:cost,edge,cascade:0.05")
    assert [arm.options() for arm in arms] == [
        {"mode": "cloud"},
        {"mode": "speculative", "num_draft_tokens": 8},
        {"mode": "speculative"},
        {"mode": "auto"},
        {"mode": "auto", "objective": "cost"},
        {"mode": "edge"},
        {"mode": "cascade", "quality": Risk(0.05)},
    ]
    assert [arm.fixed for arm in arms] == [True, True, True, False, False, False, False]
    assert [arm.name for arm in arms if not arm.verified] == ["edge", "cascade:0.05"]


@pytest.mark.parametrize(
    "text", ["", "cloud,fog", "cloud,speculative:0", "cloud,speculative:x", "cloud,auto:speed", "cloud:1", "cascade", "cascade:2"]
)
def test_an_unknown_arm_is_named(text: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(repr(text.rpartition(",")[2]))):
        parse_arms(text)


def test_the_measure_must_be_there_and_nothing_twice() -> None:
    with pytest.raises(ConfigError, match="lacks cloud"):
        parse_arms("speculative:4,auto")
    with pytest.raises(ConfigError, match="twice"):
        parse_arms("cloud,cloud")
    with pytest.raises(ConfigError, match="twice"):
        check_distinct("--links", [parse_link(text).name for text in ("20ms", "20")])


def test_links_by_name_round_trip_and_trace(tmp_path: Path) -> None:
    assert parse_link("20ms").arguments("h:1") == ["link", "--listen", "0", "--to", "h:1", "--rtt", "20ms", "--jitter", "0ms"]
    lte = parse_link("LTE")
    assert (lte.name, lte.rtt_ms + lte.jitter_ms, lte.up_mbps) == ("lte", 75, 30)
    trace = tmp_path / "bus.log"
    trace.write_text("0 5\n1 2\n")
    (odd := tmp_path / "a@b.log").write_text("0 5\n")
    assert parse_link(f"trace:{odd}").trace == str(odd)
    assert parse_link(f"trace:{trace}@75ms") == Link("bus 75ms", 75, trace=str(trace))
    assert parse_link(f"trace:{trace}").arguments("h:1")[-2:] == ["--trace", str(trace)]


@pytest.mark.parametrize("text", ["", "fast", "3g", "trace:none.log", "-1ms"])
def test_an_unknown_link_is_named(text: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(repr(text)) if "none" not in text else "none.log cannot be read"):
        parse_link(text)


def test_prompts_of_text_and_json(tmp_path: Path) -> None:
    (text := tmp_path / "p.txt").write_text("one\n\n two \n")
    assert read_prompts(text) == ["one", "two"]
    (lines := tmp_path / "p.jsonl").write_text('{"turns": ["a", "b"]}\n{"question": "c", "answer": "d"}\n\n{"prompt": "e"}\n')
    assert read_prompts(lines) == ["a", "c", "e"]
    assert spread_evenly(list("abcdef"), 3) == ["a", "c", "e"]
    assert spread_evenly(["a"], 3) == ["a"]
    assert spread_evenly(["a", "b"], 0) == ["a", "b"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"\xff\xfe", "no UTF-8 text"),
        (b'{"prompt": "a"}\nhello\n', "line 2 is no JSON"),
        (b'{"text": "a"}\n', "line 1 is no object with a key of turns, question, prompt"),
        (b"[1]\n", "line 1 is no object"),
        (b'{"turns": []}\n', "line 1: turns is '\\[\\]'; it takes text"),
        (b'{"prompt": 3}\n', "line 1: prompt is '3'; it takes text"),
    ],
)
def test_a_bad_file_of_prompts_says_where(tmp_path: Path, content: bytes, words: str) -> None:
    (file := tmp_path / "p.jsonl").write_bytes(content)
    with pytest.raises(ConfigError, match=words):
        read_prompts(file)


def test_bad_usage(tiny_pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = str(tiny_pair.bundle)
    for arguments, words in (
        (["--modes", "cloud,fog"], "'fog'"),
        (["--links", "fast"], "'fast'"),
        (["--prompts", str(tmp_path / "none.txt")], "none.txt cannot be read"),
        (["--repeats", "0"], "--repeats is 0"),
        (["--num-prompts", "-1"], "--num-prompts is -1"),
    ):
        assert run(["bench", bundle, *arguments]) == 2
        assert words in capsys.readouterr().err
    assert run(["bench", str(tiny_pair.target)]) == 1
    assert "is no bundle" in capsys.readouterr().err
    assert run(["bench", bundle, "--max-new-tokens", "5000"]) == 2
    assert "prompt 1 of 12" in capsys.readouterr().err


def test_a_folder_that_cannot_be_is_refused_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is in the extras bench and dev")
    (taken := tmp_path / "taken").write_text("")
    assert run(["bench", "any", "-o", str(taken)]) == 2
    assert "taken cannot be written to" in capsys.readouterr().err


def test_without_the_library_for_plots_the_mend_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert run(["bench", "any", "-o", str(tmp_path / "report")]) == 1
    assert "install edgecloud[bench], or leave out -o" in capsys.readouterr().err
    assert not (tmp_path / "report").exists()
    with pytest.raises(EdgecloudError, match="edgecloud"):
        plots.all_plots(bench_of(compared()[0]))


def test_a_difference_is_a_failure_after_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is in the extras bench and dev")
    samples, _ = compared()
    monkeypatch.setattr(bench_module, "run_bench", lambda *_, **__: bench_of(with_another_answer(samples)))
    assert run(["bench", "any", "-o", str(tmp_path), "--json"]) == 1
    said = capsys.readouterr()
    assert json.loads(said.out)["identical"] is False
    assert "differs from the cloud's" in said.err
    assert json.loads((tmp_path / "bench.json").read_text())["identical"] is False
    assert "Not every verified answer" in (tmp_path / "report.html").read_text()


# The report


class Page(HTMLParser):
    """Ids, and whether anything is fetched from elsewhere."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.sources: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id":
                self.ids.append(str(value))
            if name in {"src", "href", "xlink:href"} and not str(value).startswith(("#", "data:")):
                self.sources.append(f"{tag} {value}")


def test_the_report_is_one_page_with_all_plots() -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is in the extras bench and dev")
    samples, _ = compared()
    text = bench_report.to_html(bench_of(samples))
    page = Page(text)
    assert {"plot-tpot", "plot-ttft", "plot-acceptance", "plot-timeline-auto", "regret", "cells", "identity"} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    assert page.sources == []
    assert "<script" not in text
    for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        ElementTree.fromstring(svg)
    assert "<td>1.250</td>" in text
    assert "&lt;tiny&gt;" in text
    assert "a &amp; b" in text
    assert "Every verified answer has the token ids" in text


def test_a_file_is_replaced_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    (file := tmp_path / "bench.json").write_text("before")
    with pytest.raises(UnicodeEncodeError):
        bench_report.write_whole(file, "x" * 100_000 + "\ud800")
    assert [path.name for path in tmp_path.iterdir()] == ["bench.json"]
    assert file.read_text() == "before"
    bench_report.write_whole(file, "after")
    assert file.read_text() == "after"


# All of it


def test_the_whole_of_it(tiny_pair: Pair, tmp_path: Path) -> None:
    (prompts := tmp_path / "prompts.jsonl").write_text('{"turns": ["Hello there"]}\n{"prompt": "Why?"}\n')
    (trace := tmp_path / "bus.log").write_text("0 5\n1 2\n")
    command = [
        sys.executable,
        "-P",
        "-c",
        ENTRY,
        "bench",
        str(tiny_pair.bundle),
        "--prompts",
        str(prompts),
        "--max-new-tokens",
        "8",
    ]
    command += ["--links", f"2ms,trace:{trace}@10ms", "--modes", "cloud,speculative:2,auto,edge", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["identical"] is True
    assert found["prompts"] == ["Hello there", "Why?"]
    assert str(tmp_path) not in found["command"].replace(f"trace:{trace}", "")
    assert len(found["samples"]) == 2 * 2 * 4
    assert {(cell["link"], cell["arm"]) for cell in found["cells"]} == {
        (link, arm) for link in ("2ms", "bus 10ms") for arm in ("cloud", "speculative:2", "auto", "edge")
    }
    assert all(cell["num_identical"] == 2 for cell in found["cells"] if cell["verified"])
    assert all(cell["rtt_ms"] >= 10 for cell in found["cells"] if (cell["link"], cell["arm"]) == ("bus 10ms", "cloud"))
    assert [row["link"] for row in found["regrets"]] == ["2ms", "bus 10ms"]
    assert all(row["ratio"] > 0 for row in found["regrets"])
    assert "$ edgecloud serve" in done.stderr
