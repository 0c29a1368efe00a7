"""Copies of the text as drafts: the index against a plain search, what is trusted, and that the text stays the target's."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

import pytest
from flying import Uncounted, Unhurried, fly
from hypothesis import given, settings
from hypothesis import strategies as st
from pairs import Gate, Pair, Server

from edgecloud.client import Client
from edgecloud.edge.lookup import Lookup, Trust
from edgecloud.edge.pilot import Draft, Drafted, Failed, Judged, Pilot, Tick, Verify
from edgecloud.edge.plan import Fixed, Plan
from edgecloud.edge.retry import Retry, Timeout
from edgecloud.edge.text_index import LONGEST, MOST_TRIED, SHORTEST, TextIndex
from edgecloud.errors import CloudUnavailableError, ConfigError
from edgecloud.protocols import PendingVerdict
from edgecloud.sampling import SamplingSettings
from edgecloud.types import CallCost, Round, Verdict

pytest_plugins = ["pairs"]

GREEDY = SamplingSettings()
PASSAGE = list(range(100, 140))
PROMPT = "one two three four one two three four one two three"

few_kinds = st.lists(st.integers(0, 2), max_size=MOST_TRIED)


# The index


def plain_longest(tokens: Sequence[int]) -> tuple[int, int]:
    """Length of the longest match of the text's end, and the latest position behind one."""
    best = (0, 0)
    for position in range(SHORTEST, len(tokens)):
        length = 0
        while length < min(position, LONGEST) and tokens[position - 1 - length] == tokens[-1 - length]:
            length += 1
        if length >= SHORTEST:
            best = max(best, (length, position))
    return best


@given(few_kinds)
def test_the_longest_match_is_found_and_of_equals_the_latest(tokens: list[int]) -> None:
    match = TextIndex(tokens).longest()
    assert (match.length, match.position) == plain_longest(tokens)


@given(few_kinds, few_kinds, st.data())
def test_a_text_that_is_cut_back_is_as_if_it_had_never_grown(tokens: list[int], more: list[int], data: st.DataObject) -> None:
    index, kept = TextIndex(tokens + more), data.draw(st.integers(0, len(tokens)))
    index.crop_to(kept)
    assert vars(index) == vars(TextIndex(tokens[:kept]))


# What is copied


def test_a_passage_that_begins_again_is_copied_to_its_end_and_beyond_a_drafts_length() -> None:
    lookup = Lookup([*PASSAGE, 7, 8], Trust())
    lookup.settle(PASSAGE[:16])
    copied = lookup.copies([], 4, 24)
    assert len(copied) > 8
    assert copied == [*PASSAGE[16:], 7, 8][: len(copied)]
    assert lookup.copies(copied[:3], 4, 24)[:5] == copied[3:8]  # behind guesses as well


def test_what_was_never_there_is_not_copied() -> None:
    assert Lookup(PASSAGE, Trust(), alone=True).copies([], 4, 24) == []
    assert Lookup([], Trust(), alone=True).copies([1, 2], 4, 24) == []


def test_a_short_match_takes_no_models_place_but_follows_a_whole_draft() -> None:
    lookup = Lookup([1, 2, 3, 4, 5, 6, 9, 1, 2, 3, 4], Trust())
    assert lookup.copies([], 2, 8) == []
    assert lookup.copies([], 0, 8)[:2] == [5, 6]
    assert Lookup([1, 2, 3, 4, 5, 6, 9, 1, 2], Trust(), alone=True).copies([], 2, 2) == [3, 4]  # better than nothing


def test_copies_that_were_wrong_of_late_are_trusted_no_more_and_regain_it() -> None:
    trust = Trust()
    before = trust.least
    for number in range(400):
        trust.copied(20, right=False)
        trust.guessed(number % 2 == 0)
    assert Lookup(PASSAGE * 2, trust).copies([], 0, 8) == []
    assert trust.least < before  # a model that is wrong half the time is easier to stand in for
    for _ in range(800):
        trust.copied(20, right=True)
    assert Lookup(PASSAGE * 2, trust).copies([], 4, 8) == PASSAGE[:8]


# In flight


@dataclass
class Recital:
    """A target that says one text whatever comes, as a verifier; counts its passes."""

    tokens: list[int]
    known: list[int] = field(default_factory=list)
    num_passes: int = 0

    def submit(self, tokens: Sequence[int], draft_ids: Sequence[int], sampling: SamplingSettings) -> PendingVerdict:
        start = len(tokens)
        assert list(tokens) == self.tokens[:start]
        said = self.tokens[start : start + len(draft_ids)]
        same = next((at for at, (a, b) in enumerate(zip(draft_ids, said, strict=True)) if a != b), len(draft_ids))
        self.known = self.tokens[: start + same + 1]
        self.num_passes += 1
        return Said(Verdict(same, self.tokens[start + same], CallCost()))

    def decode(
        self, tokens: Sequence[int], max_new_tokens: int, sampling: SamplingSettings, stop_token_ids: Collection[int]
    ) -> Iterator[Round]:
        for token in self.tokens[len(tokens) : len(tokens) + max_new_tokens]:
            yield Round([token], "cloud", "final")

    def release(self) -> None:
        pass


@dataclass
class Said:
    """A verdict that is there."""

    verdict: Verdict

    def result(self) -> Verdict:
        return self.verdict


@dataclass
class Reader:
    """A drafter that knows the text, and is wrong at these positions."""

    tokens: list[int]
    wrong: Collection[int] = ()
    num_steps: int = 0

    def draft(
        self, tokens: Sequence[int], num_draft_tokens: int, sampling: SamplingSettings, stop_token_ids: Collection[int]
    ) -> list[int]:
        self.num_steps += 1
        at = len(tokens)
        return [-1 if at in self.wrong or at >= len(self.tokens) else self.tokens[at]]


@settings(max_examples=150)
@given(
    prompt=st.lists(st.integers(0, 3), min_size=1, max_size=30),
    answer=st.lists(st.integers(0, 3), min_size=1, max_size=30),
    wrong=st.frozensets(st.integers(0, 60)),
    plan=st.builds(Plan, st.sampled_from(["speculative", "cloud", "split"]), st.integers(1, 5), st.integers(1, 4)),
    alone=st.booleans(),
    daring=st.booleans(),
    order=st.lists(st.booleans(), max_size=12),
    stop=st.sampled_from([(), (3,)]),
)
def test_the_text_is_the_targets_whatever_is_copied(
    prompt: list[int], answer: list[int], wrong: frozenset[int], plan: Plan, alone: bool, daring: bool, order: list[bool],
    stop: tuple[int, ...],
) -> None:  # fmt: skip
    trust = Trust()
    for _ in range(400 if daring else 0):
        for length in (2, 3, 4, 6, 9, 16):
            trust.copied(length, right=True)
    tokens = prompt + answer
    drafter = Reader(tokens, wrong)
    rounds = list(
        fly(prompt, plan, drafter, Recital([*tokens, 0]), GREEDY, len(answer), stop, order, Lookup(prompt, trust, alone=alone))
    )
    ends = [at for at, token in enumerate(answer) if token in stop]
    assert [token for round_ in rounds for token in round_.token_ids] == answer[: ends[0] + 1 if ends else None]
    assert not (alone and drafter.num_steps)


def passes_and_steps(prompt: list[int], answer: list[int], lookup: Lookup | None) -> tuple[int, int]:
    target, drafter = Recital(prompt + answer), Reader(prompt + answer)
    list(fly(prompt, Plan("speculative", 4), drafter, target, GREEDY, len(answer), (), (True, False), lookup))
    return target.num_passes, drafter.num_steps


def test_a_copied_answer_takes_a_fraction_of_passes_and_steps_and_another_no_more_than_without() -> None:
    model = passes_and_steps(PASSAGE, PASSAGE, None)
    both = passes_and_steps(PASSAGE, PASSAGE, Lookup(PASSAGE, Trust()))
    copies = passes_and_steps(PASSAGE, PASSAGE, Lookup(PASSAGE, Trust(), alone=True))
    assert both[0] <= model[0] // 2
    assert both[1] <= model[1] // 2
    assert copies[0] < model[0]
    assert copies[1] == 0
    new = list(range(200, 240))
    assert passes_and_steps(PASSAGE, new, Lookup(PASSAGE, Trust())) == passes_and_steps(PASSAGE, new, None)


def test_what_nobody_will_verify_is_the_models_own_choice() -> None:
    prompt = [*PASSAGE, 7, *PASSAGE[:20]]
    trust, retry = Trust(), Retry(Timeout(retry_s=5.0), None, "cloud")
    pilot = Pilot(prompt, Fixed(Plan("speculative", 4)), retry, Unhurried(), Uncounted(), max_new_tokens=12, stop_token_ids=(),
                  on_loss="continue", met=32, lookup=Lookup(prompt, trust))  # fmt: skip
    pilot.begin(0.0)
    second, asked, judged = 0.0, 0, False
    while not pilot.finished:
        actions, second = list(pilot.actions), second + 1.0
        pilot.actions.clear()
        for action in actions:
            if isinstance(action, Draft):
                asked += 1
                pilot.take(Drafted(action.version, 1000 + len(action.tokens)), second)
            elif isinstance(action, Verify) and not judged:
                judged = True
                pilot.take(Judged(action.call, Verdict(0, PASSAGE[20], CallCost())), second)
                assert PASSAGE[21] in pilot.tail  # copied, as the target will see to it
            elif isinstance(action, Verify):
                pilot.take(Failed(action.call, CloudUnavailableError("reset")), second)
        pilot.take(Tick(), second)
    unverified = pilot.tokens[len(prompt) + 1 :]
    assert unverified == [1000 + at for at in range(len(prompt) + 1, len(prompt) + 12)]


# Through a service


@pytest.mark.parametrize("asked", [{}, {"temperature": 0.8, "seed": 5}], ids=["greedy", "sampled"])
def test_every_drafter_gives_the_targets_text(tiny_pair: Pair, tiny_server: Server, asked: dict[str, float]) -> None:
    with Client(tiny_pair.bundle, tiny_server.address, num_threads=1) as client:
        expected = client.generate(PROMPT, mode="cloud", max_new_tokens=60, **asked)  # type: ignore[arg-type]
        for mode in ("speculative", "auto"):
            for drafter in ("both", "model", "lookup"):
                reply = client.generate(PROMPT, mode=mode, drafter=drafter, max_new_tokens=60, **asked)  # type: ignore[arg-type]
                assert (mode, drafter, reply.token_ids) == (mode, drafter, expected.token_ids)
                assert reply.metrics.num_unverified_tokens == 0


def test_copies_alone_load_no_model(tiny_pair: Pair, tiny_server: Server) -> None:
    code = f"""
import sys
from edgecloud.client import Client
with Client({str(tiny_pair.bundle)!r}, {tiny_server.address!r}) as client:
    for mode in ("speculative", "auto"):
        reply = client.generate({PROMPT!r}, mode=mode, drafter="lookup", max_new_tokens=60)
        print(len(reply.token_ids) > 0, "onnxruntime" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False"] * 2


def test_copies_alone_do_not_go_on_without_the_cloud(tiny_pair: Pair, gate: Gate) -> None:
    with pytest.raises(ConfigError, match="'lookup' needs a cloud"), Client(tiny_pair.bundle) as client:
        client.generate(PROMPT, drafter="lookup")
    timeout = Timeout(connect_s=2.0, request_s=10.0, retry_s=0.3)
    with Client(tiny_pair.bundle, gate.address, timeout=timeout, num_threads=1) as client:
        with pytest.raises(ConfigError, match="mode 'edge' needs the draft model"):
            client.generate(PROMPT, mode="edge", drafter="lookup")
        with pytest.raises(ConfigError, match="drafter is 'luck'"):
            client.generate(PROMPT, drafter="luck")  # type: ignore[arg-type]
        client.describe()
        gate.shut()
        with pytest.raises(CloudUnavailableError):
            client.generate(PROMPT, drafter="lookup", max_new_tokens=60)
