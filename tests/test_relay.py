"""The simulated link, measured over real sockets: no byte may come before the link allows it.

Lower bounds are hard. Upper bounds only tell a working link from a broken one, since test machines are noisy.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import signal
import socket
import statistics
import struct
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager, closing, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgecloud.edge.link_config import (
    LinkConfig,
    Outage,
    Pacer,
    Trace,
    constant_rate,
    parse_address,
    parse_duration_ms,
    parse_outage,
    parse_rate_mbps,
    read_trace,
)
from edgecloud.edge.relay import Clock, Line, Relay
from edgecloud.errors import ConfigError, ServerError

EARLY_S = 1e-4  # how far two readings of the clock may differ
EDGECLOUD = [sys.executable, "-c", "from edgecloud.cli import main; main()"]

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, 20))


@asynccontextmanager
async def serving(handler: Handler) -> AsyncIterator[int]:
    """A server on a free port; the handlers are over when the context is."""
    tasks: set[asyncio.Task[None]] = set()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            with suppress(ConnectionError):
                await handler(reader, writer)
        finally:
            await finish(writer)

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        await server.wait_closed()
        await asyncio.gather(*tasks, return_exceptions=True)


@asynccontextmanager
async def linked(handler: Handler, **options: Any) -> AsyncIterator[Relay]:
    async with serving(handler) as port:
        relay = Relay(LinkConfig(0, "127.0.0.1", port, **options))
        await relay.start()
        try:
            yield relay
        finally:
            await relay.close()


@asynccontextmanager
async def connected(relay: Relay) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", relay.port)
    try:
        yield reader, writer
    finally:
        await finish(writer)


async def finish(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with suppress(ConnectionError):
        await writer.wait_closed()


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
    writer.write_eof()


async def ping(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> float:
    """Seconds for one byte there and back."""
    start_s = time.monotonic()
    writer.write(b"p")
    assert await reader.readexactly(1) == b"p"
    return time.monotonic() - start_s


def reset(writer: asyncio.StreamWriter) -> None:
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


# ---- delay


def test_a_ping_takes_the_round_trip_time() -> None:
    async def test() -> None:
        async with linked(echo, rtt_ms=60) as relay, connected(relay) as (reader, writer):
            times_s = [await ping(reader, writer) for _ in range(9)]
        assert min(times_s) >= 0.060 - EARLY_S
        assert statistics.median(times_s) < 0.120

    run(test())


def test_half_of_the_round_trip_time_lies_in_each_direction() -> None:
    async def stamp(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(1):
            writer.write(struct.pack("d", time.monotonic()))

    async def test() -> None:
        up_s, down_s = [], []
        async with linked(stamp, rtt_ms=80) as relay, connected(relay) as (reader, writer):
            for _ in range(5):
                sent_s = time.monotonic()
                writer.write(b"p")
                (at_server_s,) = struct.unpack("d", await reader.readexactly(8))
                up_s.append(at_server_s - sent_s)
                down_s.append(time.monotonic() - at_server_s)
        assert 0.040 - EARLY_S <= min(up_s) < 0.070
        assert 0.040 - EARLY_S <= min(down_s) < 0.070

    run(test())


def test_jitter_only_adds_and_varies() -> None:
    async def test() -> None:
        async with linked(echo, rtt_ms=10, jitter_ms=40, seed=3) as relay, connected(relay) as (reader, writer):
            times_s = [await ping(reader, writer) for _ in range(16)]
        assert min(times_s) >= 0.010 - EARLY_S
        assert max(times_s) - min(times_s) > 0.015  # a sum of two uniform(0, 40 ms)
        assert 0.025 < statistics.median(times_s) < 0.100

    run(test())


@pytest.mark.parametrize("limits", [{}, {"up_mbps": 40.0, "down_mbps": 60.0}], ids=["unlimited", "limited"])
def test_bytes_arrive_unchanged_and_in_order_both_ways_at_once(limits: dict[str, float]) -> None:
    async def exchange(relay: Relay, seed: int) -> None:
        rng = random.Random(seed)
        payload = rng.randbytes(400_000)
        received = bytearray()
        async with connected(relay) as (reader, writer):

            async def send() -> None:
                sent = 0
                while sent < len(payload):
                    size = rng.choice([1, 100, 5_000, 60_000])
                    writer.write(payload[sent : sent + size])
                    sent += size
                    await writer.drain()
                    await asyncio.sleep(rng.choice([0, 0, 0.002]))
                writer.write_eof()

            async def receive() -> None:
                while data := await reader.read(65536):
                    received.extend(data)

            await asyncio.gather(send(), receive())
        assert bytes(received) == payload

    async def test() -> None:
        async with linked(echo, rtt_ms=6, jitter_ms=8, **limits) as relay:
            await asyncio.gather(*(exchange(relay, seed) for seed in range(3)))

    run(test())


def test_the_line_keeps_the_order_across_connections() -> None:
    async def test() -> None:
        line = Line(Pacer(constant_rate(None)), Clock(), math.inf, LinkConfig(0, "h", 1, jitter_ms=50), "seed")
        dues_s = [line.due(1) for _ in range(100)]
        assert dues_s == sorted(dues_s)

    run(test())


# ---- rate


def sink(num_bytes: int) -> Handler:
    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(num_bytes)
        writer.write(b"k")

    return handler


async def upload_s(relay: Relay, num_bytes: int) -> float:
    async with connected(relay) as (reader, writer):
        start_s = time.monotonic()
        writer.write(bytes(num_bytes))
        assert await reader.readexactly(1) == b"k"
        return time.monotonic() - start_s


def test_a_transfer_takes_size_over_rate() -> None:
    async def test() -> None:
        async with linked(sink(200_000), up_mbps=4.0, rtt_ms=20) as relay:
            taken_s = await upload_s(relay, 200_000)
        assert 0.4 + 0.020 - EARLY_S <= taken_s < 1.0

    run(test())


def test_up_and_down_are_paced_on_their_own() -> None:
    async def both(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(bytes(100_000))
        await reader.readexactly(100_000)
        writer.write(b"k")

    async def test() -> None:
        async with linked(both, up_mbps=1.6, down_mbps=8.0) as relay:
            start_s = time.monotonic()
            async with connected(relay) as (reader, writer):
                writer.write(bytes(100_000))
                await reader.readexactly(100_000)
                down_s = time.monotonic() - start_s
                await reader.readexactly(1)
                up_s = time.monotonic() - start_s
        assert 0.1 - EARLY_S <= down_s < 0.9 * up_s
        assert 0.5 - EARLY_S <= up_s < 1.5

    run(test())


def test_connections_share_the_rate_fairly() -> None:
    async def test() -> None:
        async with linked(sink(60_000), up_mbps=2.0) as relay:
            times_s = await asyncio.gather(upload_s(relay, 60_000), upload_s(relay, 60_000))
        assert max(times_s) >= 0.48 - EARLY_S
        assert min(times_s) > 0.6 * max(times_s)

    run(test())


def test_a_ping_does_not_wait_for_all_of_another_connection() -> None:
    async def test() -> None:
        async with (
            linked(echo, up_mbps=2.0) as relay,
            connected(relay) as (_, bulk),
            connected(relay) as (reader, writer),
        ):
            bulk.write(bytes(250_000))  # 1 s on the line
            await asyncio.sleep(0.05)
            assert await ping(reader, writer) < 0.5
            reset(bulk)

    run(test())


def test_the_bandwidth_delay_product_fits_on_the_line() -> None:
    async def test() -> None:
        async with linked(sink(4_000_000), up_mbps=160.0, rtt_ms=400) as relay:
            taken_s = await upload_s(relay, 4_000_000)
        assert 0.6 - EARLY_S <= taken_s < 2.0  # with 64 KiB in flight it would be 12 s

    run(test())


def test_a_receiver_that_does_not_read_stops_the_sender() -> None:
    async def deaf(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        reader._transport.pause_reading()  # type: ignore[attr-defined]
        await release.wait()
        reset(writer)

    async def test() -> None:
        async with linked(deaf) as relay:
            loop = asyncio.get_running_loop()
            with closing(socket.create_connection(("127.0.0.1", relay.port))) as connection:
                connection.setblocking(False)
                num_sent = 0
                with suppress(TimeoutError):
                    while num_sent < 100_000_000:
                        await asyncio.wait_for(loop.sock_sendall(connection, bytes(100_000)), 0.3)
                        num_sent += 100_000
            release.set()
        assert 1_000_000 < num_sent < 50_000_000

    release = asyncio.Event()
    run(test())


# ---- traces


def write_trace(folder: Path, text: str) -> Path:
    path = folder / "trace.log"
    path.write_text(text)
    return path


def test_the_trace_sets_the_down_rate_and_rate_zero_stalls(tmp_path: Path) -> None:
    trace = read_trace(write_trace(tmp_path, "10 2\n10.4 0\n10.8 4\n12 4\n"))

    def allowed_bytes(time_s: float) -> float:
        return 250_000 * min(time_s, 0.4) + 500_000 * max(time_s - 0.8, 0)

    async def source(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(bytes(250_000))
        await writer.drain()

    async def test() -> None:
        start_s = time.monotonic()
        num_bytes, before_zero = 0, 0
        async with linked(source, trace=trace) as relay, connected(relay) as (reader, _):
            while data := await reader.read(65536):
                num_bytes += len(data)
                time_s = time.monotonic() - start_s
                assert num_bytes <= allowed_bytes(time_s) + 1
                before_zero = num_bytes if time_s < 0.8 else before_zero
        assert num_bytes == 250_000
        assert before_zero > 50_000
        assert time_s < 2.0

    run(test())


def test_the_trace_sets_the_up_rate_unless_up_does(tmp_path: Path) -> None:
    trace = read_trace(write_trace(tmp_path, "0 1.6\n"))
    assert LinkConfig(0, "h", 1, trace=trace).up_rate(0)[0] == 1.6
    assert LinkConfig(0, "h", 1, trace=trace, up_mbps=5.0).up_rate(0)[0] == 5.0
    with pytest.raises(ConfigError, match=r"--down .* --trace .*trace\.log"):
        LinkConfig(0, "h", 1, trace=trace, down_mbps=5.0)

    async def test() -> None:
        async with linked(sink(60_000), trace=trace) as relay:
            assert await upload_s(relay, 60_000) >= 0.3 - EARLY_S

    run(test())


def test_a_trace_repeats_and_its_last_rate_lasts_as_long_as_the_one_before(tmp_path: Path) -> None:
    trace = read_trace(write_trace(tmp_path, "# comment\n\n5\t1.5\n6 0\n8 3\n"))
    assert trace.period_s == 5.0
    assert [trace.rate(t)[0] for t in (0, 0.9, 1, 2.9, 3, 4.9, 5, 6, 8, 500.5)] == [
        1.5,
        1.5,
        0,
        0,
        3,
        3,
        1.5,
        0,
        3,
        1.5,
    ]
    assert [trace.rate(t)[1] for t in (0, 0.5, 1, 3, 5)] == [1, 1, 3, 5, 6]
    assert read_trace(write_trace(tmp_path, "7 2\n")).rate(1e6) == (2.0, math.inf)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("0 1\n1 x\n", "line 2: '1 x'"),
        ("0 1\n1\n", "line 2: '1'"),
        ("0 1 2\n", "line 1"),
        ("\n0 1\n1 -3\n", "line 3: '1 -3'"),
        ("0 nan\n", "line 1"),
        ("inf 1\n", "line 1"),
        ("0 1\n2 1\n2 1\n", "line 3: time 2"),
        ("0 1\n2 1\n1 1\n", "line 3: time 1"),
        ("0 0\n1 0\n", "no rate above 0"),
        ("", "no rate above 0"),
    ],
)
def test_a_malformed_trace_names_file_and_line(tmp_path: Path, text: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint) as caught:
        read_trace(write_trace(tmp_path, text))
    assert "trace.log" in str(caught.value)


def test_a_trace_that_cannot_be_read_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"missing\.log cannot be read: No such file"):
        read_trace(tmp_path / "missing.log")
    (tmp_path / "binary.log").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"binary\.log cannot be read: not a text file"):
        read_trace(tmp_path / "binary.log")


# ---- the pacer alone

traces = st.lists(st.tuples(st.floats(0.001, 3), st.sampled_from([0.0, 0.1, 1.0, 7.0])), min_size=2, max_size=6).filter(
    lambda segments: any(mbps for _, mbps in segments[:-1])
)
stalls = st.lists(st.builds(Outage, st.floats(0, 5), st.floats(0.01, 2)), max_size=3)
sends = st.lists(st.tuples(st.floats(0, 2), st.integers(1, 50_000)), min_size=1, max_size=12)


@given(traces, stalls, sends)
def test_the_pacer_sends_exactly_what_the_rate_allows(
    segments: list[tuple[float, float]], outages: list[Outage], gaps: list[tuple[float, int]]
) -> None:
    """Against the definition: from start to end of a send, the integral of the rate is its bytes."""
    starts_s = [sum(length for length, _ in segments[:i]) for i in range(len(segments))]
    trace = Trace(Path("t"), tuple(starts_s), tuple(mbps for _, mbps in segments))
    pacer = Pacer(trace.rate, outages)

    def integral(begin_s: float, end_s: float) -> float:
        edges = {begin_s, end_s}
        edges |= {e for o in outages for e in (o.start_s, o.end_s)}
        period, repeats = trace.period_s, int(end_s / trace.period_s) + 2
        edges |= {r * period + s for r in range(repeats) for s in starts_s}
        points = sorted(e for e in edges if begin_s <= e <= end_s)
        num_bytes = 0.0
        for left, right in pairwise(points):
            middle = (left + right) / 2
            if all(not o.start_s <= middle < o.end_s for o in outages):
                num_bytes += trace.rate(middle)[0] * 125_000 * (right - left)
        return num_bytes

    now_s, free_s = 0.0, 0.0
    for gap_s, num_bytes in gaps:
        now_s += gap_s
        begin_s = max(now_s, free_s)
        free_s = pacer.send(num_bytes, now_s)
        assert free_s >= begin_s
        assert integral(begin_s, free_s) == pytest.approx(num_bytes, rel=1e-6, abs=1.0)


def test_lateness_does_not_add_up() -> None:
    pacer = Pacer(constant_rate(8.0))
    assert [pacer.send(10_000, time_s) for time_s in (0.0, 0.013, 0.024, 0.037)] == pytest.approx([0.010, 0.023, 0.034, 0.047])
    late = Pacer(constant_rate(8.0))
    assert [late.send(10_000, time_s) for time_s in (0.0, 0.003, 0.019, 0.021)] == pytest.approx([0.01, 0.02, 0.03, 0.04])


# ---- outages


def test_a_stall_delivers_nothing_and_everything_afterwards() -> None:
    async def ticks(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for _i in range(80):
            writer.write(struct.pack("d", time.monotonic()))
            await asyncio.sleep(0.02)

    async def test() -> None:
        start_s = time.monotonic()
        async with linked(ticks, outages=(Outage(1.0, 0.4),)) as relay:
            late_s = time.monotonic() - start_s  # the link's time is behind ours by at most this
            async with connected(relay) as (reader, _):
                pairs = []
                while len(data := await reader.read(8)) == 8:
                    pairs.append((struct.unpack("d", data)[0] - start_s, time.monotonic() - start_s))
        assert len(pairs) == 80
        assert [sent for sent, _ in pairs] == sorted(sent for sent, _ in pairs)
        held = [(sent, received) for sent, received in pairs if 1.0 + late_s < sent < 1.4]
        assert len(held) > 5
        assert min(received for _, received in held) >= 1.4 - EARLY_S
        assert min(received for _, received in pairs) < 1.4  # what came before it was not held

    run(test())


def test_a_cut_resets_connections_and_later_ones_work() -> None:
    async def test() -> None:
        start_s = time.monotonic()
        async with linked(echo, outages=(Outage(0.3, 0.6, "cut"),)) as relay:
            async with connected(relay) as (reader, writer):
                await ping(reader, writer)
                with pytest.raises(ConnectionResetError):
                    await reader.read(1)
                assert time.monotonic() - start_s >= 0.3 - EARLY_S
            with pytest.raises(ConnectionResetError):
                async with connected(relay) as (reader, writer):
                    await reader.read(1)
            assert time.monotonic() - start_s < 0.9, "the machine was too slow to look into the cut"
            await asyncio.sleep(0.95 - (time.monotonic() - start_s))
            async with connected(relay) as (reader, writer):
                await ping(reader, writer)

    run(test())


# ---- ends


def test_half_close_passes_after_queued_data() -> None:
    async def count(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(str(len(await reader.read())).encode())

    async def test() -> None:
        async with (
            linked(count, rtt_ms=20, jitter_ms=5, up_mbps=20.0) as relay,
            connected(relay) as (reader, writer),
        ):
            writer.write(bytes(300_000))
            writer.write_eof()
            assert await reader.read() == b"300000"

    run(test())


def test_resets_pass_in_both_directions() -> None:
    ends: list[object] = []

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if await reader.readexactly(1) == b"r":
            reset(writer)
            return
        writer.write(b"k")
        try:
            ends.append(await reader.read(1))
        except ConnectionResetError as error:
            ends.append(error)

    async def test() -> None:
        async with linked(handler, rtt_ms=10) as relay:
            async with connected(relay) as (reader, writer):
                writer.write(b"r")
                with pytest.raises(ConnectionResetError):
                    await reader.read(1)
            async with connected(relay) as (reader, writer):
                writer.write(b"k")
                await reader.readexactly(1)
                reset(writer)
            while not ends:
                await asyncio.sleep(0.01)
        assert isinstance(ends[0], ConnectionResetError)

    run(test())


def test_a_client_that_leaves_stops_a_server_that_streams() -> None:
    stopped = asyncio.Event()

    async def stream(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                writer.write(bytes(1000))
                await writer.drain()
                await asyncio.sleep(0.005)
        finally:
            stopped.set()

    async def test() -> None:
        async with linked(stream, rtt_ms=10) as relay:
            async with connected(relay) as (reader, _):
                await reader.readexactly(1000)
            await asyncio.wait_for(stopped.wait(), 5)

    run(test())


def test_a_server_learns_that_nobody_hears_its_answer() -> None:
    stopped = asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert await reader.read() == b"q"
        try:
            while True:
                writer.write(bytes(1000))
                await writer.drain()
                await asyncio.sleep(0.005)
        finally:
            stopped.set()

    async def test() -> None:
        async with linked(answer, rtt_ms=10) as relay:
            async with connected(relay) as (_, writer):
                writer.write(b"q")
            await asyncio.wait_for(stopped.wait(), 5)

    run(test())


def test_a_reset_is_noticed_while_the_line_up_is_busy() -> None:
    ends: list[object] = []

    async def stream(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async def send() -> None:
            while True:
                writer.write(b"x")
                await asyncio.sleep(0.005)

        sender = asyncio.create_task(send())
        try:
            ends.append(len(await reader.read()))
        except ConnectionResetError as error:
            ends.append(error)
        finally:
            sender.cancel()

    async def test() -> None:
        async with linked(stream, up_mbps=0.1) as relay:
            async with connected(relay) as (reader, writer):
                writer.write(bytes(6000))  # 0.48 s on the line; the relay reads the end of it later
                await reader.readexactly(1)
                reset(writer)
            while not ends:
                await asyncio.sleep(0.01)
        assert isinstance(ends[0], ConnectionResetError)

    run(test())


def test_a_connection_whose_both_ends_reset_at_once_is_over() -> None:
    both = asyncio.Event()

    async def stream(writer: asyncio.StreamWriter) -> None:
        while not both.is_set():
            writer.write(b"x")
            with suppress(TimeoutError):
                await asyncio.wait_for(both.wait(), 0.01)
        reset(writer)

    async def test() -> None:
        async with linked(lambda _, writer: stream(writer), rtt_ms=100) as relay, connected(relay) as (reader, writer):
            client = asyncio.create_task(stream(writer))
            await reader.readexactly(1)
            both.set()
            await client
            async with asyncio.timeout(5):
                while relay._connections:
                    await asyncio.sleep(0.01)

    run(test())


def test_a_target_that_is_not_there_resets_the_client() -> None:
    async def test() -> None:
        relay = Relay(LinkConfig(0, "127.0.0.1", free_port()))
        await relay.start()
        async with connected(relay) as (reader, _):
            with pytest.raises(ConnectionResetError):
                await reader.read(1)
        await relay.close()

    run(test())


def test_closing_the_relay_resets_its_connections_and_frees_the_port() -> None:
    async def test() -> None:
        async with linked(echo) as relay, connected(relay) as (reader, writer):
            await ping(reader, writer)
            port = relay.port
            await relay.close()
            with pytest.raises(ConnectionResetError):
                await reader.read(1)
            await relay.close()
            with pytest.raises(ConnectionRefusedError):
                await asyncio.open_connection("127.0.0.1", port)

    run(test())


# ---- configuration


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def test_a_port_in_use_is_named() -> None:
    async def test(port: int) -> None:
        with pytest.raises(ServerError, match=rf"port {port} on 127.0.0.1 is in use; give another --listen"):
            await Relay(LinkConfig(port, "127.0.0.1", 1)).start()

    with socket.create_server(("127.0.0.1", 0)) as taken:
        run(test(taken.getsockname()[1]))


def test_a_host_of_another_machine_is_named() -> None:
    async def test() -> None:
        with pytest.raises(ServerError, match=r"cannot listen on 192\.0\.2\.1"):
            await Relay(LinkConfig(0, "127.0.0.1", 1, host="192.0.2.1")).start()

    run(test())


@pytest.mark.parametrize(
    ("text", "ms"), [("60ms", 60), ("1.5s", 1500), ("2", 2), ("250us", 0.25), ("1min", 60_000), (" 3 MS ", 3), ("0", 0)]
)
def test_durations(text: str, ms: float) -> None:
    assert parse_duration_ms(text) == pytest.approx(ms)


@pytest.mark.parametrize(
    ("text", "mbps"), [("5mbit", 5), ("500kbit", 0.5), ("1gbit", 1000), ("2.5Mbit/s", 2.5), ("9600bit", 0.0096)]
)
def test_rates(text: str, mbps: float) -> None:
    assert parse_rate_mbps(text) == pytest.approx(mbps)


@pytest.mark.parametrize(
    ("text", "outage"),
    [
        ("3s@10s", Outage(10, 3)),
        ("500ms@0s", Outage(0, 0.5)),
        ("3s@1min:cut", Outage(60, 3, "cut")),
        ("3s@10s:stall", Outage(10, 3, "stall")),
    ],
)
def test_outages(text: str, outage: Outage) -> None:
    assert parse_outage(text) == outage


@pytest.mark.parametrize(("text", "address"), [("a.b:7070", ("a.b", 7070)), ("[::1]:80", ("::1", 80))])
def test_addresses(text: str, address: tuple[str, int]) -> None:
    assert parse_address(text) == address


@pytest.mark.parametrize(
    ("parse", "text"),
    [
        *((parse_duration_ms, text) for text in ("60parsecs", "-5ms", "", "ms", "1e3ms", "nan", "inf", "5 5ms", "9" * 400)),
        *((parse_rate_mbps, text) for text in ("5", "-5mbit", "0mbit", "mbit", "", "fast", "5mb", "inf")),
        *((parse_outage, text) for text in ("3s", "3s@", "@3s", "3@10", "0s@1s", "-3s@1s", "3s@10s:", "3s@10s:dead", "")),
        *((parse_address, text) for text in ("host", "host:", ":80", "host:http", "a:b:1", "", "::1:80")),
    ],
)
def test_what_cannot_be_parsed_is_named_with_the_mend(parse: Callable[[str], object], text: str) -> None:
    with pytest.raises(ConfigError, match=r"; (write|give) ") as caught:
        parse(text)
    assert repr(text) in str(caught.value) or text in {"0s@1s", "-3s@1s", "3@10"}


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"listen_port": 70_000}, "--listen 70000"),
        ({"to_port": 0}, "--to h:0"),
        ({"to_host": "a..b"}, "--to 'a..b'"),
        ({"host": ""}, "--host ''"),
        ({"rtt_ms": -1.0}, "--rtt -1ms"),
        ({"jitter_ms": float("nan")}, "--jitter nanms"),
        ({"up_mbps": 0.0}, "--up 0mbit"),
        ({"down_mbps": -2.0}, "--down -2mbit"),
    ],
)
def test_the_configuration_checks_itself(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        LinkConfig(**{"listen_port": 0, "to_host": "h", "to_port": 1, **options})


def test_an_unknown_outage_kind_is_named() -> None:
    with pytest.raises(ConfigError, match="'dead' is unknown; choose stall or cut"):
        Outage(0, 1, "dead")  # type: ignore[arg-type]


# ---- the command


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_command_carries_bytes_until_a_signal(tmp_path: Path, number: signal.Signals) -> None:
    trace = write_trace(tmp_path, "0 50\n")
    with socket.create_server(("127.0.0.1", 0)) as server:
        to = f"127.0.0.1:{server.getsockname()[1]}"
        options = f"--listen 0 --to {to} --rtt 30ms --jitter 1ms --up 5mbit --trace {trace} --outage 1s@50s:cut --seed 4"
        with subprocess.Popen(
            [*EDGECLOUD, "link", *options.split(), "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            try:
                assert process.stdout is not None
                content = json.loads(process.stdout.readline())
                host, port = parse_address(content["listen"])
                with socket.create_connection((host, port), 10) as client:
                    start_s = time.monotonic()
                    client.sendall(b"ping")
                    remote, _ = server.accept()
                    with remote:
                        assert remote.recv(4) == b"ping"
                        remote.sendall(b"pong")
                        assert client.recv(4) == b"pong"
                    assert time.monotonic() - start_s >= 0.030 - EARLY_S
                    process.send_signal(number)
                    rest, remarks = process.communicate(timeout=20)
            finally:
                process.kill()
    assert process.returncode == 0
    assert rest == ""
    assert remarks.splitlines() == [
        f"link from {content['listen']} to {to}: rtt 30 ms, jitter 1 ms, up 5 mbit/s, down as in {trace}, "
        "cut of 1 s at 50 s; Ctrl-C ends it"
    ]
    del content["listen"]
    assert content == {
        "to": to,
        "rtt_ms": 30.0,
        "jitter_ms": 1.0,
        "up_mbps": 5.0,
        "down_mbps": None,
        "trace": str(trace),
        "outages": [{"start_s": 50.0, "duration_s": 1.0, "kind": "cut"}],
    }


def command(capsys: pytest.CaptureFixture[str], options: str) -> tuple[int, str]:
    from edgecloud.cli.app import run as run_command

    code = run_command(["link", *options.split()])
    out, remarks = capsys.readouterr()
    assert out == ""
    return code, remarks


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ("--listen 0 --to 127.0.0.1:1 --rtt 60parsecs", "60parsecs"),
        ("--listen 0 --to 127.0.0.1:1 --up -5mbit", "-5mbit"),
        ("--listen 0 --to 127.0.0.1:1 --trace no/such.log", "no/such.log"),
        ("--listen 0 --to 127.0.0.1:1 --outage 3s", "'3s'"),
        ("--listen 0 --to 127.0.0.1:1 --outage-kind dead", "dead"),
        ("--listen 0 --to nowhere", "nowhere"),
        ("--listen ten --to 127.0.0.1:1", "ten"),
        ("--listen -1 --to 127.0.0.1:1", "-1"),
        ("--listen 0", "--to"),
    ],
)
def test_bad_usage_exits_2_and_names_the_value(capsys: pytest.CaptureFixture[str], options: str, complaint: str) -> None:
    code, remarks = command(capsys, options)
    assert code == 2
    assert remarks.startswith("error: ")
    assert complaint in remarks
    assert len(remarks.splitlines()) == 1


def test_a_port_in_use_exits_1(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, remarks = command(capsys, f"--listen {port} --to 127.0.0.1:1")
    assert code == 1
    assert remarks.startswith(f"error: port {port} ")


def test_bad_usage_of_the_installed_command_exits_2() -> None:
    arguments = [*EDGECLOUD, "link", "--listen", "0", "--to", "127.0.0.1:1", "--rtt", "60parsecs"]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: '60parsecs' is no duration")
