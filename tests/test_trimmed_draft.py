"""A draft whose head is trimmed: from `draft_vocab.json` in its folder to what the device proposes, in every mode."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pairs import Pair, Server, copy_of, edit_manifest, list_file
from plain_choice import settings_
from tiny import END_OF_TURN_ID, TOKENIZER_SIZE, make_tiny_llama

from edgecloud.bundle import Bundle
from edgecloud.cli.app import run
from edgecloud.client import Client
from edgecloud.draft_vocab import DRAFT_VOCAB, DraftVocab
from edgecloud.edge.drafter import ModelDrafter
from edgecloud.edge.model import DraftModel
from edgecloud.errors import BundleCorruptError, BundleError, BundleVersionError, ModelError
from edgecloud.kernels.choice import choose
from edgecloud.manifest import SCHEMA_VERSION
from edgecloud.partitioner.export import Precision, export_graph
from edgecloud.partitioner.graph import DraftGraph
from edgecloud.partitioner.inputs import check_inputs
from edgecloud.partitioner.model_folder import ModelFolder
from edgecloud.partitioner.partition import partition
from edgecloud.partitioner.trimmed_head import trim_head
from edgecloud.types import Mode

pytest_plugins = ["pairs"]

VOCAB_SIZE = 260
WINDOW = 64
KEPT = (0, 2, *range(3, 160, 2), 200, 258)  # with the end of a turn; not the start of one, which every prompt holds


def with_list(model: Path, folder: Path, content: str) -> Path:
    """A copy of a model that has a list."""
    shutil.copytree(model, folder)
    (folder / DRAFT_VOCAB).write_text(content)
    return folder


@pytest.fixture(scope="module")
def trimmed(tiny_pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of the tiny target and a draft with the same weights, trimmed."""
    folder = tmp_path_factory.mktemp("trimmed")
    draft = with_list(tiny_pair.target, folder / "draft", json.dumps({"token_ids": KEPT}))
    config = json.loads((draft / "config.json").read_text())
    (draft / "config.json").write_text(json.dumps({**config, "made_by": "hand"}))  # another model, as a distilled one is
    inputs = check_inputs(str(tiny_pair.target), folder / "bundle", draft=str(draft), precision="int4", overwrite=False)
    report = partition(inputs)
    assert report.num_kept_ids == len(KEPT)
    assert report.parity.max_relative_diff < report.parity.bound  # of the kept rows, of an untied head
    return folder / "bundle"


@pytest.fixture(scope="module")
def bundle(trimmed: Path) -> Bundle:
    return Bundle.open(trimmed)


@pytest.fixture(scope="module")
def drafter(bundle: Bundle) -> ModelDrafter:
    model = DraftModel.of_bundle(bundle, WINDOW, 1)
    return ModelDrafter(lambda: model, VOCAB_SIZE)


@pytest.fixture
def changed(trimmed: Path, tmp_path: Path) -> Path:
    return copy_of(trimmed, tmp_path / "bundle")


# The list


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "JSON"),
        ("[" * 100_000, "JSON"),
        ("[0, 2]", "must hold"),
        ('{"token_ids": [0, 2], "frequency": []}', "nothing else"),
        ('{"token_ids": "02"}', "must hold"),
        ('{"token_ids": []}', "empty"),
        ('{"token_ids": [0, 2.0]}', r"2\.0; every entry is a whole number"),
        ('{"token_ids": [0, true, 2]}', "True; every entry"),
        ('{"token_ids": [-1, 2]}', "-1"),
        ('{"token_ids": [2, 0]}', "0 after 2"),
        ('{"token_ids": [0, 2, 2]}', "2 twice"),
        ('{"token_ids": [0, 1, 3]}', "lacks 2, which ends a text"),
        (json.dumps({"token_ids": [2, TOKENIZER_SIZE]}), f"{TOKENIZER_SIZE}; the model has {TOKENIZER_SIZE} tokens"),
        (json.dumps({"token_ids": list(range(10**5))}), "99999; the model has"),
    ],
)
def test_a_list_that_cannot_be_used_is_refused(tiny_pair: Pair, tmp_path: Path, content: str, said: str) -> None:
    draft = with_list(tiny_pair.target, tmp_path / "draft", content)
    with pytest.raises(ModelError, match=f"{DRAFT_VOCAB}: .*{said}"):
        check_inputs(str(tiny_pair.target), tmp_path / "bundle", draft=str(draft), precision="int4", overwrite=False)
    assert not (tmp_path / "bundle").exists()


# The graph


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("int4", 0.15)])
def test_a_tied_matrix_is_kept_whole_and_once(tmp_path: Path, precision: Precision, tolerance: float) -> None:
    """In int4 scales are rounded to fp16, upon which some activations of eight bits round to their other side."""
    model = ModelFolder.open(make_tiny_llama(tmp_path / "model", tie_word_embeddings=True))
    whole = export_graph(model, tmp_path / "whole", precision)
    shutil.copytree(tmp_path / "whole", tmp_path / "trimmed")
    vocab = DraftVocab(KEPT)
    trim_head(tmp_path / "trimmed" / whole.name, vocab, VOCAB_SIZE)
    ours, theirs = DraftGraph(tmp_path / "trimmed" / whole.name, WINDOW, 1, vocab=vocab), DraftGraph(whole, WINDOW, 1)
    tokens = [1, 255, 2, 7]  # of which it may not propose two
    logits = theirs.extend(tokens)[list(KEPT)]
    np.testing.assert_allclose(ours.extend(tokens), logits, rtol=0, atol=tolerance * np.abs(logits).max())
    stored = onnx.load(tmp_path / "trimmed" / whole.name, load_external_data=False).graph.initializer
    assert not [matrix.name for matrix in stored if len(matrix.dims) > 1 and len(KEPT) in matrix.dims]  # no second copy of the rows


def test_a_list_of_another_length_does_not_fit_a_graph(bundle: Bundle) -> None:
    graph = bundle.file(bundle.draft.model)
    with pytest.raises(ModelError, match=f"{len(KEPT)} tokens, its list has 2"):
        DraftGraph(graph, WINDOW, 1, vocab=DraftVocab((0, 2)))
    with pytest.raises(BundleError, match=f"{len(KEPT)} tokens, its list names 2"):
        DraftModel(graph, WINDOW, 1, vocab=DraftVocab((0, 2)), vocab_size=VOCAB_SIZE)


def test_a_head_that_is_no_plain_product_is_refused(tmp_path: Path, bundle: Bundle) -> None:
    value = ir.Value(name="x", shape=ir.Shape([1, 1, 4]), type=ir.TensorType(ir.DataType.FLOAT))
    node = ir.node("Tanh", [value])
    node.outputs[0].name = "logits"
    graph = ir.Graph([value], node.outputs, nodes=[node], opset_imports={"": 20}, name="g")
    ir.save(ir.Model(graph, ir_version=9), tmp_path / "model.onnx")
    with pytest.raises(ModelError, match="from Tanh, no plain product"):
        trim_head(tmp_path / "model.onnx", DraftVocab((0, 2)), 4)
    shutil.copytree(bundle.file("edge/draft"), tmp_path / "draft")
    with pytest.raises(ModelError, match="9999 rows belong"):
        trim_head(tmp_path / "draft/model.onnx", DraftVocab((0, 2)), 9999)


# The bundle


def test_the_bundle_names_its_list_and_inspect_and_verify_know_it(trimmed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = Bundle.open(trimmed)
    bundle.verify_files("edge")
    assert bundle.draft.vocab == f"edge/draft/{DRAFT_VOCAB}"
    assert bundle.draft_vocab() == DraftVocab(KEPT)
    assert bundle.draft.vocab_size == VOCAB_SIZE
    logits = onnx.load(bundle.file(bundle.draft.model), load_external_data=False).graph.output[0]
    assert logits.type.tensor_type.shape.dim[2].dim_value == len(KEPT)
    assert run(["inspect", str(trimmed), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["num_kept_ids"] == len(KEPT)
    assert run(["inspect", str(trimmed)]) == 0
    assert f"proposes {len(KEPT)} of {VOCAB_SIZE}" in " ".join(capsys.readouterr().out.split())
    assert run(["verify", str(trimmed), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["passed"]


def test_the_agreement_counts_what_the_draft_cannot_say_as_missed(bundle: Bundle) -> None:
    from edgecloud.partitioner import check

    vocab = bundle.draft_vocab()
    sample = check.Sample([1, 70, 71], [1, 201, 1])  # none of these is in the list
    graph = check.open_graph(bundle.file(bundle.draft.model), [sample], vocab)
    assert check.measure_agreement(graph, [sample], TOKENIZER_SIZE).acceptance_rate == 0
    graph.crop_to(0)
    own = KEPT[int(graph.extend([1, 70, 71]).argmax())]
    graph.crop_to(0)
    assert check.measure_agreement(graph, [check.Sample([1, 70, 71], [own])], TOKENIZER_SIZE).acceptance_rate == 1


@pytest.mark.parametrize(
    ("content", "said"), [({"token_ids": [0, 1]}, "lacks 2"), ({"token_ids": [2, 260]}, "260 tokens"), ({}, "must hold")]
)
def test_a_list_that_fits_no_bundle_is_named(changed: Path, content: dict[str, Any], said: str) -> None:
    name = f"edge/draft/{DRAFT_VOCAB}"
    (changed / name).write_text(json.dumps(content))
    edit_manifest(changed, lambda manifest: list_file(manifest, changed, name))
    with pytest.raises(BundleCorruptError, match=f"{DRAFT_VOCAB}: .*{said}"):
        DraftModel.of_bundle(Bundle.open(changed), WINDOW, 1)


def test_the_list_is_a_file_of_the_device_like_any_other(changed: Path) -> None:
    edit_manifest(changed, lambda manifest: manifest["files"].pop(f"edge/draft/{DRAFT_VOCAB}"))
    with pytest.raises(BundleCorruptError, match="lists no such file"):
        Bundle.open(changed)
    edit_manifest(changed, lambda manifest: manifest["draft"].update(vocab="cloud/config.json"))
    with pytest.raises(BundleCorruptError, match="below edge/"):
        Bundle.open(changed)


def test_an_edgecloud_that_knows_no_lists_refuses_the_bundle(changed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert json.loads((changed / "bundle.json").read_text())["schema_version"] == SCHEMA_VERSION == 3
    monkeypatch.setattr("edgecloud.manifest.SCHEMA_VERSION", 2)
    with pytest.raises(BundleVersionError, match="upgrade"):
        Bundle.open(changed)


# What it proposes


@given(st.lists(st.integers(0, TOKENIZER_SIZE - 1), min_size=1, max_size=20), settings_, st.integers(1, 4))
@settings(max_examples=40)
def test_a_guess_is_the_choice_among_the_list_whatever_the_context_holds(
    bundle: Bundle, drafter: ModelDrafter, tokens: list[int], sampling: Any, num_draft_tokens: int
) -> None:
    guessed = drafter.draft(tokens, num_draft_tokens, sampling, {END_OF_TURN_ID})
    assert set(guessed) <= set(KEPT)
    model = drafter._model
    for at, token in enumerate(guessed):
        so_far = [*tokens, *guessed[:at]]
        logits = np.full(VOCAB_SIZE, -np.inf, np.float32)
        logits[list(KEPT)] = model.extend_to(so_far)
        assert token == choose(logits, so_far, sampling)


@pytest.fixture(scope="module")
def client(trimmed: Path, tiny_server: Server) -> Iterator[Client]:
    with Client(trimmed, cloud=tiny_server.address, insecure=True) as connected:
        yield connected


@pytest.mark.parametrize("mode", ["edge", "speculative", "auto"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_only_who_decides_alone_is_bound_to_the_list(client: Client, tiny_pair: Pair, mode: Mode, temperature: float) -> None:
    """The draft says tokens of its list only; the target's text is its own, whatever the draft can say."""
    beyond = 0
    for seed, prompt in enumerate(["Why is the sky blue?", "\x00\xff~", "zzzz"]):
        reply = client.generate(prompt, mode=mode, max_new_tokens=24, temperature=temperature, seed=seed)
        if mode == "edge":
            assert set(reply.token_ids) <= set(KEPT)
            continue
        told = {"temperature": temperature, "seed": seed, "max_new_tokens": 24}
        assert reply.token_ids == client.generate(prompt, mode="cloud", **told).token_ids
        beyond += len(set(reply.token_ids) - set(KEPT))
        assert mode == "auto" or reply.metrics.num_draft_tokens > 0
    assert mode == "edge" or beyond > 0
