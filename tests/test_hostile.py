"""A real server, its two processes, and clients that mean it no good: a typed status each time, the same engine, flat memory."""

from __future__ import annotations

import asyncio
import os
import socket
import urllib.request
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import ExitStack, asynccontextmanager, suppress
from pathlib import Path
from random import Random
from typing import Any

import fuzz
import grpc
import pytest
from loopback import refusal_of
from pairs import PATIENCE_S, Server, until
from tiny import make_tiny_llama

from edgecloud.rpc import codec
from edgecloud.rpc import edgecloud_pb2 as pb
from edgecloud.rpc import edgecloud_pb2_grpc as pb_grpc

Code = grpc.StatusCode
MAX_PASS_TOKENS = 64
OPTIONS = ["--cache-mb", "1", "--max-sessions", "64", "--idle-s", "1", "--slow-reader-s", "1", "--metrics-port", "0"]
OPTIONS += ["--max-pass-tokens", str(MAX_PASS_TOKENS)]
MAX_SESSIONS = 64
PROMPT = fuzz.LOG[:9]
NUM_CALLS = 24  # at a time
# SEED:FIRST:NUMBER of the fuzzer's cases. A failure names its case; "0:1234:1" plays case 1234 of seed 0 alone.
SEED, FIRST, NUM_CASES = map(int, os.environ.get("EDGECLOUD_TEST_FUZZ", "0:0:20000").split(":"))
NUM_SESSIONS = int(os.environ.get("EDGECLOUD_TEST_SESSIONS", "3000"))  # of the compressed hour
MIB = 1 << 20
# What a process may grow by in the second half of many thousand equal calls. The allocator's arenas still settle then, by less than
# one MiB as a rule; a leak of one KiB a call would be five or ten.
SETTLING = 2 * MIB


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("target") / "tiny", hidden_size=fuzz.WIDTH, max_position_embeddings=64)


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the server's processes write."""
    return tmp_path_factory.mktemp("log") / "stderr"


@pytest.fixture(scope="module")
def started(model: Path, log: Path) -> Iterator[Server]:
    with log.open("w") as stderr:
        server = Server(model, *OPTIONS, stderr=stderr)
        meet_every_number_of_rows(server)
        yield server
        server.close()


@pytest.fixture
def server(started: Server, log: Path) -> Iterator[Server]:
    """The server, which afterwards must be as it was: the same engine, the same answer, nothing kept, no traceback."""
    engine, answer, num_logged = started.engine, known_answer(started), log.stat().st_size
    yield started
    assert started.engine == engine, log.read_text()
    assert known_answer(started) == answer
    until(lambda: num_running(started) == 0)
    until(started.is_empty)
    assert "Traceback" not in log.read_text()[num_logged:]


def known_answer(server: Server) -> list[int]:
    """What it says to a request that it has been asked before."""
    with grpc.insecure_channel(server.address) as channel:
        request = pb.DecodeRequest(session_id=os.urandom(16), context_ids=PROMPT, max_new_tokens=12)
        replies = list(pb_grpc.VerificationStub(channel).Decode(request, timeout=PATIENCE_S))
    return [token for reply in replies for token in reply.token_ids]


def meet_every_number_of_rows(server: Server) -> None:
    """One pass of each size. oneDNN keeps 0.6 MB for every number of rows that it has met, which is no leak but looks like one."""
    with grpc.insecure_channel(server.address) as channel:
        for num_rows in range(1, MAX_PASS_TOKENS + 1):
            num_drafted = min(num_rows - 1, 32)
            ids = [i % fuzz.VOCAB_SIZE for i in range(num_rows)]
            request = pb.VerifyRequest(session_id=os.urandom(16), context_ids=ids[num_drafted:], draft_ids=ids[:num_drafted])
            pb_grpc.VerificationStub(channel).Verify(request, timeout=PATIENCE_S)


def num_running(server: Server) -> float:
    """Requests that the front end has not done with."""
    with urllib.request.urlopen(f"http://127.0.0.1:{server.serving['metrics_port']}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    [value] = [line.split()[1] for line in lines if line.startswith("edgecloud:num_requests_running ")]
    return float(value)


def memory(server: Server, what: str = "VmRSS") -> list[int]:
    """Bytes that the front end and the engine hold now; `VmHWM`: at most held."""
    found = []
    for process_id in (server.process.pid, server.engine):
        lines = Path(f"/proc/{process_id}/status").read_text().splitlines()
        [line] = [line for line in lines if line.startswith(f"{what}:")]
        found.append(int(line.split()[1]) * 1024)
    return found


def assert_flat(before: list[int], after: list[int], allowed: int = SETTLING) -> None:
    growth = [b - a for a, b in zip(before, after, strict=True)]
    print("front end and engine grew by", *(f"{bytes_ / MIB:.2f} MiB" for bytes_ in growth))
    assert max(growth) <= allowed, growth


@asynccontextmanager
async def channels(address: str, number: int = 4) -> AsyncIterator[list[grpc.aio.Channel]]:
    """Connections of their own."""
    made = [grpc.aio.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1)]) for _ in range(number)]
    try:
        yield made
    finally:
        for channel in made:
            await channel.close()


async def for_each(address: str, items: Iterable[Any], do: Callable[[grpc.aio.Channel, Any], Awaitable[None]]) -> None:
    """Do something for every item, a few at a time, over a few connections."""
    rest = iter(items)

    async def worker(channel: grpc.aio.Channel) -> None:
        for item in rest:
            await do(channel, item)

    async with channels(address) as made:
        await asyncio.gather(*(worker(made[i % len(made)]) for i in range(NUM_CALLS)))


# Fuzzing

EXPECTED = {Code.OK, Code.INVALID_ARGUMENT, Code.FAILED_PRECONDITION, Code.RESOURCE_EXHAUSTED}
EXPECTED_OF = {fuzz.HEALTH: {*EXPECTED, Code.NOT_FOUND}, fuzz.NOBODY: {Code.UNIMPLEMENTED}}


async def play(channel: grpc.aio.Channel, case: fuzz.Case) -> tuple[Code, str]:
    """Make the call.  -> how it ended"""
    call: Any = channel.unary_stream(case.method)(case.content, timeout=PATIENCE_S)
    try:
        replies = [reply async for reply in call]
    except grpc.aio.AioRpcError as error:
        return error.code(), error.details() or ""
    if case.method in (f"{fuzz.SERVICE}/Verify", f"{fuzz.SERVICE}/Tail"):
        assert pb.VerifyReply.FromString(replies[0]).next_token_id < fuzz.VOCAB_SIZE
    return Code.OK, ""


def batter(server: Server, cases: Iterable[fuzz.Case]) -> Counter[tuple[str, Code]]:
    """Make the calls, each of which must end as one may.  -> how often which method ended how"""
    ends: Counter[tuple[str, Code]] = Counter()
    failures: list[str] = []

    async def judge(channel: grpc.aio.Channel, case: fuzz.Case) -> None:
        code, words = await play(channel, case)
        ends[case.method, code] += 1
        if code not in EXPECTED_OF.get(case.method, EXPECTED) or (code != Code.OK and not words):
            failures.append(f"{code.name} ({words}): {case}")

    asyncio.run(for_each(server.address, cases, judge))
    assert not failures, "\n".join([f"{len(failures)} of {ends.total()} calls, among them", *failures[:5]])
    return ends


def test_no_call_has_any_end_but_a_typed_status(server: Server) -> None:
    half = FIRST + NUM_CASES // 2
    ends = batter(server, (fuzz.case(SEED, number) for number in range(FIRST, half)))
    before = memory(server)
    ends += batter(server, (fuzz.case(SEED, number) for number in range(half, FIRST + NUM_CASES)))
    assert_flat(before, memory(server))
    assert ends.total() == NUM_CASES
    if NUM_CASES >= 1000:  # it gets past the first checks, too
        answered = {method for method, code in ends if code == Code.OK}
        assert answered == {*fuzz.MESSAGES, fuzz.HEALTH, fuzz.REFLECTION}
        assert min(ends[f"{fuzz.SERVICE}/{name}", Code.FAILED_PRECONDITION] for name in ("Verify", "Tail")) > 0


def test_bytes_that_are_not_even_grpc_break_nothing(server: Server) -> None:
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    for number in range(300):
        random = Random(number)
        content = random.randbytes(random.choice([1, 9, 100, 20_000]))
        with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE_S) as connection, suppress(OSError):
            connection.sendall(random.choice([b"", b"GET / HTTP/1.1\r\n\r\n", preface, preface + bytes(9)]) + content)


# Size


@pytest.mark.parametrize(
    ("num_bytes", "compression"),
    [(1024 * MIB, grpc.Compression.NoCompression), (256 * MIB, grpc.Compression.Gzip)],
    ids=["of a gibibyte", "that is small only while it is compressed"],
)
def test_a_message_is_refused_before_it_fills_the_memory(server: Server, num_bytes: int, compression: grpc.Compression) -> None:
    before = memory(server, "VmHWM")
    with grpc.insecure_channel(server.address) as channel:
        verify = channel.unary_unary(f"{fuzz.SERVICE}/Verify")
        refusal = refusal_of(lambda: verify(bytes(num_bytes), timeout=PATIENCE_S, compression=compression))
        assert refusal.code == Code.RESOURCE_EXHAUSTED
        assert "larger than max" in refusal.words
    assert_flat(before, memory(server, "VmHWM"), 64 * MIB)


# Sessions


async def answer_of(channel: grpc.aio.Channel, request: pb.VerifyRequest) -> pb.VerifyReply:
    reply: pb.VerifyReply = await pb_grpc.VerificationStub(channel).Verify(request, timeout=PATIENCE_S)
    return reply


def test_ten_thousand_sessions_that_are_opened_and_left_take_no_more_room_than_a_few(server: Server) -> None:
    most_sessions = 0

    async def open_and_leave(channel: grpc.aio.Channel, number: int) -> None:
        nonlocal most_sessions
        await answer_of(channel, pb.VerifyRequest(session_id=number.to_bytes(codec.SESSION_ID_BYTES), context_ids=PROMPT))
        if number % 500 == 0:
            describe: Any = pb_grpc.VerificationStub(channel).Describe
            most_sessions = max(most_sessions, (await describe(pb.DescribeRequest())).load.num_sessions)

    def play(part: int) -> None:
        asyncio.run(for_each(server.address, range(part * 5_000, (part + 1) * 5_000), open_and_leave))

    play(0)
    before = memory(server)
    play(1)
    assert_flat(before, memory(server))
    assert 0 < most_sessions <= MAX_SESSIONS


def test_streams_that_are_neither_read_nor_closed_are_left_and_their_sessions_freed(server: Server) -> None:
    narrow = [("grpc.use_local_subchannel_pool", 1), ("grpc.http2.lookahead_bytes", 10), ("grpc.http2.bdp_probe", 0)]
    with ExitStack() as stack:
        for _ in range(4):
            channel = stack.enter_context(grpc.insecure_channel(server.address, narrow))
            decode = pb_grpc.VerificationStub(channel).Decode
            for _ in range(8):
                stream = decode(pb.DecodeRequest(session_id=os.urandom(16), context_ids=PROMPT, max_new_tokens=50))
                stack.callback(stream.cancel)  # a stream that nobody holds is cancelled at once
        until(lambda: num_running(server) > 0)
        until(lambda: num_running(server) == 0)
        until(server.is_empty)


class ShortSession:
    """A session as an hour has thousands of: some verdicts and streams, some given up in the middle, ended or abandoned."""

    def __init__(self, channel: grpc.aio.Channel, random: Random) -> None:
        self._stub: Any = pb_grpc.VerificationStub(channel)
        self._random = random
        self._id = random.randbytes(codec.SESSION_ID_BYTES)
        self._tokens = [random.randrange(fuzz.VOCAB_SIZE) for _ in range(random.randint(1, 30))]
        self._num_known = 0  # to the server
        self.ends: Counter[str] = Counter()

    async def live(self) -> None:
        """From the first call to the last."""
        for _ in range(self._random.randint(1, 3)):
            await self._random.choice([self._verify, self._verify, self._decode])()
        if self._random.random() < 0.5:
            await self._stub.Release(pb.ReleaseRequest(session_id=self._id), timeout=PATIENCE_S)

    def _context(self) -> dict[str, Any]:
        known, tokens = self._num_known, self._tokens
        return {
            "session_id": self._id,
            "context_start": known,
            "context_ids": tokens[known:],
            "context_hash": codec.context_hash(tokens[:known]),
            "sampling": pb.Sampling(temperature=1.0, seed=7),
        }

    async def _verify(self) -> None:
        draft = [self._random.randrange(fuzz.VOCAB_SIZE) for _ in range(self._random.randint(0, 5))]
        timeout = self._random.choice([0.002, *[PATIENCE_S] * 9])
        call = self._stub.Verify(pb.VerifyRequest(**self._context(), draft_ids=draft), timeout=timeout)
        if self._random.random() < 0.1:
            await asyncio.sleep(self._random.uniform(0, 0.005))
            call.cancel()
        if (reply := await self._end_of(call)) is not None:
            self._tokens += [*draft[: reply.num_accepted], reply.next_token_id]
            self._num_known = reply.cached_length

    async def _decode(self) -> None:
        enough = self._random.choice([1, 3, 99])
        call = self._stub.Decode(pb.DecodeRequest(**self._context(), max_new_tokens=8), timeout=PATIENCE_S)

        async def read() -> None:
            num_read = 0
            async for reply in call:
                self._tokens += reply.token_ids
                self._num_known = len(self._tokens)
                num_read += 1
                if num_read == enough:
                    call.cancel()

        await self._end_of(read())

    async def _end_of(self, call: Awaitable[Any]) -> Any:
        """Whatever it gives; None when it ends in one of the ways that it may end."""
        try:
            answer = await call
        except asyncio.CancelledError:
            self.ends["CANCELLED"] += 1
        except grpc.aio.AioRpcError as error:
            if error.code() not in {Code.FAILED_PRECONDITION, Code.DEADLINE_EXCEEDED}:
                raise
            self._num_known = 0
            self.ends[error.code().name] += 1
        else:
            self.ends["OK"] += 1
            return answer
        return None


def test_an_hour_of_short_sessions_leaves_no_page_and_no_memory_behind(server: Server) -> None:
    """Compressed: what counts is how often, not how long. That no page is missing in the end, the fixture sees."""
    ends: Counter[str] = Counter()

    async def live(channel: grpc.aio.Channel, number: int) -> None:
        session = ShortSession(channel, Random(number))
        await session.live()
        ends.update(session.ends)

    def play(part: int) -> None:
        half = NUM_SESSIONS // 2
        asyncio.run(for_each(server.address, range(part * half, (part + 1) * half), live))

    play(0)
    before = memory(server)
    play(1)
    assert_flat(before, memory(server))
    print(ends)
    assert min(ends["OK"], ends["CANCELLED"]) > NUM_SESSIONS // 10


# Last, because of what the allocator keeps of them


def test_lists_of_a_million_tokens_are_refused(server: Server) -> None:
    ends = batter(server, (fuzz.long_case(SEED, number) for number in range(100)))
    assert {code for _, code in ends} == {Code.INVALID_ARGUMENT, Code.RESOURCE_EXHAUSTED}
