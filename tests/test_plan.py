"""The plan: what holds for every device, cloud and link; what a user reads of it; and the steps it need not do twice."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import make_tiny_llama
from typer.testing import CliRunner

from edgecloud.cli.app import app
from edgecloud.cost import COST_SLOWDOWN, Price, overlapped, split_overlapped, survival
from edgecloud.errors import ConfigError, NoPlanError
from edgecloud.partitioner.candidate import Candidate, Connection, Draft, Workload, candidates
from edgecloud.partitioner.layer_times import ModelShape
from edgecloud.partitioner.losses import Loss, Losses, read_losses
from edgecloud.partitioner.machine_profile import Energy, MachineProfile, load_profile
from edgecloud.partitioner.plan import Plan, make_plan
from edgecloud.partitioner.prediction import Predictor, Scene
from edgecloud.partitioner.search import VALUES, Constraints, Search, search
from edgecloud.partitioner.step_cache import MAX_STEPS, cached_step, step_key, usable_cache
from edgecloud.plan_report import to_html, write_plan

SHAPE = ModelShape("model", 5, 256, 8, 2, 32, 1024, 8000, tied=True)
LOSSES = Losses(
    tuple(
        Loss(cut, codec, agreement, front)
        for cut in (1, 4)
        for codec, agreement in (("int4", 0.9), ("int8", 0.99), ("float16", 1.0))
        for front in ("int4", "int8", "fp16")
    )
)


def scene(device_gb: float = 10.0, cloud_gb: float = 20.0, rate: float = 0.7, losses: Losses = LOSSES, ram: float = 8.0) -> Scene:
    device = MachineProfile("device", {"int4": 100.0, "int8": 100.0}, device_gb, ram, energy=Energy(5.0, 1.0, 3.0, 0.4))
    cloud = MachineProfile("cloud", {"fp16": 1000.0}, cloud_gb, 80.0)
    draft = Draft("draft", SHAPE, "int4", tuple(survival(rate, 16)), measured=False)
    return Scene(SHAPE, [draft], device, cloud, Workload(), losses)


scenes = st.builds(
    scene,
    device_gb=st.floats(0.5, 100),
    cloud_gb=st.floats(0.05, 100),
    rate=st.floats(0.05, 0.95),
    losses=st.sampled_from([LOSSES, Losses()]),
    ram=st.floats(0.2, 8),
)
links = st.builds(Connection, st.just("link"), st.floats(0, 400), st.one_of(st.none(), st.floats(0.1, 1000)))
objectives = st.sampled_from(["latency", "cost", "energy", "privacy"])
constraint = st.builds(
    Constraints,
    max_ram_bytes=st.one_of(st.none(), st.floats(90e6, 200e6)),
    max_loss=st.sampled_from([0.0, 0.03, 0.2, 1.0]),
    max_tpot_ms=st.one_of(st.none(), st.floats(0.1, 200)),
    keep_prompt=st.booleans(),
)


def searched(where: Scene, link: Connection, objective: Any, asked: Constraints) -> Search | None:
    try:
        return search(where, link, objective, asked)
    except NoPlanError:
        return None


@settings(max_examples=60)
@given(where=scenes, link=links, objective=objectives, asked=constraint)
def test_the_plan_keeps_to_every_constraint_and_is_the_best_that_does(
    where: Scene, link: Connection, objective: Any, asked: Constraints
) -> None:
    predictor = Predictor(where)
    stream_ms = predictor.predict(Candidate("cloud"), link).tpot_ms

    def allowed(candidate: Candidate) -> bool:  # said once more, in other words
        found = predictor.predict(candidate, link)
        slowest = asked.max_tpot_ms or (COST_SLOWDOWN * stream_ms if objective == "cost" else math.inf)
        return (
            found.device_ram_bytes <= min(where.device.ram * 1e9, asked.max_ram_bytes or math.inf)
            and (asked.max_loss if found.loss is not None else math.floor(asked.max_loss)) >= (found.loss or 0)
            and (found.loss is not None or asked.max_loss == 1)
            and found.tpot_ms <= slowest
            and not ((asked.keep_prompt or objective == "privacy") and candidate.mode in ("cloud", "speculative"))
        )

    every = list(candidates(where.target, where.drafts, where.front_weights))
    values = [VALUES[objective](predictor.predict(candidate, link)) for candidate in every if allowed(candidate)]
    found = searched(where, link, objective, asked)
    if found is None:
        assert not values
        return
    assert allowed(found.best.candidate)
    assert found.best.value == min(values)
    assert len(found.judged) == len(every)
    assert [judged.feasible for judged in found.judged].count(True) == len(values)
    if asked.keep_prompt or objective == "privacy":
        assert not found.best.candidate.sends_prompt_ids


@settings(max_examples=60)
@given(
    where=scenes, rtt_ms=st.floats(0, 300), up=st.floats(0.1, 500), slower=st.floats(0, 300), share=st.floats(0.01, 1), at=st.data()
)
def test_a_slower_link_never_favours_a_cut(
    where: Scene, rtt_ms: float, up: float, slower: float, share: float, at: st.DataObject
) -> None:
    """Neither a longer way nor a narrower one: what the split loses to the stream only grows."""
    splits = [candidate for candidate in candidates(SHAPE, where.drafts, where.front_weights) if candidate.mode == "split"]
    split, predictor = at.draw(st.sampled_from(splits)), Predictor(where)

    def behind_ms(link: Connection) -> float:
        return predictor.predict(split, link).answer_ms - predictor.predict(Candidate("cloud"), link).answer_ms

    near = behind_ms(Connection("a", rtt_ms, up))
    assert behind_ms(Connection("b", rtt_ms + slower, up)) >= near - 1e-6 * abs(near)
    assert behind_ms(Connection("c", rtt_ms, up * share)) >= near - 1e-6 * abs(near)


@settings(max_examples=40)
@given(where=scenes, link=links, objective=objectives, asked=constraint)
def test_an_offer_is_kept(where: Scene, link: Connection, objective: Any, asked: Constraints) -> None:
    """The value that the error names does: with it there is a plan."""
    try:
        search(where, link, objective, asked)
    except NoPlanError as error:
        message = str(error)
    else:
        return
    for option, field, unit in (("--max-ram", "max_ram_bytes", 1e6), ("--max-loss", "max_loss", 1), ("--tpot", "max_tpot_ms", 1)):
        offer = message.partition("one does with ")[2].partition(f"{option} ")[2]
        if offer:
            value = float(offer.partition(" ")[0].rstrip("MBms"))
            assert searched(where, link, objective, replace(asked, **{field: value * unit}))


def test_the_error_names_what_would_do() -> None:
    link = Connection("link", 20, 20)
    with pytest.raises(NoPlanError, match=r"--max-ram 50MB.*one does with --max-ram 103MB \(cloud\)"):
        search(scene(), link, "latency", Constraints(max_ram_bytes=50e6))
    with pytest.raises(NoPlanError, match=r"--tpot 0.1ms.*one does with --tpot .*ms"):
        search(scene(), link, "latency", Constraints(max_tpot_ms=0.1))
    with pytest.raises(NoPlanError, match="nor with any one of them given up; nearest is"):
        search(scene(), link, "latency", Constraints(max_tpot_ms=0.001, max_ram_bytes=1e6))
    with pytest.raises(ConfigError, match="no figures of energy"):
        search(replace(scene(), device=MachineProfile("bare", {"int4": 1.0}, 1.0, 1.0)), link, "energy")


def test_deeper_cuts_spare_the_cloud_and_load_the_device() -> None:
    predictor, link = Predictor(scene()), Connection("link", 20, 20)
    splits = [Candidate("split", "draft", 4, cut, "int8", "int8") for cut in range(1, SHAPE.num_layers)]
    found = [predictor.predict(split, link) for split in splits]
    for shallow, deep in pairwise(found):
        assert deep.cloud_ms_per_token < shallow.cloud_ms_per_token
        assert deep.passes_per_token < shallow.passes_per_token
        assert deep.device_ram_bytes > shallow.device_ram_bytes
        assert deep.up_bytes_per_token == shallow.up_bytes_per_token
    speculative = predictor.predict(Candidate("speculative", "draft", 4), link)
    assert found[0].cloud_ms_per_token < speculative.cloud_ms_per_token * 1.3


def test_split_is_speculation_with_more_to_do_on_the_device_and_less_in_the_cloud() -> None:
    chances = [0.5, 0.25]
    bare = overlapped(chances, 2, 10.0, 20.0, 30.0, 4)
    assert split_overlapped(chances, 2, 10.0, 0.0, 0.0, 20.0, 30.0, 0.0, 4) == bare
    cut = split_overlapped(chances, 2, 10.0, 9.0, 3.0, 20.0, 30.0, 0.4, 4)
    assert cut == Price(overlapped(chances, 2, 13.0, 26.0, 30.0, 4).ms_per_token, cut.passes_per_token)
    assert cut.passes_per_token == pytest.approx(0.6 * bare.passes_per_token)
    narrow = split_overlapped(chances, 2, 10.0, 9.0, 300.0, 20.0, 30.0, 0.4, 4)  # the uplink is what a row waits for
    assert narrow.ms_per_token == overlapped(chances, 2, 100.0, 323.0, 30.0, 4).ms_per_token


def test_what_was_not_measured_is_not_trusted() -> None:
    assert LOSSES.loss(1, "int8", "int8") == pytest.approx(0.01)
    between = Losses((Loss(2, "int8", 0.9, "int8"), Loss(6, "int8", 0.98, "int8")))
    assert between.loss(3, "int8", "int8") == pytest.approx(0.08)
    assert between.loss(7, "int8", "int8") is None  # not beyond what was measured
    apart = Losses((Loss(2, "int8", 0.95), Loss(2, "float32", 0.9, "int4")))
    assert apart.loss(2, "int4", "int8") == pytest.approx(0.15)
    assert apart.loss(2, "int8", "int8") is None
    unmeasured = search(scene(losses=Losses()), Connection("link", 1, 1000), "latency")
    assert unmeasured.best.candidate.mode in ("cloud", "speculative")
    assert unmeasured.best_of("split").violated[0].startswith("its loss was not measured")  # type: ignore[union-attr]


@pytest.mark.parametrize("text", ["{}", "[1]", "nonsense", '[{"cut": 1, "codec": "int8", "agreement": 2.0}]', '[{"cut": 1}]'])
def test_damage_that_cannot_be_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "damage.json").write_text(text)
    with pytest.raises(ConfigError, match=r"--damage .*damage\.json"):
        read_losses(tmp_path / "damage.json")


@pytest.fixture(scope="module")
def plan() -> Plan:
    return make_plan(scene(), Connection("wifi", 20, 20), "latency", Constraints(), ["said by the test"])


def test_the_plan_says_why_the_others_lose(plan: Plan) -> None:
    found = json.loads(json.dumps(plan.to_dict()))
    assert found["best"]["why_not"] == ""
    assert {entry["mode"] for entry in found["table"]} == {"edge", "cloud", "speculative", "split"}
    assert all(entry["why_not"] for entry in found["table"] if entry["plan"] != found["best"]["plan"])
    assert len(found["by_cut"]) == SHAPE.num_layers - 1
    assert {(place["rtt_ms"], place["up_mbps"]) for place in found["over_links"]} >= {(5.0, 1.0), (200.0, 100.0)}
    assert any("A cut is" in line for line in found["conclusions"])
    assert found["assumptions"][0] == "said by the test"
    assert plan.to_table().row_count == len(found["table"])
    assert any(line.startswith("edge: loses 0.3") for line in plan.refusals())


def test_a_cut_is_called_a_bad_idea_where_it_is_one() -> None:
    over_lte = make_plan(scene(cloud_gb=100), Connection("lte", 75, 30), "latency", Constraints(), [])
    assert any(line.startswith("A cut is a bad idea here") for line in over_lte.conclusions())
    private = make_plan(scene(), Connection("wifi", 20, 20), "privacy", Constraints(), [])
    assert private.best.candidate.mode == "split"
    assert any("can be inverted" in line for line in private.conclusions())


def test_the_report_is_one_page_with_its_plots(plan: Plan, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    page = to_html(plan)
    for name in ("cuts", "regions", "damage"):
        assert f'id="plot-{name}"' in page
    assert not any(word in page for word in ("<script", "<link", "src="))
    assert "the plan" in page
    files = write_plan(plan, tmp_path)
    assert [path.name for path in files] == ["plan.json", "plan.html"]
    assert json.loads(files[0].read_text())["best"] == json.loads(json.dumps(plan.to_dict()))["best"]


def test_a_phone_in_front_of_an_a100_should_leave_a_7b_model_alone() -> None:
    llama = ModelShape("llama", 32, 4096, 32, 32, 128, 11008, 32000, tied=False)
    draft = Draft("llama int4", llama, "int4", tuple(survival(0.7, 16)), measured=False)
    found = search(Scene(llama, [draft], load_profile("phone"), load_profile("a100")), Connection("lte", 75, 30), "latency")
    assert found.best.candidate == Candidate("cloud")
    edge = found.best_of("edge")
    assert edge is not None
    assert "needs" in edge.violated[0]


# Steps that are not done twice


def test_a_step_is_made_once_and_again_when_its_files_were_changed(tmp_path: Path) -> None:
    made: list[str] = []

    def make(folder: Path) -> None:
        (folder / "inner").mkdir(parents=True)
        (folder / "inner" / "graph").write_text("graph")
        made.append(folder.name)

    def step(name: str, **parts: object) -> bool:
        found = cached_step(tmp_path / "cache", {"step": "export", **parts}, tmp_path / name, make)
        assert (tmp_path / name / "inner" / "graph").read_text() == "graph"
        return found

    assert [step("a", cut=1), step("b", cut=1), step("c", cut=2)] == [False, True, False]
    assert len(made) == 2
    (tmp_path / "cache" / "steps" / step_key({"step": "export", "cut": 1}) / "content" / "inner" / "graph").write_text("changed")
    assert step("d", cut=1) is False
    assert len(made) == 3


def test_a_step_that_fails_leaves_nothing_and_old_ones_are_forgotten(tmp_path: Path) -> None:
    def fails(folder: Path) -> None:
        folder.mkdir(parents=True)
        (folder / "half").write_text("half")
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        cached_step(tmp_path / "cache", {"step": 0}, tmp_path / "out", fails)
    assert not (tmp_path / "out").exists()
    assert not any((tmp_path / "cache" / "steps").iterdir())
    for number in range(MAX_STEPS + 3):
        cached_step(tmp_path / "cache", {"step": number}, tmp_path / f"{number}", lambda folder: folder.mkdir(parents=True))
    kept = {path.name for path in (tmp_path / "cache" / "steps").iterdir()}
    assert len(kept) == MAX_STEPS
    assert step_key({"step": MAX_STEPS + 2}) in kept


def test_a_cache_that_cannot_be_written_is_said_and_done_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    said: list[str] = []
    monkeypatch.setenv("EDGECLOUD_HOME", str(tmp_path / "file" / "home"))
    assert usable_cache(said.append) is None
    assert "EDGECLOUD_HOME" in said[0]
    monkeypatch.setenv("EDGECLOUD_HOME", str(tmp_path / "home"))
    assert usable_cache(said.append) == tmp_path / "home"


# The command


def run(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["partition", *arguments])
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("models") / "tiny", num_layers=3)


def test_a_dry_run_plans_for_machines_that_are_not_there(tiny: Path, tmp_path: Path) -> None:
    words = [str(tiny), "-o", str(tmp_path / "bundle"), "--dry-run", "--json", "--device", "phone", "--cloud-device", "h100"]
    code, out, _ = run(*words, "--objective", "privacy", "--max-loss", "1", "--link", "30ms@5mbit")
    assert code == 0
    plan = json.loads(out)["plan"]
    assert plan["link"] == {"name": "30ms@5mbit", "rtt_ms": 30.0, "up_mbps": 5.0}
    assert plan["best"]["mode"] in ("edge", "split")
    assert plan["device"].startswith("mid-range phone")
    assert any("assumed to be right 70%" in line for line in plan["assumptions"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--device", "nokia"], "--device nokia is neither a file nor a profile"),
        (["--cloud-device", "abacus"], "--cloud-device abacus is neither"),
        (["--link", "carrier-pigeon"], "--link is 'carrier-pigeon'"),
        (["--link", "20ms@fast"], "fast"),
        (["--max-ram", "lots"], "--max-ram is 'lots'; it takes bytes"),
        (["--max-ram", "1mb"], "one does with --max-ram"),
        (["--max-loss", "2"], "max_loss is 2.0"),
        (["--tpot", "soon"], "soon"),
        (["--acceptance", "1"], "--acceptance is 1.0"),
        (["--prompt-tokens", "0"], "prompt_tokens is 0"),
        (["--damage", "nowhere.json"], "--damage nowhere.json cannot be read"),
        (["--objective", "energy"], "no figures of energy"),
        (["--device", "a100"], "has no figure for int4"),
    ],
)
def test_a_value_that_cannot_be_is_named_and_nothing_is_written(
    words: list[str], complaint: str, tiny: Path, tmp_path: Path
) -> None:
    result = CliRunner().invoke(app, ["partition", str(tiny), "-o", str(tmp_path / "bundle"), "--dry-run", *words])
    assert isinstance(result.exception, ConfigError)
    assert complaint in str(result.exception)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("words", "takes"), [(["--objective", "privacy", "--max-loss", "1"], True), ([], False)])
def test_the_cut_of_the_plan_is_taken_where_the_plan_was_asked_for(
    words: list[str], takes: bool, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgecloud.partitioner import partition as partitioning

    asked: list[Any] = []

    def partition(inputs: Any, **_: Any) -> None:
        asked.append(inputs.front)
        raise ConfigError("not today")

    monkeypatch.setattr(partitioning, "partition", partition)
    device = MachineProfile("device", {"int4": 0.001, "int8": 1e5}, 1000.0, 8.0)  # drafting alone is hopeless on it
    (tmp_path / "device.json").write_text(device.to_json())
    CliRunner().invoke(
        app, ["partition", str(tiny), "-o", str(tmp_path / "b"), "--device", str(tmp_path / "device.json"), "--link", "1ms", *words]
    )
    [front] = asked
    assert (front is not None) is takes
    if takes:
        assert 1 <= front.cut < 3
