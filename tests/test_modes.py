"""Every mode equals plain decoding: for random models, prompts, settings, drafts, page sizes and evictions.

First over a verifier of this process that drives the real engine; then over gRPC with the real draft model.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from flying import fly
from hypothesis import given, settings
from hypothesis import strategies as st
from pairs import Pair, Plain, PlainTarget, Server, plain_target, with_eos
from tiny import make_tiny_llama

from edgecloud.client import Client
from edgecloud.cloud.engine import Engine
from edgecloud.cloud.model import TargetModel
from edgecloud.cloud.work import Answer, Extend, Extended, Refused
from edgecloud.edge.local import decode_locally
from edgecloud.edge.plan import Plan
from edgecloud.protocols import Drafter, Verifier
from edgecloud.rpc.codec import context_hash
from edgecloud.sampling import SamplingSettings
from edgecloud.types import CallCost, Mode, Round, Verdict

pytest_plugins = ["pairs"]

VOCAB_SIZE = 40  # so small that repetitions, stop tokens and ties of all kinds come up
SHAPES: dict[str, dict[str, Any]] = {
    "grouped heads": {"seed": 0},
    "all heads": {"seed": 1, "num_kv_heads": 2},
    "tied": {"seed": 2, "tie_word_embeddings": True, "num_layers": 1},
}
MAX_PROMPT_TOKENS, MAX_NEW_TOKENS = 12, 24
ONE_BY_ONE = Plan("speculative", 4, max_in_flight=1)  # synchronous rounds: nothing is drafted while a verdict travels
OURS, THEIRS = b"o" * 16, b"t" * 16


@dataclass(frozen=True)
class Target:
    """A random model, twice: as the engine runs it and as it is."""

    served: TargetModel
    plain: PlainTarget


@pytest.fixture(scope="module")
def target_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Target]:
    @cache
    def make(shape: str) -> Target:
        folder = tmp_path_factory.mktemp("targets") / "model"
        make_tiny_llama(folder, vocab_size=VOCAB_SIZE, hidden_size=32, **SHAPES[shape])
        return Target(TargetModel(folder), plain_target(folder))

    return make


# A verifier of this process


@dataclass
class EngineVerifier:
    """`protocols.Verifier` over an engine that the caller's own thread steps.

    Like the remote one it sends only what the engine may lack, and the rest when the engine refuses. Before call number n,
    `faults[n]` happens: "forget" drops the session, "crowd" lets another session take all pages.
    """

    engine: Engine
    faults: dict[int, str] = field(default_factory=dict)
    num_calls: int = 0
    num_refusals: int = 0
    released: bool = False
    _known: list[int] = field(default_factory=list)

    @property
    def known(self) -> list[int]:
        """Tokens that the engine was left with."""
        return self._known

    def submit(self, tokens: Sequence[int], draft_ids: Sequence[int], sampling: SamplingSettings) -> Settled:
        answer = self._ask(list(tokens), sampling, draft_ids=tuple(draft_ids))[-1]
        self._known = [*tokens, *draft_ids[: answer.num_accepted], answer.next_token_id]
        assert answer.cached_length == len(self._known)
        return Settled(Verdict(answer.num_accepted, answer.next_token_id, CallCost(answer.target_passes)))

    def decode(
        self, tokens: Sequence[int], max_new_tokens: int, sampling: SamplingSettings, stop_token_ids: Collection[int]
    ) -> Iterator[Round]:
        stop_ids = frozenset(stop_token_ids)
        log = list(tokens)
        for answer in self._ask(log, sampling, max_new_tokens=max_new_tokens, stop_token_ids=stop_ids):
            log.append(answer.next_token_id)
            yield Round([answer.next_token_id], "cloud", "final", cost=CallCost(answer.target_passes))
        self._known = log

    def release(self) -> None:
        self.released = True

    def _ask(self, tokens: list[int], sampling: SamplingSettings, **request: Any) -> list[Extended]:
        self._break_something(self.faults.get(self.num_calls))
        self.num_calls += 1
        start = next((i for i, (a, b) in enumerate(zip(self._known, tokens, strict=False)) if a != b), None)
        start = min(len(self._known), len(tokens)) if start is None else start
        while True:
            ours = Extend(
                OURS, start, tuple(tokens[start:]), context_hash(tokens[:start]), sampling, **{"max_new_tokens": 1, **request}
            )
            answers = run_to_end(self.engine, ours)
            if not isinstance(answers[-1], Refused):
                assert all(isinstance(answer, Extended) for answer in answers), answers
                return [answer for answer in answers if isinstance(answer, Extended)]
            assert answers[-1].cached_length < start
            self.num_refusals += 1
            start = answers[-1].cached_length

    def _break_something(self, fault: str | None) -> None:
        if fault == "forget":
            self.engine.release(OURS)
        elif fault == "crowd":
            crowd = tuple(i % VOCAB_SIZE for i in range(self.engine.max_context_tokens - 1))
            run_to_end(self.engine, Extend(THEIRS, 0, crowd, 0, SamplingSettings()))
            self.engine.release(THEIRS)


@dataclass(frozen=True)
class Settled:
    verdict: Verdict

    def result(self) -> Verdict:
        return self.verdict


def run_to_end(engine: Engine, request: Extend) -> list[Answer]:
    answers: list[Answer] = []
    engine.submit(0, request, answers.append)
    while not answers or (isinstance(answers[-1], Extended) and not answers[-1].last):
        engine.step()
    return answers


def engine_of(target: Target, page_size: int, max_rows: int, room_tokens: int = 64) -> Engine:
    """An engine whose cache holds one conversation and hardly more."""
    num_pages = -(-room_tokens // page_size)
    cache_bytes = num_pages * page_size * target.served.bytes_per_token
    return Engine(target.served, cache_bytes=cache_bytes, page_size=page_size, max_rows=max_rows)


# Drafters


@dataclass(frozen=True)
class ScriptedDrafter:
    """Knows what the target will say, and gets it wrong where it is told to."""

    num_prompt_tokens: int
    expected: list[int]
    wrong_at: Callable[[int], bool]  # number of the generated token

    def draft(
        self, tokens: Sequence[int], num_draft_tokens: int, sampling: SamplingSettings, stop_token_ids: Collection[int]
    ) -> list[int]:
        first = len(tokens) - self.num_prompt_tokens
        guessed: list[int] = []
        for number in range(first, first + num_draft_tokens):
            right = self.expected[number] if number < len(self.expected) else 0
            guessed.append((right + 1 + number % 3) % VOCAB_SIZE if self.wrong_at(number) else right)
            if guessed[-1] in stop_token_ids:
                break
        return guessed


KINDS = ("target", "adversary", "mix")


@st.composite
def drafts(draw: st.DrawFn) -> tuple[str, frozenset[int]]:
    """Kind of drafter, numbers of the tokens that a mix gets wrong."""
    return draw(st.sampled_from(KINDS)), draw(st.frozensets(st.integers(0, MAX_NEW_TOKENS)))


def drafter_of(draft: tuple[str, frozenset[int]], prompt: Sequence[int], expected: Plain) -> ScriptedDrafter:
    kind, wrong = draft
    wrong_at = {"target": lambda _: False, "adversary": lambda _: True, "mix": lambda number: number in wrong}[kind]
    return ScriptedDrafter(len(prompt), expected.token_ids, wrong_at)


samplings = st.builds(
    SamplingSettings,
    temperature=st.sampled_from([0.0, 0.0, 0.3, 1.0, 2.5]),
    top_k=st.sampled_from([0, 1, 5, VOCAB_SIZE + 3]),
    top_p=st.sampled_from([1.0, 0.95, 0.4]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.8]),
    seed=st.integers(0, 2**64 - 1),
)
prompts = st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=MAX_PROMPT_TOKENS)
faults = st.dictionaries(st.integers(0, 12), st.sampled_from(["forget", "crowd"]), max_size=6)
page_sizes = st.sampled_from([1, 3, 8, 16])
max_rows = st.sampled_from([3, 512])  # 3: every prompt takes several passes
orders = st.lists(st.booleans(), max_size=12)
stop_ids = st.frozensets(st.integers(0, VOCAB_SIZE - 1), max_size=3)
shapes = st.sampled_from(sorted(SHAPES))


def ids_of(rounds: Iterator[Round]) -> list[int]:
    return [token for round_ in rounds for token in round_.token_ids]


@settings(max_examples=100)
@given(
    shapes,
    prompts,
    samplings,
    stop_ids,
    st.integers(1, MAX_NEW_TOKENS),
    st.integers(1, 8),
    st.integers(1, 4),
    orders,
    drafts(),
    faults,
    page_sizes,
    max_rows,
)
def test_speculation_equals_plain_decoding(
    target_of: Callable[[str], Target],
    shape: str,
    prompt: list[int],
    sampling: SamplingSettings,
    stop_token_ids: frozenset[int],
    max_new_tokens: int,
    num_draft_tokens: int,
    max_in_flight: int,
    order: list[bool],
    draft: tuple[str, frozenset[int]],
    broken: dict[int, str],
    page_size: int,
    rows: int,
) -> None:
    target = target_of(shape)
    expected = target.plain.decode(prompt, max_new_tokens, sampling, stop_token_ids)
    drafter = drafter_of(draft, prompt, expected)
    verifier = EngineVerifier(engine_of(target, page_size, rows), broken)
    plan = Plan("speculative", num_draft_tokens, max_in_flight)
    rounds = list(fly(prompt, plan, drafter, verifier, sampling, max_new_tokens, stop_token_ids, order))
    token_ids = ids_of(iter(rounds))
    assert expected.agrees_with(token_ids)
    assert len(token_ids) <= max_new_tokens
    assert not set(token_ids[:-1]) & stop_token_ids  # nothing follows a stop token
    assert all(round_.num_accepted <= round_.num_draft_tokens <= num_draft_tokens for round_ in rounds)
    if draft[0] == "adversary":
        assert all(round_.num_accepted == 0 for round_ in rounds)
    if draft[0] == "target" and min(expected.margins) > 1e-4:
        assert all(round_.num_accepted == round_.num_draft_tokens for round_ in rounds)


@settings(max_examples=50)
@given(shapes, prompts, samplings, stop_ids, st.integers(1, MAX_NEW_TOKENS), faults, page_sizes, max_rows)
def test_cloud_decoding_equals_plain_decoding(
    target_of: Callable[[str], Target],
    shape: str,
    prompt: list[int],
    sampling: SamplingSettings,
    stop_token_ids: frozenset[int],
    max_new_tokens: int,
    broken: dict[int, str],
    page_size: int,
    rows: int,
) -> None:
    target = target_of(shape)
    expected = target.plain.decode(prompt, max_new_tokens, sampling, stop_token_ids)
    verifier = EngineVerifier(engine_of(target, page_size, rows), broken)
    assert expected.agrees_with(ids_of(verifier.decode(prompt, max_new_tokens, sampling, stop_token_ids)))
    # a second turn on the same session, cropped somewhere and then continued by other tokens
    turn = [*prompt, *expected.token_ids[: max_new_tokens // 2], 7, 8, 9]
    again = target.plain.decode(turn, 5, sampling)
    assert again.agrees_with(ids_of(verifier.decode(turn, 5, sampling, ())))


@dataclass(frozen=True)
class Switching:
    """One mode up to a length of the context, then the other."""

    num_draft_tokens: int
    switch_at: int
    first: Mode

    def plan(self, now_s: float, context_tokens: int) -> Plan:
        speculates = (self.first == "speculative") == (context_tokens < self.switch_at)
        return Plan("speculative", self.num_draft_tokens) if speculates else Plan("cloud", 0)


@settings(max_examples=50)
@given(
    shapes,
    prompts,
    samplings,
    st.integers(1, MAX_NEW_TOKENS),
    st.integers(1, 8),
    st.integers(0, MAX_NEW_TOKENS),
    st.sampled_from(["cloud", "speculative"]),
    orders,
    drafts(),
)
def test_the_mode_may_change_after_any_token(
    target_of: Callable[[str], Target],
    shape: str,
    prompt: list[int],
    sampling: SamplingSettings,
    max_new_tokens: int,
    num_draft_tokens: int,
    switch_at: int,
    first: Mode,
    order: list[bool],
    draft: tuple[str, frozenset[int]],
) -> None:
    target = target_of(shape)
    expected = target.plain.decode(prompt, max_new_tokens, sampling)
    drafter = drafter_of(draft, prompt, expected)
    verifier = EngineVerifier(engine_of(target, 8, 512))
    planner = Switching(num_draft_tokens, len(prompt) + switch_at, first)
    assert expected.agrees_with(ids_of(fly(prompt, planner, drafter, verifier, sampling, max_new_tokens, (), order)))


# Where an answer may end, one case at a time


@pytest.fixture(scope="module")
def answer_of_target(target_of: Callable[[str], Target]) -> tuple[Target, list[int], Plain]:
    """A sampled answer without a repetition in its first ten tokens, so that each can be made a stop token."""
    target = target_of("grouped heads")
    for seed in range(100):
        expected = target.plain.decode([1, 2, 3], 12, SamplingSettings(temperature=1.0, seed=seed))
        if len(set(expected.token_ids[:10])) == 10 and min(expected.margins) > 1e-4:
            return target, [1, 2, 3, seed], expected
    raise AssertionError("no such answer")


@pytest.mark.parametrize(
    ("stop_at", "wrong", "place"),
    [
        (0, set(), "the opening token"),
        (2, set(), "inside a draft"),
        (4, set(), "the draft's last token"),
        (5, set(), "the bonus token"),
        (3, {3}, "the recovered token"),
        (3, {2}, "behind a recovered token"),
        (4, {1, 2, 3, 4}, "a recovered token, nothing ever accepted"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_stop_token_ends_the_answer_wherever_it_falls(
    answer_of_target: tuple[Target, list[int], Plain], stop_at: int, wrong: set[int], place: str
) -> None:
    target, (*prompt, seed), expected = answer_of_target
    stop = {expected.token_ids[stop_at]}
    drafter = ScriptedDrafter(3, expected.token_ids, wrong.__contains__)
    sampling = SamplingSettings(temperature=1.0, seed=seed)
    rounds = list(fly(prompt, ONE_BY_ONE, drafter, EngineVerifier(engine_of(target, 8, 512)), sampling, 12, stop))
    assert ids_of(iter(rounds)) == expected.token_ids[: stop_at + 1], place


@pytest.mark.parametrize("max_new_tokens", range(1, 12))
def test_the_limit_ends_the_answer_wherever_it_falls_and_drafts_nothing_beyond(
    answer_of_target: tuple[Target, list[int], Plain], max_new_tokens: int
) -> None:
    target, (*prompt, seed), expected = answer_of_target
    drafter = ScriptedDrafter(3, expected.token_ids, lambda _: False)
    sampling = SamplingSettings(temperature=1.0, seed=seed)
    verifier = EngineVerifier(engine_of(target, 8, 512))
    rounds = list(fly(prompt, ONE_BY_ONE, drafter, verifier, sampling, max_new_tokens, ()))
    assert ids_of(iter(rounds)) == expected.token_ids[:max_new_tokens]
    assert [round_.num_accepted for round_ in rounds] == [round_.num_draft_tokens for round_ in rounds]
    assert verifier.num_calls == 1 + -(-(max_new_tokens - 1) // 5)


def test_what_was_forgotten_is_sent_again(answer_of_target: tuple[Target, list[int], Plain]) -> None:
    target, (*prompt, seed), expected = answer_of_target
    drafter = ScriptedDrafter(3, expected.token_ids, lambda _: True)
    verifier = EngineVerifier(engine_of(target, 8, 512), {2: "forget", 3: "crowd", 5: "forget"})
    rounds = fly(prompt, ONE_BY_ONE, drafter, verifier, SamplingSettings(temperature=1.0, seed=seed), 12, ())
    assert ids_of(rounds) == expected.token_ids
    assert verifier.num_refusals == 2  # an evicted session keeps its tokens: the engine rebuilds it alone


def test_the_draft_alone_is_the_draft_models_own_choice(target_of: Callable[[str], Target]) -> None:
    target = target_of("tied")
    sampling = SamplingSettings(temperature=1.0, seed=3)
    expected = target.plain.decode([5, 6], 10, sampling, {9})
    drafter: Drafter = ScriptedDrafter(2, expected.token_ids, lambda _: False)
    rounds = list(decode_locally([5, 6], drafter, sampling, 10, {9}))
    assert ids_of(iter(rounds)) == expected.token_ids
    assert {(round_.mode, round_.status) for round_ in rounds} == {("edge", "provisional")}


def test_the_verifier_of_this_process_is_a_verifier(target_of: Callable[[str], Target]) -> None:
    verifier: Verifier = EngineVerifier(engine_of(target_of("tied"), 8, 512))
    verifier.release()


# The same over gRPC, with the real draft model and the client

MODES: list[dict[str, Any]] = [
    {"mode": "cloud"},
    {"mode": "speculative", "num_draft_tokens": 1},
    {"mode": "speculative", "num_draft_tokens": 4},
    {"mode": "speculative", "num_draft_tokens": 8},
    {"mode": "auto"},
]
SETTINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0, "seed": 7},
    {"temperature": 0.8, "top_p": 0.95, "top_k": 50, "seed": 123456789012345},
    {"repetition_penalty": 1.3, "temperature": 0.2, "seed": 2**64 - 1},
]
PROMPTS = ["Why is the sky blue?", "naïve 🦊 café " * 8]  # the second takes the device two chunks


@pytest.mark.parametrize("pair_name", ["tiny_pair", "stranger_pair"])
def test_every_mode_gives_the_same_ids_and_text_over_grpc(
    request: pytest.FixtureRequest, tiny_server: Server, pair_name: str
) -> None:
    pair: Pair = request.getfixturevalue(pair_name)
    accepted = drafted = 0
    with Client(pair.bundle, tiny_server.address, num_threads=1) as client:
        for prompt in PROMPTS:
            tokens = client.tokenizer.encode_chat([{"role": "user", "content": prompt}])
            for sampling in SETTINGS:
                expected = pair.plain.decode(tokens, 24, SamplingSettings(**sampling), {2})
                replies = [client.generate(prompt, max_new_tokens=24, **sampling, **mode) for mode in MODES]
                for mode, reply in zip(MODES, replies, strict=True):
                    assert expected.agrees_with(reply.token_ids), (prompt, sampling, mode)
                    assert (reply.token_ids, reply.text) == (replies[0].token_ids, replies[0].text), (prompt, sampling, mode)
                    assert reply.metrics.num_unverified_tokens == 0
                accepted += sum(reply.metrics.num_accepted_tokens for reply in replies)
                drafted += sum(reply.metrics.num_draft_tokens for reply in replies)
    share = accepted / drafted
    assert 0.1 < share < 0.9 if pair_name == "tiny_pair" else share < 0.1  # the drafts were what they were meant to be


@pytest.mark.parametrize("stop_at", [0, 1, 4, 9])
def test_a_stop_token_ends_every_mode_over_grpc(tiny_pair: Pair, tiny_server: Server, tmp_path: Path, stop_at: int) -> None:
    with Client(tiny_pair.bundle, tiny_server.address, num_threads=1) as client:
        free = client.generate("Stop.", max_new_tokens=16, temperature=1.0, seed=5, mode="cloud")
    stop = free.token_ids[stop_at]
    pair = with_eos(tiny_pair, tmp_path / "bundle", 2, stop)
    with Client(pair.bundle, tiny_server.address, num_threads=1) as client:
        for mode in MODES:
            reply = client.generate("Stop.", max_new_tokens=16, temperature=1.0, seed=5, **mode)
            assert reply.token_ids == free.token_ids[: free.token_ids.index(stop) + 1], mode
            assert reply.finish_reason == "stop"
