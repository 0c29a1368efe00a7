"""Conversations: ids and caches are kept between turns, and only what is new travels."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pairs import Gate, Pair, Server, copy_of, edit_manifest, list_file, once_reachable, until
from tiny import CHAT_TEMPLATE

from edgecloud.client import Client
from edgecloud.edge.retry import Timeout
from edgecloud.errors import CloudUnavailableError, ConfigError, ContextLengthError

pytest_plugins = ["pairs"]

SAMPLED: dict[str, Any] = {"max_new_tokens": 12, "temperature": 1.0, "seed": 11}
MODES = ["cloud", "speculative", "auto"]
TURNS = ["Why is the sky blue?", "naïve 🦊?", "And at night?"]


@pytest.fixture
def client(tiny_pair: Pair, tiny_server: Server) -> Iterator[Client]:
    with Client(tiny_pair.bundle, tiny_server.address, num_threads=1) as made:
        yield made


def with_template(pair: Pair, to: Path, template: str) -> Path:
    bundle = copy_of(pair.bundle, to)
    name = "edge/draft/chat_template.jinja"
    (bundle / name).write_text(template)
    edit_manifest(bundle, lambda content: list_file(content, bundle, name))
    return bundle


@pytest.mark.parametrize("mode", MODES)
def test_every_turn_equals_a_fresh_generation_over_the_same_ids(client: Client, mode: str) -> None:
    with client.session("Be brief.") as session:
        for turn in TURNS:
            before = list(session.token_ids)
            reply = session.generate(turn, mode=mode, **SAMPLED)
            assert session.token_ids[: len(before)] == before  # what was said stays as it was generated
            prompt = session.token_ids[: -len(reply.token_ids)]
            assert reply.usage.prompt_tokens == len(prompt)
            fresh = client.start(prompt, None, mode="cloud", **SAMPLED).finish()
            assert (fresh.token_ids, fresh.text) == (reply.token_ids, reply.text)
            assert session.messages[-1] == {"role": "assistant", "content": reply.text}
        assert [message["role"] for message in session.messages] == ["system", *["user", "assistant"] * 3]


def test_every_mode_holds_the_same_conversation(client: Client) -> None:
    conversations = []
    for mode in MODES:
        with client.session() as session:
            for turn in TURNS:
                session.generate(turn, mode=mode, **SAMPLED)
            conversations.append((session.token_ids, session.messages))
    assert conversations[0] == conversations[1] == conversations[2]


def test_the_mode_may_change_between_turns(client: Client) -> None:
    with client.session() as one, client.session() as other:
        for number, turn in enumerate(TURNS):
            one.generate(turn, mode="cloud", **SAMPLED)
            other.generate(turn, mode=MODES[number], **SAMPLED)
        assert one.token_ids == other.token_ids


@pytest.mark.parametrize("mode", MODES)
def test_a_later_turn_sends_only_what_is_new(client: Client, mode: str) -> None:
    with client.session() as session:
        first = session.generate("x" * 200, mode=mode, max_new_tokens=4)
        known = len(session.token_ids)
        second = session.generate("y" * 10, mode=mode, max_new_tokens=4)
        new = second.usage.prompt_tokens - known
        assert new < 60 < known
        assert first.metrics.uplink_bytes > 200
        one_call = 16 + 2 + 9 + 2 * new + 60  # session id, hash, new ids of two bytes at most, the rest of the message
        num_calls = max(1, 1 + second.metrics.num_rounds)
        assert second.metrics.uplink_bytes < one_call + 60 * (num_calls - 1)
        assert second.metrics.target_passes <= 4


@pytest.mark.parametrize("mode", MODES)
def test_a_turn_left_early_changes_nothing(client: Client, mode: str) -> None:
    with client.session() as session, client.session() as other:
        for each in (session, other):
            each.generate(TURNS[0], mode=mode, **SAMPLED)
        before = (list(session.token_ids), list(session.messages))
        with session.stream("Never mind.", mode=mode, max_new_tokens=100, repetition_penalty=1.2) as stream:
            next(stream)
            next(stream)
        assert (session.token_ids, session.messages) == before
        with pytest.raises(ConfigError, match="top_p"):
            session.generate("And this?", top_p=7)
        with pytest.raises(ContextLengthError):
            session.generate("z" * 600)
        assert (session.token_ids, session.messages) == before
        assert session.generate(TURNS[1], mode=mode, **SAMPLED).text == other.generate(TURNS[1], mode=mode, **SAMPLED).text


def test_a_turn_that_broke_changes_nothing_and_can_be_taken_again(tiny_pair: Pair, gate: Gate) -> None:
    timeout = Timeout(connect_s=2.0, request_s=10.0, retry_s=0.3)
    options: dict[str, Any] = {"mode": "speculative", "max_new_tokens": 100, "repetition_penalty": 1.2}
    with Client(tiny_pair.bundle, gate.address, timeout=timeout, num_threads=1) as client, client.session() as session:
        session.generate(TURNS[0], **SAMPLED)
        before = (list(session.token_ids), list(session.messages))
        stream = session.stream(TURNS[1], **options)
        next(stream)
        gate.shut()
        with pytest.raises(CloudUnavailableError):
            stream.finish()
        assert (session.token_ids, session.messages) == before
        gate.open()
        reply = once_reachable(lambda: session.generate(TURNS[1], **options))
        prompt = session.token_ids[: -len(reply.token_ids)]
        assert client.start(prompt, None, **{**options, "mode": "cloud"}).finish().token_ids == reply.token_ids


@pytest.mark.parametrize(
    "template",
    [
        CHAT_TEMPLATE.replace("message['content']", "(message['content'] | trim | upper)"),
        CHAT_TEMPLATE.replace("in messages", "in messages[-1:]"),
        CHAT_TEMPLATE.replace("<|im_end|>\\n", "\\n"),
    ],
    ids=["rewrites", "forgets", "ends turns otherwise"],
)
def test_a_template_of_another_kind_gives_what_it_renders(
    tiny_pair: Pair, tiny_server: Server, tmp_path: Path, template: str
) -> None:
    bundle = with_template(tiny_pair, tmp_path / "bundle", template)
    with Client(bundle, tiny_server.address, num_threads=1) as client, client.session("System.") as session:
        session.generate("one", **SAMPLED)
        first = list(session.token_ids)
        reply = session.generate("two", **SAMPLED)
        prompt = session.token_ids[: -len(reply.token_ids)]
        messages = [*session.messages[:-1]]
        whole = client.tokenizer.encode_chat(messages)
        kept = prompt[: len(first)] == first
        if not kept:  # the template rewrote what was said, so all of it was encoded anew
            assert prompt == whole
        fresh = client.start(prompt, None, mode="cloud", **SAMPLED).finish()
        assert fresh.token_ids == reply.token_ids


def test_a_rewritten_history_is_encoded_anew(tiny_pair: Pair, tiny_server: Server, tmp_path: Path) -> None:
    template = CHAT_TEMPLATE.replace("message['content']", "(message['content'] | replace('one', 'ONE' if loop.last else '1'))")
    bundle = with_template(tiny_pair, tmp_path / "bundle", template)
    with Client(bundle, tiny_server.address, num_threads=1) as client, client.session() as session:
        session.generate("one", **SAMPLED)
        first = list(session.token_ids)
        reply = session.generate("two", **SAMPLED)
        prompt = session.token_ids[: -len(reply.token_ids)]
        assert prompt != first + prompt[len(first) :]
        assert prompt == client.tokenizer.encode_chat(session.messages[:-1])


def test_the_end_of_turn_token_is_not_sent_twice(client: Client) -> None:
    """Whether an answer ended by itself or was cut, the next turn follows its one end token."""
    end = client.bundle.tokenizer.eos_token_ids[0]
    with client.session() as session:
        session.messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        rendered = client.tokenizer.encode_chat(session.messages[:1]) + client.tokenizer.encode_rendered("b")
        whole = client.tokenizer.encode_chat([*session.messages, {"role": "user", "content": "c"}])
        for token_ids in ([*rendered, end], rendered):
            session.token_ids = list(token_ids)
            assert session._turn_tokens({"role": "user", "content": "c"}) == whole


def test_closing_a_session_frees_it(client: Client, tiny_server: Server) -> None:
    before = tiny_server.load().num_sessions
    session = client.session()
    session.generate("hi", **SAMPLED)
    until(lambda: tiny_server.load().num_sessions > before)  # it is kept between turns
    session.close()
    session.close()
    until(lambda: tiny_server.load().num_sessions <= before)
    with pytest.raises(ConfigError, match="closed"):
        session.generate("hi")


@pytest.mark.parametrize("prompt", [None, 3, ["hi"]])
def test_a_turn_that_is_no_text_is_refused(client: Client, prompt: Any) -> None:
    with client.session() as session, pytest.raises(ConfigError, match="prompt is"):
        session.generate(prompt)


def test_a_session_without_a_cloud(tiny_pair: Pair) -> None:
    with Client(tiny_pair.bundle, num_threads=1) as client, client.session() as session:
        for turn in TURNS:
            reply = session.generate(turn, **SAMPLED)
            assert reply.metrics.num_unverified_tokens == len(reply.token_ids)
            prompt = session.token_ids[: -len(reply.token_ids)]
            assert client.start(prompt, None, **SAMPLED).finish().token_ids == reply.token_ids
