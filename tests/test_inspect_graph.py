"""`edgecloud inspect` and `verify` of a cut graph: what is in it, is it whole, do its cuts still lose what they say?"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from cut_graphs import random_model, sample, write_bundle
from graphs import picture, small_network
from onnx import numpy_helper
from pairs import edit_manifest, list_file

from edgecloud.cli.app import run
from edgecloud.graph_bundle import GraphBundle
from edgecloud.manifest import MANIFEST
from edgecloud.partitioner.graph_partition import partition_graph
from edgecloud.partitioner.graph_request import GraphRequest
from edgecloud.partitioner.link_spec import LinkSpec

Told = Callable[..., tuple[int, dict[str, Any], str]]


@pytest.fixture
def told(capsys: pytest.CaptureFixture[str]) -> Told:
    """Runs a command with --json.  -> exit code, the object, stderr"""

    def tell(*command: object) -> tuple[int, dict[str, Any], str]:
        capsys.readouterr()
        code = run([*map(str, command), "--json"])
        output = capsys.readouterr()
        return code, json.loads(output.out or "{}", parse_constant=pytest.fail), output.err

    return tell


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a bundle that has codecs at its cuts, and the sample that it was made with."""
    root = tmp_path_factory.mktemp("made")
    sample = picture(root / "sample.npz")
    model = small_network(root / "network.onnx")
    link = LinkSpec(0.5, 0.5, 1.0)
    request = GraphRequest(model, root / "bundle", (sample,), link=link, max_loss=0.05, codecs=("int8",), num_threads=1)
    partition_graph(request)
    return root


@pytest.fixture
def bundle(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "bundle", tmp_path / "bundle"))


@pytest.fixture
def by_hand(tmp_path: Path) -> Path:
    """Two inputs, two outputs, a cut in between; nothing is recorded of loss."""
    write_bundle(tmp_path / "hand", random_model(1), [5])
    np.savez(tmp_path / "sample.npz", **sample(1))
    return tmp_path / "hand"


def divided(bundle: Path) -> str:
    """A cut of which both sides have a part."""
    return next(cut.name for cut in GraphBundle.open(bundle).cuts if cut.name.startswith("cut-"))


def change_weight(file: Path, by: float) -> None:
    """Some weight of a graph becomes another one."""
    model = onnx.load(file)
    weight = model.graph.initializer[-1]
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * np.float32(by), weight.name))
    onnx.save(model, file)


# inspect


def test_a_graph_bundle_is_taken_apart(bundle: Path, told: Told) -> None:
    code, found, _ = told("inspect", bundle)
    manifest = json.loads((bundle / MANIFEST).read_text())
    assert (code, found["problems"], found["kind"]) == (0, [], "graph")
    for key in ("graph", "cuts", "chosen", "licence", "checks"):
        assert found[key] == manifest[key]
    assert found["num_files"] == len(manifest["files"])
    assert found["num_bytes"] == sum(file.stat().st_size for file in bundle.rglob("*.onnx"))
    assert found["edge_is_here"]
    assert found["cloud_is_here"]


def test_the_table_tells_a_person_the_same(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", str(bundle)]) == 0
    text = " ".join(capsys.readouterr().out.split())
    cuts = GraphBundle.open(bundle)
    for words in (
        cuts.graph.fingerprint,
        "opset 17",
        "float32 of [batch, 3, height, width]",
        "all hashes right",
        f"{cuts.chosen} *",
    ):
        assert words in text
    for cut in cuts.cuts:
        assert cut.name in text
        assert str(cut.boundary_bytes) in text
        assert all(f"{tensor.name} {tensor.codec or 'raw'}" in text for tensor in cut.boundary)


def test_every_file_that_is_wrong_is_named(bundle: Path, told: Told) -> None:
    changed, shorter, gone = bundle / "edge/whole.onnx", bundle / "cloud/whole.onnx", bundle / "edge/extra.onnx"
    gone.write_bytes(b"soon gone")
    edit_manifest(bundle, lambda content: list_file(content, bundle, "edge/extra.onnx"))
    gone.unlink()
    for file in (changed, shorter):
        content = bytearray(file.read_bytes())
        file.unlink()  # the two may be one
        content[100] ^= 1
        file.write_bytes(content if file == changed else content[:-1])
    code, found, remarks = told("inspect", bundle)
    assert code == 1
    assert len(found["problems"]) == remarks.count("error: ") == 3
    for name, word in ((changed, "SHA-256"), (shorter, "bytes"), (gone, "cannot be read")):
        assert any(str(name) in problem and word in problem for problem in found["problems"])


@pytest.mark.parametrize(("part", "key", "owner"), [("cloud", "cloud_is_here", "device's"), ("edge", "edge_is_here", "cloud's")])
def test_the_copy_of_one_side_is_no_problem_but_cannot_be_verified(
    part: str, key: str, owner: str, bundle: Path, made: Path, told: Told, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(bundle / part)
    code, found, _ = told("inspect", bundle)
    assert (code, found["problems"], found[key]) == (0, [], False)
    run(["inspect", str(bundle)])
    assert f"{owner} copy" in " ".join(capsys.readouterr().out.split())
    code, _, remarks = told("verify", bundle, "--inputs", made / "sample.npz")
    assert code == 1
    assert f"{owner} copy" in remarks


def test_a_manifest_without_any_files_is_a_problem(bundle: Path, told: Told) -> None:
    for part in ("edge", "cloud"):
        shutil.rmtree(bundle / part)
    code, found, _ = told("inspect", bundle)
    assert code == 1
    assert len(found["problems"]) == found["num_files"]


# verify


def test_what_was_recorded_is_found_again(made: Path, told: Told) -> None:
    code, found, remarks = told("verify", made / "bundle", "--inputs", made / "sample.npz")
    assert (code, found["passed"], found["notes"]) == (0, True, []), remarks
    cuts = GraphBundle.open(made / "bundle").cuts
    assert any(cut.loss for cut in cuts)  # a codec is at work
    assert len(found["findings"]) == 3 * len(cuts)
    for finding in found["findings"]:
        assert finding["measured"] == pytest.approx(finding["recorded"], rel=1e-3, abs=1e-5)


def test_several_inputs_and_outputs_and_nothing_recorded_of_loss(by_hand: Path, told: Told) -> None:
    code, found, _ = told("verify", by_hand, "--inputs", by_hand.parent / "sample.npz")
    assert (code, found["passed"]) == (0, True)
    assert len(found["findings"]) == 2 * 3
    assert any("loss was not measured" in note for note in found["notes"])


def test_worse_than_recorded_is_exit_code_1(bundle: Path, made: Path, told: Told) -> None:
    lossy = next(cut.name for cut in GraphBundle.open(bundle).cuts if cut.loss)

    def boast(content: dict[str, Any]) -> None:
        for cut in content["cuts"]:
            cut.update(loss=0.0, max_error=0.0)

    edit_manifest(bundle, boast)
    code, found, _ = told("verify", bundle, "--inputs", made / "sample.npz")
    assert (code, found["passed"]) == (1, False)
    worse = {finding["what"] for finding in found["findings"] if not finding["passed"]}
    assert {f"{lossy}: max error", f"{lossy}: loss"} <= worse
    assert any("depends on the samples" in note for note in found["notes"])


@pytest.mark.parametrize("by", [2.0, 1 + 1e-6])
def test_a_tail_that_computes_something_else_is_found(by: float, by_hand: Path, told: Told) -> None:
    file = GraphBundle.open(by_hand).cut("cut-1").cloud
    assert file is not None
    change_weight(by_hand / file, by)
    edit_manifest(by_hand, lambda content: list_file(content, by_hand, file))
    code, found, _ = told("verify", by_hand, "--inputs", by_hand.parent / "sample.npz")
    assert code == 1
    worse = {finding["what"] for finding in found["findings"] if not finding["passed"]}
    assert "cut-1: outputs with other bits, raw" in worse  # however little it is
    assert ("cut-1: max error" in worse) is (by == 2.0)
    assert all(what.startswith("cut-1") for what in worse)


def test_values_that_a_codec_refuses_are_no_number_and_not_passed(by_hand: Path, told: Told) -> None:
    edit_manifest(by_hand, lambda content: content["cuts"][1]["boundary"][0].update(codec="float16"))
    huge = sample(1)
    huge["input"] *= np.float32(1e6)
    np.savez(by_hand.parent / "huge.npz", **huge)
    code, found, _ = told("verify", by_hand, "--inputs", by_hand.parent / "huge.npz")
    assert code == 1
    finding = next(finding for finding in found["findings"] if finding["what"] == "cloud: max error")
    assert (finding["measured"], finding["passed"]) == (None, False)
    assert any("codec refuses" in note for note in found["notes"])
    assert run(["verify", str(by_hand), "--inputs", str(by_hand.parent / "huge.npz")]) == 1  # as a table


def test_a_graph_that_is_not_its_cuts_is_an_error(by_hand: Path, told: Told) -> None:
    def swap(content: dict[str, Any]) -> None:
        cut = content["cuts"][2]
        cut["edge_outputs"], cut["cloud_outputs"] = cut["cloud_outputs"], cut["edge_outputs"]

    edit_manifest(by_hand, swap)
    code, _, remarks = told("verify", by_hand, "--inputs", by_hand.parent / "sample.npz")
    assert code == 1
    assert "does not give" in remarks


def test_without_an_undivided_graph_there_is_nothing_to_compare_with(tmp_path: Path, told: Told) -> None:
    bundle = write_bundle(tmp_path / "hand", random_model(1), [5], drop=("edge", "cloud"), chosen="cut-1")
    np.savez(tmp_path / "sample.npz", **sample(1))
    code, _, remarks = told("verify", bundle.path, "--inputs", tmp_path / "sample.npz")
    assert code == 1
    assert "no undivided graph" in remarks


def test_inputs_are_asked_for_and_checked(made: Path, tmp_path: Path, told: Told) -> None:
    code, _, remarks = told("verify", made / "bundle")
    assert code == 2
    assert "--inputs" in remarks
    np.savez(tmp_path / "wrong.npz", picture=np.zeros((1, 3, 64, 64), np.float32))
    code, _, remarks = told("verify", made / "bundle", "--inputs", tmp_path / "wrong.npz")
    assert code == 2
    assert "'image'" in remarks


def test_a_changed_file_ends_a_verification(bundle: Path, made: Path, told: Told) -> None:
    cut = GraphBundle.open(bundle).cut(divided(bundle))
    with (bundle / str(cut.edge)).open("r+b") as file:
        file.write(b"\0\1\2\3")
    code, _, remarks = told("verify", bundle, "--inputs", made / "sample.npz")
    assert code == 1
    assert "SHA-256" in remarks
