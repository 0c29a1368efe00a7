"""Roll-outs of a cascade: what it would say, what each skipped token should have been, and records that outlive a killed run."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pairs import Pair

from edgecloud.bundle import Bundle
from edgecloud.errors import ModelError
from edgecloud.partitioner import check
from edgecloud.partitioner.choosers import GraphGuesser, TorchChooser
from edgecloud.partitioner.graph import DraftGraph
from edgecloud.partitioner.model_folder import ModelFolder
from edgecloud.partitioner.recording import THRESHOLDS, Record, prompt_key, record, record_all
from edgecloud.partitioner.rollout import ALWAYS, NEVER, Rollouts
from edgecloud.sampling import SamplingSettings

pytest_plugins = ["pairs"]

STOP, VOCAB = 0, 6


class Guessed:
    """Pure functions of the context, wrong now and then; whatever is asked, in whatever order, the answer is the same."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def choice(self, tokens: Sequence[int]) -> int:
        return random.Random(f"{self._seed} {list(tokens)}").choices(range(VOCAB), [1, 6, 6, 6, 6, 6])[0]

    def guess(self, tokens: Sequence[int]) -> tuple[int, float]:
        dice = random.Random(f"draft {self._seed} {list(tokens)}")
        score = dice.random()
        return (self.choice(tokens) if dice.random() < score else dice.randrange(VOCAB)), score

    def choose(self, tokens: Sequence[int], first: int) -> list[int]:
        return [self.choice(tokens[:at]) for at in range(first, len(tokens) + 1)]


def plain_cascade(pair: Guessed, prompt: list[int], threshold: float, limit: int) -> tuple[list[int], list[bool]]:
    """The policy, word for word."""
    answer: list[int] = []
    mismatched = []
    while len(answer) < limit and (not answer or answer[-1] != STOP):
        guess, score = pair.guess(prompt + answer)
        mismatched.append(guess != pair.choice(prompt + answer))
        answer.append(guess if score >= threshold else pair.choice(prompt + answer))
    return answer, mismatched


thresholds = st.lists(st.sampled_from([NEVER, ALWAYS, 0.2, 0.5, 0.8, 0.95]), min_size=1, max_size=5)


@given(st.integers(0, 10**6), thresholds, st.integers(1, 20), st.none() | st.lists(st.integers(0, VOCAB - 1), max_size=25))
def test_rollouts_that_share_contexts_are_those_of_the_plain_policy(
    seed: int, order: list[float], limit: int, expected: list[int] | None
) -> None:
    pair, prompt = Guessed(seed), [1, 2, 3]
    rollouts = Rollouts(prompt, pair, pair, limit, [STOP])
    if expected is not None:  # right or wrong, it changes nothing
        rollouts.expect(expected)
    for threshold in order:
        found = rollouts.roll(threshold)
        assert (found.token_ids, found.mismatched) == plain_cascade(pair, prompt, threshold, limit)
        skipped = [score >= threshold for score in found.scores]
        wrong = [skip and mismatch for skip, mismatch in zip(skipped, found.mismatched, strict=True)]
        assert found.counts(threshold) == (len(found.token_ids), sum(skipped), sum(wrong))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_with_real_graphs_no_exit_gives_the_targets_text_and_every_exit_the_drafts(tiny_pair: Pair, temperature: float) -> None:
    sampling = SamplingSettings(temperature=temperature, seed=7)
    target = check.load_torch(ModelFolder.open(tiny_pair.target), fp32=True)
    draft = tiny_pair.bundle / Bundle.open(tiny_pair.bundle).draft.model
    prompt = [1, 50, 60, 70]
    pair = (GraphGuesser(DraftGraph(draft, 64, 1), 259, sampling), TorchChooser(target, 259, sampling))
    rollouts = Rollouts(prompt, *pair, 24, [2])
    local = rollouts.roll(ALWAYS)  # first, so that the caches of both have to be cropped
    assert tiny_pair.plain.decode(prompt, 24, sampling, [2]).agrees_with(rollouts.roll(NEVER).token_ids)
    for at in range(len(local.token_ids)):  # each guess judged in the context that the draft's own text made
        choice = tiny_pair.plain.decode(prompt + local.token_ids[:at], 1, sampling)
        assert choice.agrees_with([local.token_ids[at]]) != local.mismatched[at] or choice.margins[0] < 1e-4
    assert all(0 < score <= 1 for score in local.scores)


class Rows:
    """Stands for a graph whose head has these logits."""

    def __init__(self, logits: list[float], kept: list[int] | None = None) -> None:
        self._logits = np.array(logits, np.float32)
        self.kept = None if kept is None else np.array(kept)

    def crop_to(self, length: int) -> None: ...

    def extend(self, token_ids: Sequence[int]) -> npt.NDArray[np.float32]:
        return self._logits


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_trimmed_head_guesses_only_tokens_that_it_has_and_its_score_is_over_those(temperature: float) -> None:
    for seed in range(20):
        guesser = GraphGuesser(Rows([1.0, 4.0, 2.0], [3, 5, 250]), 259, SamplingSettings(temperature, seed=seed))  # type: ignore[arg-type]
        token, score = guesser.guess([1])
        assert token in (3, 5, 250)
        assert token == 5 or temperature > 0
        warm = np.exp(np.array([1.0, 4.0, 2.0]) / (temperature or 1.0))
        assert score == pytest.approx(warm.max() / warm.sum(), rel=1e-6)


def test_logits_that_are_none_are_refused() -> None:
    with pytest.raises(ModelError, match="not finite"):
        GraphGuesser(Rows([1.0, float("nan")]), 2, SamplingSettings()).guess([1])  # type: ignore[arg-type]


# Records


def measured(prompt: Sequence[int]) -> Record:
    pair = Guessed(3)
    return record(prompt, Rollouts(prompt, pair, pair, 12, [STOP]))


def test_a_killed_run_goes_on_where_it_was(tmp_path: Path) -> None:
    prompts = [[1, number] for number in range(8)]
    calls: list[Sequence[int]] = []

    def dying(prompt: Sequence[int]) -> Record:
        calls.append(prompt)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return measured(prompt)

    with pytest.raises(KeyboardInterrupt):
        record_all(prompts, {"pair": "a"}, tmp_path, dying, lambda done: None)
    [journal] = (tmp_path / "calibration").iterdir()
    journal.write_bytes(journal.read_bytes()[:-30])  # and the last record reached the disk by half
    calls.clear()
    done: list[int] = []
    found = record_all(prompts, {"pair": "a"}, tmp_path, lambda prompt: calls.append(prompt) or measured(prompt), done.append)
    assert found == [measured(prompt) for prompt in prompts]
    assert (calls, done) == (prompts[4:], list(range(1, 9)))
    calls.clear()
    record_all(prompts, {"pair": "a"}, tmp_path, dying, done.append)
    assert calls == []
    other = record_all(prompts[:2], {"pair": "b"}, tmp_path, measured, done.append)  # of other models nothing is taken
    assert len(list((tmp_path / "calibration").iterdir())) == 2
    assert other == record_all(prompts[:2], {}, None, measured, done.append)  # without a cache it is measured all the same


def test_a_record_says_what_each_threshold_would_have_done() -> None:
    found = measured([4, 2])
    assert found.prompt == prompt_key([4, 2])
    for threshold, (tokens, skipped, diverged) in zip(THRESHOLDS, found.cascade, strict=True):
        answer, mismatched = plain_cascade(Guessed(3), [4, 2], threshold, 12)
        assert tokens == len(answer)
        assert 0 <= diverged <= skipped <= tokens
        assert diverged <= sum(mismatched)
    assert found.mean_score == pytest.approx(sum(found.local_scores) / len(found.local_scores))
    assert found.opening_score == pytest.approx(sum(found.local_scores[:8]) / len(found.local_scores[:8]))
