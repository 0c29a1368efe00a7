"""The engine: every answer equals plain decoding, whoever else is served, evicted, cancelled or broken at the same time."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from loopback import engine_thread
from pairs import PATIENCE_S, TIE, Plain, PlainTarget, plain_target
from tiny import make_tiny_llama

from edgecloud.cloud import engine as engine_module
from edgecloud.cloud.attention import PagedBatch
from edgecloud.cloud.engine import CANCELLED_GRACE_S, Engine
from edgecloud.cloud.engine_client import EngineClient
from edgecloud.cloud.model import TargetModel
from edgecloud.cloud.work import Answer, Extend, Extended, Failed, Gone, Overloaded, Refused
from edgecloud.errors import ConfigError
from edgecloud.rpc.codec import context_hash
from edgecloud.sampling import SamplingSettings

VOCAB_SIZE = 40
GREEDY = SamplingSettings()
SAMPLED = SamplingSettings(temperature=1.0, seed=11)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """More would only wait for each other over models this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass
class Target:
    """A random model twice: as the engine runs it and as it is. Tests may put something before a forward."""

    served: TargetModel
    plain: PlainTarget
    before_forward: Callable[[], None] = lambda: None
    after_forward: Callable[[], None] = lambda: None
    num_passes: int = 0
    num_rows: int = 0


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Target:
    folder = make_tiny_llama(tmp_path_factory.mktemp("target") / "m", vocab_size=VOCAB_SIZE, hidden_size=32, scale=0.6)
    target = Target(TargetModel(folder), plain_target(folder))
    forward = target.served.forward

    def watched(batch: PagedBatch) -> torch.Tensor:
        target.num_passes += 1
        target.num_rows += batch.input_ids.shape[1]
        target.before_forward()
        logits = forward(batch)
        target.after_forward()
        return logits

    target.served.forward = watched  # type: ignore[method-assign]
    return target


@pytest.fixture
def target(loaded: Target) -> Target:
    loaded.before_forward = loaded.after_forward = lambda: None
    return loaded


@dataclass
class Asked:
    """A request, what came back, and whether the one who asked is still there."""

    request: Extend
    answers: list[Answer] = field(default_factory=list)
    number: int = 0
    cancelled: bool = False
    on_answer: Callable[[Answer], None] = lambda _: None

    def take(self, answer: Answer) -> None:
        assert not self.done, f"{answer} came after the last answer"
        self.answers.append(answer)
        self.on_answer(answer)

    @property
    def done(self) -> bool:
        return bool(self.answers) and (not isinstance(self.answers[-1], Extended) or self.answers[-1].last)

    @property
    def extended(self) -> list[Extended]:
        assert all(isinstance(answer, Extended) for answer in self.answers), self.answers
        return [answer for answer in self.answers if isinstance(answer, Extended)]

    @property
    def token_ids(self) -> list[int]:
        return [answer.next_token_id for answer in self.extended]

    @property
    def verdict(self) -> tuple[int, int, int]:
        """What must not depend on anything but the request."""
        (answer,) = self.extended
        assert answer.last
        return answer.num_accepted, answer.next_token_id, answer.cached_length


class Driver:
    """An engine that the test's own thread steps, so that it is known what happens in which pass."""

    def __init__(self, target: Target, *, room_tokens: int = 128, page_size: int = 4, **options: Any) -> None:
        num_pages = -(-room_tokens // page_size)
        cache_bytes = num_pages * page_size * target.served.bytes_per_token
        self.engine = Engine(target.served, **{"fewest_shared": 0, **options}, cache_bytes=cache_bytes, page_size=page_size)
        self.open: list[Asked] = []

    def ask(self, request: Extend, **options: Any) -> Asked:
        asked = Asked(request, number=len(self.open), **options)
        self.open.append(asked)
        self.engine.submit(asked.number, request, asked.take)
        return asked

    def cancel(self, asked: Asked) -> None:
        asked.cancelled = True
        self.engine.cancel(asked.number)

    def step(self, times: int = 1) -> None:
        """Make a pass. Fails when there is nothing to do but something is open."""
        for _ in range(times):
            assert self.engine.has_work, "a request was lost"
            self.engine.step()

    def drive(self, *wanted: Asked) -> None:
        """Until all, or those wanted, are answered."""
        for _ in range(2000):
            if all(asked.done or asked.cancelled for asked in wanted or self.open):
                return
            self.step()
        raise AssertionError(f"no end in sight: {[asked.answers[-1:] for asked in self.open]}")

    def answer(self, request: Extend) -> Asked:
        asked = self.ask(request)
        self.drive(asked)
        return asked

    def release(self, session_id: bytes) -> None:
        self.engine.release(session_id)

    @property
    def num_used_pages(self) -> int:
        return self.engine._pool.num_pages - self.engine._pool.num_free


def new_id() -> bytes:
    return os.urandom(16)


def whole(tokens: Sequence[int], session_id: bytes | None = None, sampling: SamplingSettings = GREEDY, **options: Any) -> Extend:
    """A request that sends all its context."""
    return Extend(session_id or new_id(), 0, tuple(tokens), 0, sampling, **options)


def rest(session_id: bytes, tokens: Sequence[int], start: int, sampling: SamplingSettings = GREEDY, **options: Any) -> Extend:
    """A request that sends the context from `start` on."""
    return Extend(session_id, start, tuple(tokens[start:]), context_hash(tokens[:start]), sampling, **options)


def prompt_of(length: int, salt: int = 0) -> list[int]:
    return [(7 * i + 13 * salt + 3) % VOCAB_SIZE for i in range(length)]


def verdict_of(plain: Plain, draft: Sequence[int]) -> tuple[int, int]:
    """Number accepted and next token, by plain decoding."""
    accepted = 0
    while accepted < len(draft) and draft[accepted] == plain.token_ids[accepted]:
        accepted += 1
    assert min(plain.margins[: accepted + 1]) > TIE, "no example: the target's own choice hangs by a hair"
    return accepted, plain.token_ids[accepted]


def assert_plain(target: Target, asked: Asked) -> None:
    """A verify or a decode of a whole context says what plain decoding says."""
    request = asked.request
    assert request.context_start == 0
    context, sampling = list(request.context_ids), request.sampling
    if request.max_new_tokens > 1:
        assert target.plain.decode(context, request.max_new_tokens, sampling, request.stop_token_ids).agrees_with(asked.token_ids)
        return
    accepted, token = verdict_of(target.plain.decode(context, len(request.draft_ids) + 1, sampling), request.draft_ids)
    assert asked.verdict == (accepted, token, len(context) + accepted + 1)


# Any number of sessions, in any order


@dataclass
class Peer:
    """A client: its tokens, and how many of them it believes the engine has."""

    tokens: list[int]
    sampling: SamplingSettings
    session_id: bytes = field(default_factory=new_id)
    num_known: int = 0

    def request(self, **options: Any) -> Extend:
        return rest(self.session_id, self.tokens, min(self.num_known, len(self.tokens)), self.sampling, **options)


samplings = st.builds(
    SamplingSettings,
    temperature=st.sampled_from([0.0, 0.0, 0.4, 1.0, 2.0]),
    top_k=st.sampled_from([0, 3]),
    top_p=st.sampled_from([1.0, 0.9]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    seed=st.integers(0, 2**64 - 1),
)
COMMON = [(5 * i + 2) % VOCAB_SIZE for i in range(24)]  # many a prompt begins like another: pages are shared
prompts = st.builds(
    lambda num_common, own: [*COMMON[:num_common], *own],
    st.sampled_from([0, 7, 16, 24]),
    st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=12),
)
peers = st.builds(Peer, prompts, samplings)


def draft_for(data: st.DataObject, plain: Plain, num_draft_tokens: int) -> tuple[int, ...]:
    """All right, all wrong, or wrong here and there."""
    wrong = data.draw(
        st.sampled_from([(False,) * num_draft_tokens, (True,) * num_draft_tokens]) | st.tuples(*[st.booleans()] * num_draft_tokens),
        label="wrong",
    )
    right = plain.token_ids[:num_draft_tokens]
    return tuple((token + 1) % VOCAB_SIZE if bad else token for token, bad in zip(right, wrong, strict=True))


@dataclass
class Turn:
    """What a peer asked, and what plain decoding says."""

    peer: Peer
    asked: Asked
    plain: Plain


@dataclass
class Crowd:
    """Peers on one engine, none of which knows of the others."""

    target: Target
    driver: Driver
    data: st.DataObject
    turns: list[Turn] = field(default_factory=list)
    history: list[Asked] = field(default_factory=list)
    replays: list[tuple[Asked, Asked]] = field(default_factory=list)

    def begin(self, peer: Peer) -> None:
        """One peer does something, perhaps after its session was forgotten or its text was changed."""
        action = self.data.draw(st.sampled_from(["verify", "verify", "decode", "rewrite", "say", "forget", "rest"]), label="action")
        if action == "rest":
            return
        if action == "forget":
            self.driver.release(peer.session_id)
        if action == "rewrite":
            peer.num_known = min(peer.num_known, self.data.draw(st.integers(0, len(peer.tokens) - 1)))
            peer.tokens[peer.num_known :] = [self.data.draw(st.integers(0, VOCAB_SIZE - 1))]
        if action == "say":  # the next turn of a conversation
            peer.tokens += self.data.draw(st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=5))
        length = self.data.draw(st.integers(0, 8), label="length")
        plain = self.target.plain.decode(peer.tokens, length + 1, peer.sampling)
        assume(min(plain.margins) > TIE)
        if action == "decode":
            asked = self.driver.ask(peer.request(max_new_tokens=length + 1))
        else:
            asked = self.driver.ask(peer.request(draft_ids=draft_for(self.data, plain, length)))
        self.turns.append(Turn(peer, asked, plain))

    def replay(self) -> None:
        """Somebody's old request comes once more."""
        if self.history and self.data.draw(st.booleans(), label="replay"):
            old = self.data.draw(st.sampled_from(self.history))
            self.replays.append((old, self.driver.ask(old.request)))

    def check_replays(self) -> None:
        """Sent at the wrong time: refused, or answered as before."""
        for old, again in self.replays:
            if isinstance(again.answers[-1], Extended):
                assert again.token_ids == old.token_ids
                assert again.extended[-1].cached_length == old.extended[-1].cached_length
        self.replays = []

    def settle(self, turn: Turn) -> None:
        """See a request through: when the session was forgotten or crowded out, send what is missing, alone."""
        peer, asked = turn.peer, turn.asked
        draft, max_new_tokens = asked.request.draft_ids, asked.request.max_new_tokens
        while not isinstance(asked.answers[-1], Extended):
            assert isinstance(asked.answers[-1], Refused | Overloaded), asked.answers
            if isinstance(asked.answers[-1], Refused):
                assert asked.answers[-1].cached_length < asked.request.context_start
                peer.num_known = asked.answers[-1].cached_length
            asked = self.driver.answer(peer.request(draft_ids=draft, max_new_tokens=max_new_tokens))
        if max_new_tokens > 1:
            assert turn.plain.agrees_with(asked.token_ids)
            peer.tokens += asked.token_ids
        else:
            accepted, token, cached_length = asked.verdict
            assert (accepted, token) == verdict_of(turn.plain, draft)
            peer.tokens += [*draft[:accepted], token]
            assert cached_length == len(peer.tokens)
        peer.num_known = len(peer.tokens)
        self.history.append(asked)


@settings(max_examples=40)
@given(
    st.lists(peers, min_size=1, max_size=4),
    st.integers(1, 16),
    st.sampled_from([1, 3, 8, 512]),
    st.sampled_from([64, 100, 400]),
    st.data(),
)
def test_every_answer_equals_plain_decoding(
    loaded: Target, clients: list[Peer], page_size: int, max_rows: int, room_tokens: int, data: st.DataObject
) -> None:
    """Sessions share passes, push each other out of the cache, are forgotten, rewritten and asked again."""
    driver = Driver(loaded, room_tokens=room_tokens, page_size=page_size, max_rows=max_rows)
    crowd = Crowd(loaded, driver, data)
    passes_before = loaded.num_passes
    for _ in range(data.draw(st.integers(1, 3), label="rounds")):
        crowd.turns = []
        for peer in clients:
            crowd.begin(peer)
            crowd.replay()
        driver.drive()
        crowd.check_replays()
        for turn in crowd.turns:
            crowd.settle(turn)
    answers = [answer for asked in driver.open for answer in asked.answers]
    if not any(isinstance(answer, Overloaded) for answer in answers):  # else a pass was spent on who made room
        shares = sum(answer.target_passes for answer in answers if isinstance(answer, Extended))
        assert shares == pytest.approx(loaded.num_passes - passes_before)
    for peer in clients:
        driver.release(peer.session_id)
    assert driver.num_used_pages == 0


def test_sessions_in_one_pass_are_answered_as_alone(target: Target) -> None:
    requests = [
        whole(prompt_of(5), draft_ids=(1, 2, 3)),
        whole(prompt_of(31, 1), sampling=SAMPLED),
        whole(prompt_of(12, 2), sampling=SAMPLED, max_new_tokens=6),
        whole(prompt_of(1, 3), draft_ids=(9,)),
    ]
    alone = [Driver(target).answer(request) for request in requests]
    driver = Driver(target)
    before = target.num_passes
    together = [driver.ask(request) for request in requests]
    driver.drive()
    assert target.num_passes - before == 6  # one for all, then the decode alone
    for a, b in zip(alone, together, strict=True):
        assert [(x.num_accepted, x.next_token_id, x.cached_length) for x in a.extended] == [
            (x.num_accepted, x.next_token_id, x.cached_length) for x in b.extended
        ]
        assert_plain(target, b)
    assert [asked.extended[0].target_passes for asked in together] == [pytest.approx(0.25)] * 4


def test_what_another_session_has_read_is_not_read_again(target: Target) -> None:
    driver = Driver(target, page_size=4)
    prompt = prompt_of(30)
    driver.answer(whole(prompt))
    before = target.num_rows
    asked = driver.answer(whole([*prompt[:21], 1, 2, 3], sampling=SAMPLED, max_new_tokens=3))
    assert target.num_rows - before == 4 + 2  # 20 tokens lie in full pages; then one row a token
    assert_plain(target, asked)


def test_a_prefix_too_short_to_pay_is_read_again(target: Target) -> None:
    driver = Driver(target, page_size=4, fewest_shared=20)
    driver.answer(whole(prompt_of(30)))
    for num_common, num_rows in ((19, 24), (20, 5)):
        before = target.num_rows
        assert_plain(target, driver.answer(whole([*prompt_of(num_common), 1, 2, 3, 4, 5][: num_common + 5])))
        assert target.num_rows - before == num_rows


@pytest.mark.parametrize("max_rows", [7, 512])
def test_a_prompt_that_several_bring_at_the_same_time_is_read_once(target: Target, max_rows: int) -> None:
    driver = Driver(target, room_tokens=400, fewest_shared=8, max_rows=max_rows)
    before = target.num_rows
    asked = [driver.ask(whole([*prompt_of(30), i], sampling=SAMPLED)) for i in range(4)]
    driver.drive()
    assert target.num_rows - before == 31 + 3 * 3  # 28 tokens lie in full pages
    for one in asked:
        assert_plain(target, one)


def test_who_has_too_little_in_common_or_another_tenant_waits_for_nobody(target: Target) -> None:
    driver = Driver(target, room_tokens=400, fewest_shared=8)
    asked = [
        driver.ask(whole(prompt, tenant=tenant))
        for prompt, tenant in ((prompt_of(30), "a"), (prompt_of(30), "b"), ([*prompt_of(7), *prompt_of(23, 1)], "a"))
    ]
    driver.step()
    for one in asked:
        assert_plain(target, one)


def test_who_could_take_little_more_than_has_been_read_does_not_wait_for_it(target: Target) -> None:
    driver = Driver(target, room_tokens=400, fewest_shared=8, max_rows=24)
    first = driver.ask(whole(prompt_of(60)))
    driver.step()
    before = target.num_rows
    second = driver.ask(whole([*prompt_of(30), 1, 2, 3]))  # 28 tokens in common, 24 of which have been read
    driver.step()
    assert target.num_rows - before == 24, "both are in the pass"
    driver.step()
    assert second.done
    driver.drive()
    assert target.num_rows - before == 36 + 9
    for one in (first, second):
        assert_plain(target, one)


@pytest.mark.parametrize("end", ["cancelled", "failed"])
def test_who_waits_for_a_prompt_that_is_not_read_to_the_end_reads_the_rest(target: Target, end: str) -> None:
    driver = Driver(target, room_tokens=400, fewest_shared=8, max_rows=10)
    first = driver.ask(whole(prompt_of(40)))
    others = [driver.ask(whole(prompt_of(40), sampling=SAMPLED)) for _ in range(2)]
    driver.step(2)
    before = target.num_rows

    def break_once() -> None:
        target.before_forward = lambda: None
        raise RuntimeError("the accelerator fell off")

    if end == "cancelled":
        driver.cancel(first)
    else:
        target.before_forward = break_once
    driver.drive()
    wasted = 10 if end == "failed" else 0
    assert target.num_rows - before == wasted + 20 + 4  # the third takes 36 tokens of the second's
    for one in others:
        assert_plain(target, one)


def test_nobody_waits_for_a_less_urgent_one(target: Target) -> None:
    driver = Driver(target, room_tokens=400, fewest_shared=8, max_rows=10)
    later = driver.ask(whole(prompt_of(40)))
    driver.step()
    urgent = driver.ask(whole(prompt_of(40), deadline_s=time.monotonic() + PATIENCE_S))
    driver.step(4)
    assert urgent.done
    assert not later.done
    driver.drive()
    for one in (later, urgent):
        assert_plain(target, one)


def test_nobody_waits_for_one_that_finds_no_pages(target: Target) -> None:
    driver = Driver(target, room_tokens=48, fewest_shared=8)
    decode = driver.ask(whole(prompt_of(16, 1), max_new_tokens=8))
    driver.step()
    too_long = driver.ask(whole(prompt_of(40)))
    fits = driver.ask(whole(prompt_of(20)))
    driver.step(3)
    assert fits.done
    assert not decode.done
    driver.drive()
    for one in (decode, too_long, fits):
        assert_plain(target, one)


def test_nobody_waits_for_one_that_has_read_it_but_whose_pages_cannot_be_found(target: Target) -> None:
    driver = Driver(target, room_tokens=400, fewest_shared=12, max_rows=10)
    session = new_id()
    first = driver.ask(whole(prompt_of(30), session))
    driver.step()
    decode = driver.ask(whole(prompt_of(30), deadline_s=time.monotonic() + PATIENCE_S, max_new_tokens=40))
    driver.step(4)
    driver.cancel(first)
    driver.drive(driver.ask(whole(prompt_of(30, 1), session)))  # over the pages under which the beginning was found
    late = driver.ask(whole(prompt_of(30)))
    driver.drive(late)
    assert not decode.done
    driver.drive()
    for one in (decode, late):
        assert_plain(target, one)


def test_tenants_do_not_share(target: Target) -> None:
    driver = Driver(target)
    driver.answer(whole(prompt_of(30), tenant="a"))
    before = target.num_rows
    assert_plain(target, driver.answer(whole(prompt_of(30), tenant="b")))
    assert target.num_rows - before == 30


def test_a_session_that_leaves_what_it_shares_leaves_the_others_alone(target: Target) -> None:
    driver = Driver(target, page_size=8)
    first, second, prompt = new_id(), new_id(), prompt_of(24)
    for session in (first, second):
        driver.answer(whole(prompt, session))
    rewritten = [*prompt[:11], 1, 1, 1, 1, 1]
    assert_plain(target, driver.answer(whole(rewritten, second)))  # from the middle of a shared page on
    kept = driver.answer(rest(first, prompt, 24, draft_ids=(1, 2)))
    again = driver.answer(whole(prompt, draft_ids=(1, 2)))
    assert kept.verdict == again.verdict
    assert_plain(target, again)


def test_a_short_request_does_not_wait_for_a_long_prompt(target: Target) -> None:
    driver = Driver(target, room_tokens=256, max_rows=8)
    long = driver.ask(whole(prompt_of(100)))
    driver.step()
    short = driver.ask(whole(prompt_of(4, 1)))
    driver.step()
    assert short.done
    assert not long.done
    driver.drive()
    assert_plain(target, short)
    assert_plain(target, long)


# Idempotence


def test_a_replayed_duplicated_or_reordered_verify_changes_nothing(target: Target) -> None:
    driver = Driver(target)
    session, prompt = new_id(), prompt_of(9)
    expected = target.plain.decode(prompt, 20, SAMPLED).token_ids
    first_draft, second_draft = (*expected[:2], VOCAB_SIZE - 1), tuple(expected[3:6])
    first = whole(prompt, session, SAMPLED, draft_ids=first_draft)
    twice = [driver.ask(first), driver.ask(first)]  # a hedge
    driver.drive()
    accepted, token, cached_length = twice[0].verdict
    log = [*prompt, *first_draft[:accepted], token]
    second = rest(session, log, cached_length, SAMPLED, draft_ids=second_draft)
    answers = [driver.answer(request).verdict for request in (second, first, second, second, first, first)]
    assert {twice[1].verdict, answers[1], answers[4], answers[5]} == {twice[0].verdict}
    assert answers[0] == answers[2] == answers[3]
    accepted, token, _ = answers[0]
    log += [*second_draft[:accepted], token]
    final = driver.answer(rest(session, log, len(log), SAMPLED, max_new_tokens=4))
    assert final.answers == [Refused(cached_length)], "all that a late one costs: what it did not mention is sent again"
    final = driver.answer(rest(session, log, cached_length, SAMPLED, max_new_tokens=4))
    assert [*log[len(prompt) :], *final.token_ids] == expected[: len(log) - len(prompt) + 4]


def test_what_was_cached_of_rejected_or_rewritten_tokens_is_not_believed(target: Target) -> None:
    driver = Driver(target)
    session, prompt = new_id(), prompt_of(9)
    token = target.plain.decode(prompt, 1).token_ids[0]
    wrong = tuple((token + i) % VOCAB_SIZE for i in range(1, 5))
    for said in range(8):  # several, as the next token may not depend on what is wrong
        assert driver.answer(whole(prompt, session, draft_ids=wrong)).verdict == (0, token, 10)
        turn = [*prompt, token, said, 12, 13]  # goes on behind the recovered token
        asked = driver.answer(rest(session, turn, 10, SAMPLED, max_new_tokens=4))
        assert asked.token_ids == target.plain.decode(turn, 4, SAMPLED).token_ids
        changed = [(t + 1) % VOCAB_SIZE if i == said else t for i, t in enumerate(turn)]
        assert_plain(target, driver.answer(whole(changed, session, SAMPLED, max_new_tokens=4)))


def test_requests_for_one_session_are_served_in_the_order_they_came(target: Target) -> None:
    driver = Driver(target)
    session, prompt, order = new_id(), prompt_of(6), list[int]()
    expected = target.plain.decode(prompt, 9, GREEDY).token_ids
    log = prompt + expected
    requests = [
        whole(prompt, session, max_new_tokens=3),
        rest(session, log[:9], 9, draft_ids=tuple(expected[3:5])),
        rest(session, log[:12], 12, max_new_tokens=2),
        whole(prompt, session),
    ]
    asked = []
    for i, request in enumerate(requests):

        def note(answer: Answer, i: int = i) -> None:
            if isinstance(answer, Extended) and answer.last:
                order.append(i)

        asked.append(driver.ask(request, on_answer=note))
    driver.drive()
    assert order == [0, 1, 2, 3]
    assert [a.token_ids for a in asked] == [expected[:3], expected[5:6], expected[6:8], expected[:1]]


@pytest.mark.parametrize(
    ("start", "known_tokens", "cached_length"),
    [
        (5, [1, 2, 3, 4, 6], 0),  # the session holds other tokens there
        (4, [9, 2, 3, 4], 0),
        (8, [1, 2, 3, 4, 5, 6, 7, 8], 7),  # beyond what it has
    ],
)
def test_a_session_taken_over_with_other_tokens_is_refused(
    target: Target, start: int, known_tokens: list[int], cached_length: int
) -> None:
    driver = Driver(target)
    session = new_id()
    before = driver.answer(whole([1, 2, 3, 4, 5, 6], session))
    assert before.extended[0].cached_length == 7
    passes = target.num_passes
    asked = driver.answer(Extend(session, start, (7,), context_hash(known_tokens[:start]), GREEDY))
    assert asked.answers == [Refused(cached_length)]
    assert target.num_passes == passes
    tokens = [1, 2, 3, 4, 5, 6, *before.token_ids, 8]
    asked = driver.answer(rest(session, tokens, 7))  # whoever knows the tokens goes on as if nothing had been
    assert asked.token_ids == target.plain.decode(tokens, 1).token_ids


def test_an_unknown_session_is_refused_when_it_relies_on_the_past(target: Target) -> None:
    driver = Driver(target)
    asked = driver.answer(rest(new_id(), [1, 2, 3], 2))
    assert asked.answers == [Refused(0)]
    assert driver.engine.load.num_sessions == 0


# Where a decode ends


@pytest.mark.parametrize("max_new_tokens", [1, 2, 9])
def test_a_decode_ends_at_its_limit_and_says_so_once(target: Target, max_new_tokens: int) -> None:
    asked = Driver(target).answer(whole(prompt_of(6), sampling=SAMPLED, max_new_tokens=max_new_tokens))
    assert len(asked.answers) == max_new_tokens
    assert [answer.last for answer in asked.extended] == [False] * (max_new_tokens - 1) + [True]
    assert [answer.cached_length for answer in asked.extended] == [7 + i for i in range(max_new_tokens)]
    assert_plain(target, asked)


def test_a_decode_ends_after_a_stop_token(target: Target) -> None:
    expected = target.plain.decode(prompt_of(6), 12, SAMPLED).token_ids
    stop = expected[7]
    asked = Driver(target).answer(
        whole(prompt_of(6), sampling=SAMPLED, max_new_tokens=12, stop_token_ids=frozenset({stop, VOCAB_SIZE + 5}))
    )
    assert asked.token_ids == expected[: expected.index(stop) + 1]


def test_a_decode_ends_when_the_window_is_full(target: Target) -> None:
    driver = Driver(target, room_tokens=20, page_size=4)
    assert driver.engine.max_context_tokens == 20
    asked = driver.answer(whole(prompt_of(6), sampling=SAMPLED, max_new_tokens=100))
    assert len(asked.token_ids) == 15  # the last one follows the twentieth token
    assert asked.token_ids == target.plain.decode(prompt_of(6), 15, SAMPLED).token_ids
    full = driver.answer(whole(prompt_of(20), max_new_tokens=5))
    assert full.token_ids == target.plain.decode(prompt_of(20), 1).token_ids


# Those who go away


def test_a_cancelled_decode_stops_and_its_session_can_be_used_again(target: Target) -> None:
    driver = Driver(target)
    session, prompt = new_id(), prompt_of(6)
    asked = driver.ask(whole(prompt, session, SAMPLED, max_new_tokens=50))
    asked.on_answer = lambda _: driver.cancel(asked) if len(asked.answers) == 3 else None
    driver.drive(asked)
    passes = target.num_passes
    tokens = prompt + asked.token_ids
    after = driver.answer(rest(session, tokens, len(tokens), SAMPLED))
    assert target.num_passes == passes + 1
    assert len(asked.answers) == 3
    assert [*asked.token_ids, *after.token_ids] == target.plain.decode(prompt, 4, SAMPLED).token_ids


def test_a_request_cancelled_before_its_turn_costs_no_pass(target: Target) -> None:
    driver = Driver(target)
    session = new_id()
    first = driver.ask(whole(prompt_of(4), session, max_new_tokens=4))
    waiting, early = driver.ask(whole(prompt_of(9), session)), driver.ask(whole(prompt_of(9)))
    driver.cancel(early)
    driver.step()
    driver.cancel(waiting)
    passes = target.num_passes
    driver.drive(first)
    assert target.num_passes == passes + 3
    assert (waiting.answers, early.answers) == ([], [])
    driver.release(session)
    assert driver.num_used_pages == 0


def test_requests_cancelled_behind_a_busy_session_are_forgotten_at_once(target: Target) -> None:
    """Else whoever sends and cancels while a long answer is under way fills the engine's memory."""
    driver = Driver(target)
    session = new_id()
    first = driver.ask(whole(prompt_of(4), session, max_new_tokens=4))
    for _ in range(50):
        driver.cancel(driver.ask(whole(prompt_of(9), session)))
    kept = driver.ask(whole(prompt_of(9), session))
    assert driver.engine.load.num_waiting == 2
    driver.drive(first, kept)
    assert_plain(target, kept)


@pytest.mark.parametrize("max_rows", [4, 512])
def test_a_prompt_cancelled_half_way_leaves_a_usable_cache(target: Target, max_rows: int) -> None:
    driver = Driver(target, max_rows=max_rows)
    session, prompt = new_id(), prompt_of(30)
    asked = driver.ask(whole(prompt, session))
    if max_rows < 30:
        driver.step(3)
    driver.cancel(asked)
    other = driver.answer(whole(prompt_of(3, 1)))
    again = driver.answer(whole(prompt, session))
    assert asked.answers == []
    assert_plain(target, other)
    assert_plain(target, again)


def test_a_session_released_while_busy_finishes_and_is_forgotten(target: Target) -> None:
    driver = Driver(target)
    session = new_id()
    first = driver.ask(whole(prompt_of(5), session, max_new_tokens=6))
    driver.step(2)
    waiting = driver.ask(whole(prompt_of(7), session))
    driver.release(session)
    driver.drive()
    assert_plain(target, first)
    assert_plain(target, waiting)
    assert driver.num_used_pages == 0
    assert driver.answer(rest(session, prompt_of(8), 7)).answers == [Refused(0)]


def test_releasing_an_unknown_session_is_fine(target: Target) -> None:
    driver = Driver(target)
    driver.release(new_id())
    assert_plain(target, driver.answer(whole(prompt_of(4))))


class Clock:
    """Time that passes when the test says so."""

    now_s = 1000.0

    def monotonic(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(engine_module, "time", SimpleNamespace(monotonic=clock.monotonic, perf_counter=time.perf_counter))
    return clock


def test_an_idle_session_expires_and_a_busy_one_does_not(target: Target, clock: Clock) -> None:
    driver = Driver(target, room_tokens=256, idle_s=60.0)
    idle, busy = new_id(), new_id()
    driver.answer(whole(prompt_of(5), idle))
    decode = driver.ask(whole(prompt_of(5, 1), busy, max_new_tokens=6))
    driver.step()
    clock.now_s += 59.0
    driver.step()
    assert driver.engine._sessions.get(idle) is not None
    clock.now_s += 2.0
    driver.step()
    assert driver.engine._sessions.get(idle) is None
    clock.now_s += 100.0
    driver.drive()
    assert_plain(target, decode)
    clock.now_s += 61.0
    driver.engine.step()
    assert driver.num_used_pages == 0


def test_the_session_of_a_client_that_went_away_expires_soon(target: Target, clock: Clock) -> None:
    driver = Driver(target, room_tokens=256, idle_s=300.0)
    gone, kept = new_id(), new_id()
    driver.answer(whole(prompt_of(5), kept))
    asked = driver.ask(whole(prompt_of(5, 1), gone, max_new_tokens=9))
    driver.step()
    driver.cancel(asked)
    driver.step()
    clock.now_s += CANCELLED_GRACE_S - 1.5
    driver.engine.step()
    assert driver.engine._sessions.get(gone) is not None
    clock.now_s += 3.0
    driver.engine.step()
    assert driver.engine._sessions.get(gone) is None
    assert driver.engine._sessions.get(kept) is not None


# No room


@pytest.mark.parametrize("max_rows", [5, 512])
def test_two_prompts_that_do_not_fit_together_do_not_block_each_other(target: Target, max_rows: int) -> None:
    driver = Driver(target, room_tokens=40, max_rows=max_rows)
    first, second = driver.ask(whole(prompt_of(30))), driver.ask(whole(prompt_of(30, 1)))
    driver.drive()
    assert_plain(target, first)
    assert_plain(target, second)


def test_a_request_waits_while_those_that_hold_the_pages_go_on(target: Target) -> None:
    driver = Driver(target, room_tokens=32)
    decode = driver.ask(whole(prompt_of(20), max_new_tokens=10))
    driver.step()
    waiting = driver.ask(whole(prompt_of(16, 1)))
    driver.step(3)
    assert not waiting.answers
    driver.drive()
    assert_plain(target, decode)
    assert_plain(target, waiting)


def test_decodes_that_outgrow_the_cache_end_with_one_of_them_overloaded(target: Target) -> None:
    driver = Driver(target, room_tokens=40)
    decodes = [driver.ask(whole(prompt_of(10, i), max_new_tokens=25)) for i in range(2)]
    driver.drive()
    ends = [type(asked.answers[-1]) for asked in decodes]
    assert sorted(end.__name__ for end in ends) == ["Extended", "Overloaded"]
    broken = decodes[ends.index(Overloaded)]
    got = [answer.next_token_id for answer in broken.answers if isinstance(answer, Extended)]
    resumed = driver.answer(whole(list(broken.request.context_ids) + got, max_new_tokens=25 - len(got)))
    assert target.plain.decode(list(broken.request.context_ids), 25).agrees_with(got + resumed.token_ids)
    assert_plain(target, decodes[ends.index(Extended)])


def test_a_tenant_over_its_quota_loses_its_own_idle_sessions_and_nobody_elses(target: Target) -> None:
    driver = Driver(target, room_tokens=200)
    other = whole(prompt_of(20, 9), tenant="other")
    driver.answer(other)
    asked = [driver.answer(whole(prompt_of(20, i), tenant="full", max_cache_tokens=42)) for i in range(5)]
    assert driver.engine._pool.num_held("full") == 10
    before = target.num_rows
    for request in (other, asked[4].request, asked[3].request):  # still there
        assert_plain(target, driver.answer(request))
    assert target.num_rows - before == 3


def test_a_tenant_whose_sessions_at_work_hold_its_quota_is_told_to_come_again_and_others_go_on(target: Target) -> None:
    driver = Driver(target, room_tokens=200)
    busy = [driver.ask(whole(prompt_of(16, i), tenant="full", max_cache_tokens=40, max_new_tokens=4)) for i in range(2)]
    driver.step()
    late = driver.ask(whole(prompt_of(16, 2), tenant="full", max_cache_tokens=40))
    other = driver.ask(whole(prompt_of(40, 3), tenant="other", max_cache_tokens=40))
    driver.step()
    (refusal,) = late.answers
    assert isinstance(refusal, Overloaded)
    assert "max_cache_tokens" in refusal.reason
    assert refusal.retry_after_ms > 0
    assert other.done
    driver.drive()
    for one in (*busy, other, driver.answer(late.request)):
        assert_plain(target, one)


def test_of_decodes_that_outgrow_their_tenants_quota_the_last_one_makes_room(target: Target) -> None:
    driver = Driver(target, room_tokens=400)
    options: dict[str, Any] = {"tenant": "full", "max_cache_tokens": 40}
    decodes = [driver.ask(whole(prompt_of(12 - i, i), **options, max_new_tokens=20)) for i in range(3)]
    driver.drive()
    assert [type(asked.answers[-1]) for asked in decodes] == [Extended, Overloaded, Overloaded]
    assert_plain(target, decodes[0])
    for asked in decodes[1:]:
        context = [*asked.request.context_ids, *(a.next_token_id for a in asked.answers if isinstance(a, Extended))]
        resumed = driver.answer(whole(context, **options, max_new_tokens=30 - len(context)))
        assert target.plain.decode(context, 30 - len(context)).agrees_with(resumed.token_ids)


def test_a_page_that_several_sessions_of_a_tenant_hold_counts_once(target: Target) -> None:
    driver = Driver(target, room_tokens=200)
    asked = [
        driver.ask(whole([*prompt_of(24), i], tenant="full", max_cache_tokens=36, max_new_tokens=3, sampling=SAMPLED))
        for i in range(3)
    ]
    driver.drive()
    for one in asked:
        assert_plain(target, one)


def test_pages_that_are_found_count_before_anything_is_written(target: Target) -> None:
    driver = Driver(target, room_tokens=200, max_rows=1)
    options: dict[str, Any] = {"tenant": "full", "max_cache_tokens": 40}
    before = new_id()
    driver.answer(whole(prompt_of(32), before, **options))
    driver.release(before)
    busy = driver.ask(whole(prompt_of(20, 1), **options, max_new_tokens=6, deadline_s=time.monotonic() + PATIENCE_S))
    driver.step(20)
    found = driver.ask(whole([*prompt_of(32), 1], **options))
    while not busy.done:
        driver.step()
        assert driver.engine._pool.num_held("full") <= 10
    driver.drive()
    for one in (busy, found):
        assert_plain(target, one)


@pytest.mark.parametrize("max_cache_tokens", [1, 4, 17, 40])
def test_a_context_as_long_as_the_quota_is_answered(target: Target, max_cache_tokens: int) -> None:
    driver = Driver(target, room_tokens=200)
    for salt in range(3):  # with what is left of others in the way
        request = whole(prompt_of(max_cache_tokens, salt), tenant="full", max_cache_tokens=max_cache_tokens)
        assert_plain(target, driver.answer(request))


def test_a_server_of_busy_sessions_takes_no_more_until_one_is_idle(target: Target) -> None:
    driver = Driver(target, max_sessions=2)
    busy = [driver.ask(whole(prompt_of(4, i), max_new_tokens=4)) for i in range(2)]
    refused = driver.ask(whole(prompt_of(4, 2)))
    driver.drive(refused)
    (answer,) = refused.answers
    assert isinstance(answer, Overloaded)
    assert "busy" in answer.reason
    driver.drive()
    assert_plain(target, driver.answer(refused.request))
    for asked in busy:
        assert_plain(target, asked)
    assert len(driver.engine._sessions) == 2


def test_a_cache_that_holds_no_page_is_refused(target: Target) -> None:
    with pytest.raises(ConfigError, match=f"1000 bytes holds no page of 16 tokens at {target.served.bytes_per_token} bytes"):
        Engine(target.served, cache_bytes=1000, page_size=16)


# A pass that breaks


@pytest.mark.parametrize("moment", ["before_forward", "after_forward"])
def test_a_broken_pass_fails_its_requests_only_and_the_sessions_go_on(target: Target, moment: str) -> None:
    """After the forward the cache has been written already: what was written must not be believed."""
    driver = Driver(target, max_rows=12)
    sessions = [new_id() for _ in range(3)]
    for i, session in enumerate(sessions):
        driver.answer(whole(prompt_of(6, i), session))

    def break_once() -> None:
        target.before_forward = target.after_forward = lambda: None
        raise RuntimeError("the accelerator fell off")

    broken = [driver.ask(whole(prompt_of(12, i), session)) for i, session in enumerate(sessions[:2])]
    spared = driver.ask(whole(prompt_of(20, 2), sessions[2]))  # does not fit into the pass beside them
    behind = driver.ask(whole(prompt_of(5, 0), sessions[0]))
    setattr(target, moment, break_once)
    driver.drive()
    for asked in broken:
        assert asked.answers == [Failed("RuntimeError: the accelerator fell off")]
    for asked in (spared, behind, *(driver.answer(asked.request) for asked in broken)):
        assert_plain(target, asked)
    for session in sessions:
        driver.release(session)
    assert driver.num_used_pages == 0


def test_a_pass_that_breaks_in_the_middle_of_a_prompt_or_a_decode_loses_nothing_else(target: Target) -> None:
    driver = Driver(target, max_rows=8)
    session, prompt = new_id(), prompt_of(20)
    asked = driver.ask(whole(prompt, session, SAMPLED, max_new_tokens=6))
    driver.step(5)  # three chunks and two tokens more
    assert len(asked.answers) == 3

    def break_once() -> None:
        target.after_forward = lambda: None
        raise MemoryError("full")

    target.after_forward = break_once
    driver.drive()
    assert asked.answers[-1] == Failed("MemoryError: full")
    got = [answer.next_token_id for answer in asked.answers if isinstance(answer, Extended)]
    tokens = prompt + got
    resumed = driver.answer(rest(session, tokens, len(tokens), SAMPLED, max_new_tokens=6 - len(got)))
    assert target.plain.decode(prompt, 6, SAMPLED).agrees_with(got + resumed.token_ids)


# Behind its socket


async def gather(runner: EngineClient, request: Extend, take: int = 10**9) -> list[Answer]:
    answers: list[Answer] = []
    async with aclosing(runner.extend(request)) as stream:  # type: ignore[type-var]  # an async generator
        async for answer in stream:
            answers.append(answer)
            if len(answers) == take:
                break
    return answers


def test_many_at_once_are_answered_as_plain_decoding_does(target: Target) -> None:
    engine = Driver(target, room_tokens=80, max_rows=16).engine
    requests = [whole(prompt_of(3 + 2 * i, i), sampling=SAMPLED, max_new_tokens=4) for i in range(8)]

    async def ask_until_there_is_room(runner: EngineClient, request: Extend) -> list[Answer]:
        while True:
            answers = await gather(runner, request)
            if not isinstance(answers[-1], Overloaded):
                return answers
            await asyncio.sleep(0.01)

    async def ask_all() -> list[list[Answer]]:
        async with engine_thread(engine) as runner:
            return await asyncio.gather(*(ask_until_there_is_room(runner, request) for request in requests))

    for request, answers in zip(requests, asyncio.run(ask_all()), strict=True):
        assert_plain(target, Asked(request, answers))


def test_leaving_the_iterator_frees_the_session_for_the_next_request(target: Target) -> None:
    engine = Driver(target).engine
    session = new_id()
    first_pass, left = target.num_passes + 1, threading.Event()

    def wait_in_the_third_pass() -> None:
        assert target.num_passes < first_pass + 2 or left.wait(PATIENCE_S)

    target.before_forward = wait_in_the_third_pass

    async def leave_and_return() -> list[Answer]:
        async with engine_thread(engine) as runner:
            await gather(runner, whole(prompt_of(5), session, max_new_tokens=100), take=2)
            left.set()
            return await gather(runner, whole(prompt_of(5), session, draft_ids=(1,)))

    answers = asyncio.run(leave_and_return())
    assert target.num_passes <= first_pass + 3
    assert_plain(target, Asked(whole(prompt_of(5), session, draft_ids=(1,)), answers))


def test_who_waits_for_an_engine_that_is_gone_is_told_and_so_is_who_asks_later(target: Target) -> None:
    stopped, left = threading.Event(), threading.Event()

    def wait_in_a_pass() -> None:
        stopped.set()
        assert left.wait(PATIENCE_S)

    target.before_forward = wait_in_a_pass

    async def ask() -> list[list[Answer]]:
        async with engine_thread(Driver(target).engine) as runner:
            waiting = asyncio.create_task(gather(runner, whole([1, 2])))
            await asyncio.to_thread(stopped.wait, PATIENCE_S)
            runner.give_up("it died")
            left.set()
            return [await waiting, await gather(runner, whole([1]))]

    assert asyncio.run(ask()) == [[Gone("it died")]] * 2
