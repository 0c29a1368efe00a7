"""What the tests of modes, client and command line share: model pairs as bundles, real servers, and plain decoding.

A pytest plugin: a test module that wants the fixtures names it in `pytest_plugins`. It may be imported before, hence
PYTEST_DONT_REWRITE.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import IO, Any, TypeVar

import grpc
import numpy as np
import numpy.typing as npt
import onnx
import pytest
import torch
from tiny import make_tiny_llama
from transformers import AutoModelForCausalLM

from edgecloud import answers
from edgecloud.bundle import MANIFEST
from edgecloud.edge.link_config import LinkConfig
from edgecloud.edge.relay import Relay
from edgecloud.errors import CloudUnavailableError
from edgecloud.fingerprint import sha256_file
from edgecloud.kernels.choice import gumbel, process
from edgecloud.partitioner.inputs import check_inputs
from edgecloud.partitioner.partition import partition
from edgecloud.rpc import edgecloud_pb2 as pb
from edgecloud.rpc import edgecloud_pb2_grpc as pb_grpc
from edgecloud.sampling import SamplingSettings

Answer = TypeVar("Answer")

# A shell starts background jobs with Ctrl-C ignored, and what is ignored is inherited: the child must not.
ENTRY = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from edgecloud.cli import main; main()"
EDGECLOUD = [sys.executable, "-c", ENTRY]
TIE = 1e-4  # exactness is promised where the target's first choice leads its second by more
ROOT = Path(__file__).resolve().parents[1]
PATIENCE_S = 60.0  # how long a condition may take that takes a moment on an idle machine

torch.set_num_threads(1)  # for tiny models a second thread only gets in the way


# Plain decoding: what every mode is held against


@dataclass(frozen=True)
class Plain:
    """What the stock model says, one full forward a token, and by how much each token won."""

    token_ids: list[int]
    margins: list[float]

    def agrees_with(self, token_ids: Sequence[int]) -> bool:
        """Whether they are equal, at least up to the first tie."""
        for (want, margin), got in zip(zip(self.token_ids, self.margins, strict=True), token_ids, strict=False):
            if margin < TIE:
                return True
            if want != got:
                return False
        return len(self.token_ids) == len(token_ids)


class PlainTarget:
    """The stock model of transformers in fp32, chosen from in float64: no cache, no batch, nothing of `edgecloud.cloud`."""

    def __init__(self, folder: Path) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def decode(
        self,
        prompt: Sequence[int],
        max_new_tokens: int,
        sampling: SamplingSettings | None = None,
        stop_token_ids: Collection[int] = (),
    ) -> Plain:
        """Continue `prompt`; the stop token is kept."""
        settings = sampling or SamplingSettings()
        tokens, margins = list(prompt), []
        for _ in range(max_new_tokens):
            token, margin = plain_choice(self.logits(tokens)[-1], tokens, settings)
            tokens.append(token)
            margins.append(margin)
            if token in stop_token_ids:
                break
        return Plain(tokens[len(prompt) :], margins)

    def hidden(self, tokens: Sequence[int]) -> list[npt.NDArray[np.float32]]:
        """What every layer takes, by one full forward.  -> [len(tokens), width] each; behind them what the head takes"""
        with torch.inference_mode():
            states = self._model(torch.tensor([list(tokens)]), output_hidden_states=True).hidden_states
        return [state[0].numpy() for state in states]

    def logits(self, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        """One full forward.  -> [len(tokens), vocab]"""
        with torch.inference_mode():
            logits: npt.NDArray[np.float32] = self._model(torch.tensor([list(tokens)])).logits[0].numpy()
        return logits


def plain_choice(logits: npt.NDArray[np.float32], tokens: Sequence[int], settings: SamplingSettings) -> tuple[int, float]:
    """The token after `tokens`, chosen in float64, and by how much it won."""
    z = process(logits, tokens, settings)
    if not settings.greedy:
        z = z + gumbel(settings.seed, len(tokens), len(z))
    return int(z.argmax()), float(z.max() - np.partition(z, -2)[-2])


plain_target = cache(PlainTarget)


# Bundles


@dataclass(frozen=True)
class Pair:
    """A bundle and the Hugging Face folder that its target came from."""

    bundle: Path
    target: Path

    @property
    def plain(self) -> PlainTarget:
        """The target, decoded plainly."""
        return plain_target(self.target)


@pytest.fixture(scope="session")
def tiny_pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A tiny random target and itself in int4 as the draft: about a third of the drafts are accepted. Cut in the middle.

    The front has an exit head, so mode `split` drafts by that.

    Made once for all workers of a run.
    """
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "tiny-pair"
    with alone_with(folder):
        if not (folder / "bundle" / MANIFEST).is_file():
            target = make_tiny_llama(folder / "target")
            file = write_answers(target, folder / "answers.jsonl", num_prompts=12, num_tokens=16)
            given: dict[str, Any] = {"draft": None, "precision": "int4", "overwrite": False, "cut": 1, "exit_head": str(file)}
            partition(check_inputs(str(target), folder / "bundle", **given))
    return Pair(folder / "bundle", folder / "target")


def write_answers(target: Path, file: Path, *, num_prompts: int, num_tokens: int) -> Path:
    """The target's greedy answers to prompts of letters, as `edgecloud distill` collects them."""
    with answers.AnswerFile(file).append_to() as collected:
        for number in range(num_prompts):
            prompt = [1, *(30 + (7 * number + i * (number + 1)) % 60 for i in range(4 + number % 5))]
            said = plain_target(target).decode(prompt, num_tokens).token_ids
            collected.add(answers.Answer(f"prompt {number}", prompt, said, 0.0))
    return file


@pytest.fixture(scope="session")
def stranger_pair(tiny_pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """The same target with a draft of other random weights, the tiny one's shuffled: hardly a draft is accepted."""
    bundle = copy_of(tiny_pair.bundle, tmp_path_factory.mktemp("stranger") / "bundle")
    path = bundle / "edge/draft/model.onnx"
    graph = onnx.load(path)
    for weight in graph.graph.initializer:
        if weight.data_type == onnx.TensorProto.UINT8:  # packed int4
            weight.raw_data = bytes(reversed(weight.raw_data))
    path.with_name("model.onnx.data").unlink()
    onnx.save(graph, path, save_as_external_data=True, location="model.onnx.data", size_threshold=0)
    for name in ("model.onnx", "model.onnx.data"):
        edit_manifest(bundle, lambda content, name=name: list_file(content, bundle, f"edge/draft/{name}"))
    return Pair(bundle, tiny_pair.target)


def home_folder() -> Path:
    """Where the real model is kept between runs."""
    return Path(os.environ.get("EDGECLOUD_HOME") or ROOT / "build" / "home").resolve()


@contextmanager
def alone_with(folder: Path) -> Iterator[None]:
    """Keep out other runs, and other workers of this one, that would make the same things."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "tests.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the kernel gives it back, however this process ends
        yield


@pytest.fixture(scope="session")
def smol_pair() -> Pair:
    """The real demo pair: taken from EDGECLOUD_TEST_BUNDLE, else fetched and partitioned once into the cache folder."""
    if given := os.environ.get("EDGECLOUD_TEST_BUNDLE"):
        return Pair(Path(given).resolve(), Path(given).resolve() / "cloud")
    environment = {**os.environ, "EDGECLOUD_HOME": str(home_folder())}
    bundle = home_folder() / "test-bundle-cut"
    with alone_with(home_folder()):
        if not (bundle / MANIFEST).is_file():
            for command in (["fetch", "smollm2-135m"], ["partition", "smollm2-135m", "-o", str(bundle), "--cut", "10"]):
                done = subprocess.run([*EDGECLOUD, *command], env=environment, capture_output=True, text=True, check=False)
                assert done.returncode == 0, done.stderr
    return Pair(bundle, bundle / "cloud")


def copy_of(bundle: Path, to: Path) -> Path:
    """A bundle that a test may change."""
    return Path(shutil.copytree(bundle, to))


def edit_manifest(bundle: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change bundle.json."""
    content = json.loads((bundle / MANIFEST).read_text())
    change(content)
    (bundle / MANIFEST).write_text(json.dumps(content))


def list_file(content: dict[str, Any], bundle: Path, name: str) -> None:
    """Make the manifest say of a file what it is now."""
    path = bundle / name
    content["files"][name] = {"sha256": sha256_file(path), "num_bytes": path.stat().st_size}


def with_eos(pair: Pair, to: Path, *eos_token_ids: int) -> Pair:
    """The same pair, ending after other tokens. They travel with each request, so the same server will do."""
    bundle = copy_of(pair.bundle, to)
    edit_manifest(bundle, lambda content: content["tokenizer"].update(eos_token_ids=list(eos_token_ids)))
    return Pair(bundle, pair.target)


# Servers


class Server:
    """A real `edgecloud serve` in a process of its own, on this machine."""

    def __init__(self, model: Path, *options: str, port: int = 0, stderr: IO[str] | int = subprocess.DEVNULL) -> None:
        self._command = [*EDGECLOUD, "serve", str(model), "--threads", "1", "--json", *options]
        self._stderr = stderr
        self.process = self._start(port)
        self.serving = self._wait()  # what it says of itself
        self.address = str(self.serving["address"])

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self.address.rpartition(":")[2])

    @property
    def engine(self) -> int:
        """Process id of its engine: the newest child."""
        until(lambda: self._children() != [])  # after a crash the next one starts in a moment
        return self._children()[-1]

    def kill(self) -> None:
        """As a crash would."""
        self.process.kill()
        self.process.communicate()

    def restart(self) -> None:
        """Start again on the same port, with nothing remembered."""
        self.process = self._start(self.port)
        self._wait()

    def load(self) -> pb.Load:
        """How busy it says it is."""
        with grpc.insecure_channel(self.address) as channel:
            reply: pb.DescribeReply = pb_grpc.VerificationStub(channel).Describe(pb.DescribeRequest(), timeout=PATIENCE_S)
        return reply.load

    def is_empty(self) -> bool:
        """Whether it holds no session and every page is free."""
        load = self.load()
        return load.num_sessions == 0 and load.num_free_pages == load.num_pages

    def close(self) -> None:
        """Stop it."""
        self.process.terminate()
        self.process.communicate()

    def _children(self) -> list[int]:
        return [int(child) for child in Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()]

    def _start(self, port: int) -> subprocess.Popen[str]:
        command = [*self._command, "--port", str(port)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=self._stderr, text=True)

    def _wait(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"the server ended with {self.process.wait()}"
        content: dict[str, Any] = json.loads(line)
        return content


@contextmanager
def serving(model: Path, *options: str, stderr: IO[str] | int = subprocess.DEVNULL) -> Iterator[Server]:
    """A server of the test's own."""
    server = Server(model, *options, stderr=stderr)
    try:
        yield server
    finally:
        server.close()


@pytest.fixture(scope="session")
def tiny_server(tiny_pair: Pair) -> Iterator[Server]:
    """One server for all tests that do not harm it."""
    with serving(tiny_pair.bundle) as server:
        yield server


def free_port() -> int:
    """A port on which nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def until(holds: Callable[[], bool]) -> None:
    """Wait for something that happens on its own; how long it takes is not judged."""
    end_s = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < end_s, "it did not come to hold"
        time.sleep(0.02)


def once_reachable(ask: Callable[[], Answer]) -> Answer:
    """Ask until the cloud is found again: an impatient client gives up before gRPC tries a lost connection once more."""
    end_s = time.monotonic() + PATIENCE_S
    while True:
        try:
            return ask()
        except CloudUnavailableError:
            if time.monotonic() > end_s:
                raise


# The way to a server


class Gate:
    """A way to a server that can be shut and opened again: the relay of `edgecloud link`, without delay, in this process."""

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self._config = LinkConfig(0, host, int(port))
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="gate")
        self._thread.start()
        self.open()
        self.address = f"127.0.0.1:{self._relay.port}"  # what the device connects to

    def open(self) -> None:
        """Listen, on the same port every time."""
        self._relay = Relay(self._config)
        self._run(self._relay.start())
        self._config = replace(self._config, listen_port=self._relay.port)

    def shut(self) -> None:
        """Reset every connection and refuse new ones."""
        self._run(self._relay.close())

    def close(self) -> None:
        """Shut it for good."""
        self.shut()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(PATIENCE_S)


@pytest.fixture
def gate(tiny_server: Server) -> Iterator[Gate]:
    """A way to the tiny server that a test may shut."""
    way = Gate(tiny_server.address)
    yield way
    way.close()
