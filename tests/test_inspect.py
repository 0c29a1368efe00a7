"""`edgecloud inspect` and `verify`: what is in a bundle, whether it is whole, and whether what it says of itself is still true."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pairs import Pair, copy_of, edit_manifest, list_file

from edgecloud.bundle import MANIFEST
from edgecloud.cli.app import run

pytest_plugins = ["pairs"]

Told = Callable[..., tuple[int, dict[str, Any], str]]


@pytest.fixture
def told(capsys: pytest.CaptureFixture[str]) -> Told:
    """Runs a command with --json.  -> exit code, the object, stderr"""

    def tell(*command: object) -> tuple[int, dict[str, Any], str]:
        capsys.readouterr()
        code = run([*map(str, command), "--json"])
        output = capsys.readouterr()
        return code, json.loads(output.out or "{}"), output.err

    return tell


@pytest.fixture
def bundle(tiny_pair: Pair, tmp_path: Path) -> Path:
    return copy_of(tiny_pair.bundle, tmp_path / "bundle")


# inspect


def test_a_whole_bundle_is_taken_apart(tiny_pair: Pair, told: Told) -> None:
    code, found, _ = told("inspect", tiny_pair.bundle)
    assert (code, found["problems"], found["kind"]) == (0, [], "pair")
    manifest = json.loads((tiny_pair.bundle / MANIFEST).read_text())
    assert found["target"] == manifest["target"]
    assert found["front"]["cut"] == 1
    assert found["num_files"] == len(manifest["files"])
    draft, front = found["graphs"]["draft"], found["graphs"]["front"]
    assert draft["products"] == [{"count": 11, "bits": 4, "block_size": 32, "accuracy_level": 4}]  # five a layer, and the head
    assert front["products"] == [{"count": 5, "bits": 8, "block_size": 32, "accuracy_level": 4}]
    assert (draft["num_cached_layers"], front["num_cached_layers"]) == (2, 1)
    assert front["kv_bytes_per_token"] == 2 * 32 * 4  # keys and values, one head of 32, float32
    assert front["kv_bytes"] == front["kv_bytes_per_token"] * found["window_tokens"] == 256 * 512
    assert found["ram_bytes"] == sum(graph["num_bytes"] + graph["kv_bytes"] for graph in (draft, front))
    assert front["rss_bytes"] == manifest["checks"]["front"]["device"]["peak_rss_bytes"] > front["num_bytes"]


def test_the_table_tells_a_person_the_same(tiny_pair: Pair, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", str(tiny_pair.bundle)]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for words in ("layers 0 to 0 of 2, int8", "11 products in int4, blocks of 32, accuracy level 4", "all hashes right"):
        assert words in text


def test_every_file_that_is_wrong_is_named_and_a_changed_graph_is_not_read(bundle: Path, told: Told) -> None:
    front, weights, target = bundle / "edge/front/model.onnx", bundle / "edge/draft/model.onnx.data", bundle / "cloud/config.json"
    content = bytearray(front.read_bytes())
    content[100] ^= 1
    front.write_bytes(bytes(content))
    weights.write_bytes(weights.read_bytes()[:-1])
    target.unlink()
    code, found, remarks = told("inspect", bundle)
    assert code == 1
    assert len(found["problems"]) == remarks.count("error: ") == 3
    for name, word in ((front, "SHA-256"), (weights, "bytes"), (target, "cannot be read")):
        assert any(str(name) in problem and word in problem for problem in found["problems"])
    assert set(found["graphs"]) == {"draft"}


def test_a_devices_copy_is_no_problem(bundle: Path, told: Told) -> None:
    shutil.rmtree(bundle / "cloud")
    code, found, _ = told("inspect", bundle)
    assert (code, found["problems"], found["target_is_here"]) == (0, [], False)
    code, _, remarks = told("verify", bundle)
    assert code == 1
    assert "carries no target" in remarks


def test_a_listed_file_that_is_no_onnx_is_an_error(bundle: Path, told: Told) -> None:
    (bundle / "edge/front/model.onnx").write_bytes(b"\xff\xff noise")
    edit_manifest(bundle, lambda content: list_file(content, bundle, "edge/front/model.onnx"))
    code, _, remarks = told("inspect", bundle)
    assert code == 1
    assert "cannot be read as ONNX" in remarks


@pytest.mark.parametrize("text", ["", '{"schema_version": 2', "[]"])
@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_a_broken_manifest_or_none(command: str, text: str, bundle: Path, tmp_path: Path, told: Told) -> None:
    (bundle / MANIFEST).write_text(text)
    code, found, remarks = told(command, bundle)
    assert (code, found) == (1, {})
    assert f"error: {bundle / MANIFEST}" in remarks
    code, _, remarks = told(command, tmp_path / "absent")
    assert code == 1
    assert "is no bundle" in remarks


# verify


def test_what_was_recorded_is_found_again(tiny_pair: Pair, told: Told) -> None:
    code, found, remarks = told("verify", tiny_pair.bundle)
    assert code == 0, remarks
    assert (found["passed"], found["notes"]) == (True, [])
    figures = {finding["what"]: finding for finding in found["findings"]}
    assert len(figures) == 4
    for finding in figures.values():
        assert finding["measured"] == pytest.approx(finding["recorded"], rel=1e-6)  # the same machine


def test_worse_than_recorded_is_exit_code_1(bundle: Path, told: Told) -> None:
    def boast(content: dict[str, Any]) -> None:
        content["draft"]["fingerprint"] = "d" * 64  # as if the draft were another model
        content["checks"]["agreement"]["acceptance_rate"] = 1.0
        content["checks"]["front"]["quality"]["median_relative_error"] = 0.0

    edit_manifest(bundle, boast)
    code, found, _ = told("verify", bundle)
    assert (code, found["passed"]) == (1, False)
    assert [finding["passed"] for finding in found["findings"]] == [False, False, True]
    assert "only its quantized graph" in found["notes"][0]


def test_a_changed_file_ends_a_verification(bundle: Path, told: Told) -> None:
    with (bundle / "edge/front/model.onnx.data").open("r+b") as file:
        file.write(b"\0\1\2\3")
    code, _, remarks = told("verify", bundle)
    assert code == 1
    assert "SHA-256" in remarks


def test_inputs_are_for_graph_bundles(tiny_pair: Pair, told: Told) -> None:
    code, _, remarks = told("verify", tiny_pair.bundle, "--inputs", "sample.npz")
    assert code == 2
    assert "--inputs sample.npz is for graph bundles" in remarks
