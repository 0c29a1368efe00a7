"""A bundle's manifest and files: what opens, and how each thing that can be wrong is named."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgecloud.bundle import MANIFEST, SCHEMA_VERSION, Bundle, is_bundle
from edgecloud.errors import (
    BundleCorruptError,
    BundleError,
    BundleNotFoundError,
    BundleVersionError,
    ModelError,
)
from edgecloud.fingerprint import model_fingerprint, read_json, sha256_file, tokenizer_fingerprint

FILES = {
    "edge/draft/model.onnx": b"the graph",
    "edge/draft/model.onnx.data": bytes(range(256)) * 40,
    "edge/draft/tokenizer.json": b'{"model": {}}',
    "edge/draft/chat_template.jinja": b"{{ messages }}",
    "cloud/config.json": b'{"model_type": "llama"}',
    "cloud/model.safetensors": b"weights" * 100,
}

Edit = Callable[[dict[str, Any]], Any]


def manifest_of(files: dict[str, bytes]) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "pair_id": "smol",
        "created_by": "edgecloud 0.1.0",
        "licence": "Apache-2.0",
        "target": {
            "name": "target",
            "fingerprint": "a" * 64,
            "folder": "cloud",
            "hub_id": None,
            "revision": None,
            "vocab_size": 100,
            "max_context_tokens": 64,
            "dtype": "float32",
            "num_parameters": 1000,
        },
        "draft": {
            "name": "draft",
            "fingerprint": "b" * 64,
            "model": "edge/draft/model.onnx",
            "quantization": "int4",
            "vocab_size": 104,
            "max_context_tokens": 64,
        },
        "tokenizer": {
            "fingerprint": "c" * 64,
            "path": "edge/draft/tokenizer.json",
            "chat_template": "edge/draft/chat_template.jinja",
            "special_tokens": {"eos_token": "<end>"},
            "eos_token_ids": [2],
        },
        "files": {
            name: {"sha256": hashlib.sha256(content).hexdigest(), "num_bytes": len(content)} for name, content in files.items()
        },
        "checks": {"agreement": 0.7},
        "cut_points": [10, 20],
        "calibration": {"threshold": 0.5},
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small valid bundle; it is the manifest that is tested, so the files hold anything."""
    root = tmp_path / "bundle"
    for name, content in FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    (root / MANIFEST).write_text(json.dumps(manifest_of(FILES)))
    return root


def edit(folder: Path, change: Edit) -> None:
    content = json.loads((folder / MANIFEST).read_text())
    change(content)
    (folder / MANIFEST).write_text(json.dumps(content))


def put(path: str, value: Any) -> Edit:
    """An edit that sets a dotted path."""

    def change(content: dict[str, Any]) -> None:
        *parents, last = path.split(".")
        for key in parents:
            content = content[key]
        content[last] = value

    return change


FRONT = {
    "model": "edge/front/model.onnx", "cut": 10, "num_layers": 30, "width": 64, "quantization": "int8", "codec": "int8",
    "max_context_tokens": 64,
}  # fmt: skip


@pytest.fixture
def split(folder: Path) -> Path:
    """The same with a front."""
    (folder / "edge/front").mkdir()
    (folder / "edge/front/model.onnx").write_bytes(b"the front")
    entry = {"sha256": hashlib.sha256(b"the front").hexdigest(), "num_bytes": 9}
    edit(folder, lambda content: content.update(front=FRONT))
    edit(folder, lambda content: content["files"].update({"edge/front/model.onnx": entry}))
    return folder


# What works


def test_a_valid_bundle_opens(folder: Path) -> None:
    bundle = Bundle.open(str(folder))
    assert bundle.pair_id == "smol"
    assert bundle.target.vocab_size == 100
    assert bundle.draft.quantization == "int4"
    assert bundle.tokenizer.eos_token_ids == [2]
    assert bundle.cut_points == [10, 20]
    assert bundle.target_folder == folder / "cloud"
    assert bundle.file(bundle.draft.model).read_bytes() == b"the graph"
    bundle.verify_files("edge")
    bundle.verify_files("cloud")
    assert is_bundle(folder)


def test_what_is_written_opens_as_it_was(folder: Path) -> None:
    bundle = Bundle.open(folder)
    (folder / MANIFEST).write_text(bundle.to_json())
    assert Bundle.open(folder) == bundle
    assert Bundle.open(folder).to_json() == bundle.to_json()
    assert str(folder) not in bundle.to_json()  # it opens wherever it is copied to


def test_optional_fields_may_be_missing(folder: Path) -> None:
    edit(folder, lambda content: [content.pop(key) for key in ("checks", "cut_points", "calibration")])
    bundle = Bundle.open(folder)
    assert (bundle.checks, bundle.cut_points, bundle.calibration) == ({}, [], None)


def test_a_target_on_the_hub_needs_no_folder(folder: Path) -> None:
    edit(folder, put("target.folder", None))
    assert Bundle.open(folder).target_folder is None


def test_the_device_needs_edge_only(folder: Path) -> None:
    shutil.rmtree(folder / "cloud")
    bundle = Bundle.open(folder)
    bundle.verify_files("edge")
    with pytest.raises(BundleCorruptError, match="cannot be read"):
        bundle.verify_files("cloud")


def test_the_cloud_needs_cloud_only(folder: Path) -> None:
    shutil.rmtree(folder / "edge")
    bundle = Bundle.open(folder)
    bundle.verify_files("cloud")
    with pytest.raises(BundleCorruptError, match="cannot be read"):
        bundle.verify_files("edge")


def test_a_linked_folder_is_a_bundle_too(folder: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(folder)
    Bundle.open(link).verify_files("edge")


def test_a_relative_path_is_a_bundle_too(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    Bundle.open("bundle").verify_files("edge")
    monkeypatch.chdir(folder)
    Bundle.open(".").verify_files("edge")


# Files that are not what they were


@pytest.mark.parametrize("name", FILES)
def test_a_changed_byte_is_named(folder: Path, name: str) -> None:
    path = folder / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    bundle = Bundle.open(folder)
    with pytest.raises(BundleCorruptError, match="SHA-256") as caught:
        bundle.verify_files("edge" if name.startswith("edge") else "cloud")
    assert str(path) in str(caught.value)
    bundle.verify_files("cloud" if name.startswith("edge") else "edge")  # the other half is as good as it was


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_file_is_named(folder: Path, name: str) -> None:
    path = folder / name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BundleCorruptError, match=f"has {len(FILES[name]) - 1} bytes") as caught:
        Bundle.open(folder).verify_files("edge" if name.startswith("edge") else "cloud")
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(BundleCorruptError, match="No such file") as caught:
        Bundle.open(folder).verify_files("edge" if name.startswith("edge") else "cloud")
    assert str(folder / name) in str(caught.value)


def test_a_folder_in_place_of_a_file_is_named(folder: Path) -> None:
    path = folder / "edge/draft/model.onnx"
    path.unlink()
    path.mkdir()
    with pytest.raises(BundleCorruptError, match="edge/draft/model.onnx"):
        Bundle.open(folder).verify_files("edge")


def test_a_pipe_in_place_of_a_file_is_named_and_not_waited_for(folder: Path) -> None:
    path = folder / "edge/draft/model.onnx"
    path.unlink()
    os.mkfifo(path)
    edit(folder, put("files", {**manifest_of(FILES)["files"], "edge/draft/model.onnx": {"sha256": "", "num_bytes": 0}}))
    with pytest.raises(BundleCorruptError, match="edge/draft/model.onnx"):
        Bundle.open(folder).verify_files("edge")


# Manifests that are not what they should be


def test_no_folder_and_no_manifest(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "nothing", tmp_path, tmp_path / "file"):
        with pytest.raises(BundleNotFoundError, match="edgecloud partition") as caught:
            Bundle.open(path)
        assert str(path) in str(caught.value)
        assert not is_bundle(path)


@pytest.mark.parametrize(
    "raw",
    [b"", b"{", b"schema_version: 1", b"\xff\xfe", b"[" * 200_000, b'{"a": 1} trailing'],
    ids=["empty", "cut", "yaml", "not-utf8", "deep", "trailing"],
)
def test_a_manifest_that_is_no_json(folder: Path, raw: bytes) -> None:
    (folder / MANIFEST).write_bytes(raw)
    with pytest.raises(BundleCorruptError, match="cannot be read as JSON") as caught:
        Bundle.open(folder)
    assert MANIFEST in str(caught.value)


@pytest.mark.parametrize("raw", ["[]", "null", "3", '"text"'])
def test_a_manifest_that_is_no_object(folder: Path, raw: str) -> None:
    (folder / MANIFEST).write_text(raw)
    with pytest.raises(BundleCorruptError, match="not an object"):
        Bundle.open(folder)


def test_a_manifest_that_is_a_folder(folder: Path) -> None:
    (folder / MANIFEST).unlink()
    (folder / MANIFEST).mkdir()
    with pytest.raises(BundleCorruptError, match=MANIFEST):
        Bundle.open(folder)


def test_a_newer_schema_asks_for_an_upgrade(folder: Path) -> None:
    edit(folder, put("schema_version", SCHEMA_VERSION + 1))
    edit(folder, put("something_new", {}))  # the version speaks first
    with pytest.raises(BundleVersionError, match=f"{SCHEMA_VERSION + 1}.*upgrade edgecloud"):
        Bundle.open(folder)


@pytest.mark.parametrize("version", [0, -1, "1", 1.0, None, True, [1]])
def test_a_schema_version_that_is_none(folder: Path, version: Any) -> None:
    edit(folder, put("schema_version", version))
    with pytest.raises(BundleCorruptError, match="schema_version"):
        Bundle.open(folder)


@pytest.mark.parametrize(
    "field",
    [
        "surprise",
        "path",
        "target.surprise",
        "draft.surprise",
        "tokenizer.surprise",
        "files.edge/draft/model.onnx.surprise",
    ],
)
def test_an_unknown_field_is_named(folder: Path, field: str) -> None:
    if field.startswith("files."):
        edit(folder, lambda content: content["files"]["edge/draft/model.onnx"].update(surprise=1))
    else:
        edit(folder, put(field, 1))
    with pytest.raises(BundleCorruptError, match=field):
        Bundle.open(folder)


@pytest.mark.parametrize(
    "field",
    ["pair_id", "created_by", "licence", "files", "target.fingerprint", "draft.model", "tokenizer.eos_token_ids"],
)
def test_a_missing_field_is_named(folder: Path, field: str) -> None:
    *parents, last = field.split(".")
    edit(folder, lambda content: (content[parents[0]] if parents else content).pop(last))
    with pytest.raises(BundleCorruptError, match=last):
        Bundle.open(folder)


@pytest.mark.parametrize("part", ["target", "draft", "tokenizer"])
def test_a_missing_part_is_named(folder: Path, part: str) -> None:
    edit(folder, lambda content: content.pop(part))
    with pytest.raises(BundleCorruptError, match=part):
        Bundle.open(folder)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("pair_id", 3),
        ("licence", 3),
        ("files", []),
        ("files", None),
        ("checks", []),
        ("cut_points", {}),
        ("cut_points", ["10"]),
        ("cut_points", [True]),
        ("calibration", 1),
        ("target", []),
        ("target.name", None),
        ("target.folder", 3),
        ("target.vocab_size", "100"),
        ("target.vocab_size", 100.0),
        ("target.vocab_size", True),
        ("target.max_context_tokens", None),
        ("draft.model", ["edge/draft/model.onnx"]),
        ("tokenizer.path", None),
        ("tokenizer.chat_template", 1),
        ("tokenizer.special_tokens", []),
        ("tokenizer.special_tokens", {"eos_token": 2}),
        ("tokenizer.eos_token_ids", 2),
        ("tokenizer.eos_token_ids", ["2"]),
        ("tokenizer.eos_token_ids", [None]),
    ],
    ids=lambda v: str(v)[:24],
)
def test_a_wrong_type_is_named(folder: Path, field: str, value: Any) -> None:
    edit(folder, put(field, value))
    with pytest.raises(BundleCorruptError, match=field):
        Bundle.open(folder)


@pytest.mark.parametrize("entry", [None, [], "sha", {"sha256": 1, "num_bytes": 1}, {"sha256": "", "num_bytes": "1"}, {}])
def test_a_wrong_file_entry_is_named(folder: Path, entry: Any) -> None:
    edit(folder, lambda content: content["files"].update({"edge/draft/model.onnx": entry}))
    with pytest.raises(BundleCorruptError, match=r"files\.edge/draft/model\.onnx"):
        Bundle.open(folder)


@pytest.mark.parametrize("field", ["draft.model", "tokenizer.path", "tokenizer.chat_template"])
def test_a_path_that_no_file_entry_covers_is_named(folder: Path, field: str) -> None:
    (folder / "edge" / "other").write_text("unchecked")
    edit(folder, put(field, "edge/other"))
    with pytest.raises(BundleCorruptError, match="edge/other"):
        Bundle.open(folder)


# Paths that want out


@pytest.mark.parametrize(
    "name",
    ["../x", "edge/../../x", "edge/../edge/x", "/etc/hostname", "..", ".", "", "edge\\..\\..\\x", "..\\x", "edge/x\0y"],
)
@pytest.mark.parametrize("where", ["files", "draft", "target"])
def test_a_path_that_leaves_is_refused(folder: Path, name: str, where: str) -> None:
    def change(content: dict[str, Any]) -> None:
        if where == "target":
            content["target"]["folder"] = name
            return
        content["files"][name] = {"sha256": "0" * 64, "num_bytes": 0}
        if where == "draft":
            content["draft"]["model"] = name

    edit(folder, change)
    with pytest.raises(BundleCorruptError, match="outside the bundle"):
        Bundle.open(folder)


def test_a_link_that_leaves_is_refused(folder: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(FILES["edge/draft/model.onnx"])
    (folder / "edge/draft/model.onnx").unlink()
    (folder / "edge/draft/model.onnx").symlink_to(secret)
    with pytest.raises(BundleCorruptError, match="outside the bundle"):
        Bundle.open(folder)


def test_a_folder_link_that_leaves_is_refused(folder: Path, tmp_path: Path) -> None:
    shutil.move(folder / "cloud", tmp_path / "elsewhere")
    (folder / "cloud").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BundleCorruptError, match="outside the bundle"):
        Bundle.open(folder)


def test_a_link_that_goes_in_a_circle_is_refused(folder: Path) -> None:
    path = folder / "edge/draft/model.onnx"
    path.unlink()
    path.symlink_to(path)
    with pytest.raises(BundleCorruptError, match="edge/draft/model.onnx"):
        Bundle.open(folder).verify_files("edge")


def test_a_link_that_stays_inside_is_fine(folder: Path) -> None:
    (folder / "edge/draft/model.onnx").rename(folder / "edge/graph")
    (folder / "edge/draft/model.onnx").symlink_to("../graph")
    Bundle.open(folder).verify_files("edge")


@pytest.mark.parametrize("field", ["draft.model", "tokenizer.path", "tokenizer.chat_template"])
def test_what_the_device_reads_must_lie_below_edge(folder: Path, field: str) -> None:
    """Else verify_files("edge") would not check it, and a device that was given edge/ only would not have it."""
    edit(folder, put(field, "cloud/config.json"))
    with pytest.raises(BundleCorruptError, match=r"cloud/config\.json.*edge/"):
        Bundle.open(folder)


def test_the_target_must_lie_below_cloud(folder: Path) -> None:
    edit(folder, put("target.folder", "edge"))
    with pytest.raises(BundleCorruptError, match="cloud/"):
        Bundle.open(folder)


def test_every_bundle_error_is_one_of_ours() -> None:
    assert all(issubclass(e, BundleError) for e in (BundleCorruptError, BundleNotFoundError, BundleVersionError))


# Fingerprints


@pytest.fixture
def model(tmp_path: Path) -> Path:
    root = tmp_path / "model"
    root.mkdir()
    (root / "config.json").write_text('{"hidden_size": 8, "use_cache": true, "transformers_version": "5.0"}')
    (root / "model-1.safetensors").write_bytes(b"one")
    (root / "model-2.safetensors").write_bytes(b"two")
    return root


def test_a_fingerprint_ignores_what_decides_nothing(model: Path) -> None:
    before = model_fingerprint(model)
    (model / "config.json").write_text('{\n  "use_cache": false,\n  "hidden_size": 8, "_name_or_path": "somewhere"\n}')
    (model / "README.md").write_text("hello")
    assert model_fingerprint(model) == before


def test_a_fingerprint_notices_what_decides(model: Path) -> None:
    seen = {model_fingerprint(model)}
    (model / "config.json").write_text('{"hidden_size": 9}')
    seen.add(model_fingerprint(model))
    (model / "model-2.safetensors").write_bytes(b"too")
    seen.add(model_fingerprint(model))
    (model / "model-2.safetensors").rename(model / "model-3.safetensors")
    seen.add(model_fingerprint(model))
    (model / "model-3.safetensors").unlink()
    seen.add(model_fingerprint(model))
    assert len(seen) == 5


def test_a_tokenizer_fingerprint_ignores_formatting_and_padding(tmp_path: Path) -> None:
    first, second, third = (tmp_path / name for name in "abc")
    first.write_text('{"model": {"vocab": {"a": 0}}, "padding": null}')
    second.write_text('{\n"padding": {"length": 8}, "truncation": null,\n"model": {"vocab": {"a": 0}}}')
    third.write_text('{"model": {"vocab": {"a": 1}}}')
    assert tokenizer_fingerprint(first) == tokenizer_fingerprint(second) != tokenizer_fingerprint(third)


def test_a_model_folder_that_is_none_is_named(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="nowhere"):
        model_fingerprint(tmp_path / "nowhere")
    (model / "config.json").unlink()
    with pytest.raises(ModelError, match=r"config\.json does not exist"):
        model_fingerprint(model)


def test_weights_that_cannot_be_read_are_named(model: Path) -> None:
    (model / "model-1.safetensors").unlink()
    (model / "model-1.safetensors").symlink_to(model / "gone")
    with pytest.raises(ModelError, match=r"model-1\.safetensors"):
        model_fingerprint(model)


@pytest.mark.parametrize("raw", ["", "[1]", "{", "[" * 200_000], ids=["empty", "list", "cut", "deep"])
def test_json_that_is_no_object_is_named(tmp_path: Path, raw: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(raw)
    with pytest.raises(ModelError, match=r"config\.json"):
        read_json(path)


def test_sha256_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    assert sha256_file(tmp_path / "x").startswith("ba7816bf8f01cfea")


# The front


def test_a_front_opens_and_survives_a_round_trip(split: Path) -> None:
    bundle = Bundle.open(split)
    assert bundle.front is not None
    assert (bundle.front.cut, bundle.front.codec) == (10, "int8")
    bundle.verify_files("edge")
    (split / MANIFEST).write_text(bundle.to_json())
    assert Bundle.open(split) == bundle


def test_a_bundle_of_schema_1_has_no_front_and_opens(folder: Path) -> None:
    edit(folder, put("schema_version", 1))
    assert Bundle.open(folder).front is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("front.cut", 0), "cut is 0, a model of 30 layers is cut at 1 to 29"),
        (put("front.cut", 30), "cut is 30"),
        (put("front.cut", 5), r"cut at 5, cut_points are \[10, 20\]"),
        (put("front.cut", "10"), "front.cut is '10'"),
        (put("front.width", 0), "width is 0"),
        (put("front.model", "edge/other.onnx"), "lists no such file"),
        (put("front.model", "cloud/config.json"), "must lie below edge/"),
        (put("front.speed", 1), "unknown field 'front.speed'"),
        (put("front", 3), "front is int, not an object"),
        (lambda content: content["front"].pop("codec"), "front.*codec"),
    ],
)
def test_a_front_that_cannot_be(split: Path, change: Edit, message: str) -> None:
    edit(split, change)
    with pytest.raises(BundleCorruptError, match=message):
        Bundle.open(split)
