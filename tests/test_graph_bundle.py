"""A graph bundle's manifest: what opens, and how each thing that can be wrong is named."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgecloud.bundle import Bundle
from edgecloud.errors import BundleCorruptError, BundleKindError, BundleNotFoundError, BundleVersionError, ConfigError
from edgecloud.graph_bundle import CODECS, GraphBundle
from edgecloud.kernels import codec as kernel
from edgecloud.manifest import MANIFEST, SCHEMA_VERSION, bundle_kind, is_bundle

FILES = {
    "edge/edge.onnx": b"front",
    "cloud/cloud.onnx": b"tail",
    "edge/whole.onnx": b"whole",
    "cloud/whole.onnx": b"whole",
}
TIMES = {"edge_ms": 1.5, "cloud_ms": 0, "codec_ms": 0.0, "boundary_bytes": 8, "output_bytes": 4, "edge_ram_bytes": 10}
LOSS = {"max_error": 0.0, "loss": 0.0}
PICTURE = {"name": "x", "dtype": "float32", "shape": ["batch", None, 4]}


def cut(name: str, edge: str | None, cloud: str | None, boundary: list[dict[str, Any]]) -> dict[str, Any]:
    outputs = {"edge_outputs": [] if cloud else ["y"], "cloud_outputs": ["y"] if cloud else []}
    return {"name": name, "edge": edge, "cloud": cloud, "boundary": boundary, **outputs, **TIMES, **LOSS}


def content() -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": "graph",
        "created_by": "edgecloud 0.1.0",
        "licence": None,
        "graph": {
            "name": "net",
            "fingerprint": "a" * 64,
            "opset": 17,
            "inputs": [PICTURE],
            "outputs": [{"name": "y", "dtype": "int64", "shape": [1]}],
        },
        "cuts": [
            cut("edge", "edge/whole.onnx", None, []),
            cut("cloud", None, "cloud/whole.onnx", [{**PICTURE, "codec": ""}]),
            cut("cut-1", "edge/edge.onnx", "cloud/cloud.onnx", [{**PICTURE, "name": "t", "codec": "int8"}]),
        ],
        "chosen": "cut-1",
        "files": {name: {"sha256": hashlib.sha256(data).hexdigest(), "num_bytes": len(data)} for name, data in FILES.items()},
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "bundle"
    for name, data in FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    (root / MANIFEST).write_text(json.dumps(content()))
    return root


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    found = json.loads((folder / MANIFEST).read_text())
    change(found)
    (folder / MANIFEST).write_text(json.dumps(found))


def test_a_valid_bundle_opens(folder: Path) -> None:
    bundle = GraphBundle.open(folder)
    assert (bundle.chosen, bundle.graph.inputs[0].shape) == ("cut-1", ["batch", None, 4])
    assert bundle.cut("cut-1").boundary[0].codec == "int8"
    assert bundle.file("edge/edge.onnx").read_bytes() == b"front"
    assert is_bundle(folder)
    assert bundle_kind(folder) == "graph"
    with pytest.raises(ConfigError, match="cut-9.*cut-1"):
        bundle.cut("cut-9")


def test_what_is_written_opens_as_it_was(folder: Path) -> None:
    bundle = GraphBundle.open(folder)
    (folder / MANIFEST).write_text(bundle.to_json())
    assert GraphBundle.open(folder) == bundle


@pytest.mark.parametrize("part", ["edge", "cloud"])
def test_each_side_needs_its_part_only_and_a_changed_byte_is_named(folder: Path, part: str) -> None:
    shutil.rmtree(folder / ("cloud" if part == "edge" else "edge"))
    bundle = GraphBundle.open(folder)
    bundle.verify_files(part)  # type: ignore[arg-type]
    (folder / part / "whole.onnx").write_bytes(b"whole"[::-1])
    with pytest.raises(BundleCorruptError, match="whole.onnx.*SHA-256"):
        bundle.verify_files(part)  # type: ignore[arg-type]


def test_the_hash_notices_what_two_machines_must_agree_on(folder: Path) -> None:
    seen = {GraphBundle.open(folder).graph_hash}
    for change in (
        lambda c: c["graph"].update(fingerprint="b" * 64),
        lambda c: c["files"]["cloud/cloud.onnx"].update(sha256="c" * 64),
        lambda c: c["cuts"][2]["boundary"][0].update(codec="int4"),
        lambda c: c["cuts"][2].update(name="cut-2") or c.update(chosen="cut-2"),
    ):
        edit(folder, change)
        seen.add(GraphBundle.open(folder).graph_hash)
    assert len(seen) == 5
    assert all(0 < value < 2**64 for value in seen)
    before = GraphBundle.open(folder).graph_hash
    edit(folder, lambda c: c["cuts"].reverse() or c["cuts"][0].update(edge_ms=9.0))
    assert GraphBundle.open(folder).graph_hash == before


def test_the_codecs_are_those_of_the_kernel() -> None:
    assert CODECS[1:] == kernel.CODECS


def test_each_kind_refuses_the_other(folder: Path) -> None:
    with pytest.raises(BundleKindError, match="a cut ONNX graph"):
        Bundle.open(folder)
    edit(folder, lambda c: c.pop("kind"))
    with pytest.raises(BundleKindError, match="a model pair"):
        GraphBundle.open(folder)
    edit(folder, lambda c: c.update(kind="music"))
    for opened in (Bundle, GraphBundle):
        with pytest.raises(BundleCorruptError, match="music"):
            opened.open(folder)


def test_what_is_no_bundle(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleNotFoundError):
        GraphBundle.open(tmp_path)
    edit(folder, lambda c: c.update(schema_version=SCHEMA_VERSION + 1))
    with pytest.raises(BundleVersionError):
        GraphBundle.open(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(surprise=1), "surprise"),
        (lambda c: c.pop("chosen"), "chosen"),
        (lambda c: c.update(chosen="cut-7"), "cut-7"),
        (lambda c: c.update(cuts=[]), "cuts"),
        (lambda c: c.update(cuts={}), "cuts"),
        (lambda c: c["cuts"].append(c["cuts"][0]), "cuts"),
        (lambda c: c["cuts"].append(3), r"cuts\[3\]"),
        (lambda c: c["cuts"][0].update(surprise=1), "surprise"),
        (lambda c: c["cuts"][0].update(edge_ms=-1), "edge_ms"),
        (lambda c: c["cuts"][0].update(edge_ms="1"), "edge_ms"),
        (lambda c: c["cuts"][0].update(loss=float("nan")), "loss"),
        (lambda c: c["cuts"][0].update(cloud="cloud/whole.onnx"), "cut edge"),
        (lambda c: c["cuts"][0].update(edge=None), "cut edge"),
        (lambda c: c["cuts"][2].update(name="best"), "best"),
        (lambda c: c["cuts"][2].update(name="../cut"), "../cut"),
        (lambda c: c["cuts"][2].update(cloud_outputs=[]), "cut-1"),
        (lambda c: c["cuts"][2].update(edge_outputs=["y"]), "cut-1"),
        (lambda c: c["cuts"][2].update(boundary=None), r"cuts\[2\].boundary"),
        (lambda c: c["cuts"][2]["boundary"][0].update(codec="zip"), "zip"),
        (lambda c: c["cuts"][2]["boundary"][0].update(dtype="int32"), "int32"),
        (lambda c: c["cuts"][2]["boundary"][0].update(dtype="object", codec=""), "object"),
        (lambda c: c["cuts"][2]["boundary"][0].update(shape=[-1]), "-1"),
        (lambda c: c["cuts"][2]["boundary"][0].update(shape=[1.5]), "shape"),
        (lambda c: c["cuts"][2]["boundary"][0].update(shape=[]), "last dimension"),
        (lambda c: c["cuts"][2]["boundary"].append(c["cuts"][2]["boundary"][0]), "cut-1"),
        (lambda c: c["cuts"][2].update(edge="../edge.onnx"), "outside"),
        (lambda c: c["cuts"][2].update(edge="cloud/cloud.onnx"), "below edge/"),
        (lambda c: c["cuts"][2].update(cloud="edge/edge.onnx"), "below cloud/"),
        (lambda c: c["cuts"][2].update(cloud="cloud/other.onnx"), "lists no such file"),
        (lambda c: c["files"].update({"/etc/x": c["files"]["edge/edge.onnx"]}), "outside"),
        (lambda c: c["graph"].update(inputs=[]), "inputs"),
        (lambda c: c["graph"].update(outputs=[PICTURE, PICTURE]), "outputs"),
        (lambda c: c["graph"].update(opset="17"), "opset"),
        (lambda c: c.update(graph=[]), "graph"),
    ],
    ids=[str(index) for index in range(34)],
)
def test_what_cannot_be_is_named(folder: Path, change: Callable[[dict[str, Any]], Any], message: str) -> None:
    edit(folder, change)
    with pytest.raises(BundleCorruptError, match=message):
        GraphBundle.open(folder)
