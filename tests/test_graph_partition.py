"""`edgecloud partition model.onnx`: what it writes and chooses, and how each bad input is named while nothing is half-written."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from graphs import picture, save, small_network
from onnx import TensorProto, helper

from edgecloud.bundle import Bundle
from edgecloud.cli.app import run
from edgecloud.cli.partition_graph import is_for_graph, parse_bytes, parse_link_spec, parse_pin
from edgecloud.errors import BundleError, BundleKindError, ConfigError, ModelError
from edgecloud.fingerprint import sha256_file
from edgecloud.graph_bundle import GraphBundle
from edgecloud.partitioner.boundary import through
from edgecloud.partitioner.fetch import GRAPH, model_path
from edgecloud.partitioner.graph_partition import partition_graph
from edgecloud.partitioner.graph_plan import cheapest, cost_ms
from edgecloud.partitioner.graph_request import GraphRequest
from edgecloud.partitioner.link_spec import LinkSpec
from edgecloud.partitioner.onnx_model import load_model

SLOW = LinkSpec(0.5, 0.5, 1.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, samples, and a profile that makes every node slow: so the plan does not depend on this machine."""
    root = tmp_path_factory.mktemp("graph")
    small_network(root / "network.onnx")
    picture(root / "sample.npz")
    picture(root / "other.npz", 96)
    (root / "device.json").write_text(json.dumps(slow_profile(root)))
    return root


def slow_profile(root: Path) -> dict[str, Any]:
    return {
        "fingerprint": sha256_file(root / "network.onnx"),
        "shapes": {"image": [1, 3, 64, 64]},
        "num_threads": 1,
        "machine": "a slow one",
        "total_ms": 700.0,
        "tensor_ms": dict.fromkeys(("r0", "r1", "r2", "skip", "r3", "r4", "scores"), 100.0),
    }


def request(folder: Path, bundle: Path, **changes: Any) -> GraphRequest:
    given = {
        "model": folder / "network.onnx",
        "inputs": (folder / "sample.npz",),
        "device_profile": folder / "device.json",
        "link": SLOW,
        "cloud_speed": 50.0,
        "num_threads": 1,
        "timing_s": 0.1,
    }
    return GraphRequest(bundle=bundle, **{**given, **changes})


def run_cut(bundle: GraphBundle, name: str, sample: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """As a runtime would, from what the bundle says alone."""
    cut, held, found = bundle.cut(name), dict(sample), {}
    if cut.edge is not None:
        session = ort.InferenceSession(str(bundle.file(cut.edge)))
        names = [value.name for value in session.get_outputs()]
        held |= dict(zip(names, session.run(names, {v.name: sample[v.name] for v in session.get_inputs()}), strict=True))
        found = {name: held[name] for name in cut.edge_outputs}
    if cut.cloud is not None:
        session = ort.InferenceSession(str(bundle.file(cut.cloud)))
        sent = {tensor.name: through(held[tensor.name], tensor.codec) for tensor in cut.boundary}
        found |= dict(zip(cut.cloud_outputs, session.run(cut.cloud_outputs, sent), strict=True))
    return found


# What is written


def test_a_bundle_holds_cuts_that_compute_the_whole(folder: Path, tmp_path: Path) -> None:
    report = partition_graph(request(folder, tmp_path / "bundle"))
    bundle = GraphBundle.open(tmp_path / "bundle")
    bundle.verify_files("edge")
    bundle.verify_files("cloud")
    assert bundle.chosen == report.chosen
    assert bundle.chosen == cheapest(bundle.cuts, request(folder, tmp_path))
    assert {cut.name for cut in bundle.cuts} >= {"edge", "cloud"}
    assert bundle.graph.inputs[0].shape == ["batch", 3, "height", "width"]
    sample = dict(np.load(folder / "sample.npz"))
    whole = ort.InferenceSession(str(folder / "network.onnx")).run(None, sample)[0]
    for cut in bundle.cuts:
        assert np.array_equal(run_cut(bundle, cut.name, sample)["scores"], whole)
        assert (cut.loss, cut.max_error) == (0, 0)


def test_the_chosen_cut_lies_where_everyone_looks_first(folder: Path, tmp_path: Path) -> None:
    partition_graph(request(folder, tmp_path / "bundle", pins={"classify": False}))  # the picture is large, the link slow
    bundle = GraphBundle.open(tmp_path / "bundle")
    assert bundle.chosen.startswith("cut-")
    chosen = bundle.cut(bundle.chosen)
    assert (chosen.edge, chosen.cloud) == ("edge/edge.onnx", "cloud/cloud.onnx")


def test_the_device_alone_is_taken_where_a_cut_is_hardly_better(folder: Path, tmp_path: Path) -> None:
    partition_graph(request(folder, tmp_path / "bundle"))
    bundle, wanted = GraphBundle.open(tmp_path / "bundle"), request(folder, tmp_path)
    alone, cut = bundle.cut("edge"), next(cut for cut in bundle.cuts if cut.name.startswith("cut-"))
    free = replace(cut, cloud_ms=0.0, codec_ms=0.0, boundary_bytes=0, output_bytes=0)  # but for the call itself
    hardly, clearly = (
        replace(free, name=name, edge_ms=share * cost_ms(alone, wanted)) for name, share in (("cut-8", 0.96), ("cut-9", 0.94))
    )
    assert cheapest([alone, hardly], wanted) == "edge"
    assert cheapest([alone, hardly, clearly], wanted) == "cut-9"
    assert cheapest([hardly, clearly], wanted) == "cut-9"


def test_a_cut_runs_on_other_shapes(folder: Path, tmp_path: Path) -> None:
    partition_graph(request(folder, tmp_path / "bundle"))
    bundle = GraphBundle.open(tmp_path / "bundle")
    sample = dict(np.load(folder / "other.npz"))
    whole = ort.InferenceSession(str(folder / "network.onnx")).run(None, sample)[0]
    np.testing.assert_allclose(run_cut(bundle, bundle.chosen, sample)["scores"], whole, rtol=1e-5, atol=1e-5)


def test_codecs_are_used_within_the_loss_that_is_allowed(folder: Path, tmp_path: Path) -> None:
    exact = partition_graph(request(folder, tmp_path / "exact"), dry_run=True)
    report = partition_graph(request(folder, tmp_path / "bundle", max_loss=0.05, inputs=(folder / "sample.npz",)))
    bundle = GraphBundle.open(tmp_path / "bundle")
    cut = bundle.cut(bundle.chosen)
    assert any(tensor.codec for tensor in cut.boundary)
    assert 0 < cut.loss <= 0.05
    assert report.bound_ms <= exact.bound_ms
    sample = dict(np.load(folder / "sample.npz"))
    whole = ort.InferenceSession(str(folder / "network.onnx")).run(None, sample)[0]
    found = run_cut(bundle, cut.name, sample)["scores"]
    assert np.linalg.norm(found - whole) / np.linalg.norm(whole) == pytest.approx(cut.loss)
    assert np.abs(found - whole).max() == pytest.approx(cut.max_error)


def test_a_loss_that_nothing_keeps_to_leaves_it_raw(folder: Path, tmp_path: Path) -> None:
    report = partition_graph(request(folder, tmp_path / "bundle", max_loss=1e-12), dry_run=True)
    assert all(not tensor.codec for cut in report.cuts for tensor in cut.boundary)


def test_throughput_is_the_slowest_stage(folder: Path, tmp_path: Path) -> None:
    report = partition_graph(
        request(folder, tmp_path / "bundle", objective="throughput", link=LinkSpec(2.0, 2.0, 500.0)), dry_run=True
    )
    for cut in report.cuts:
        up_ms, down_ms = 8e-3 * cut.boundary_bytes / 2.0, 8e-3 * cut.output_bytes / 2.0
        assert report.costs_ms[cut.name] == pytest.approx(max(cut.edge_ms + cut.codec_ms, up_ms, cut.cloud_ms, down_ms), abs=1e-2)


def test_pins_keep_nodes_where_they_are(folder: Path, tmp_path: Path) -> None:
    report = partition_graph(request(folder, tmp_path / "bundle", pins={"r4": True, "classify": False}), dry_run=True)
    assert {cut.name for cut in report.cuts} == {"cut-1"}
    report = partition_graph(request(folder, tmp_path / "bundle", pins={"classify": True}), dry_run=True)
    assert [cut.name for cut in report.cuts] == ["edge"]


def test_memory_is_a_limit_and_the_smallest_is_named(folder: Path, tmp_path: Path) -> None:
    free = partition_graph(request(folder, tmp_path / "bundle"), dry_run=True)
    most = min(cut.edge_ram_bytes for cut in free.cuts if cut.name == "edge") - 1
    tight = partition_graph(request(folder, tmp_path / "bundle", max_ram_bytes=most), dry_run=True)
    assert all(cut.edge_ram_bytes <= most for cut in tight.cuts)
    with pytest.raises(ConfigError, match="smallest that would do is 49152 bytes"):  # the picture itself
        partition_graph(request(folder, tmp_path / "bundle", max_ram_bytes=1000))
    with pytest.raises(ConfigError, match="smallest that would do is") as caught:
        partition_graph(request(folder, tmp_path / "bundle", max_ram_bytes=60_000, pins={"r0": True}))
    smallest = int(str(caught.value).split()[-2])
    fits = partition_graph(request(folder, tmp_path / "bundle", max_ram_bytes=smallest, pins={"r0": True}), dry_run=True)
    assert fits.cuts
    assert not (tmp_path / "bundle").exists()


def test_a_profile_can_be_measured_saved_and_read(folder: Path, tmp_path: Path) -> None:
    saved = tmp_path / "times.json"
    report = partition_graph(request(folder, tmp_path / "b", device_profile=None, save_profile=saved), dry_run=True)
    content = json.loads(saved.read_text())
    assert sum(content["tensor_ms"].values()) == pytest.approx(report.total_ms, rel=1e-3)
    again = partition_graph(request(folder, tmp_path / "b", device_profile=saved, cloud_profile=saved), dry_run=True)
    assert again.cloud_share == pytest.approx(1.0)


# The command line


def test_the_command_writes_a_bundle_that_the_text_side_refuses(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = tmp_path / "bundle"
    words = ["partition", str(folder / "network.onnx"), "--inputs", str(folder / "sample.npz"), "-o", str(bundle), "--threads", "1"]
    assert run([*words, "--dry-run"]) == 0
    assert not bundle.exists()
    capsys.readouterr()
    assert run([*words, "--json", "--link", "up=5mbit,down=20mbit,rtt=40ms"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["chosen"] == GraphBundle.open(bundle).chosen
    with pytest.raises(BundleKindError, match="graph"):
        Bundle.open(bundle)
    assert run(words) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert run([*words, "--overwrite", "--max-loss", "0.05", "--boundary", "int8"]) == 0


def test_a_link_is_read_as_it_is_written() -> None:
    assert parse_link_spec("20mbit,40ms") == LinkSpec(20.0, 20.0, 40.0)
    assert parse_link_spec("up=5mbit, down=20mbit, rtt=40ms") == LinkSpec(5.0, 20.0, 40.0)
    assert parse_link_spec("40ms") == LinkSpec(None, None, 40.0)
    assert parse_link_spec("LTE").up_mbps == 30
    for text in ("20mbit", "fast,40ms", "left=5mbit,40ms", "", "up=40ms,rtt=40ms", "0mbit,40ms"):
        with pytest.raises(ConfigError, match="link"):
            parse_link_spec(text)
    assert parse_bytes("--max-ram", "1.5MB") == 1_500_000
    assert parse_pin("a=b=cloud") == ("a=b", False)
    for wrong in ("a", "a=both", "=edge"):
        with pytest.raises(ConfigError, match="--pin"):
            parse_pin(wrong)
    assert is_for_graph(["partition", "x.ONNX"])
    assert not is_for_graph(["partition", "x"])
    assert not is_for_graph(["serve", "x.onnx"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cloud_speed": 0.0}, "--cloud-speed 0"),
        ({"max_loss": -1.0}, "--max-loss -1"),
        ({"max_loss": 0.1, "inputs": ()}, "dynamic shape .*--inputs SAMPLE"),
        ({"max_ram_bytes": 0}, "--max-ram 0"),
        ({"codecs": ("int3",)}, "int3"),
        ({"codecs": ("int8",)}, "--max-loss 0.01"),
        ({"loss_metric": "best"}, "best"),
        ({"num_threads": -1}, "--threads -1"),
        ({"timing_s": -1.0}, "timing_s is -1"),
        ({"pins": {"nothing": True}}, "nothing"),
    ],
    ids=str,
)
def test_options_that_cannot_work_are_named(folder: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        partition_graph(request(folder, tmp_path / "bundle", **changes))
    assert not list(tmp_path.iterdir())


# Models that cannot be divided


def external(path: Path) -> None:
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="weights.bin", size_threshold=0)


def set_opset(version: int) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        model = onnx.load(path)
        model.opset_import[0].version = version
        onnx.save(model, path)

    return change


def without_data(path: Path) -> None:
    external(path)
    (path.parent / "weights.bin").unlink()


def short_data(path: Path) -> None:
    external(path)
    os.truncate(path.parent / "weights.bin", 10)


def outside_data(path: Path) -> None:
    external(path)
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        tensor.external_data[0].value = "../weights.bin"
    path.write_bytes(model.SerializeToString())


def much_data(path: Path) -> None:
    external(path)
    os.truncate(path.parent / "weights.bin", 3 << 30)  # no block of it is on the disk


def unknown_operator(path: Path) -> None:
    model = onnx.load(path)
    model.graph.node[0].domain = "com.example"
    model.opset_import.append(helper.make_opsetid("com.example", 1))
    onnx.save(model, path)


def dangling(path: Path) -> None:
    model = onnx.load(path)
    model.graph.node[0].input[0] = "nowhere"
    onnx.save(model, path)


def text_input(path: Path) -> None:
    graph = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["y"])],
        "text",
        [helper.make_tensor_value_info("x", TensorProto.STRING, [1])],
        [helper.make_tensor_value_info("y", TensorProto.STRING, [1])],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (Path.unlink, "cannot be read"),
        (lambda path: path.write_bytes(b""), "no ONNX model"),
        (lambda path: path.write_text("hello, this is text"), "no ONNX model"),
        (lambda path: path.write_bytes(path.read_bytes()[:500]), "no ONNX model"),
        (set_opset(3), "opset 3"),
        (set_opset(999), "opset 999"),
        (without_data, "weights.bin does not exist"),
        (short_data, "beyond the end"),
        (outside_data, "outside the model's folder"),
        (much_data, "2 GB"),
        (unknown_operator, "cannot load"),
        (dangling, "nowhere"),
        (text_input, "STRING"),
    ],
    ids=[
        "missing",
        "empty",
        "text",
        "cut",
        "old",
        "new",
        "no-data",
        "short-data",
        "outside-data",
        "much-data",
        "operator",
        "dangling",
        "string",
    ],
)
def test_a_model_that_cannot_be_divided_is_named(folder: Path, tmp_path: Path, change: Callable[[Path], Any], message: str) -> None:
    (tmp_path / "model").mkdir()
    model = Path(shutil.copy(folder / "network.onnx", tmp_path / "model"))
    change(model)
    with pytest.raises(ModelError, match=message) as caught:
        partition_graph(request(folder, tmp_path / "bundle", model=model, device_profile=None))
    assert "network.onnx" in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_weights_in_another_file_are_read(folder: Path, tmp_path: Path) -> None:
    model = Path(shutil.copy(folder / "network.onnx", tmp_path))
    external(model)
    partition_graph(request(folder, tmp_path / "bundle", model=model, device_profile=None))
    bundle = GraphBundle.open(tmp_path / "bundle")
    assert bundle.graph.fingerprint != sha256_file(model)  # the weights count
    sample = dict(np.load(folder / "sample.npz"))
    whole = ort.InferenceSession(str(folder / "network.onnx")).run(None, sample)[0]
    assert np.array_equal(run_cut(bundle, "edge", sample)["scores"], whole)


def test_outputs_that_change_from_run_to_run_cannot_be_checked(tmp_path: Path) -> None:
    nodes = [helper.make_node("RandomNormalLike", ["x"], ["noise"]), helper.make_node("Add", ["x", "noise"], ["y"])]
    save(tmp_path / "m.onnx", nodes, ["x"], ["y"], {})
    np.savez(tmp_path / "s.npz", x=np.ones((2, 4), np.float32))
    with pytest.raises(ModelError, match="other outputs for the same inputs"):
        partition_graph(GraphRequest(model=tmp_path / "m.onnx", bundle=tmp_path / "b", inputs=(tmp_path / "s.npz",)))


def test_an_output_that_is_a_weight_or_an_input(tmp_path: Path) -> None:
    nodes = [helper.make_node("Neg", ["x"], ["y"])]
    weight = {"w": np.ones((2, 4), np.float32)}
    model = load_model(save(tmp_path / "m.onnx", nodes, ["x"], ["y", "w"], weight))
    assert {name for node in model.proto.graph.node for name in node.output} == {"y", "w"}
    np.savez(tmp_path / "s.npz", x=np.ones((2, 4), np.float32))
    report = partition_graph(GraphRequest(model=tmp_path / "m.onnx", bundle=tmp_path / "b", inputs=(tmp_path / "s.npz",)))
    bundle = GraphBundle.open(tmp_path / "b")
    for cut in report.cuts:
        assert run_cut(bundle, cut.name, dict(np.load(tmp_path / "s.npz")))["w"].tolist() == weight["w"].tolist()
    with pytest.raises(ModelError, match="gives its input 'x' back"):
        load_model(save(tmp_path / "m.onnx", nodes, ["x"], ["y", "x"], {}))


# Samples that do not fit


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"imag": np.zeros((1, 3, 64, 64), np.float32)}, "did you mean 'image'"),
        ({}, "lacks the input 'image'"),
        ({"image": np.zeros((1, 3, 64, 64))}, "float64, the model takes float32"),
        ({"image": np.zeros((1, 4, 64, 64), np.float32)}, r"\[1, 4, 64, 64\]"),
        ({"image": np.zeros((3, 64, 64), np.float32)}, r"\[3, 64, 64\]"),
        ({"image": np.array([{}], object)}, "plain arrays"),
    ],
    ids=["name", "missing", "dtype", "channels", "rank", "pickle"],
)
def test_samples_that_do_not_fit_are_named(folder: Path, tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    np.savez(tmp_path / "s.npz", **arrays)
    with pytest.raises(ConfigError, match=message):
        partition_graph(request(folder, tmp_path / "bundle", inputs=(tmp_path / "s.npz",)))
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize("content", [None, b"", b"no archive", "array"], ids=str)
def test_files_of_samples_that_are_none_are_named(folder: Path, tmp_path: Path, content: Any) -> None:
    if content == "array":
        np.save(tmp_path / "s.npy", np.zeros(3))
        (tmp_path / "s.npy").rename(tmp_path / "s.npz")
    elif content is not None:
        (tmp_path / "s.npz").write_bytes(content)
    with pytest.raises(ConfigError, match=r"--inputs .*s\.npz"):
        partition_graph(request(folder, tmp_path / "bundle", inputs=(tmp_path / "s.npz",)))


def test_fixed_shapes_need_no_samples(folder: Path, tmp_path: Path) -> None:
    small_network(tmp_path / "fixed.onnx", fixed=True)
    report = partition_graph(
        request(folder, tmp_path / "b", model=tmp_path / "fixed.onnx", inputs=(), device_profile=None), dry_run=True
    )
    assert any("made-up" in note for note in report.notes)
    with pytest.raises(ConfigError, match="--inputs SAMPLE"):
        partition_graph(request(folder, tmp_path / "b", model=tmp_path / "fixed.onnx", inputs=(), max_loss=0.1))


# Profiles and destinations that do not fit


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fingerprint": "0" * 64}, "another model"),
        ({"shapes": {"image": [1, 3, 32, 32]}}, "profile with the same"),
        ({"total_ms": "fast"}, "no profile"),
        ({"tensor_ms": {"r0": -1.0}}, "below 0"),
        ({"surprise": 1}, "no profile"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_profiles_that_do_not_fit_are_named(folder: Path, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    (tmp_path / "p.json").write_text(json.dumps({**slow_profile(folder), **change}))
    for side in ("device_profile", "cloud_profile"):
        with pytest.raises(ConfigError, match=message):
            partition_graph(request(folder, tmp_path / "bundle", **{side: tmp_path / "p.json"}))


def test_what_lies_at_the_destination_is_safe(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("x")
    for path in (tmp_path / "mine", tmp_path / "mine" / "file"):
        with pytest.raises(BundleError):
            partition_graph(request(folder, path, overwrite=True))
    assert (tmp_path / "mine" / "file").read_text() == "x"


# A real model


def test_recognition_of_text_can_be_cut(tmp_path: Path) -> None:
    """PP-OCR on a rendered line of text, with the recognized characters as what must not change."""
    model = model_path("ppocr-rec") / GRAPH
    if not model.is_file():
        pytest.skip("needs PP-OCR's recognizer; run `edgecloud fetch ppocr-rec`")
    np.savez(tmp_path / "line.npz", x=rendered("edge and cloud"))
    report = partition_graph(
        GraphRequest(
            model=model, bundle=tmp_path / "bundle", inputs=(tmp_path / "line.npz",), link=LinkSpec(100.0, 1000.0, 5.0),
            cloud_speed=1000.0, max_loss=0.0, num_threads=1, loss_metric="argmax",
            timing_s=0.0,
        )
    )  # fmt: skip
    assert report.num_groups > 50
    bundle = GraphBundle.open(tmp_path / "bundle")
    sample = dict(np.load(tmp_path / "line.npz"))
    [expected] = ort.InferenceSession(str(model)).run(None, sample)
    for cut in bundle.cuts:
        [found] = run_cut(bundle, cut.name, sample).values()
        assert np.array_equal(found.argmax(axis=-1), expected.argmax(axis=-1))


def rendered(text: str) -> np.ndarray:
    """A line of text as PP-OCR takes it.  -> [1, 3, 48, 320]"""
    from PIL import Image, ImageDraw, ImageFont

    image = Image.new("RGB", (320, 48), "white")
    ImageDraw.Draw(image).text((8, 8), text, fill="black", font=ImageFont.load_default(28))
    pixels = np.asarray(image, np.float32) / 127.5 - 1
    return np.ascontiguousarray(pixels.transpose(2, 0, 1)[None])
