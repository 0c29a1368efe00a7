"""A packed draft is the draft, without what its target has."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny import make_tiny_llama
from transformers import AutoModelForCausalLM

from edgecloud.draft_vocab import DRAFT_VOCAB, DraftVocab
from edgecloud.errors import ModelError
from edgecloud.partitioner.model_folder import ModelFolder
from edgecloud.partitioner.packed_draft import PACKED, open_draft, own_weights, pack
from edgecloud.partitioner.rounding import rounded
from edgecloud.partitioner.student import Student

KEPT = tuple(range(200))


@pytest.fixture
def target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGECLOUD_HOME", str(tmp_path / "home"))
    return make_tiny_llama(tmp_path / "target", num_layers=4, tie_word_embeddings=True, scale=0.1)


@pytest.fixture
def packed(target: Path, tmp_path: Path) -> tuple[Path, Student]:
    """Two layers, changed a little as if they had learnt."""
    student = Student(AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32), [0, 3], torch.tensor(KEPT))
    with torch.no_grad():
        for weights in student.trained().values():
            weights.add_(0.01 * torch.randn(weights.shape, generator=torch.Generator().manual_seed(0)))
    student.round()
    folder = tmp_path / "draft"
    folder.mkdir()
    student.save_packed(folder, ModelFolder.open(target).fingerprint())
    (folder / DRAFT_VOCAB).write_text(DraftVocab(KEPT).to_json(), "utf-8")
    return folder, student


def test_what_is_unpacked_is_what_was_packed_bit_by_bit(target: Path, packed: tuple[Path, Student]) -> None:
    folder, student = packed
    found = open_draft(str(folder), ModelFolder.open(target))
    assert found.name == "draft"
    model = AutoModelForCausalLM.from_pretrained(found.path)
    expected = student.model.state_dict()
    assert model.state_dict().keys() == expected.keys()
    for name, weights in model.state_dict().items():
        assert torch.equal(weights, expected[name]), name
    assert (found.path / DRAFT_VOCAB).is_file()
    assert found.fingerprint() == open_draft(str(folder), ModelFolder.open(target)).fingerprint()


def test_nothing_that_the_target_has_is_in_it(target: Path, packed: tuple[Path, Student]) -> None:
    own = sum(weights.numel() for weights in packed[1].trained().values())
    assert (packed[0] / PACKED).stat().st_size < 0.7 * own + 8192
    assert not any("embed" in name for name in load_file(packed[0] / PACKED))


@given(st.integers(1, 4), st.integers(1, 70))
def test_matrices_of_any_width(tmp_path_factory: pytest.TempPathFactory, num_out: int, num_in: int) -> None:
    folder = tmp_path_factory.mktemp("packed")
    weights = torch.randn(num_out, num_in, generator=torch.Generator().manual_seed(num_in))
    pack({"layers.0.w": weights}, "layers", "x", folder)
    assert torch.equal(own_weights(folder / PACKED, "x", "target")[0]["layers.0.w"], rounded(weights))


def test_another_target_is_named(target: Path, packed: tuple[Path, Student], tmp_path: Path) -> None:
    other = make_tiny_llama(tmp_path / "other", num_layers=4, tie_word_embeddings=True, scale=0.1, seed=7)
    with pytest.raises(ModelError, match=ModelFolder.open(target).fingerprint()):
        open_draft(str(packed[0]), ModelFolder.open(other))


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_truncated_one_is_refused(target: Path, packed: tuple[Path, Student], share: float, tmp_path: Path) -> None:
    file = packed[0] / PACKED
    whole = file.read_bytes()
    file.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ModelError, match="copy it again"):
        open_draft(str(packed[0]), ModelFolder.open(target))
    assert not list((tmp_path / "home").glob("drafts/*"))


def test_a_cache_that_cannot_be_written_is_named(
    target: Path, packed: tuple[Path, Student], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EDGECLOUD_HOME", str(tmp_path / "file"))
    with pytest.raises(ModelError, match="EDGECLOUD_HOME"):
        open_draft(str(packed[0]), ModelFolder.open(target))


def test_a_part_of_one_is_refused(target: Path, packed: tuple[Path, Student]) -> None:
    (packed[0] / DRAFT_VOCAB).unlink()
    with pytest.raises(ModelError, match="copy the whole"):
        open_draft(str(packed[0]), ModelFolder.open(target))
