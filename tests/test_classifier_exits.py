"""Early exits of a classifier: the stated risk holds, the report is true of unseen samples, and without a risk nothing leaves."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import pytest
import torch
from cut_graphs import whole
from graph_loopback import GraphLoopback, graph_loopback
from graphs import small_network
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from pairs import free_port

from edgecloud.aio import AsyncClient
from edgecloud.cli.app import run as run_command
from edgecloud.client import Client
from edgecloud.edge.estimates import LinkEstimate
from edgecloud.edge.graph_controller import GraphController
from edgecloud.edge.graph_estimates import CutTimes, GraphEstimates
from edgecloud.edge.retry import Timeout
from edgecloud.errors import BundleCorruptError, BundleError, CloudUnavailableError, ConfigError, ModelError
from edgecloud.exit_scores import leaves, scores
from edgecloud.exits import RULES, Exits, Rule, samples_needed
from edgecloud.graph_bundle import GraphBundle
from edgecloud.partitioner.binomial import interval, upper_bound
from edgecloud.partitioner.classifier_calibration import split, with_counts
from edgecloud.partitioner.classifier_exits import ExitRequest, make_exits
from edgecloud.partitioner.classifier_graph import with_heads
from edgecloud.partitioner.classifier_heads import Head
from edgecloud.partitioner.classifier_metadata import read_exits
from edgecloud.partitioner.classifier_places import Places
from edgecloud.partitioner.classifier_report import ExitReport
from edgecloud.partitioner.export_classifier import export_classifier
from edgecloud.partitioner.graph_partition import partition_graph
from edgecloud.partitioner.graph_request import GraphRequest
from edgecloud.partitioner.onnx_model import load_model

Floats = npt.NDArray[np.float32]
Outputs = Mapping[str, npt.NDArray[Any]]
NUM_CLASSES, WIDTH, HIDDEN = 4, 8, 48
RISKS = (0.02, 0.05, 0.1)
IMPATIENT = Timeout(connect_s=0.3, request_s=0.3, retry_s=0.3)


def draw(seed: int, num: int) -> tuple[Floats, npt.NDArray[np.int64]]:
    """Samples of four classes, around their middles of their classes, which overlap: some are easy, others not."""
    random = np.random.default_rng(seed)
    middles = np.random.default_rng(99).normal(0, 1.1, (NUM_CLASSES, WIDTH))
    labels = random.integers(0, NUM_CLASSES, num)
    return (middles[labels] + random.normal(0, 1, (num, WIDTH))).astype(np.float32), labels.astype(np.int64)


def classifier(path: Path, *, end: str = "scores") -> Path:
    """Two layers of random features, and a last one that was fitted."""
    random = np.random.default_rng(1)
    x, labels = draw(0, 3000)
    first = random.normal(0, 0.5, (WIDTH, HIDDEN)).astype(np.float32)
    second = random.normal(0, 0.2, (HIDDEN, HIDDEN)).astype(np.float32)
    hidden = np.maximum(np.maximum(x @ first, 0) @ second, 0)
    last = np.linalg.lstsq(hidden, 6 * np.eye(NUM_CLASSES)[labels], rcond=None)[0].astype(np.float32)
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["m1"], name="layer1"),
        helper.make_node("Relu", ["m1"], ["h1"], name="relu1"),
        helper.make_node("MatMul", ["h1", "w2"], ["m2"], name="layer2"),
        helper.make_node("Relu", ["m2"], ["h2"], name="relu2"),
        helper.make_node("MatMul", ["h2", "w3"], ["logits" if end == "probabilities" else "scores"], name="last"),
    ]
    if end == "probabilities":
        nodes.append(helper.make_node("Softmax", ["logits"], ["scores"], axis=1))
    outputs = [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["batch", NUM_CLASSES])]
    if end == "two":
        outputs.append(helper.make_tensor_value_info("h2", TensorProto.FLOAT, ["batch", HIDDEN]))
    weights = [numpy_helper.from_array(w, n) for n, w in (("w1", first), ("w2", second), ("w3", last))]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", WIDTH])]
    graph = helper.make_graph(nodes, "classifier", inputs, outputs, weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


def outputs_of(path: Path, x: Floats) -> Outputs:
    return whole(onnx.load(path), {"x": x})


class Made:
    """A classifier, its exits, and a bundle of them, made once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.plain = classifier(folder / "plain.onnx")
        x, labels = draw(1, 1500)
        np.savez(folder / "samples.npz", x=x)
        np.save(folder / "labels.npy", labels)
        self.request = ExitRequest(
            self.plain, folder / "samples.npz", output=folder / "exits.onnx", at=("relu1", "h2"), risks=RISKS, num_threads=1
        )
        self.report: ExitReport = make_exits(self.request)
        found = read_exits(load_model(folder / "exits.onnx"))
        assert found is not None
        self.exits: Exits = found
        np.savez(folder / "one.npz", x=x[:1])
        partition_graph(
            GraphRequest(folder / "exits.onnx", folder / "bundle", inputs=(folder / "one.npz",), timing_s=0.0, num_threads=1)
        )
        self.bundle = GraphBundle.open(folder / "bundle")

    @property
    def cut(self) -> str:
        """That of the first exit, and not of the second."""
        [name] = [c.name for c in self.bundle.cuts if c.cloud and self.exits.heads[0].answer in c.edge_outputs
                  and self.exits.heads[1].answer not in c.edge_outputs]  # fmt: skip
        return name


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("exits"))


@pytest.fixture(scope="module")
def server(made: Made) -> Iterator[GraphLoopback]:
    with graph_loopback(made.bundle) as started:
        yield started


# The statistics


def test_the_report_is_true_of_samples_never_seen(made: Made) -> None:
    x, _ = draw(2, 20_000)
    found = outputs_of(made.folder / "exits.onnx", x)
    right = found["scores"].argmax(axis=1)
    checked = 0
    for line in made.report.lines:
        if line.threshold is None:
            continue
        index = [head.name for head in made.exits.heads].index(line.exit)
        head, before = made.exits.heads[index], found[made.exits.heads[0].features] if index else None
        out = scores(line.rule, found[head.answer], found[head.features], before, "scores") >= line.threshold  # type: ignore[arg-type]
        wrong = (found[head.answer].argmax(axis=1) != right)[out]
        point = next(p for p in head.curve(line.rule).points if p.threshold == line.threshold)  # type: ignore[arg-type]
        low, high = interval(point.num_left, made.exits.num_samples, 1e-3)
        assert low <= out.mean() <= high
        low, high = interval(point.num_wrong, point.num_left, 1e-3)
        assert low <= wrong.mean() <= high
        assert line.risk_bound is not None
        assert line.risk_bound <= line.risk
        checked += 1
    assert checked >= 6


def test_the_risk_holds_in_95_percent_of_200_calibrations(made: Made) -> None:
    x, _ = draw(3, 24_000)
    found = outputs_of(made.folder / "exits.onnx", x)
    right = found["scores"].argmax(axis=1).astype(np.int64)
    broken, taken = dict.fromkeys(RISKS, 0), dict.fromkeys(RISKS, 0)
    wrong = {head.name: found[head.answer].argmax(axis=1) != right for head in made.exits.heads}
    sure = {head.name: scores("confidence", found[head.answer], found[head.features], None, "scores") for head in made.exits.heads}
    for seed in range(200):
        some = np.random.default_rng(seed).permutation(len(x))[:1200]
        part = {name: value[some] for name, value in found.items()}
        again = with_counts(made.exits, part, right[some], split(1200, (0.0, 0.3), seed))
        for risk in RISKS:
            for head in again.heads:
                if (point := head.curve("confidence").point(risk, again)) is not None:
                    out = sure[head.name] >= point.threshold
                    broken[risk] += float(wrong[head.name][out].mean()) > risk
                    taken[risk] += 1
    assert all(taken[risk] >= 100 for risk in (0.05, 0.1))
    assert all(broken[risk] <= 0.05 * 200 for risk in RISKS), broken


def test_the_bound_is_the_exact_binomial_one() -> None:
    assert upper_bound(0, 59, 0.05) <= 0.05 < upper_bound(0, 58, 0.05)  # the rule of three, exactly
    assert samples_needed(0.05, 0.05) == 59
    assert upper_bound(7, 7, 0.05) == 1.0
    low, high = interval(50, 100, 0.05)
    assert (round(low, 4), round(high, 4)) == (0.3983, 0.6017)  # Clopper and Pearson's


@given(st.integers(2, 6), st.integers(0, 10_000), st.sampled_from(RULES))
def test_scores_are_ordered_by_sureness_and_what_is_unknown_is_unsure(num: int, seed: int, rule: Any) -> None:
    random = np.random.default_rng(seed)
    logits, features = random.normal(0, 3, (5, num)).astype(np.float32), random.normal(0, 1, (5, 3)).astype(np.float32)
    before = random.normal(0, 1, (5, 3)).astype(np.float32)
    found = scores(rule, logits, features, before, "scores")
    assert np.isfinite(found).all()
    assert (found <= 1 + 1e-12).all()
    if rule == "feature_delta":
        assert np.allclose(scores(rule, logits, features, features, "scores"), 1.0)
        assert (scores(rule, logits, features, None, "scores") == -np.inf).all()
    else:
        assert (scores(rule, 2 * logits, features, before, "scores") >= found - 1e-9).all()  # sharper is surer
        unknown = np.full_like(logits, np.nan)
        assert (scores(rule, unknown, features, before, "scores") == -np.inf).all()
        p = np.exp(logits.astype(np.float64))
        p /= p.sum(axis=1, keepdims=True)
        assert np.allclose(scores(rule, p, features, before, "probabilities"), found)


# The graph


@pytest.mark.parametrize("opset", [12, 17, 18])
def test_heads_in_the_graph_pool_as_they_were_trained_and_leave_the_answer_alone(opset: int, tmp_path: Path) -> None:
    proto = onnx.load(small_network(tmp_path / "network.onnx", fixed=True))
    proto.opset_import[0].version = opset
    onnx.save(proto, tmp_path / "network.onnx")
    model = load_model(tmp_path / "network.onnx")
    x = np.random.default_rng(3).random((1, 3, 64, 64)).astype(np.float32)
    [place] = Places(model, {"image": x}, 1).named(["relu1"])
    assert (place.tensor, place.pooled_axes) == ("r1", (2, 3))
    random = np.random.default_rng(4)
    head = Head(*(random.normal(0, 1, shape).astype(np.float32) for shape in ((64, 5), (5,), (5, 10), (10,))))
    made, [info] = with_heads(model, [place], [head], "scores")
    found = whole(made, {"image": x})
    assert found["scores"].tobytes() == whole(proto, {"image": x})["scores"].tobytes()
    shown = onnx.ModelProto()
    shown.CopyFrom(proto)
    shown.graph.output.append(onnx.ValueInfoProto(name="r1"))
    r1 = ort.InferenceSession(shown.SerializeToString(), providers=["CPUExecutionProvider"]).run(["r1"], {"image": x})[0]
    pooled = np.concatenate([r1.mean(axis=(2, 3)), r1.max(axis=(2, 3))], axis=1)
    features = np.maximum(pooled @ head.adapter + head.shift, 0)
    assert np.allclose(found[info.features], features, atol=1e-4)
    assert np.allclose(found[info.answer], features @ head.classifier + head.bias, atol=1e-3)


def test_places_are_spread_over_the_computation_and_come_in_order(tmp_path: Path) -> None:
    model = load_model(small_network(tmp_path / "network.onnx", fixed=True))
    places = Places(model, {"image": np.ones((1, 3, 64, 64), np.float32)}, 1)
    chosen = places.spread(3)
    assert len({place.tensor for place in chosen}) == 3
    assert [place.when for place in chosen] == sorted(place.when for place in chosen)
    assert "r1" in places.possible  # the skip goes around r2, so more than r2 would cross there
    assert "r2" not in {place.tensor for place in places.spread(3)}


def test_a_classifier_that_gives_probabilities_has_exits_that_do(made: Made, tmp_path: Path) -> None:
    path = classifier(tmp_path / "p.onnx", end="probabilities")
    make_exits(replace(made.request, model=path, output=tmp_path / "e.onnx", at=("h1",), risks=(0.1,)))
    found = outputs_of(tmp_path / "e.onnx", draw(4, 10)[0])
    exits = read_exits(load_model(tmp_path / "e.onnx"))
    assert exits is not None
    assert exits.answers == "probabilities"
    assert np.allclose(found[exits.heads[0].answer].sum(axis=1), 1.0)


def test_the_same_seed_gives_the_same_exits_and_labels_may_judge(made: Made, tmp_path: Path) -> None:
    x, labels = draw(9, 300)
    np.savez(tmp_path / "x.npz", x=x)
    np.save(tmp_path / "labels.npy", labels)
    request = replace(made.request, inputs=tmp_path / "x.npz", at=("h1",), risks=(0.2,))
    for name in ("a.onnx", "b.onnx"):
        assert make_exits(replace(request, output=tmp_path / name)).judge == "model"
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
    report = make_exits(replace(request, output=tmp_path / "c.onnx", labels=tmp_path / "labels.npy"))
    assert report.judge == "labels"
    assert report.model_accuracy < 1.0 == made.report.model_accuracy


def test_a_torch_module_becomes_a_classifier(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(WIDTH, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3))
    export_classifier(module, torch.zeros(1, WIDTH), tmp_path / "m.onnx")
    x = draw(0, 7)[0]
    found = whole(load_model(tmp_path / "m.onnx").proto, {"input": x})
    assert np.allclose(found["scores"], module(torch.from_numpy(x)).detach().numpy(), atol=1e-5)
    assert module.training  # as it was
    with pytest.raises(ModelError, match="cannot be exported"):
        export_classifier(module, torch.zeros(1, WIDTH + 1), tmp_path / "n.onnx")


# Running


def test_without_a_risk_nothing_leaves_and_the_answer_is_the_classifiers_own(made: Made, server: GraphLoopback) -> None:
    x, _ = draw(5, 6)
    with Client(made.bundle.path, cloud=server.address, num_threads=1) as client:
        for row in x[:, None]:
            want = outputs_of(made.plain, row)
            for mode in ("auto", "edge", "cloud", "split", made.cut):
                reply = client.run({"x": row}, mode=mode)
                assert (list(reply), reply.exit) == (["scores"], None)
                assert reply["scores"].tobytes() == want["scores"].tobytes()
                assert mode in ("auto", "edge") or reply.metrics.num_attempts == 1


def test_what_is_sure_enough_leaves_without_a_call_and_the_rest_is_the_classifiers_own(made: Made, server: GraphLoopback) -> None:
    x, _ = draw(6, 60)
    point = made.exits.points(0.02)["exit-1"]
    found = outputs_of(made.folder / "exits.onnx", x)
    head = made.exits.heads[0]
    expected = scores("confidence", found[head.answer], found[head.features], None, "scores") >= point.threshold
    assert 5 < expected.sum() < 55
    with Client(made.bundle.path, cloud=server.address, num_threads=1) as client:
        for index, row in enumerate(x[:, None]):
            reply = client.run({"x": row}, mode=made.cut, risk=0.02)
            assert list(reply) == ["scores"]
            assert reply.exit == ("exit-1" if expected[index] else None)
            assert reply.metrics.num_attempts == (0 if expected[index] else 1)
            name = head.answer if expected[index] else "scores"
            assert np.allclose(reply["scores"], found[name][index : index + 1], atol=1e-5)
            assert reply.to_dict()["exit"] == reply.exit
        rows = x[expected][:3]
        assert client.run({"x": rows}, mode=made.cut, risk=0.02).exit == "exit-1"
        mixed = np.concatenate([rows, x[~expected][:1]])
        assert client.run({"x": mixed}, mode=made.cut, risk=0.02).exit is None  # all rows or none


async def ask_beside(made: Made, x: Floats) -> list[str | None]:
    """Twice at once, with an `AsyncClient` that reaches nobody."""
    async with AsyncClient(made.bundle.path, cloud=f"127.0.0.1:{free_port()}", timeout=IMPATIENT, num_threads=1) as client:
        rules: tuple[Rule, Rule] = ("confidence", "margin")
        runs = [client.run({"x": x}, mode=made.cut, risk=0.02, exit_rule=rule) for rule in rules]
        return [reply.exit for reply in await asyncio.gather(*runs)]


def test_what_leaves_needs_no_service_at_all(made: Made) -> None:
    x, _ = draw(6, 60)
    with Client(made.bundle.path, cloud=f"127.0.0.1:{free_port()}", timeout=IMPATIENT, num_threads=1) as client:
        found = outputs_of(made.folder / "exits.onnx", x)[made.exits.heads[0].answer]
        order = np.argsort(-scores("confidence", found, found, None, "scores"))
        sure, unsure = x[order[:1]], x[order[-1:]]
        assert client.run({"x": sure}, mode=made.cut, risk=0.02).exit == "exit-1"
        assert asyncio.run(ask_beside(made, sure)) == ["exit-1", "exit-1"]
        with pytest.raises(CloudUnavailableError):
            client.run({"x": unsure}, mode=made.cut, risk=0.02)
        with pytest.raises(CloudUnavailableError):
            client.run({"x": sure}, mode=made.cut)


def test_a_cut_at_which_many_leave_is_cheaper() -> None:
    times = CutTimes({"edge": 100.0, "cut-1": 10.0}), CutTimes({"edge": 0.0, "cut-1": 10.0})
    link = LinkEstimate()
    link.add(200.0, 0, 0.0, was_idle=False)
    estimates = GraphEstimates(link, *times, uplink_bytes={"edge": 0.0, "cut-1": 0.0}, downlink_bytes={"edge": 0.0, "cut-1": 0.0})
    cuts = [SimpleNamespace(name="edge", cloud=None), SimpleNamespace(name="cut-1", cloud="cloud.onnx")]
    controller = GraphController(cuts, "edge", estimates)  # type: ignore[arg-type]  # of a cut it reads no more than that
    assert controller.choose(1.0, 1.0, ["edge", "cut-1"]).price.cut == "edge"
    choice = controller.choose(1.0, 1.0, ["edge", "cut-1"], {"cut-1": 0.9})
    assert choice.price.cut == "cut-1"
    assert choice.price.total_ms == pytest.approx(10.0 + 0.1 * (200.0 + 10.0))


def test_the_deepest_exit_that_keeps_the_risk_decides(made: Made) -> None:
    first, second = made.exits.heads
    both = frozenset({first.answer, first.features, second.answer, second.features})
    found = [leaves(made.exits, some, 0.1, None) for some in (frozenset[str](), both - {second.features}, both)]
    assert [leave.exit if leave else None for leave in found] == [None, "exit-1", "exit-2"]


# Bundles


def test_exits_can_be_calibrated_anew_in_a_bundle(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    partition_graph(
        GraphRequest(made.folder / "exits.onnx", tmp_path / "b", (made.folder / "one.npz",), timing_s=0.0, num_threads=1)
    )
    np.savez(tmp_path / "more.npz", x=draw(7, 700)[0])
    request = ExitRequest(tmp_path / "b", tmp_path / "more.npz", risks=(0.1,), rule="margin", num_threads=1)
    assert make_exits(request).num_samples == 490
    bundle = GraphBundle.open(tmp_path / "b")
    bundle.verify_files("edge")
    assert run_command(["inspect", str(tmp_path / "b")]) == 0
    assert "exit-1 after h1" in capsys.readouterr().out
    assert bundle.exits is not None
    assert (bundle.exits.rule, bundle.exits.num_samples) == ("margin", 490)
    make_exits(replace(request, rule=None))
    assert GraphBundle.open(tmp_path / "b").exits == bundle.exits  # the rule stays
    assert [head.tensor for head in bundle.exits.heads] == [head.tensor for head in made.exits.heads]
    with pytest.raises(ConfigError, match="drop --at and --output"):
        make_exits(replace(request, at=("h1",)))


def test_a_bundle_whose_exits_cannot_be_is_refused(made: Made, tmp_path: Path) -> None:
    content = json.loads((made.bundle.path / "bundle.json").read_text())
    for change in ({"rule": "luck"}, {"num_samples": "many"}, {"delta": 2.0}, {"heads": []}, {"output": "nothing"}, {"more": 1}):
        (tmp_path / "bundle.json").write_text(json.dumps({**content, "exits": {**content["exits"], **change}}))
        with pytest.raises(BundleCorruptError):
            GraphBundle.open(tmp_path)


# What cannot work


def test_bad_input_is_refused_with_what_would_do(made: Made, tmp_path: Path) -> None:
    x, labels = draw(1, 1500)
    np.savez(tmp_path / "few.npz", x=x[:80])
    np.savez(tmp_path / "dtype.npz", x=x.astype(np.float64))
    np.savez(tmp_path / "wide.npz", x=np.repeat(x, 2, axis=1))
    np.save(tmp_path / "short.npy", labels[:-1])
    np.save(tmp_path / "one.npy", np.zeros(1500, np.int64))
    np.save(tmp_path / "beyond.npy", labels + 1)
    np.save(tmp_path / "floats.npy", labels.astype(np.float32))
    two = classifier(tmp_path / "two.onnx", end="two")
    cases: list[tuple[dict[str, Any], str]] = [
        ({"labels": tmp_path / "short.npy"}, "1499 labels, --inputs 1500 samples"),
        ({"labels": tmp_path / "one.npy"}, "all 1500 samples are of class 0 by --labels"),
        ({"labels": tmp_path / "beyond.npy"}, "labels from 1 to 4, the classifier classes 0 to 3"),
        ({"labels": tmp_path / "floats.npy"}, "float32 of shape"),
        ({"labels": tmp_path / "none.npy"}, "cannot be read"),
        ({"inputs": tmp_path / "few.npz"}, "a risk of 0.02 takes at least 436 samples, --inputs has 80"),
        ({"inputs": tmp_path / "dtype.npz"}, "'x' is float64, the model takes float32"),
        ({"inputs": tmp_path / "wide.npz"}, r"samples of 'x' have shape \[16\]"),
        ({"at": ("relu9",)}, "no such node or tensor; did you mean relu"),
        ({"at": ("last",)}, "comes after the output 'scores', or is it"),
        ({"at": ("relu1", "h1")}, "name each once"),
        ({"at": (), "num_exits": 9}, "places for 9 exits; take fewer"),
        ({"model": two}, "outputs scores, h2; a classifier with exits has one"),
        ({"model": made.folder / "exits.onnx"}, "has exits; make others from the model"),
        ({"output": made.plain}, "exists; give another --output, or --overwrite"),
        ({"output": None}, "no --output"),
    ]
    for change, words in cases:
        with pytest.raises((ConfigError, ModelError), match=words):
            make_exits(replace(made.request, **{"output": tmp_path / "e.onnx", **change}))
    assert not (tmp_path / "e.onnx").exists()
    for wrong in (
        {"risks": (0.0,)},
        {"risks": ()},
        {"delta": 1.0},
        {"rule": "luck"},
        {"width": 0},
        {"num_exits": 0},
        {"num_threads": -1},
    ):
        with pytest.raises(ConfigError):
            replace(made.request, **wrong)  # type: ignore[arg-type]


def test_risks_that_cannot_be_kept_are_refused(made: Made, tmp_path: Path) -> None:
    row = {"x": draw(8, 1)[0]}
    with Client(made.bundle.path, num_threads=1) as client:
        for risk in (0, 1, -0.1, True, "little", float("nan")):
            with pytest.raises(ConfigError, match="risk is"):
                client.run(row, risk=risk)  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="needs 3105 calibration samples, this classifier has 600"):
            client.run(row, risk=0.001)
        with pytest.raises(ConfigError, match="it takes confidence, entropy, margin, feature_delta"):
            client.run(row, risk=0.1, exit_rule="luck")  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="decides nothing without a risk"):
            client.run(row, exit_rule="margin")
        assert client.run(row, risk=0.1).exit is None  # no cloud: the device computes it all, which is better than an exit
    partition_graph(GraphRequest(made.plain, tmp_path / "b", (made.folder / "one.npz",), timing_s=0.0, num_threads=1))
    with Client(tmp_path / "b", num_threads=1) as client, pytest.raises(ConfigError, match="has no exits"):
        client.run(row, risk=0.1)
    with pytest.raises(BundleError, match="has no exits"):
        make_exits(ExitRequest(tmp_path / "b", made.folder / "samples.npz"))


def test_the_commands_do_it_too(made: Made, server: GraphLoopback, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "samples.npz", x=draw(9, 300)[0])
    words = ["exits", str(made.plain), "--inputs", str(tmp_path / "samples.npz"), "-o", str(tmp_path / "e.onnx")]
    assert run_command([*words, "--at", "h1", "--risk", "0.1", "--threads", "1", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert {line["rule"] for line in report["lines"]} == set(RULES)
    assert run_command([*words, "--at", "h1", "--risk", "0.1", "--threads", "1", "--overwrite"]) == 0
    assert "exit-1 is after h1" in capsys.readouterr().out
    assert run_command(words) == 2  # it is there
    shutil.copytree(made.bundle.path, tmp_path / "b")
    words = [
        "calibrate",
        str(tmp_path / "b"),
        "--inputs",
        str(tmp_path / "samples.npz"),
        "--risk",
        "0.1",
        "--threads",
        "1",
        "--json",
    ]
    capsys.readouterr()
    assert run_command(words) == 0
    assert json.loads(capsys.readouterr().out)["num_samples"] == 210
    x, _ = draw(6, 60)
    found = outputs_of(made.folder / "exits.onnx", x)[made.exits.heads[0].answer]
    np.savez(tmp_path / "sure.npz", x=x[[scores("confidence", found, found, None, "scores").argmax()]])
    capsys.readouterr()
    run = ["run", str(made.bundle.path), "--inputs", str(tmp_path / "sure.npz"), "--cloud", server.address, "--mode", made.cut]
    assert run_command([*run, "--risk", "0.02", "--threads", "1"]) == 0
    assert "left at exit-1, not verified" in capsys.readouterr().out
