"""The client against a real service: what it refuses, what it does when the cloud goes away, and what it leaves behind."""

from __future__ import annotations

import asyncio
import inspect
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from pairs import Gate, Pair, Server, copy_of, edit_manifest, free_port, once_reachable, serving, until
from screen import Screen
from tiny import make_tiny_llama

from edgecloud.aio import AsyncClient, AsyncSession
from edgecloud.client import Client
from edgecloud.edge.retry import Timeout
from edgecloud.errors import (
    BundleCorruptError,
    BundleNotFoundError,
    CloudError,
    CloudUnavailableError,
    ConfigError,
    ContextLengthError,
    DeadlineExceededError,
    ModelMismatchError,
)
from edgecloud.fingerprint import model_fingerprint
from edgecloud.sampling import SamplingSettings
from edgecloud.session import Session
from edgecloud.types import CloudLost, Event, ModeChanged, Retract, TokenEvent

pytest_plugins = ["pairs"]

IMPATIENT = Timeout(connect_s=2.0, request_s=10.0, retry_s=0.3)
PROMPT = "Why is the sky blue?"


@pytest.fixture
def client(tiny_pair: Pair, tiny_server: Server) -> Iterator[Client]:
    with Client(tiny_pair.bundle, tiny_server.address, num_threads=1) as made:
        yield made


@pytest.fixture
def alone(tiny_pair: Pair) -> Iterator[Client]:
    with Client(tiny_pair.bundle, num_threads=1) as made:
        yield made


def text_of(events: list[Event]) -> str:
    return Screen(events).text


# What the constructor does, and what it does not


def test_the_constructor_touches_neither_disk_nor_network(tmp_path: Path) -> None:
    client = Client(tmp_path / "nothing", f"127.0.0.1:{free_port()}")
    with pytest.raises(BundleNotFoundError, match="nothing"):
        client.generate("hi")
    client.close()


def test_a_bundle_that_comes_later_will_do(tiny_pair: Pair, tmp_path: Path) -> None:
    with Client(tmp_path / "bundle", num_threads=1) as client:
        with pytest.raises(BundleNotFoundError):
            client.generate("hi", max_new_tokens=1)
        copy_of(tiny_pair.bundle, tmp_path / "bundle")
        assert client.generate("hi", max_new_tokens=1).usage.completion_tokens == 1


def test_a_changed_draft_is_refused_before_it_is_run(tiny_pair: Pair, tmp_path: Path) -> None:
    bundle = copy_of(tiny_pair.bundle, tmp_path / "bundle")
    content = bytearray((bundle / "edge/draft/model.onnx.data").read_bytes())
    content[100] ^= 1
    (bundle / "edge/draft/model.onnx.data").write_bytes(content)
    with Client(bundle) as client, pytest.raises(BundleCorruptError, match=r"model\.onnx\.data"):
        client.generate("hi")


def test_importing_the_client_loads_no_model_library() -> None:
    code = "import edgecloud.client, edgecloud.aio, sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert not {"torch", "transformers", "onnxruntime", "typer", "pydantic"} & set(done.stdout.split())


# Arguments

BAD_OPTIONS: list[dict[str, Any]] = [
    {"mode": "best"},
    {"mode": None},
    {"temperature": float("nan")},
    {"temperature": -1.0},
    {"temperature": "0"},
    {"temprature": 0.5},
    {"top_k": -1},
    {"top_p": 0.0},
    {"repetition_penalty": float("inf")},
    {"seed": 1.5},
    {"max_new_tokens": 0},
    {"max_new_tokens": -3},
    {"max_new_tokens": 2.0},
    {"max_new_tokens": True},
    {"num_draft_tokens": 0},
    {"num_draft_tokens": 65},
    {"num_draft_tokens": "4"},
    {"stop_strings": "abc"},
    {"stop_strings": [""]},
    {"stop_strings": [3]},
    {"stop_strings": None},
    {"stop_strings": iter(["a"])},
    {"deadline_s": 0},
    {"deadline_s": -1.0},
    {"deadline_s": float("nan")},
    {"deadline_s": "5"},
]


@pytest.mark.parametrize("options", BAD_OPTIONS, ids=lambda options: str(options).partition(" at 0x")[0])
def test_a_bad_option_is_refused_by_name(alone: Client, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        alone.generate("hi", **options)
    assert next(iter(options)) in str(caught.value)
    with alone.session() as session, pytest.raises(ConfigError, match=next(iter(options))):
        session.generate("hi", **options)


@pytest.mark.parametrize("prompt", [None, 3, [], ["hi"], [{"role": "user"}], [{"role": "user", "content": 3}], {"role": "user"}])
def test_a_bad_prompt_is_refused(alone: Client, prompt: Any) -> None:
    with pytest.raises(ConfigError, match="prompt is"):
        alone.generate(prompt)


def test_a_prompt_that_is_no_unicode_is_refused(alone: Client) -> None:
    with pytest.raises(ConfigError, match="no valid Unicode"):
        alone.generate("broken \ud800")


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"num_draft_tokens": 0}, "num_draft_tokens is 0"),
        ({"num_threads": -1}, "num_threads is -1"),
        ({"max_context_tokens": -1}, "max_context_tokens is -1"),
    ],
)
def test_a_bad_client_is_refused(tiny_pair: Pair, options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        Client(tiny_pair.bundle, **options)


@pytest.mark.parametrize("address", ["nowhere", "host:", ":7070", "host:0", "host:65536", "host:http", ""])
def test_a_bad_address_is_refused_when_it_is_needed(tiny_pair: Pair, address: str) -> None:
    with Client(tiny_pair.bundle, address, num_threads=1) as client:
        assert client.generate("hi", mode="edge", max_new_tokens=1)
        with pytest.raises(ConfigError, match="HOST:PORT") as caught:
            client.generate("hi", mode="cloud")
        assert repr(address) in str(caught.value)


@pytest.mark.parametrize("mode", ["cloud", "speculative"])
def test_a_mode_that_needs_a_cloud_says_so(alone: Client, mode: str) -> None:
    with pytest.raises(ConfigError, match=f"{mode}.*HOST:PORT"):
        alone.generate("hi", mode=mode)
    with pytest.raises(ConfigError, match="no cloud"):
        alone.describe()


def test_an_empty_prompt_is_refused(alone: Client) -> None:
    with pytest.raises(ConfigError, match="prompt is empty"):
        alone.generate("", raw=True)


def test_what_does_not_fit_the_window_is_refused_with_the_numbers(alone: Client, tiny_pair: Pair) -> None:
    with pytest.raises(ContextLengthError, match=r"tokens and 256 new ones do not fit the context window of 512"):
        alone.generate("x" * 300)
    with pytest.raises(ContextLengthError, match="509 tokens and 4 new"):
        alone.generate("x" * 509, raw=True, max_new_tokens=4)
    assert alone.generate("x" * 509, raw=True, max_new_tokens=3).usage.completion_tokens <= 3
    with Client(tiny_pair.bundle, max_context_tokens=40) as short, pytest.raises(ContextLengthError, match="window of 40"):
        short.generate("x" * 30, raw=True, max_new_tokens=11)


def test_the_window_of_the_service_counts_too(tiny_pair: Pair, tmp_path: Path) -> None:
    bundle = copy_of(tiny_pair.bundle, tmp_path / "bundle")
    for part in ("target", "draft"):
        edit_manifest(bundle, lambda content, part=part: content[part].update(max_context_tokens=100_000))
    with serving(tiny_pair.bundle) as server, Client(bundle, server.address, num_threads=1, max_context_tokens=600) as client:
        with pytest.raises(ContextLengthError, match=f"window of {server.address} of 512"):
            client.generate("x" * 500, raw=True, mode="cloud", max_new_tokens=13)
        whole = client.generate("x" * 490, raw=True, mode="cloud", max_new_tokens=22)  # to the last place
        drafted = client.generate("x" * 490, raw=True, mode="speculative", max_new_tokens=22)
        assert drafted.token_ids == whole.token_ids


# The handshake


def test_another_target_started_at_the_same_address_is_refused(tiny_pair: Pair, tmp_path: Path) -> None:
    stranger = make_tiny_llama(tmp_path / "stranger", seed=5)
    with serving(tiny_pair.bundle) as server, Client(tiny_pair.bundle, server.address, num_threads=1) as client:
        whole = client.generate(PROMPT, mode="speculative", max_new_tokens=100, repetition_penalty=1.2)
        stream = client.stream(PROMPT, mode="speculative", max_new_tokens=100, repetition_penalty=1.2)
        next(stream)
        server.kill()
        with closing(Server(stranger, port=server.port)):
            for attempt in (stream.finish, lambda: client.generate(PROMPT, mode="cloud"), lambda: client.generate(PROMPT)):
                with pytest.raises(ModelMismatchError) as caught:
                    attempt()
                assert model_fingerprint(stranger) in str(caught.value)
                assert client.bundle.target.fingerprint in str(caught.value)
                reply = caught.value.reply  # what was final stays final, and nothing of the stranger's is in it
                assert reply is not None
                assert reply.token_ids == whole.token_ids[: len(reply.token_ids)]
        server.restart()
        again = client.generate(PROMPT, mode="speculative", max_new_tokens=100, repetition_penalty=1.2)
        assert again.token_ids == whole.token_ids


def test_another_target_is_refused_with_both_fingerprints(tiny_pair: Pair, tmp_path: Path) -> None:
    other = make_tiny_llama(tmp_path / "other", seed=7)
    with serving(other) as server, Client(tiny_pair.bundle, server.address) as client:
        for mode in ("cloud", "speculative", "auto"):
            with pytest.raises(ModelMismatchError) as caught:
                client.generate("hi", mode=mode)
            assert model_fingerprint(other) in str(caught.value)
            assert model_fingerprint(tiny_pair.target) in str(caught.value)
            assert server.address in str(caught.value)
        assert client.generate("hi", mode="edge", max_new_tokens=1).token_ids


def test_describe_says_what_is_served(client: Client, tiny_pair: Pair) -> None:
    service = client.describe()
    assert service.model_fingerprint == model_fingerprint(tiny_pair.target)
    assert (service.vocab_size, service.dtype, service.max_context_tokens) == (260, "float32", 512)
    assert client.describe() is service


# Events and modes


@pytest.mark.parametrize("mode", ["edge", "cloud", "speculative", "auto"])
def test_a_stream_tells_what_the_reply_holds(client: Client, mode: str) -> None:
    stream = client.stream(PROMPT, mode=mode, max_new_tokens=30, temperature=1.0, seed=2)
    events = list(stream)
    reply = stream.reply
    screen = Screen(events)
    assert screen.text == reply.text
    assert (screen.provisional if mode == "edge" else screen.final) == screen.token_ids == reply.token_ids
    assert screen.num_retracted == reply.metrics.num_retracted_tokens
    statuses = {event.status for event in events if isinstance(event, TokenEvent)}
    assert statuses == {"edge": {"provisional"}, "auto": {"provisional", "final"}}.get(mode, {"final"})
    if mode != "auto":
        assert not [event for event in events if isinstance(event, ModeChanged | Retract)]
    assert reply.token_ids == client.generate(PROMPT, mode=mode, max_new_tokens=30, temperature=1.0, seed=2).token_ids
    assert mode == "auto" or reply.mode_timeline[0].mode == mode
    assert (reply.metrics.rtt_ms is None) == (mode == "edge")


def test_edge_works_without_a_cloud_and_says_that_nothing_is_verified(alone: Client) -> None:
    reply = alone.generate(PROMPT, mode="edge", max_new_tokens=20, temperature=1.0, seed=4)
    assert reply.metrics.num_unverified_tokens == len(reply.token_ids) > 0
    assert (reply.metrics.target_passes, reply.metrics.uplink_bytes) == (0.0, 0)
    assert reply.token_ids == alone.generate(PROMPT, mode="auto", max_new_tokens=20, temperature=1.0, seed=4).token_ids
    assert [span.mode for span in reply.mode_timeline] == ["edge"]


def test_auto_without_a_reachable_cloud_answers_alone(tiny_pair: Pair) -> None:
    with Client(tiny_pair.bundle, f"127.0.0.1:{free_port()}", num_threads=1) as client:
        reply = client.generate(PROMPT, max_new_tokens=8)
        assert [span.mode for span in reply.mode_timeline] == ["edge"]
        assert reply.metrics.num_unverified_tokens == len(reply.token_ids) == 8
        with client.session() as session:
            assert session.generate("hi", max_new_tokens=3).metrics.num_unverified_tokens == 3


def test_auto_works_with_the_cloud(client: Client, tiny_pair: Pair) -> None:
    reply = client.generate(PROMPT, max_new_tokens=12)
    assert {span.mode for span in reply.mode_timeline} <= {"cloud", "speculative"}
    assert reply.metrics.num_unverified_tokens == 0
    tokens = client.tokenizer.encode_chat([{"role": "user", "content": PROMPT}])
    assert tiny_pair.plain.decode(tokens, 12, stop_token_ids={2}).agrees_with(reply.token_ids)


def test_chat_messages_and_raw_text_are_what_they_say(client: Client) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": PROMPT}]
    rendered = client.tokenizer.render(messages)
    assert client.generate(messages, max_new_tokens=8).text == client.generate(rendered, raw=True, max_new_tokens=8).text
    single = client.generate(messages[1:], max_new_tokens=8)
    assert client.generate(PROMPT, max_new_tokens=8).token_ids == single.token_ids


def test_a_stop_string_ends_every_mode_alike(client: Client) -> None:
    whole = client.generate(PROMPT, mode="cloud", max_new_tokens=40, temperature=1.0, seed=9).text
    stop = whole[len(whole) // 2 :][:2]
    for mode in ("cloud", "speculative", "auto"):
        reply = client.generate(PROMPT, mode=mode, max_new_tokens=40, temperature=1.0, seed=9, stop_strings=[stop])
        assert (reply.text, reply.finish_reason) == (whole[: whole.index(stop)], "stop")


# What is left behind


@pytest.mark.parametrize("mode", ["cloud", "speculative"])
def test_leaving_a_stream_frees_the_services_session(client: Client, tiny_server: Server, mode: str) -> None:
    before = tiny_server.load()
    stream = client.stream(PROMPT, mode=mode, max_new_tokens=200, temperature=1.0)
    next(stream)
    next(stream)
    until(lambda: tiny_server.load().num_sessions > before.num_sessions)
    stream.close()
    until(lambda: tiny_server.load().num_sessions <= before.num_sessions)
    assert tiny_server.load().num_free_pages >= before.num_free_pages
    assert stream.reply.finish_reason == "cancelled"
    assert len(stream.reply.token_ids) >= 2
    assert list(stream) == []


def test_a_client_that_leaves_at_once_frees_them_too(tiny_pair: Pair, tiny_server: Server) -> None:
    before = tiny_server.load().num_sessions
    for mode in ("cloud", "speculative") * 6:
        with Client(tiny_pair.bundle, tiny_server.address, num_threads=1) as client:
            client.generate("hi", mode=mode, max_new_tokens=3, temperature=1.0)
    until(lambda: tiny_server.load().num_sessions <= before)


@pytest.mark.parametrize("how", ["break", "with"])
def test_a_loop_that_is_left_early_frees_the_turn(client: Client, how: str) -> None:
    if how == "with":
        with client.stream(PROMPT, max_new_tokens=50) as stream:
            next(stream)
    else:
        for _ in client.stream(PROMPT, max_new_tokens=50):
            break
    assert client.generate("hi", max_new_tokens=3).token_ids


def test_two_streams_at_once_on_one_thread_are_refused_not_waited_for(client: Client) -> None:
    with client.stream(PROMPT, max_new_tokens=50) as first:
        next(first)
        with pytest.raises(ConfigError, match="another stream"):
            client.generate("hi", max_new_tokens=3)
    assert client.generate("hi", max_new_tokens=3).token_ids


def test_a_closed_client_says_so(tiny_pair: Pair, tiny_server: Server) -> None:
    client = Client(tiny_pair.bundle, tiny_server.address, num_threads=1)
    client.generate("hi", max_new_tokens=2)
    client.close()
    client.close()
    for use in (lambda: client.generate("hi"), lambda: client.generate("hi", mode="edge"), client.session):
        with pytest.raises(ConfigError, match="closed"):
            use()


# Failures


@pytest.mark.parametrize("mode", ["cloud", "speculative"])
def test_a_cloud_lost_midway_leaves_what_was_final(tiny_pair: Pair, gate: Gate, mode: str) -> None:
    with Client(tiny_pair.bundle, gate.address, timeout=IMPATIENT, num_threads=1) as client:
        whole = client.generate(PROMPT, mode=mode, max_new_tokens=300, repetition_penalty=1.2)
        events: list[Event] = []
        with pytest.raises(CloudUnavailableError, match=f"{gate.address}.*gave up after") as caught:  # noqa: PT012
            for event in client.stream(PROMPT, mode=mode, max_new_tokens=300, repetition_penalty=1.2):
                events.append(event)
                if len(events) == 3:
                    gate.shut()
        reply = caught.value.reply
        assert reply is not None
        assert (reply.finish_reason, reply.metrics.num_unverified_tokens) == ("cancelled", 0)
        assert 3 <= len(reply.token_ids) < len(whole.token_ids)
        assert reply.token_ids == whole.token_ids[: len(reply.token_ids)]
        assert whole.text.startswith(reply.text)
        assert text_of(events) == reply.text
        gate.open()
        again = once_reachable(lambda: client.generate(PROMPT, mode=mode, max_new_tokens=300, repetition_penalty=1.2))
        assert again.token_ids == whole.token_ids  # the client is as good as new


def test_auto_goes_on_alone_when_the_cloud_is_lost(tiny_pair: Pair, gate: Gate) -> None:
    with Client(tiny_pair.bundle, gate.address, timeout=IMPATIENT, num_threads=1) as client:
        whole = client.generate(PROMPT, max_new_tokens=100, repetition_penalty=1.2)
        stream = client.stream(PROMPT, max_new_tokens=100, repetition_penalty=1.2)
        events: list[Event] = []
        for event in stream:
            events.append(event)
            if len(events) == 4:
                gate.shut()
        reply = stream.reply
        changes = [event for event in events if isinstance(event, ModeChanged)]
        assert len(changes) == 1  # told once
        assert changes[0].mode == "edge"
        assert gate.address in changes[0].reason
        at = events.index(changes[0])
        before, screen = Screen(events[:at]), Screen(events)
        assert before.lost
        assert before.final == screen.final == whole.token_ids[: len(before.final)]
        assert screen.token_ids == reply.token_ids
        assert len(reply.token_ids) == 100 or reply.finish_reason == "stop"
        assert reply.metrics.num_unverified_tokens == len(screen.provisional) > 0
        assert [span.mode for span in reply.mode_timeline][-1] == "edge"
        assert next(span.token for span in reply.mode_timeline if span.mode == "edge") == len(before.final)
        assert screen.text == reply.text
        gate.open()
        for _ in range(20):  # an impatient client may find the connection still down
            again = client.generate(PROMPT, max_new_tokens=100, repetition_penalty=1.2)
            if again.metrics.num_unverified_tokens == 0:
                break
        assert again.token_ids == whole.token_ids  # it comes back to the cloud by itself


@pytest.mark.parametrize("mode", ["auto", "speculative"])
def test_a_cloud_that_comes_back_settles_what_was_guessed(tiny_pair: Pair, gate: Gate, mode: str) -> None:
    options: dict[str, Any] = {"max_new_tokens": 100, "repetition_penalty": 1.2, "mode": mode}
    with Client(tiny_pair.bundle, gate.address, num_threads=1) as client:
        whole = client.generate(PROMPT, **options)
        events: list[Event] = []
        screen, is_shut = Screen(), False
        for event in client.stream(PROMPT, **options):
            events.append(event)
            screen.show(event)
            if len(events) == 9:
                gate.shut()
                is_shut = True
            if is_shut and screen.lost and (len(screen.provisional) >= 20 or mode == "speculative"):
                gate.open()
                is_shut = False
        assert isinstance(events[-1], TokenEvent)
        assert not screen.lost
        assert [type(event) for event in events].count(CloudLost) == 1
        assert (screen.final, screen.provisional, screen.text) == (whole.token_ids, [], whole.text)


def test_guesses_are_not_shown_to_who_does_not_want_them(client: Client) -> None:
    events = list(client.stream(PROMPT, max_new_tokens=30, temperature=1.0, seed=2, provisional=False))
    assert {event.status for event in events if isinstance(event, TokenEvent)} == {"final"}
    assert not [event for event in events if isinstance(event, Retract)]


@pytest.mark.parametrize("mode", ["edge", "cloud", "speculative"])
def test_a_deadline_that_passes_leaves_what_was_done(client: Client, mode: str) -> None:
    stream = client.stream(PROMPT, mode=mode, max_new_tokens=400, deadline_s=0.3, repetition_penalty=1.2)
    next(stream)
    pause = threading.Event()
    pause.wait(0.4)  # a slow reader lets it pass, however fast the machine
    with pytest.raises(DeadlineExceededError, match="time allowed") as caught:
        stream.finish()
    assert caught.value.reply is not None
    assert 1 <= len(caught.value.reply.token_ids) < 400
    assert client.generate("hi", mode=mode, max_new_tokens=2, deadline_s=60.0).token_ids


@pytest.mark.parametrize("mode", ["cloud", "speculative"])
def test_a_dead_address_is_named_with_the_mend(tiny_pair: Pair, mode: str) -> None:
    address = f"127.0.0.1:{free_port()}"
    with (
        Client(tiny_pair.bundle, address, timeout=IMPATIENT) as client,
        pytest.raises(CloudUnavailableError, match=f"{address}.*edgecloud serve"),
    ):
        client.generate("hi", mode=mode)


# Threads


@pytest.mark.parametrize("mode", ["speculative", "cloud", "edge"])
def test_threads_share_a_client_and_each_gets_its_own_answer(client: Client, mode: str) -> None:
    prompts = [f"Question {number}" for number in range(4)]
    options: dict[str, Any] = {"mode": mode, "max_new_tokens": 20, "temperature": 1.0}
    expected = [client.generate(prompt, **options).token_ids for prompt in prompts]
    found: dict[int, list[int]] = {}

    def ask(number: int) -> None:
        found[number] = client.generate(prompts[number], **options).token_ids

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [found[number] for number in range(4)] == expected


# asyncio


def public_methods(kind: type) -> set[str]:
    return {name for name, _ in inspect.getmembers(kind, inspect.isfunction) if not name.startswith("_")}


def test_the_async_client_mirrors_the_client() -> None:
    assert public_methods(AsyncClient) == public_methods(Client) - {"start"}  # the sessions' way in
    assert public_methods(AsyncSession) == public_methods(Session)


def test_the_async_client_gives_the_same_text(client: Client, tiny_pair: Pair, tiny_server: Server) -> None:
    async def ask() -> None:
        async with AsyncClient(tiny_pair.bundle, tiny_server.address, num_threads=1) as asynchronous:
            options: dict[str, Any] = {"max_new_tokens": 20, "temperature": 1.0, "seed": 3}
            for mode in ("cloud", "speculative", "edge", "auto"):
                reply = await asynchronous.generate(PROMPT, mode=mode, **options)
                assert reply.token_ids == client.generate(PROMPT, mode=mode, **options).token_ids
            stream = asynchronous.stream(PROMPT, **options)
            with pytest.raises(RuntimeError, match="iterate"):
                _ = stream.reply
            assert text_of([event async for event in stream]) == stream.reply.text == client.generate(PROMPT, **options).text
            assert await asynchronous.describe() == client.describe()
            async with asynchronous.session("Be brief.") as chat:
                with client.session("Be brief.") as plain:
                    for turn in ("hi", "and?"):
                        assert (await chat.generate(turn, **options)).text == plain.generate(turn, **options).text

    asyncio.run(ask())


def test_async_generations_at_the_same_time_take_turns(client: Client, tiny_pair: Pair, tiny_server: Server) -> None:
    prompts = [f"Question {number}" for number in range(4)]

    async def ask() -> list[list[int]]:
        async with AsyncClient(tiny_pair.bundle, tiny_server.address, num_threads=1) as asynchronous:
            replies = await asyncio.gather(*(asynchronous.generate(prompt, max_new_tokens=12) for prompt in prompts))
            return [reply.token_ids for reply in replies]

    assert asyncio.run(ask()) == [client.generate(prompt, max_new_tokens=12).token_ids for prompt in prompts]


@pytest.mark.parametrize("how", ["break", "cancel"])
@pytest.mark.parametrize("mode", ["cloud", "speculative"])
def test_leaving_an_async_stream_frees_the_session_and_the_client(
    tiny_pair: Pair, tiny_server: Server, how: str, mode: str
) -> None:
    before = tiny_server.load().num_sessions

    async def ask() -> None:
        async with AsyncClient(tiny_pair.bundle, tiny_server.address, num_threads=1) as asynchronous:
            begun = asyncio.Event()

            async def read() -> None:
                num_events = 0
                async for _ in asynchronous.stream(PROMPT, mode=mode, max_new_tokens=400, repetition_penalty=1.2):
                    begun.set()
                    num_events += 1
                    if how == "break" and num_events == 2:
                        break

            task = asyncio.create_task(read())
            await begun.wait()
            if how == "cancel":
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            else:
                await task
            await asyncio.to_thread(until, lambda: tiny_server.load().num_sessions <= before)
            assert (await asynchronous.generate("hi", mode=mode, max_new_tokens=2)).token_ids

    asyncio.run(ask())


def test_an_async_error_is_the_same_error(tiny_pair: Pair) -> None:
    async def ask() -> None:
        async with AsyncClient(tiny_pair.bundle, f"127.0.0.1:{free_port()}", timeout=IMPATIENT) as asynchronous:
            with pytest.raises(CloudError):
                await asynchronous.generate("hi", mode="cloud")
            with pytest.raises(ConfigError, match="temperature"):
                await asynchronous.generate("hi", temperature=float("nan"))

    asyncio.run(ask())


def test_a_generation_uses_the_settings_that_it_was_given(client: Client, tiny_pair: Pair) -> None:
    tokens = client.tokenizer.encode("raw text")
    for sampling in (SamplingSettings(temperature=0.7, seed=2**40), SamplingSettings(temperature=1.5, top_k=20, seed=1)):
        expected = tiny_pair.plain.decode(tokens, 10, sampling, {2})
        options = {"temperature": sampling.temperature, "top_k": sampling.top_k, "seed": sampling.seed}
        with closing(client.stream("raw text", raw=True, mode="cloud", max_new_tokens=10, **options)) as stream:
            assert expected.agrees_with(stream.finish().token_ids)
