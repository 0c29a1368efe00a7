"""Tokens become text: stop strings, characters of several tokens, limits, and what is counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from screen import Screen
from tiny import END_OF_TURN_ID, TOKENIZER_SIZE, make_tiny_llama

from edgecloud.edge.tokenizer import ChatTokenizer
from edgecloud.generation import Generation, longest_stop_prefix
from edgecloud.types import CallCost, Event, Mode, ModeChanged, ModeSpan, Round, TokenEvent

EOS = END_OF_TURN_ID


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    """Bytes are tokens, so a character outside ASCII takes two to four of them."""
    return ChatTokenizer(make_tiny_llama(tmp_path_factory.mktemp("tiny")) / "tokenizer.json", None, {})


def begin(tokenizer: ChatTokenizer, *stop_strings: str, max_new_tokens: int = 1000) -> Generation:
    return Generation(3, tokenizer.stream(), max_new_tokens, {EOS}, stop_strings)


def run(generation: Generation, token_ids: Sequence[int], sizes: Sequence[int] = (1,)) -> list[TokenEvent]:
    """Give tokens in rounds of the given sizes, in turn, until the generation says that it has ended."""
    events: list[Event] = []
    at = number = 0
    while at < len(token_ids) and generation.finish_reason is None:
        size = sizes[number % len(sizes)]
        events += generation.add(Round(list(token_ids[at : at + size]), "speculative", "final", size - 1, size - 1))
        at, number = at + size, number + 1
    return [event for event in events if isinstance(event, TokenEvent)]


def shown(events: Sequence[TokenEvent]) -> str:
    return "".join(event.text for event in events)


sizes = st.lists(st.integers(1, 6), min_size=1, max_size=5)
# few letters: stop strings then overlap with the text and with each other
words = st.text("ab", max_size=30)
stops = st.lists(st.text("ab", min_size=1, max_size=4), max_size=3)


# Stop strings


@given(words, stops, sizes)
def test_the_text_ends_before_the_first_stop_string(tokenizer: ChatTokenizer, text: str, stop: list[str], size: list[int]) -> None:
    token_ids = tokenizer.encode_rendered(text)
    generation = begin(tokenizer, *stop)
    events = run(generation, token_ids, size)
    ends = [(text.find(s) + len(s), text.find(s)) for s in stop if s in text]
    reply = generation.reply()
    if not ends:
        assert (reply.text, reply.finish_reason, reply.token_ids) == (text, "cancelled", token_ids)
        assert text.startswith(shown(events))
        held = text[len(shown(events)) :]
        assert len(held) == longest_stop_prefix(text, stop)  # nothing else is held back
        return
    completed = min(end for end, _ in ends)  # the first that is complete ends it; of these the longest cuts the text
    assert reply.text == text[: min(start for end, start in ends if end == completed)]
    assert reply.finish_reason == "stop"
    assert reply.token_ids == token_ids[:completed]  # the ids that made the stop string are kept
    assert shown(events) == reply.text
    assert [token for event in events for token in event.token_ids] == reply.token_ids


@given(words, stops)
def test_the_rounds_do_not_change_the_text(tokenizer: ChatTokenizer, text: str, stop: list[str]) -> None:
    token_ids = [*tokenizer.encode_rendered(text), EOS]
    one, whole = begin(tokenizer, *stop), begin(tokenizer, *stop)
    run(one, token_ids)
    run(whole, token_ids, [len(token_ids)])
    assert (one.reply().text, one.token_ids, one.finish_reason) == (whole.reply().text, whole.token_ids, whole.finish_reason)


@given(st.text("abc", max_size=12), st.lists(st.text("abc", min_size=1, max_size=5), max_size=4))
def test_what_may_become_a_stop_string_is_held_back(text: str, stop: list[str]) -> None:
    longest = longest_stop_prefix(text, stop)
    beginnings = {s[:length] for s in stop for length in range(1, len(s))}
    assert longest == max((n for n in range(1, len(text) + 1) if text[-n:] in beginnings), default=0)


def test_a_stop_string_inside_one_round_cuts_the_round(tokenizer: ChatTokenizer) -> None:
    generation = begin(tokenizer, "STOP")
    events = run(generation, tokenizer.encode_rendered("go on STOP and more"), [100])
    assert (shown(events), len(generation.token_ids)) == ("go on ", len("go on STOP"))


def test_a_beginning_of_a_stop_string_is_shown_when_it_comes_to_nothing(tokenizer: ChatTokenizer) -> None:
    generation = begin(tokenizer, "<end>")
    events = run(generation, tokenizer.encode_rendered("a <en b"))
    assert [event.text for event in events] == ["a", " ", "", "", "", "<en ", "b"]


@pytest.mark.parametrize("last", ["EOS", "limit"])
def test_a_beginning_of_a_stop_string_is_shown_when_the_answer_ends(tokenizer: ChatTokenizer, last: str) -> None:
    token_ids = tokenizer.encode_rendered("a <e")
    generation = begin(tokenizer, "<end>", max_new_tokens=4 if last == "limit" else 9)
    events = run(generation, [*token_ids, EOS])
    assert shown(events) == generation.reply().text == "a <e"
    assert generation.finish_reason == ("length" if last == "limit" else "stop")


def test_a_stop_string_of_multi_byte_characters(tokenizer: ChatTokenizer) -> None:
    generation = begin(tokenizer, "界🦊")
    events = run(generation, tokenizer.encode_rendered("你好世界🦊 more"), [5])
    assert shown(events) == generation.reply().text == "你好世"


# Characters


@given(st.text(st.characters(exclude_categories=("Cs",)), max_size=20), sizes)
def test_a_character_is_never_shown_half(tokenizer: ChatTokenizer, text: str, size: list[int]) -> None:
    token_ids = [*tokenizer.encode_rendered(text), EOS]
    generation = begin(tokenizer)
    events = run(generation, token_ids, size)
    assert shown(events) == generation.reply().text == text
    so_far = ""
    for event in events:
        so_far += event.text
        assert text.startswith(so_far)


@given(st.lists(st.integers(0, TOKENIZER_SIZE - 1).filter(lambda token: token != EOS), min_size=1, max_size=40), sizes)
def test_any_tokens_give_the_text_that_they_decode_to(tokenizer: ChatTokenizer, token_ids: list[int], size: list[int]) -> None:
    generation = begin(tokenizer, max_new_tokens=len(token_ids))
    events = run(generation, token_ids, size)
    text = generation.reply().text
    whole = tokenizer.decode(token_ids)
    assert shown(events) == text
    assert whole.startswith(text)
    assert set(whole[len(text) :]) <= {"\ufffd"}  # only an unfinished character at the very end is left out


# The end


def test_the_stop_token_is_kept_in_the_ids_and_not_in_the_text(tokenizer: ChatTokenizer) -> None:
    generation = begin(tokenizer)
    events = run(generation, [*tokenizer.encode_rendered("hi"), EOS, *tokenizer.encode_rendered("there")], [8])
    reply = generation.reply()
    assert reply.token_ids == [*tokenizer.encode_rendered("hi"), EOS]
    assert (reply.text, shown(events), reply.finish_reason) == ("hi", "hi", "stop")
    assert reply.usage.completion_tokens == 3


def test_one_token(tokenizer: ChatTokenizer) -> None:
    generation = begin(tokenizer, max_new_tokens=1)
    events = run(generation, tokenizer.encode_rendered("hi"), [2])
    reply = generation.reply()
    assert (reply.text, shown(events), len(reply.token_ids), reply.finish_reason) == ("h", "h", 1, "length")
    assert (reply.metrics.tpot_ms, reply.usage.prompt_tokens) == (0.0, 3)


def test_a_stop_token_that_comes_last_of_all_is_a_stop(tokenizer: ChatTokenizer) -> None:
    generation = begin(tokenizer, max_new_tokens=1)
    run(generation, [EOS])
    assert (generation.finish_reason, generation.reply().text) == ("stop", "")


def test_nothing_yet(tokenizer: ChatTokenizer) -> None:
    reply = begin(tokenizer).reply()
    assert (reply.text, reply.token_ids, reply.finish_reason, reply.mode_timeline) == ("", [], "cancelled", [])
    metrics = reply.metrics
    assert (metrics.ttft_ms, metrics.tpot_ms, metrics.rtt_ms, metrics.target_passes_per_token) == (0.0, 0.0, None, 0.0)
    assert (metrics.mean_acceptance_length, metrics.acceptance_histogram) == (1.0, [])


# What is counted

ONE = CallCost(target_passes=1.0, queue_ms=1.0, compute_ms=2.0, elapsed_ms=10.0, uplink_bytes=20, downlink_bytes=30)


def round_of(num_drafted: int, num_accepted: int, mode: Mode = "speculative", cost: CallCost = ONE) -> Round:
    status = "provisional" if mode == "edge" else "final"
    return Round([10] * (num_accepted + 1), mode, status, num_drafted, num_accepted, cost)


@given(st.lists(st.integers(0, 8).flatmap(lambda k: st.tuples(st.just(k), st.integers(0, k))), min_size=1, max_size=20))
def test_the_counts_agree_with_each_other(tokenizer: ChatTokenizer, rounds: list[tuple[int, int]]) -> None:
    generation = begin(tokenizer)
    for num_drafted, num_accepted in rounds:
        generation.add(round_of(num_drafted, num_accepted))
    metrics = generation.reply().metrics
    drafted = [(k, n) for k, n in rounds if k]
    assert metrics.num_rounds == len(drafted) == sum(metrics.acceptance_histogram)
    assert metrics.num_draft_tokens == sum(k for k, _ in drafted)
    assert metrics.num_accepted_tokens == sum(i * n for i, n in enumerate(metrics.acceptance_histogram))
    assert metrics.num_accepted_tokens == sum(n for _, n in drafted)
    if drafted:
        assert metrics.mean_acceptance_length == pytest.approx(1 + metrics.num_accepted_tokens / metrics.num_rounds)
        assert len(metrics.acceptance_histogram) == max(k for k, _ in drafted) + 1
    assert metrics.target_passes == len(rounds)
    assert metrics.target_passes_per_token == pytest.approx(len(rounds) / len(generation.token_ids))
    assert (metrics.uplink_bytes, metrics.downlink_bytes) == (20 * len(rounds), 30 * len(rounds))
    assert metrics.rtt_ms == pytest.approx(7.0)  # elapsed, less what the server says it took
    assert 0 <= metrics.ttft_ms <= metrics.total_ms


def test_a_streamed_token_says_nothing_of_the_round_trip(tokenizer: ChatTokenizer) -> None:
    generation = begin(tokenizer)
    generation.add(round_of(0, 0, "cloud"))
    generation.add(round_of(0, 0, "cloud", replace(ONE, uplink_bytes=0, elapsed_ms=500.0)))
    assert generation.reply().metrics.rtt_ms == pytest.approx(7.0)


def test_the_timeline_tells_each_mode_and_draft_length_once(tokenizer: ChatTokenizer) -> None:
    generation = begin(tokenizer)
    events: list[Event] = []
    for round_ in (round_of(0, 0, "cloud"), round_of(0, 0, "cloud"), round_of(4, 2), round_of(4, 0), round_of(2, 2)):
        events += generation.add(round_)
    events += generation.add(round_of(0, 0, "edge", CallCost()))
    events += generation.add(round_of(0, 0, "edge", CallCost()))
    assert generation.reply().mode_timeline == [
        ModeSpan(0, "cloud", 0),
        ModeSpan(2, "speculative", 4),
        ModeSpan(6, "speculative", 2),
        ModeSpan(9, "edge", 0),
    ]
    changes = [event for event in events if isinstance(event, ModeChanged)]
    assert [change.mode for change in changes] == ["speculative", "edge"]
    assert [event.status for event in events if isinstance(event, TokenEvent)] == ["final"] * 5 + ["provisional"] * 2
    assert generation.reply().metrics.num_unverified_tokens == 2


def test_tokens_cut_off_the_end_of_a_round_are_not_counted(tokenizer: ChatTokenizer) -> None:
    generation = begin(tokenizer, max_new_tokens=3)
    (event,) = generation.add(Round([10] * 8, "edge", "provisional"))
    assert isinstance(event, TokenEvent)
    assert event.token_ids == [10] * 3
    reply = generation.reply()
    assert (reply.usage.completion_tokens, reply.metrics.num_unverified_tokens) == (3, 3)


def test_the_reply_as_an_object_has_the_keys_that_scripts_read(tokenizer: ChatTokenizer) -> None:
    generation = begin(tokenizer)
    generation.add(round_of(4, 1))
    content = generation.reply().to_dict()
    assert list(content) == ["text", "token_ids", "finish_reason", "usage", "metrics", "mode_timeline", "unverified_spans"]
    assert content["mode_timeline"] == [{"token": 0, "mode": "speculative", "num_draft_tokens": 4}]


# Guesses


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 6), st.text("abé🦊", max_size=4)), max_size=12), stops)
def test_guesses_leave_no_trace_in_text_or_tokens(
    tokenizer: ChatTokenizer, rounds: list[tuple[int, int, str]], stop: list[str]
) -> None:
    """Whatever was guessed, right or wrong, in part or beyond a stop string: in the end the screen holds the reply."""
    final = [tokenizer.encode_rendered(text) for _, _, text in rounds]
    plain, guessing, screen = begin(tokenizer, *stop), begin(tokenizer, *stop), Screen()
    at = 0
    whole = [token for ids in final for token in ids]
    tail: list[int] = []
    for (num_right, num_wrong, _), ids in zip(rounds, final, strict=True):
        if guessing.finish_reason is not None:
            break
        known = at + len(tail)
        guess = [*whole[known : known + num_right], *[70 + i for i in range(num_wrong)]]
        for token in guess:
            for event in guessing.guess([token]):
                screen.show(event)
        tail += guess
        for event in guessing.add(Round(list(ids), "speculative", "final")):
            screen.show(event)
        plain.add(Round(list(ids), "speculative", "final"))
        at += len(ids)
        same = next((i for i, (a, b) in enumerate(zip(ids, tail, strict=False)) if a != b), min(len(ids), len(tail)))
        tail = tail[same:] if same == len(ids) else []
        assert screen.provisional == (tail if guessing.finish_reason is None else [])
    for event in guessing.withdraw():
        screen.show(event)
    reply = guessing.reply()
    assert (reply.text, reply.token_ids, reply.finish_reason) == (
        plain.reply().text,
        plain.reply().token_ids,
        plain.reply().finish_reason,
    )
    assert (screen.final, screen.provisional) == (reply.token_ids, [])
    assert reply.text.startswith(screen.text)
    assert screen.num_retracted == reply.metrics.num_retracted_tokens
    assert reply.text == screen.text or reply.finish_reason == "cancelled"  # what is held back may begin a stop string


def test_a_guessed_stop_token_shows_nothing(tokenizer: ChatTokenizer) -> None:
    """Some models stop at a token that has text."""
    letter = tokenizer.encode_rendered("b")[0]
    generation = Generation(3, tokenizer.stream(), 9, {letter}, ())
    screen = Screen([*generation.guess([*tokenizer.encode_rendered("a"), letter])])
    assert screen.text == "a"
    for event in generation.add(Round([*tokenizer.encode_rendered("a"), letter], "speculative", "final")):
        screen.show(event)
    assert (screen.text, generation.reply().text, generation.finish_reason) == ("a", "a", "stop")
