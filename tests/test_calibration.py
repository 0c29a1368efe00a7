"""The risk holds: statistics that keep their word on prompts of any kind, and a bundle that says what was shown and what not."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pairs import Pair, copy_of, edit_manifest

from edgecloud.bundle import MANIFEST, Bundle
from edgecloud.calibration import Calibration, CurvePoint, ExitRule, ShareRule
from edgecloud.cli.app import run
from edgecloud.errors import BundleCorruptError, BundleError, ConfigError
from edgecloud.partitioner import calibrate as calibration
from edgecloud.partitioner.exit_rules import exit_rule, share_rule
from edgecloud.partitioner.recording import THRESHOLDS, Record
from edgecloud.partitioner.risk import Exits, betting_p_value, fixed_sequence, num_flawless, prompts_needed, ratio_p_value

pytest_plugins = ["pairs"]

RISKS = (0.01, 0.05, 0.1)
Table = list[Exits]


# The tests


@pytest.mark.parametrize("risk", [0.02, 0.1])
@pytest.mark.parametrize("kind", ["all or nothing", "alike", "some", "heavy tail"])
def test_a_risk_that_is_exceeded_by_a_hair_passes_no_more_often_than_delta(kind: str, risk: float) -> None:
    """Whatever the distribution: its mean is the risk, so that every pass is an error."""
    dice, passed, num_runs = np.random.default_rng(3), 0, 1000
    for _ in range(num_runs):
        size = int(dice.integers(60, 300))
        losses = {
            "all or nothing": lambda n: (dice.random(n) < risk).astype(float),  # answers wrong from the first token to the last
            "alike": lambda n: dice.binomial(16, risk, n) / 16,
            "some": lambda n: (dice.random(n) < 2 * risk) * 0.5,
            "heavy tail": lambda n: dice.beta(0.3 * risk, 0.3 * (1 - risk), n),
        }[kind](size)
        passed += betting_p_value(losses, risk) <= 0.05
    assert passed / num_runs <= 0.05 + 0.015  # and chance


@given(st.floats(0.005, 0.3), st.floats(0.001, 0.2))
def test_flawless_answers_pass_at_the_number_that_is_told_and_not_before(risk: float, delta: float) -> None:
    enough = num_flawless(risk, delta)
    assert betting_p_value(np.zeros(enough), risk) <= delta * (1 + 1e-9)
    assert betting_p_value(np.zeros(enough - 1), risk) > delta
    assert enough <= 1.15 * np.log(1 / delta) / -np.log1p(-risk) + 1  # no test that is valid for all can do with fewer


@given(st.lists(st.floats(0, 1), max_size=40), st.floats(0.01, 0.5))
def test_p_values_are_probabilities_and_more_loss_is_no_proof_of_less(losses: list[float], risk: float) -> None:
    p_value = betting_p_value(np.array(losses), risk)
    assert 0 < p_value <= 1
    assert betting_p_value(np.ones(len(losses)), risk) == 1


def test_nothing_skipped_proves_nothing_and_long_wrong_answers_weigh_by_their_tokens() -> None:
    none = np.zeros(200, np.int64)
    assert Exits(none + 10, none, none).p_value(0.1) == 1
    tokens = np.where(np.arange(200) % 8 == 0, 40, 2)
    long_wrong = np.where(tokens == 40, 8, 0)  # in a fifth of the tokens of every eighth answer
    exits = Exits(tokens, tokens, long_wrong)
    assert betting_p_value(exits.losses, 0.1) < 0.05  # 2.5 % of an answer on average
    assert ratio_p_value(exits.diverged, exits.skipped, 0.1) == 1  # but 15 % of all tokens
    assert exits.p_value(0.1) == 1
    with pytest.raises(ValueError, match="more diverged"):
        Exits(none, none, none + 1)


@pytest.mark.parametrize(("p_values", "last"), [([], None), ([0.2, 0.0], None), ([0.01, 0.04, 0.06, 0.0], 1), ([0.05, 0.0], 1)])
def test_a_sequence_ends_at_the_first_that_does_not_pass(p_values: list[float], last: int | None) -> None:
    assert fixed_sequence(iter(p_values), 0.05) == last


# Populations: prompts whose tokens depend on one another in ways that a test must survive


def population(kind: str, size: int, dice: np.random.Generator) -> npt.NDArray[np.int64]:
    """Prompts of which each threshold skips some tokens and gets some wrong.  -> [size, thresholds, 3]"""
    length = dice.integers(8, 49, size)
    safety = np.array(THRESHOLDS)
    share = np.clip(1.05 - safety[None] + dice.normal(0, 0.05, (size, 1)), 0.02, 1)  # [size, thresholds]
    wrong = np.repeat(0.25 * (1 - safety[None]) ** 1.3, size, axis=0)  # a score that is surer than it seems
    if kind == "whole answers":  # in some, every skipped token is wrong, at every threshold
        wrong = np.where(dice.random((size, 1)) < 0.02, 1.0, 0.5 * wrong)
    if kind == "bursts":  # after one error comes a run of them
        wrong = np.where(dice.random((size, len(safety))) < 6 * wrong, 0.3, 0.0)
    if kind == "long answers":
        wrong = wrong * (2.0 * length / length.mean())[:, None] ** 2 / 2
    skipped = dice.binomial(np.repeat(length[:, None], len(safety), axis=1), share)
    diverged = dice.binomial(skipped, np.clip(wrong, 0, 1))
    return np.stack([np.repeat(length[:, None], len(safety), axis=1), skipped, diverged], axis=2)


def table_of(counts: npt.NDArray[np.int64]) -> Table:
    return [Exits(*counts[:, at].T) for at in range(len(THRESHOLDS))]


@pytest.mark.parametrize("kind", ["independent", "whole answers", "bursts", "long answers"])
def test_on_prompts_kept_out_the_divergence_is_below_the_risk_in_95_of_100_splits(kind: str) -> None:
    dice = np.random.default_rng(11)
    counts = population(kind, 440, dice)
    held, allowed = dict.fromkeys(RISKS, 0), dict.fromkeys(RISKS, 0)
    for _ in range(200):
        order = dice.permutation(len(counts))
        table, kept_out = table_of(counts[order[:220]]), table_of(counts[order[220:]])
        for risk in RISKS:
            rule = exit_rule("token", risk, 0.0, 0.05, table)
            allowed[risk] += rule.threshold is not None
            held[risk] += rule.threshold is None or kept_out[THRESHOLDS.index(rule.threshold)].divergence <= risk
    assert min(held.values()) >= 190, held
    assert allowed[0.1] >= 150, allowed  # and not because nothing is ever skipped


def test_what_does_not_pass_is_written_down_with_the_prompts_that_could_have() -> None:
    counts = population("independent", 4000, np.random.default_rng(5))
    few = exit_rule("token", 0.05, 0.0, 0.05, table_of(counts[:40]))
    assert (few.threshold, few.exit_share) == (None, 0.0)
    assert few.prompts_needed is not None
    assert 50 < few.prompts_needed < 300
    enough = exit_rule("token", 0.05, 0.0, 0.05, table_of(counts[100 : 100 + 2 * few.prompts_needed]))
    assert enough.threshold is not None
    assert enough.prompts_needed is None
    assert enough.curve[THRESHOLDS.index(enough.threshold)].p_value == enough.p_value <= 0.05
    always_wrong = [Exits(exits.tokens, exits.skipped, exits.skipped) for exits in table_of(counts[:400])]
    hopeless = exit_rule("token", 0.05, 0.0, 0.05, always_wrong)
    assert (hopeless.threshold, hopeless.prompts_needed) == (None, None)
    assert prompts_needed([], 0.05, 0.05) is None


def answered(score: float, num_wrong: int) -> Record:
    return Record("", [[20, 0, 0]] * len(THRESHOLDS), [0.5], [0], [score] * 20, [1] * num_wrong + [0] * (20 - num_wrong))


def test_requests_are_answered_locally_where_the_score_says_so() -> None:
    sure, unsure = [answered(0.96, 0)] * 90, [answered(0.58, 9)] * 110
    records = [both for pair in zip(sure, unsure, strict=False) for both in pair] + unsure[:20]
    bundle, wanted = replace_bundle(), calibration.Wanted((0.1, 0.01), cloud_shares=(0.3, 0.0))
    found = calibration.fit(bundle, {0.0: records}, wanted)
    for scope in ("before", "after"):
        rule = found.rule(scope, 0.1, 0.0)  # type: ignore[arg-type]
        assert rule.threshold is not None
        assert 0.58 < rule.threshold <= 0.96
        assert rule.exit_share == pytest.approx(0.45, abs=0.05)
        assert found.rule(scope, 0.01, 0.0).threshold is None  # type: ignore[arg-type]
    assert found.share_threshold("after", 0.3, 0.0) == pytest.approx(0.58)
    assert found.share_threshold("after", 0.0, 0.0) == 0.0


@given(st.floats(0, 0.99), st.lists(st.floats(0.01, 1), min_size=1, max_size=50, unique=True))
def test_a_share_of_the_calls_goes_to_the_cloud(cloud_share: float, scores: list[float]) -> None:
    records = [Record("", [], [], [], [score], [0]) for score in scores]
    threshold = share_rule("before", cloud_share, 0.0, records).threshold
    assert sum(score < threshold for score in scores) == int(cloud_share * len(scores))


# What the runtime reads


def rule_of(risk: float, threshold: float | None, *, temperature: float = 0.0, needed: int | None = None) -> ExitRule:
    return ExitRule("token", risk, temperature, threshold, 150, 0.4, 0.02, 0.01, needed, [CurvePoint(0.9, 0.4, 0.02, 0.01)])


RULES = [rule_of(0.05, 0.8), rule_of(0.01, None, needed=420), rule_of(0.05, 0.9, temperature=1.0)]
CALIBRATION = Calibration("pair", "draft", "target", "a test", 0.05, RULES, [ShareRule("after", 0.3, 0.0, 0.7, 150, 0.1)])


def replace_bundle() -> Bundle:
    """A manifest's identity, without files."""

    class Named:
        fingerprint = "made"

    bundle = object.__new__(Bundle)
    for name, value in {"pair_id": "pair", "draft": Named, "target": Named}.items():
        object.__setattr__(bundle, name, value)
    return bundle


def test_what_is_written_is_what_is_read_and_a_threshold_is_looked_up() -> None:
    assert Calibration.from_dict(json.loads(json.dumps(CALIBRATION.to_dict()))) == CALIBRATION
    assert CALIBRATION.token_threshold(0.05, 0.0) == 0.8
    assert CALIBRATION.token_threshold(0.05, 1.0) == 0.9
    assert CALIBRATION.share_threshold("after", 0.3, 0.0) == 0.7


def test_what_was_not_calibrated_or_does_not_hold_is_refused_with_what_does() -> None:
    with pytest.raises(ConfigError, match=r"0\.02 at temperature 0 is not calibrated.*risk 0\.05 at temperature 1"):
        CALIBRATION.token_threshold(0.02, 0.0)
    with pytest.raises(ConfigError, match=r"nothing may be skipped.*150 prompts.*about 420 might.*risk 0\.05 at temperature 0"):
        CALIBRATION.token_threshold(0.01, 0.0)
    with pytest.raises(ConfigError, match="known are none"):
        CALIBRATION.request_threshold("before", 0.05, 0.0)
    with pytest.raises(ConfigError, match=r"known are share 0\.3 at temperature 0"):
        CALIBRATION.share_threshold("after", 0.4, 0.0)


@pytest.mark.parametrize(
    "damage",
    [
        {"rules": None}, {"rules": {}}, {"rules": [1]}, {"rules": [{"scope": "token"}]}, {"rules": [{"curve": [1]}]},
        {"delta": 2}, {"delta": "0.05"}, {"pair_id": 3}, {"shares": None}, {"more": 1},
    ],
)  # fmt: skip
def test_a_damaged_calibration_is_corrupt(damage: dict[str, object]) -> None:
    with pytest.raises(BundleCorruptError):
        Calibration.from_dict({**CALIBRATION.to_dict(), **damage})


@pytest.mark.parametrize("change", [{"risk": 0.0}, {"threshold": 1.5}, {"scope": "layer"}, {"temperature": float("nan")}])
def test_a_rule_that_cannot_be_is_none(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        replace(RULES[0], **change)  # type: ignore[arg-type]


# The command


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(f"prompt {number}" for number in range(24)))
    return file


def test_calibrate_writes_into_the_manifest_and_changes_nothing_else(
    tiny_pair: Pair, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EDGECLOUD_HOME", str(tmp_path / "home"))
    bundle = copy_of(tiny_pair.bundle, tmp_path / "bundle")
    edit_manifest(bundle, lambda content: content.update(created_by="someone else"))
    before = json.loads((bundle / MANIFEST).read_text())
    command = ["calibrate", str(bundle), "--prompts", str(prompts), "--max-new-tokens", "6", "--json"]
    assert run([*command, "--risk", "0.05", "--risk", "0.1", "--cloud-share", "0.3"]) == 0
    told = json.loads(capsys.readouterr().out)
    after = json.loads((bundle / MANIFEST).read_text())
    assert after.pop("calibration") == {key: value for key, value in told.items() if key != "bundle"}
    assert after == {key: value for key, value in before.items() if key != "calibration"}
    assert [path.name for path in bundle.iterdir() if path.name.startswith(".")] == []
    found = Calibration.of(Bundle.open(bundle))
    assert {(rule.scope, rule.risk) for rule in found.rules} == {(s, r) for s in ("token", "before", "after") for r in (0.05, 0.1)}
    assert all(rule.num_prompts == 24 and len(rule.curve) == len(THRESHOLDS) for rule in found.rules)
    with pytest.raises(ConfigError, match="nothing may be skipped"):  # 24 prompts show nothing
        found.token_threshold(0.05, 0.0)

    # Another run of the same reads what was measured.
    def fail(*_: object) -> Record:
        raise AssertionError("measured again")

    monkeypatch.setattr(calibration, "record", fail)
    assert run([*command, "--risk", "0.2"]) == 0
    assert [rule["risk"] for rule in json.loads((bundle / MANIFEST).read_text())["calibration"]["rules"]] == [0.2] * 3

    # And that of another pair is refused.
    edit_manifest(bundle, lambda content: content["calibration"].update(pair_id="other"))
    with pytest.raises(BundleError, match="pair other"):
        Calibration.of(Bundle.open(bundle))


def test_bad_usage_is_told_in_a_line(tiny_pair: Pair, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    device = copy_of(tiny_pair.bundle, tmp_path / "device")
    (device / "cloud").rename(tmp_path / "cloud")
    empty, few, noise = tmp_path / "empty.txt", tmp_path / "few.txt", tmp_path / "noise.jsonl"
    empty.write_text("\n")
    few.write_text("one\n" * 50)
    noise.write_text("[]\n")
    whole = str(tiny_pair.bundle)
    manifest = (tiny_pair.bundle / MANIFEST).read_bytes()
    for arguments, code, word in (
        ([whole, "--prompts", str(empty)], 2, "is empty"),
        ([whole, "--prompts", str(few)], 2, "1 different prompts are too few"),
        ([whole, "--prompts", str(prompts), "--risk", "0"], 2, "--risk is 0.0"),
        ([whole, "--prompts", str(prompts), "--risk", "nan"], 2, "--risk is nan"),
        ([whole, "--prompts", str(prompts), "--delta", "1"], 2, "--delta is 1.0"),
        ([whole, "--prompts", str(prompts), "--cloud-share", "1"], 2, "--cloud-share is 1.0"),
        ([whole, "--prompts", str(prompts), "--temperature", "-1"], 2, "temperature"),
        ([whole, "--prompts", str(prompts), "--max-new-tokens", "4000"], 2, "--max-new-tokens 4000"),
        ([whole, "--prompts", str(prompts), "--answers", str(noise)], 2, "noise.jsonl, line 1"),
        ([str(tmp_path), "--prompts", str(prompts)], 1, "is no bundle"),
        ([str(device), "--prompts", str(prompts)], 1, "carries no target"),
    ):
        assert run(["calibrate", *arguments]) == code, arguments
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1
        assert word in errors[0]
    assert (tiny_pair.bundle / MANIFEST).read_bytes() == manifest
    with pytest.raises(ConfigError, match="is not calibrated"):
        Calibration.of(Bundle.open(tiny_pair.bundle))


def test_answers_of_the_target_are_read_and_those_of_other_temperatures_are_not(tmp_path: Path) -> None:
    file = tmp_path / "answers.jsonl"
    lines = [{"prompt_ids": [1], "answer_ids": [2]}, {"prompt_ids": [3], "answer_ids": [4], "temperature": 1.0}]
    file.write_text("\n\n".join(map(json.dumps, lines)))
    assert calibration.read_answers(file) == {(1,): [2]}
