"""Two processes: the engine may die at any moment, and all that anybody sees of it is time."""

from __future__ import annotations

import asyncio
import errno
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from pairs import PATIENCE_S, Pair, Server, serving, until

from edgecloud.client import Client
from edgecloud.cloud.messages import EngineConfig
from edgecloud.cloud.supervisor import Supervisor
from edgecloud.rpc import codec
from edgecloud.rpc import edgecloud_pb2 as pb
from edgecloud.rpc import edgecloud_pb2_grpc as pb_grpc

pytest_plugins = ["pairs"]

NUM_CLIENTS = 8
NUM_KILLS = int(os.environ.get("EDGECLOUD_TEST_KILLS", "1"))  # a restart takes seconds; 20 make a run of some minutes


@pytest.fixture(scope="module")
def server(tiny_pair: Pair) -> Iterator[Server]:
    with serving(tiny_pair.bundle) as started:
        yield started


def is_alive(process_id: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{process_id}/status").read_text()
    except FileNotFoundError:
        return False


def health_of(address: str) -> int:
    with grpc.insecure_channel(address) as channel:
        reply = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=PATIENCE_S)
    return int(reply.status)


SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


def test_the_front_end_holds_no_model(server: Server) -> None:
    maps = Path(f"/proc/{server.process.pid}/maps").read_text()
    assert "libtorch" not in maps
    assert "libtorch" in Path(f"/proc/{server.engine}/maps").read_text()


def test_health_follows_the_engine(server: Server) -> None:
    assert health_of(server.address) == SERVING
    engine = server.engine
    os.kill(engine, signal.SIGKILL)
    until(lambda: health_of(server.address) == NOT_SERVING)
    request = pb.VerifyRequest(session_id=b"s" * 16, context_ids=[1, 2])
    with grpc.insecure_channel(server.address) as channel:
        stub = pb_grpc.VerificationStub(channel)
        with pytest.raises(grpc.RpcError) as refused:
            stub.Verify(request, timeout=PATIENCE_S)
    assert refused.value.code() == grpc.StatusCode.UNAVAILABLE  # at once: nobody waits for a model to load
    until(lambda: health_of(server.address) == SERVING)
    assert server.engine != engine


def test_a_tail_whose_engine_died_is_asked_for_all_its_rows_and_answered_as_before(server: Server) -> None:
    with grpc.insecure_channel(server.address) as channel:
        stub = pb_grpc.VerificationStub(channel)
        width, session = 64, os.urandom(16)
        rows = np.sin(np.arange(9 * width, dtype=np.float32)).tobytes()
        keys = codec.row_keys(rows, 4 * width, 1, "float32")

        def ask(start: int, stop: int) -> pb.VerifyReply:
            hashed = codec.row_keys_hash(keys[:start])
            told = {"context_start": start, "context_hash": hashed, "rows": rows[start * 4 * width : stop * 4 * width]}
            request = pb.TailRequest(session_id=session, draft_ids=[1], cut=1, codec="float32", **told)
            reply: pb.VerifyReply = stub.Tail(request, timeout=PATIENCE_S)
            return reply

        ask(0, 6)
        expected = ask(5, 9)
        os.kill(server.engine, signal.SIGKILL)
        until(lambda: health_of(server.address) == NOT_SERVING)
        with pytest.raises(grpc.RpcError) as refused:
            ask(5, 9)
        assert refused.value.code() == grpc.StatusCode.UNAVAILABLE
        until(lambda: health_of(server.address) == SERVING)
        with pytest.raises(grpc.RpcError) as refused:
            ask(5, 9)
        assert refused.value.code() == grpc.StatusCode.FAILED_PRECONDITION
        again = ask(0, 9)
        assert (again.num_accepted, again.next_token_id) == (expected.num_accepted, expected.next_token_id)


def test_a_health_watcher_that_takes_no_message_keeps_nobody_waiting(tiny_pair: Pair) -> None:
    """Whoever may connect may watch: it must keep neither an engine from being started again nor the server from stopping."""
    narrow = [("grpc.use_local_subchannel_pool", 1), ("grpc.http2.lookahead_bytes", 10), ("grpc.http2.bdp_probe", 0)]
    with (
        serving(tiny_pair.bundle) as server,
        grpc.insecure_channel(server.address, narrow) as narrow_channel,
        grpc.insecure_channel(server.address) as channel,
    ):
        stuck = health_pb2_grpc.HealthStub(narrow_channel).Watch(health_pb2.HealthCheckRequest())
        watching = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=PATIENCE_S)
        assert next(watching).status == SERVING
        os.kill(server.engine, signal.SIGKILL)  # two changes, more than the narrow window holds
        assert next(watching).status == NOT_SERVING
        assert next(watching).status == SERVING
        assert stuck.is_active()
        server.process.terminate()
        assert next(watching).status == NOT_SERVING
        assert server.process.wait(PATIENCE_S) == 0


def test_a_start_that_fails_is_tried_again(tiny_pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of memory, out of processes: the service must not stay without an engine for it."""
    start, num_failed = asyncio.create_subprocess_exec, 0

    async def fail_twice(*command: str, **options: Any) -> asyncio.subprocess.Process:
        nonlocal num_failed
        if num_failed < 2:
            num_failed += 1
            raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        return await start(*command, **options)

    async def kill_and_wait() -> bool:
        running: asyncio.Queue[bool] = asyncio.Queue()
        async with Supervisor(EngineConfig(tiny_pair.target, num_threads=1)) as supervisor:
            supervisor.on_change = running.put_nowait
            monkeypatch.setattr(asyncio, "create_subprocess_exec", fail_twice)
            (engine,) = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()[-1:]
            os.kill(int(engine), signal.SIGKILL)
            while True:
                if await asyncio.wait_for(running.get(), PATIENCE_S) and num_failed == 2:
                    return supervisor.load.num_pages > 0

    assert asyncio.run(kill_and_wait())


def test_no_engine_outlives_a_server_that_is_killed(tiny_pair: Pair) -> None:
    server = Server(tiny_pair.bundle)
    engine = server.engine
    server.kill()
    until(lambda: not is_alive(engine))


def test_a_server_told_to_stop_leaves_no_engine_and_no_socket(
    tiny_pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with serving(tiny_pair.bundle) as server:
        engine = server.engine
        (folder,) = tmp_path.iterdir()
        assert folder.stat().st_mode & 0o077 == 0  # nobody else may talk to the engine
    assert not is_alive(engine)
    assert list(tmp_path.iterdir()) == []


def test_an_engine_of_another_version_is_refused_by_name(tmp_path: Path) -> None:
    code = (
        "import sys, zmq; from edgecloud.cloud.messages import *\n"
        "socket = zmq.Context().socket(zmq.PAIR); socket.bind(sys.argv[1])\n"
        "from pathlib import Path\n"
        "import os; socket.send(encode(Start(99, os.getppid(), EngineConfig(Path('/nowhere')))))\n"
        "print(decode_from_engine(socket.recv()))"
    )
    endpoint = f"ipc://{tmp_path}/engine"
    engine = subprocess.Popen([sys.executable, "-P", "-m", "edgecloud.cloud.engine_process", endpoint])
    said = subprocess.run([sys.executable, "-P", "-c", code, endpoint], capture_output=True, text=True, check=True)
    assert "StartFailed(error='ServerError', reason='the front end speaks version 99" in said.stdout
    assert engine.wait(PATIENCE_S) == 0


@pytest.mark.parametrize("mode", ["speculative", "cloud"])
def test_killed_at_random_moments_every_text_is_the_same(tiny_pair: Pair, server: Server, mode: str) -> None:
    """Kill -9 of the engine, again and again, under eight clients; none hangs, and none reads another word."""
    prompts = [f"tell {i} of us a story" for i in range(NUM_CLIENTS)]

    def texts_of(client: Client, prompt: str) -> list[int]:
        reply = client.generate(prompt, mode=mode, max_new_tokens=40, temperature=0.8, seed=7, raw=True, deadline_s=PATIENCE_S)
        return list(reply.token_ids)

    with Client(tiny_pair.bundle, cloud=server.address) as client:
        expected = [texts_of(client, prompt) for prompt in prompts]
    stopping = threading.Event()
    counts = [0] * NUM_CLIENTS

    def keep_asking(number: int) -> None:
        with Client(tiny_pair.bundle, cloud=server.address) as client:
            while not stopping.is_set():
                assert texts_of(client, prompts[number]) == expected[number]
                counts[number] += 1

    moments = random.Random(mode)
    with ThreadPoolExecutor(NUM_CLIENTS) as pool:
        asking = [pool.submit(keep_asking, number) for number in range(NUM_CLIENTS)]
        try:
            for _ in range(NUM_KILLS):
                done = sum(counts)
                until(lambda done=done: sum(counts) > done or any(a.done() for a in asking))  # type: ignore[misc]
                until(lambda: health_of(server.address) == SERVING)  # answers that were on their way have counted, too
                time.sleep(moments.random() / 4)
                os.kill(server.engine, signal.SIGKILL)
            done = sum(counts)
            until(lambda: sum(counts) > done or any(a.done() for a in asking))
        finally:
            stopping.set()
        for answer in asking:
            answer.result()
    until(server.is_empty)
