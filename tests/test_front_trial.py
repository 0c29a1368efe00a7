"""The loss and the times of a cut that was made: measured where nobody knows them, taken into the plan, and not measured twice."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_plan import SHAPE, scene, tiny  # noqa: F401  # tiny is a fixture
from typer.testing import CliRunner

from edgecloud.cli.app import app
from edgecloud.errors import NoPlanError
from edgecloud.partitioner.candidate import CODECS, Candidate, Connection
from edgecloud.partitioner.device import FrontFigures
from edgecloud.partitioner.front_times import FrontTimes, nearest
from edgecloud.partitioner.front_trial import MAX_FRONTS, try_fronts
from edgecloud.partitioner.losses import Loss, Losses
from edgecloud.partitioner.machine_profile import MachineProfile
from edgecloud.partitioner.search import Constraints, PlanObjective, Search, search

MAX_LOSS = 0.03
LINK = Connection("wifi", 20, 20)


def tried_on(agreement: dict[str, float], objective: PlanObjective = "privacy") -> tuple[list[Candidate], list[Loss], Search]:
    """Fronts that agree so often, by their weights.  -> what was measured, what came of it, and how all plans were judged first"""
    measured: list[Candidate] = []

    def searched(tried: Sequence[Loss]) -> Search:
        return search(scene(100.0, 1.0, losses=Losses(tried=tuple(tried))), LINK, objective, Constraints(max_loss=1.0))

    def measure(candidate: Candidate) -> list[Loss]:
        measured.append(candidate)
        assert candidate.front is not None
        return [Loss(candidate.cut, codec, agreement[candidate.front], candidate.front) for codec in CODECS]

    return measured, try_fronts(searched, measure, MAX_LOSS), searched([])


@settings(max_examples=12)
@given(
    good=st.fixed_dictionaries({"int4": st.floats(0, 1), "int8": st.floats(0, 1)}),
    objective=st.sampled_from(["latency", "cost", "privacy"]),
)
def test_a_few_fronts_are_measured_the_best_first_and_none_that_could_not_win(
    good: dict[str, float], objective: PlanObjective
) -> None:
    measured, losses, first = tried_on(good, objective)
    assert len(measured) <= MAX_FRONTS
    assert [loss.front for loss in losses] == [one.front for one in measured for _ in CODECS]
    if not measured:
        return
    best = next(one for one in first.judged if one.candidate.mode == "split")
    assert measured[0] == best.candidate
    losses_of = [(one.value, one.figures.loss) for one in first.judged if one.feasible]
    known = min((value for value, loss in losses_of if loss is not None and loss <= MAX_LOSS), default=math.inf)
    values = {one.candidate: one.value for one in first.judged}
    assert all(values[one] <= known for one in measured)
    for number, one in enumerate(measured):
        assert number == len(measured) - 1 or 1 - good[str(one.front)] > MAX_LOSS  # one that is allowed ends it
        before = [other for other in measured[:number] if other.front == one.front]
        assert all(2 * one.cut <= other.cut for other in before)


def test_the_last_try_is_a_safe_one() -> None:
    measured, _, first = tried_on({"int4": 0.0, "int8": 0.0})
    deepest = max(one.candidate.cut for one in first.judged)
    assert len(measured) == MAX_FRONTS
    assert measured[-1].front == "int8"
    assert 3 * measured[-1].cut <= deepest + 1


def test_nothing_is_measured_where_no_split_could_win() -> None:
    near = scene(cloud_gb=1000)
    found = try_fronts(
        lambda tried: search(near, Connection("lte", 75, 30), "latency", Constraints(max_loss=1.0)),
        lambda candidate: pytest.fail(f"{candidate} cannot win"),
        MAX_LOSS,
    )
    assert found == []


def test_a_front_that_was_tried_speaks_for_its_own_cut_only() -> None:
    losses = Losses(tried=(Loss(1, "int8", 0.9, "int8"), Loss(3, "int8", 0.98, "int8")))
    assert losses.loss(3, "int8", "int8") == pytest.approx(0.02)
    assert losses.loss(2, "int8", "int8") is None
    survey = Losses((Loss(1, "int8", 0.9, "int8"), Loss(3, "int8", 0.98, "int8")), (Loss(3, "int8", 1.0, "int8"),))
    assert survey.loss(3, "int8", "int8") == 0  # the front itself beats the survey
    assert survey.loss(2, "int8", "int8") == pytest.approx(0.06)


def test_a_front_takes_what_it_was_measured_to_take() -> None:
    times = FrontTimes.of(2, "int8", FrontFigures(1, 1.0, 0.5, {"2": 4.0, "5": 7.0, "9": 9.0}, 1))
    assert [times.front_ms(SHAPE, 10.0, 2, rows, 64) for rows in (2, 5, 9, 64)] == [4.0, 7.0, 9.0, 32.0]
    assert times.front_ms(SHAPE, 10.0, 2, 3, 64) == pytest.approx(5.0)
    assert times.front_ms(SHAPE, 10.0, 1, 5, 64) == pytest.approx(3.5)
    assert times.front_ms(SHAPE, 10.0, 2, 5, 1064) > 7.0
    deep = FrontTimes(4, "int8", (2,), (9.0,))
    assert nearest([times, deep], "int8", 4) is deep
    assert nearest([times, deep], "int4", 4) is None


# The command


def partition(*words: str) -> tuple[dict[str, Any], str]:
    result = CliRunner().invoke(app, ["partition", *words, "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout), " ".join(result.stderr.split())


def test_a_cut_is_measured_planned_with_and_comes_out_of_the_cache(
    tiny: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("EDGECLOUD_HOME", str(tmp_path / "home"))
    device = MachineProfile("device", {"fp32": 1e5, "int8": 1e5}, 1000.0, 8.0)
    (tmp_path / "device.json").write_text(device.to_json())
    common = ["--precision", "fp32", "--device", str(tmp_path / "device.json"), "--link", "1ms", "--max-loss", "0.9"]
    common += ["--acceptance", "0.05"]  # so that the draft alone loses too much
    chosen, said = partition(str(tiny), "-o", str(tmp_path / "a"), "--objective", "cost", "--tpot", "1s", *common)
    assert "is not known: measuring it" in said
    front, best = chosen["front"], chosen["plan"]["best"]
    assert best["mode"] == "split"
    assert (best["cut"], best["front"], best["codec"]) == (front["cut"], front["precision"], front["codec"])
    assert best["figures"]["loss"] == pytest.approx(1 - front["quality"]["agreement"])
    assert front["codecs"].keys() == set(CODECS)
    assert any("measured to lose" in line for line in chosen["plan"]["assumptions"])
    assert not list((tmp_path / "home").glob("tmp*"))

    words = ["--cut", str(front["cut"]), "--front-precision", front["precision"], "--boundary", "float16"]
    again, said = partition(str(tiny), "-o", str(tmp_path / "b"), *words, *common)
    assert said.count("it was in the cache") == 2  # draft and front
    assert not any(step in said for step in ("layers in fp32", "answers", "agreement"))
    assert again["front"]["codec"] == "float16"
    assert again["front"]["quality"] == front["codecs"]["float16"]
    for name in ("model.onnx", "model.onnx.data"):
        assert (tmp_path / "b/edge/front" / name).read_bytes() == (tmp_path / "a/edge/front" / name).read_bytes()


def test_a_dry_run_says_how_a_loss_is_measured_and_measures_nothing(tiny: Path, tmp_path: Path) -> None:  # noqa: F811
    words = ["partition", str(tiny), "-o", str(tmp_path / "bundle"), "--dry-run", "--device", "phone"]
    result = CliRunner().invoke(app, [*words, "--objective", "privacy"])
    assert isinstance(result.exception, NoPlanError)
    assert "no --dry-run, measures some fronts" in str(result.exception)
    result = CliRunner().invoke(app, words)
    assert "no --dry-run, measures some fronts" in " ".join(result.output.split())
    assert list(tmp_path.iterdir()) == []
