"""Infer over a real socket: what it answers, what it refuses, and that whatever comes it is the same service afterwards."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any

import grpc
import numpy as np
import onnx
import pytest
from cut_graphs import WIDTH, model_of, random_model, same, sample, whole, write_bundle
from fuzz import ODD, odd_field, set_odd_values
from google.protobuf.descriptor import FieldDescriptor
from graph_loopback import PATIENCE_S, GraphLoopback, graph_loopback, held_back
from loopback import Refusal, refusal_of
from onnx import TensorProto, helper
from pairs import until

from edgecloud.cloud import graph_engine
from edgecloud.cloud.tenants import Tenants
from edgecloud.graph_bundle import GraphBundle
from edgecloud.rpc import codec
from edgecloud.rpc import edgecloud_pb2 as pb
from edgecloud.tensors import from_bytes, num_bytes, to_bytes

Code = grpc.StatusCode
MODEL = random_model(5)
Change = Callable[[pb.InferRequest], object]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> GraphBundle:
    return write_bundle(tmp_path_factory.mktemp("graph") / "bundle", MODEL, [4, 8], codec="int8")


@pytest.fixture(scope="module")
def server(bundle: GraphBundle) -> Iterator[GraphLoopback]:
    with graph_loopback(bundle) as started:
        yield started


def request(seed: int = 0, rows: int = 1, **fields: Any) -> pb.InferRequest:
    """A good one for cut `cloud`."""
    tensors = [
        pb.Tensor(name=name, dtype="float32", shape=array.shape, data=to_bytes(array)) for name, array in sample(seed, rows).items()
    ]
    return pb.InferRequest(cut="cloud", inputs=tensors, **fields)


def outputs(reply: pb.InferReply) -> dict[str, np.ndarray]:
    return {t.name: from_bytes(t.dtype, t.shape, t.codec, t.data) for t in reply.outputs}


def ask(server: GraphLoopback, asked: pb.InferRequest, **options: Any) -> pb.InferReply:
    with server.stub() as stub:
        reply: pb.InferReply = stub.Infer(asked, timeout=PATIENCE_S, **options)
        return reply


def refused(server: GraphLoopback, asked: pb.InferRequest) -> Refusal:
    return refusal_of(lambda: ask(server, asked))


def test_describe_says_what_runs_here(server: GraphLoopback, bundle: GraphBundle) -> None:
    with server.stub() as stub:
        reply = stub.Describe(pb.DescribeRequest(), timeout=PATIENCE_S)
    assert (reply.model_name, reply.model_fingerprint) == (bundle.graph.name, bundle.graph.fingerprint)
    assert list(reply.graph_cuts) == ["cloud", "cut-1", "cut-2"]
    assert reply.limits.max_message_bytes == 1 << 22
    assert "int8" in reply.boundary_codecs


def test_an_answer_is_the_whole_graphs(server: GraphLoopback, bundle: GraphBundle) -> None:
    reply = ask(server, request(7, rows=3, graph_hash=bundle.graph_hash))
    assert same(outputs(reply), whole(MODEL, sample(7, 3)))
    assert reply.compute_ms > 0
    assert reply.num_batched == 1


def test_what_waits_together_shares_a_run_and_each_gets_its_own(server: GraphLoopback, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_engine, "PAYS", math.inf)  # whatever a busy machine says
    sizes = [1, 1, 2, 1, 2, 1, 3, 1]
    for _ in range(3):  # the first two shared runs are answered from lone ones
        with held_back(server) as (opened, reached, _), ThreadPoolExecutor(len(sizes) + 1) as pool:
            blocking = pool.submit(ask, server, request(99))
            assert reached.wait(PATIENCE_S)
            asked = [pool.submit(ask, server, request(seed, n)) for seed, n in enumerate(sizes)]
            until(lambda: server.gate.num_running == len(sizes) + 1)
            opened.set()
            assert same(outputs(blocking.result()), whole(MODEL, sample(99)))
            for seed, (n, answer) in enumerate(zip(sizes, asked, strict=True)):
                got, want = outputs(answer.result()), whole(MODEL, sample(seed, n))
                assert all(np.allclose(got[name], want[name], rtol=0, atol=1e-5) for name in want)
    assert {answer.result().num_batched for answer in asked} != {1}


CHANGES: list[tuple[Change, str]] = [
    (lambda r: setattr(r, "cut", "cut-9"), "cut is 'cut-9'; this service takes cloud, cut-1, cut-2"),
    (lambda r: setattr(r, "cut", "edge"), "cut is 'edge'"),
    (lambda r: setattr(r, "cut", "cut-1"), "inputs are"),
    (lambda r: r.ClearField("inputs"), "inputs are none"),
    (lambda r: r.inputs.append(r.inputs[0]), "each once"),
    (lambda r: setattr(r.inputs[0], "name", "inptu"), "'inptu', 'late'; cloud takes 'input', 'late'"),
    (lambda r: setattr(r.inputs[0], "dtype", "float64"), "'input' is float64; this graph takes float32"),
    (lambda r: setattr(r.inputs[0], "dtype", "object"), "dtype is 'object'"),
    (lambda r: setattr(r.inputs[0], "dtype", "V8"), "dtype is 'V8'"),
    (lambda r: setattr(r.inputs[0], "codec", "int4"), "comes as 'int4'; it takes 'int8', or none"),
    (lambda r: setattr(r.inputs[0], "codec", "zip"), "codec is 'zip'"),
    (lambda r: r.inputs[0].shape.append(1), "has shape"),
    (lambda r: r.inputs[0].ClearField("shape"), "has shape"),
    (lambda r: r.inputs[0].shape.__setitem__(1, WIDTH + 1), "has shape"),
    (lambda r: r.inputs[0].shape.__setitem__(0, 0), "each at least 1"),
    (lambda r: r.inputs[0].shape.__setitem__(0, 2**32 - 1), "bytes of data"),
    (lambda r: r.inputs[0].shape.extend([2**32 - 1] * 20), "at most 16 sizes"),
    (lambda r: setattr(r.inputs[0], "data", r.inputs[0].data[:-1]), "bytes of data"),
    (lambda r: setattr(r.inputs[0], "data", b""), "has 0 bytes of data"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "words"), CHANGES, ids=[str(i) for i in range(len(CHANGES))])
def test_what_is_wrong_is_named(server: GraphLoopback, change: Change, words: str) -> None:
    asked = request()
    change(asked)
    refusal = refused(server, asked)
    assert refusal.code == Code.INVALID_ARGUMENT
    assert words in refusal.words


def test_encoded_rows_that_stand_for_no_number_are_refused(server: GraphLoopback) -> None:
    asked = request()
    asked.inputs[0].codec, asked.inputs[0].data = "int8", b"\xff" * num_bytes("float32", [1, WIDTH], "int8")
    refusal = refused(server, asked)
    assert (refusal.code, "not finite" in refusal.words) == (Code.INVALID_ARGUMENT, True)


def test_rows_that_do_not_belong_together_are_the_senders_trouble(server: GraphLoopback) -> None:
    asked = request(rows=2)
    asked.inputs[1].shape[0], asked.inputs[1].data = 3, bytes(4 * 3 * WIDTH)
    refusal = refused(server, asked)
    assert (refusal.code, "cannot run on these inputs" in refusal.words) == (Code.INVALID_ARGUMENT, True)
    assert same(outputs(ask(server, request())), whole(MODEL, sample(0)))


def test_another_graph_is_not_run(server: GraphLoopback, bundle: GraphBundle) -> None:
    refusal = refused(server, request(graph_hash=bundle.graph_hash ^ 1))
    assert refusal.code == Code.FAILED_PRECONDITION
    assert refusal.detail.model_fingerprint == bundle.graph.fingerprint


def test_a_message_above_the_limit_is_refused_unread(server: GraphLoopback) -> None:
    assert refused(server, request(rows=40_000)).code == Code.RESOURCE_EXHAUSTED


def test_text_is_not_served_here(server: GraphLoopback) -> None:
    with server.stub() as stub:
        calls: list[Callable[[], object]] = [
            lambda: stub.Verify(pb.VerifyRequest(session_id=b"s" * 16, context_ids=[1]), timeout=PATIENCE_S),
            lambda: list(stub.Decode(pb.DecodeRequest(session_id=b"s" * 16, context_ids=[1]), timeout=PATIENCE_S)),
            lambda: stub.Tail(pb.TailRequest(), timeout=PATIENCE_S),
            lambda: stub.Release(pb.ReleaseRequest(), timeout=PATIENCE_S),
        ]
        for call in calls:
            refusal = refusal_of(call)
            assert (refusal.code, "ONNX graph" in refusal.words) == (Code.UNIMPLEMENTED, True)


def test_requests_under_way_may_hold_so_many_bytes(bundle: GraphBundle) -> None:
    size = 2 * 4 * WIDTH
    with graph_loopback(bundle, max_underway_bytes=size) as server, held_back(server) as (opened, reached, _):
        with ThreadPoolExecutor(1) as pool:
            first = pool.submit(ask, server, request())
            assert reached.wait(PATIENCE_S)
            refusal = refused(server, request())
            assert refusal.code == Code.RESOURCE_EXHAUSTED
            assert refusal.detail.retry_after_ms > 0
            opened.set()
            first.result()
        ask(server, request())


def test_a_tenant_keeps_to_its_quota(bundle: GraphBundle, tmp_path: Path) -> None:
    import hashlib

    file = tmp_path / "tenants"
    file.write_text(f"acme sha256:{hashlib.sha256(b'secret').hexdigest()} requests_per_minute=2\n")
    metadata = ((codec.AUTHORIZATION_KEY, "Bearer secret"),)
    with graph_loopback(bundle, tenants=Tenants(file)) as server:
        assert refused(server, request()).code == Code.UNAUTHENTICATED
        ask(server, request(), metadata=metadata), ask(server, request(), metadata=metadata)
        refusal = refusal_of(lambda: ask(server, request(), metadata=metadata))
        assert (refusal.code, refusal.detail.retry_after_ms > 0) == (Code.RESOURCE_EXHAUSTED, True)


def test_every_type_of_tensor_travels(tmp_path: Path) -> None:
    kinds = {"bool": TensorProto.BOOL, "int64": TensorProto.INT64, "uint8": TensorProto.UINT8, "float16": TensorProto.FLOAT16}
    nodes = [helper.make_node("Identity", [f"in_{name}"], [f"out_{name}"]) for name in kinds]
    ends = [[helper.make_tensor_value_info(f"{end}_{n}", kind, [2, "n"]) for n, kind in kinds.items()] for end in ("in", "out")]
    made = write_bundle(tmp_path / "b", model_of(nodes, *ends), [2])
    arrays = {f"in_{name}": (np.arange(6).reshape(2, 3) % 2).astype(name) for name in kinds}
    tensors = [pb.Tensor(name=k, dtype=str(a.dtype), shape=a.shape, data=to_bytes(a)) for k, a in arrays.items()]
    with graph_loopback(made) as server:
        got = outputs(ask(server, pb.InferRequest(cut="cloud", inputs=tensors)))
    assert same(got, {name.replace("in_", "out_"): array for name, array in arrays.items()})


def test_hostile_requests_end_with_a_status_and_leave_no_trace(server: GraphLoopback) -> None:
    """Odd values, damaged bytes; each beside a good request, whose answer must be its own."""
    allowed = {Code.OK, Code.INVALID_ARGUMENT, Code.FAILED_PRECONDITION, Code.RESOURCE_EXHAUSTED}
    odd = {
        **ODD,
        FieldDescriptor.TYPE_STRING: lambda random: random.choice(["", "input", "late", "float32", "int8", "é" * 50, "\0"]),
    }
    want = whole(MODEL, sample(1))
    seen = set()
    with server.stub() as stub, pytest.MonkeyPatch.context() as patch, grpc.insecure_channel(server.address) as channel:
        patch.setattr("fuzz.ODD", odd)
        raw = channel.unary_unary(f"/{codec.SERVICE_NAME}/Infer")
        for number in range(1500):
            random = Random(f"infer:{number}")
            message = request(number % 7, rows=random.choice([1, 2]))
            if random.random() < 0.5:
                for tensor in random.sample(list(message.inputs), random.randint(0, 2)):
                    set_odd_values(random, tensor, random.choice([0.1, 0.3, 1.0]))
                message.cut = random.choice(["cloud", "cloud", "cut-1", "cut-2", "x"])
                message.graph_hash = random.choice([0, 0, 0, 5])
            content = bytearray(message.SerializeToString())
            if random.random() < 0.3:
                content[random.randrange(len(content))] ^= 1 << random.randrange(8)
            if random.random() < 0.1:
                content += odd_field(random)
            good = stub.Infer.future(request(1), timeout=PATIENCE_S) if number % 10 == 0 else None
            future = raw.future(bytes(content), timeout=PATIENCE_S)
            code = future.code()
            assert code in allowed, f"case {number}: {code} {future.details()}"
            seen.add(code)
            if good is not None:
                got = outputs(good.result())
                assert all(np.allclose(got[name], want[name], rtol=0, atol=1e-5) for name in want)
    assert {Code.OK, Code.INVALID_ARGUMENT} <= seen
    assert same(outputs(ask(server, request())), whole(MODEL, sample(0)))
    assert server.engine.load.num_waiting == 0


def test_a_graph_that_mixes_rows_never_gives_a_wrong_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It allows any first dimension, and means something else by it than a batch."""
    monkeypatch.setattr(graph_engine, "PAYS", math.inf)
    nodes = [
        helper.make_node("ReduceMean", ["input"], ["mean"], axes=[0], keepdims=1),
        helper.make_node("Sub", ["input", "mean"], ["output"]),
    ]
    value = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["rows", WIDTH]) for name in ("input", "output")]
    model = model_of(nodes, value[:1], value[1:])
    made = write_bundle(tmp_path / "b", model, [1])

    def one(server: GraphLoopback, seed: int) -> bool:
        x = sample(seed, 3)["input"]
        tensor = pb.Tensor(name="input", dtype="float32", shape=x.shape, data=to_bytes(x))
        return same(outputs(ask(server, pb.InferRequest(cut="cloud", inputs=[tensor]))), whole(model, {"input": x}))

    with graph_loopback(made, max_rows=16) as server, held_back(server) as (opened, reached, rows), ThreadPoolExecutor(8) as pool:
        first = pool.submit(one, server, 0)
        assert reached.wait(PATIENCE_S)
        others = [pool.submit(one, server, seed) for seed in range(1, 8)]
        until(lambda: server.gate.num_running == 8)
        opened.set()
        assert all(answer.result() for answer in [first, *others])
    assert max(rows) > 3  # it was tried


def test_metrics_tell_of_runs_and_rows(server: GraphLoopback) -> None:
    def value(name: str) -> float:
        return server.metrics.registry.get_sample_value(f"edgecloud:{name}_total") or 0.0

    rows, runs = value("graph_rows"), value("graph_runs")
    ask(server, request(rows=5))
    assert value("graph_rows") == rows + 5
    assert value("graph_runs") == runs + 1
