"""The draft that is shipped for the demo: small, whole, made for the demo's target, and what its record says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from pairs import ROOT, Pair

from edgecloud.draft_vocab import DRAFT_VOCAB, DraftVocab
from edgecloud.partitioner.check import continue_greedily, encode_prompts, load_torch
from edgecloud.partitioner.model_folder import ModelFolder
from edgecloud.partitioner.packed_draft import open_draft

pytest_plugins = ["pairs"]

FOLDER = ROOT / "examples" / "demo-draft"
MAX_BYTES = 32_000_000
WELL_BELOW_RECORD = 0.25  # on other prompts than those of the curve


def test_it_is_small_and_the_only_binary_in_the_examples() -> None:
    binaries = [path for path in (ROOT / "examples").rglob("*") if path.is_file() and b"\0" in path.read_bytes()[:4096]]
    assert [path.name for path in binaries if "__pycache__" not in path.parts] == ["layers.int4"]
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < MAX_BYTES


def test_its_record_tells_how_it_was_made() -> None:
    record = json.loads((FOLDER / "distillation.json").read_text("utf-8"))
    assert record["agreement"] == max(point["agreement"] for point in record["curve"])
    assert record["curve"][-1]["step"] == record["settings"]["num_steps"]
    assert len(DraftVocab.read(FOLDER / DRAFT_VOCAB)) == record["settings"]["num_kept"]
    assert str(record["settings"]["num_steps"]) in (FOLDER / "README.md").read_text("utf-8")


def test_it_goes_with_the_demos_target_and_agrees_with_it(smol_pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGECLOUD_HOME", str(tmp_path))
    target = ModelFolder.open(smol_pair.target)
    draft = load_torch(open_draft(str(FOLDER), target), fp32=True)
    kept = torch.tensor(DraftVocab.read(FOLDER / DRAFT_VOCAB).token_ids)
    right = total = 0
    for sample in continue_greedily(load_torch(target, fp32=True), encode_prompts(target, 200)[:6], [2], 49152, 24):
        with torch.inference_mode():
            logits = draft(torch.tensor([sample.prompt_ids + sample.continuation_ids])).logits[0, len(sample.prompt_ids) - 1 : -1]
        guesses = kept[logits[:, kept].argmax(-1)]
        right += int((guesses == torch.tensor(sample.continuation_ids)).sum())
        total += len(guesses)
    assert right / total > WELL_BELOW_RECORD
