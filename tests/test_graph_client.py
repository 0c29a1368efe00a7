"""`Client.run`: whatever the cut, the link and the fault, the answer is the whole graph's."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from cut_graphs import WIDTH, random_model, same, sample, whole, write_bundle
from graph_loopback import GraphLoopback, graph_loopback, held_back
from pairs import PATIENCE_S, Gate, Pair, free_port, serving, until

import edgecloud
from edgecloud.cli.app import run as run_command
from edgecloud.client import Client
from edgecloud.edge.graph_parts import GraphParts
from edgecloud.edge.retry import Timeout
from edgecloud.errors import (
    BundleCorruptError,
    BundleError,
    BundleKindError,
    CloudRefusedError,
    CloudUnavailableError,
    ConfigError,
    DeadlineExceededError,
    ModelMismatchError,
)
from edgecloud.graph_bundle import GraphBundle

pytest_plugins = ["pairs"]

MODEL = random_model(11)
IMPATIENT = Timeout(connect_s=0.5, request_s=0.5, retry_s=0.5)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> GraphBundle:
    return write_bundle(tmp_path_factory.mktemp("graph") / "bundle", MODEL, [2, 5, 9])


@pytest.fixture(scope="module")
def server(bundle: GraphBundle) -> Iterator[GraphLoopback]:
    with graph_loopback(bundle) as started:
        yield started


@pytest.fixture
def client(bundle: GraphBundle, server: GraphLoopback) -> Iterator[Client]:
    with Client(bundle.path, cloud=server.address, num_threads=1) as made:
        yield made


# The same answer


@pytest.mark.parametrize("seed", range(6))
def test_every_cut_of_a_random_graph_gives_what_the_whole_gives(seed: int, tmp_path: Path) -> None:
    model = random_model(seed, num_layers=2 + seed % 3, batch="batch" if seed % 2 else 3)
    num_nodes = len(model.graph.node)
    made = write_bundle(tmp_path / "bundle", model, range(1, num_nodes))
    x = sample(seed, 3)
    want = whole(model, x)
    with graph_loopback(made) as server, Client(made.path, cloud=server.address, num_threads=1) as client:
        for cut in made.cuts:
            reply = client.run(x, mode=cut.name)
            assert reply.cut == cut.name
            assert same(reply, want), cut.name
            assert list(reply) == [output.name for output in made.graph.outputs]
        assert client.run(x, mode="split").cut.startswith("cut-")
        for _ in range(5):
            assert same(client.run(x), want)


@pytest.mark.parametrize(("codec", "error"), [("float16", 5e-3), ("int8", 0.05), ("int4", 1.5)])
def test_a_boundary_may_be_encoded(codec: str, error: float, tmp_path: Path) -> None:
    made = write_bundle(tmp_path / "bundle", MODEL, [5], codec=codec)
    x = sample(3, 4)
    want = whole(MODEL, x)
    with graph_loopback(made) as server, Client(made.path, cloud=server.address, num_threads=1) as client:
        reply, plain = client.run(x, mode="cut-1"), client.run(x, mode="edge")
        huge = client.run({**x, "input": np.full_like(x["input"], np.inf)}, mode="cloud")  # no codec holds it: it goes as it is
    assert same(plain, want)
    assert 0 < np.abs(reply["output"] - want["output"]).max() < error
    assert same(huge, whole(MODEL, {**x, "input": np.full_like(x["input"], np.inf)}))


def test_clients_side_by_side_each_get_their_own(bundle: GraphBundle, server: GraphLoopback) -> None:
    def ask(seed: int) -> bool:
        want = whole(MODEL, sample(seed, 1 + seed % 3))
        with Client(bundle.path, cloud=server.address, num_threads=1) as client:
            got = [client.run(sample(seed, 1 + seed % 3), mode=mode) for mode in ("cloud", "cut-1", "cut-2", "cloud")]
        return all(np.allclose(reply[name], want[name], rtol=0, atol=1e-5) for reply in got for name in want)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ask, range(16)))


def test_a_client_may_be_shared_by_threads_and_by_tasks(bundle: GraphBundle, server: GraphLoopback) -> None:
    async def all_of_them() -> list[edgecloud.InferenceReply]:
        async with edgecloud.AsyncClient(bundle.path, cloud=server.address, num_threads=1) as client:
            return await asyncio.gather(
                *(client.run(sample(seed), mode=mode) for seed in range(6) for mode in ("cloud", "auto", "cut-3"))
            )

    for number, reply in enumerate(asyncio.run(all_of_them())):
        want = whole(MODEL, sample(number // 3))
        assert all(np.allclose(reply[name], want[name], rtol=0, atol=1e-5) for name in want)


def test_a_reply_is_a_mapping_and_says_what_it_took(client: Client) -> None:
    reply = client.run(sample(1), mode="cut-2")
    assert set(reply) == {"output", "early"} == set(dict(reply)) == set(reply.outputs)
    assert reply["output"].shape == (1, WIDTH)
    assert (reply.metrics.num_attempts, reply.metrics.num_batched, reply.fell_back) == (1, 1, None)
    assert reply.metrics.uplink_bytes > 4 * WIDTH
    assert reply.metrics.total_ms >= reply.metrics.edge_ms + reply.metrics.cloud_ms
    json.dumps(reply.to_dict())
    alone = client.run(sample(1), mode="edge")
    assert (alone.metrics.num_attempts, alone.metrics.uplink_bytes) == (0, 0)


# What cannot work

BAD: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (lambda x: [1, 2], "inputs are list"),
    (lambda x: {}, "inputs are none; small takes a mapping with 'input', 'late'"),
    (lambda x: {**x, "more": x["late"]}, "'more'"),
    (lambda x: {**x, "late": x["late"].astype(np.float64)}, r"'late' is float64, the graph takes float32; convert it"),
    (lambda x: {**x, "late": x["late"][0]}, r"'late' has shape \[24\], the graph takes \['any', 24\]"),
    (lambda x: {**x, "late": x["late"][:, :5]}, r"shape \[1, 5\]"),
    (lambda x: {**x, "late": x["late"][:0]}, r"shape \[0, 24\]"),
]


@pytest.mark.parametrize(("change", "words"), BAD, ids=[str(i) for i in range(len(BAD))])
def test_inputs_that_the_graph_does_not_take(client: Client, change: Callable[[dict[str, Any]], Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        client.run(change(sample(0)))


def test_modes_that_cannot_be(client: Client, bundle: GraphBundle, tmp_path: Path) -> None:
    for mode, words in (("fast", "it takes auto, split, or a cut"), ("cut-7", "cut-7"), ("speculative", "mode is 'speculative'")):
        with pytest.raises(ConfigError, match=words):
            client.run(sample(0), mode=mode)
    for deadline_s in (0, -1.0, float("nan"), "soon"):
        with pytest.raises(ConfigError, match="deadline_s"):
            client.run(sample(0), deadline_s=deadline_s)  # type: ignore[arg-type]
    with Client(bundle.path, num_threads=1) as alone:
        assert alone.run(sample(0)).cut == "edge"
        with pytest.raises(ConfigError, match="needs a cloud"):
            alone.run(sample(0), mode="cut-1")
    no_edge = write_bundle(tmp_path / "b", MODEL, [4], drop=["edge"], chosen="cloud")
    with Client(no_edge.path, num_threads=1) as alone:
        with pytest.raises(ConfigError, match="needs a cloud"):
            alone.run(sample(0))
        with pytest.raises(ConfigError, match="does not have"):
            alone.run(sample(0), mode="edge")


def test_rows_that_do_not_belong_together_are_refused_wherever_they_run(client: Client) -> None:
    x = {"input": sample(0, 2)["input"], "late": sample(0, 3)["late"]}
    for mode in ("edge", "cloud"):
        with pytest.raises((ConfigError, CloudRefusedError), match="cannot run on these inputs"):
            client.run(x, mode=mode)


def test_text_and_graphs_are_told_apart(bundle: GraphBundle, tiny_pair: Pair, server: GraphLoopback) -> None:
    with Client(bundle.path) as client, pytest.raises(BundleKindError, match=r"Client\.run"):
        client.generate("Hello")
    with Client(tiny_pair.bundle) as client, pytest.raises(BundleKindError, match=r"Client\.generate"):
        client.run(sample(0))
    with Client(tiny_pair.bundle, cloud=server.address) as client, pytest.raises(ModelMismatchError, match="serves small"):
        client.generate("Hello", mode="cloud", max_new_tokens=1)


def test_another_graph_or_other_cuts_are_refused(bundle: GraphBundle, server: GraphLoopback, tmp_path: Path) -> None:
    other = write_bundle(tmp_path / "other", random_model(12), [5])
    moved = write_bundle(tmp_path / "moved", MODEL, [3, 5, 9])  # the same graph, divided elsewhere
    for path in (other.path, moved.path):
        with Client(path, cloud=server.address, num_threads=1) as client:
            for mode in ("cut-1", "cloud"):
                with pytest.raises(ModelMismatchError):
                    client.run(sample(0), mode=mode)


def test_a_request_above_the_limit_names_it(bundle: GraphBundle) -> None:
    x = sample(0, 100)
    small = graph_loopback(bundle, max_message_bytes=10_000)
    with small as server, Client(bundle.path, cloud=server.address, num_threads=1) as client:
        with pytest.raises(ConfigError, match="above the service's limit of 10000"):
            client.run(x, mode="cloud")
        assert same(client.run(sample(1), mode="cloud"), whole(MODEL, sample(1)))
        with pytest.raises(ConfigError, match=r"limit of 10000.*--max-message-mb"):
            client.run(x, mode="split")
        assert client.run(x).cut == "edge"


def test_a_damaged_bundle_is_not_run(bundle: GraphBundle, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(bundle.path, tmp_path / "copy"))
    shutil.rmtree(copy / "cloud")  # the device's part will do
    with Client(copy) as client:
        client.run(sample(0), mode="edge")
    (copy / "edge/edge.onnx").write_bytes(b"no graph")
    with Client(copy) as client, pytest.raises(BundleCorruptError, match=r"edge\.onnx"):
        client.run(sample(0), mode="edge")


# When the cloud does not answer


def test_without_an_answer_the_device_stands_in_and_says_so(bundle: GraphBundle) -> None:
    x = sample(2)
    with Client(bundle.path, cloud=f"127.0.0.1:{free_port()}", num_threads=1, timeout=IMPATIENT) as client:
        for _ in range(3):
            reply = client.run(x, deadline_s=PATIENCE_S)
            assert (reply.cut, same(reply, whole(MODEL, x))) == ("edge", True)
            assert reply.fell_back is not None
        with pytest.raises(CloudUnavailableError):
            client.run(x, mode="cloud")


def test_with_nobody_to_stand_in_the_error_is_typed(tmp_path: Path) -> None:
    made = write_bundle(tmp_path / "b", MODEL, [4], drop=["edge"], chosen="cloud")
    with Client(made.path, cloud=f"127.0.0.1:{free_port()}", num_threads=1, timeout=IMPATIENT) as client:
        with pytest.raises(CloudUnavailableError):
            client.run(sample(0))
        with pytest.raises((DeadlineExceededError, CloudUnavailableError)):
            client.run(sample(0), deadline_s=0.05)


def test_a_cloud_that_is_lost_and_comes_back(tmp_path: Path) -> None:
    made = write_bundle(tmp_path / "b", MODEL, [4], edge_ms=10_000.0, cloud_ms=0.01, chosen="cloud")  # so that it wants the cloud
    x = sample(4)
    want = whole(MODEL, x)
    with graph_loopback(made) as server:
        way = Gate(server.address)
        try:
            with Client(made.path, cloud=way.address, num_threads=1, timeout=IMPATIENT) as client:
                assert client.run(x).cut == "cloud"
                way.shut()
                reply = client.run(x, deadline_s=PATIENCE_S)
                assert (reply.cut, same(reply, want)) == ("edge", True)
                assert reply.fell_back is not None
                way.open()
                until(lambda: client.run(x, mode="auto").fell_back is None)
                assert same(client.run(x, mode="cloud"), want)
        finally:
            way.close()


def test_a_cloud_that_says_nothing_is_not_waited_for_past_the_deadline(tmp_path: Path) -> None:
    made = write_bundle(tmp_path / "b", MODEL, [4], edge_ms=900.0, cloud_ms=0.01, chosen="cloud")
    with graph_loopback(made) as server, Client(made.path, cloud=server.address, num_threads=1) as client:
        assert client.run(sample(0)).cut == "cloud"
        with held_back(server) as (opened, _, _):
            reply = client.run(sample(1), deadline_s=2.0)
            assert (reply.cut, "did not answer" in str(reply.fell_back)) == ("edge", True)
            assert same(reply, whole(MODEL, sample(1)))
            with pytest.raises(DeadlineExceededError):
                client.run(sample(1), mode="cloud", deadline_s=0.2)
            opened.set()


def test_an_engine_that_is_killed_is_started_again_and_clients_get_their_answers(bundle: GraphBundle) -> None:
    with serving(bundle.path) as server, Client(bundle.path, cloud=server.address, num_threads=1) as client:
        maps = [Path(f"/proc/{process}/maps").read_text() for process in (server.process.pid, server.engine)]
        assert ["onnxruntime" in m for m in maps] == [False, True]
        assert not any("libtorch" in m for m in maps)
        engine = server.engine
        for seed in range(20):
            if seed == 5:
                os.kill(engine, signal.SIGKILL)
            assert same(client.run(sample(seed), mode=["cloud", "cut-1", "cut-2"][seed % 3]), whole(MODEL, sample(seed)))
        assert server.engine != engine
        assert server.serving["graph_cuts"] == ["cloud", "cut-1", "cut-2", "cut-3"]


# What the device holds


def test_graphs_are_kept_within_the_budget(bundle: GraphBundle) -> None:
    cuts = {cut.name: cut for cut in bundle.cuts}
    parts = GraphParts(bundle, 1, max_ram_bytes=cuts["edge"].edge_ram_bytes)
    x = sample(0)
    for name in ("cut-1", "cut-2", "edge", "cut-1", "cut-3", "edge"):
        parts.run(cuts[name], x)
        assert parts.has(cuts[name])
        assert parts.ram_bytes <= cuts["edge"].edge_ram_bytes
    assert not parts.has(cuts["cut-1"])
    assert not parts.prepare(cuts["cut-1"])  # no room beside
    unlimited = GraphParts(bundle, 1)
    for cut in bundle.cuts:
        unlimited.run(cut, x)
    assert all(unlimited.has(cut) for cut in bundle.cuts)


def test_a_graph_is_loaded_beside_the_runs(bundle: GraphBundle) -> None:
    parts = GraphParts(bundle, 1)
    cut = bundle.cut("cut-1")
    assert parts.prepare(cut)
    until(lambda: parts.has(cut))
    broken = replace(cut, edge="edge/missing.onnx", name="cut-9")
    assert parts.prepare(broken)
    until(lambda: not parts.prepare(broken))
    with pytest.raises(BundleError, match=r"missing\.onnx"):
        parts.run(broken, sample(0))


# The command


def test_the_command_runs_a_file_and_writes_another(
    bundle: GraphBundle, server: GraphLoopback, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    x, out = sample(6, 2), tmp_path / "out.npz"
    np.savez(tmp_path / "in.npz", **x)
    arguments = ["run", str(bundle.path), "--inputs", str(tmp_path / "in.npz"), "--threads", "1"]
    assert run_command([*arguments, "--cloud", server.address, "--mode", "cut-2", "-o", str(out), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["cut"], told["outputs"]["output"]["shape"]) == ("cut-2", [2, WIDTH])
    with np.load(out) as found:
        assert same({name: found[name] for name in found.files}, whole(MODEL, x))
    assert run_command([*arguments, "--repeat", "2"]) == 0
    assert "edge" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "cannot be read"), (b"nothing", "no .npz file"), (b"PK\x03\x04broken", "no .npz file"), (np.zeros(3), "without a name"),
     ({"input": np.array([object()])}, "no .npz file of plain arrays")],
)  # fmt: skip
def test_files_that_the_command_cannot_read(
    content: Any, words: str, bundle: GraphBundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "in.npz"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, dict):
        np.savez(path, allow_pickle=True, **content)
    elif content is not None:
        with path.open("wb") as file:
            np.save(file, content)
    assert run_command(["run", str(bundle.path), "--inputs", str(path)]) == 2
    assert words in capsys.readouterr().err


def test_a_bundle_that_leaves_the_cloud_nothing_is_not_served(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = write_bundle(tmp_path / "b", MODEL, [], drop=["cloud"])
    assert run_command(["serve", str(made.path), "--port", "0"]) == 1
    assert "leaves nothing to the cloud" in capsys.readouterr().err
    broken = write_bundle(tmp_path / "c", MODEL, [4])
    (broken.path / "cloud/cut-1.onnx").write_bytes(onnx.ModelProto().SerializeToString())
    assert run_command(["serve", str(broken.path), "--port", "0"]) == 1
    assert "cut-1.onnx" in capsys.readouterr().err
