"""The slow steps of a partition, each kept in the cache under everything that decides its outcome."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from edgecloud.draft_vocab import DraftVocab
from edgecloud.fingerprint import sha256_file
from edgecloud.partitioner import check, export, front, front_check, quantize, trimmed_head
from edgecloud.partitioner.candidate import CODECS
from edgecloud.partitioner.inputs import FrontPlan
from edgecloud.partitioner.model_folder import ModelFolder
from edgecloud.partitioner.step_cache import cached_step

CHECKS, SAMPLES = "checks.json", "samples.json"


def cached_export(
    cache: Path | None, model: ModelFolder, fingerprint: str, folder: Path, precision: export.Precision, vocab: DraftVocab | None
) -> bool:
    """The model's graph in `folder`, as `export.export_graph` writes it.  -> whether it was in the cache

    Raises what `export_graph` raises.
    """
    parts = {"step": "export", "model": fingerprint, "precision": precision, **_trimmed(vocab), **_builder()}
    return cached_step(cache, parts, folder, lambda made: export.export_graph(model, made, precision, vocab))


def cached_front_layers(cache: Path | None, model: ModelFolder, fingerprint: str, folder: Path, cut: int) -> bool:
    """The fp32 graph of the layers before `cut` in `folder`, as `front.export_front` writes it.  -> whether it was in the cache

    Raises what `export_front` raises.
    """

    def make(made: Path) -> None:
        made.mkdir(parents=True, exist_ok=True)
        front.export_front(model, cut, made)

    parts = {"step": "front layers", "model": fingerprint, "cut": cut, "code": sha256_file(Path(front.__file__)), **_builder()}
    return cached_step(cache, parts, folder, make, linked=False)


def cached_front(
    cache: Path | None, fingerprints: tuple[str, ...], plan: FrontPlan, folder: Path, make: Callable[[Path], None]
) -> bool:
    """A front as it is in a bundle, and what was found out about it, in `folder`; `fingerprints` are of target and tokenizer.

    Raises what `make` raises.  -> whether it was in the cache
    """
    code = {module.__name__: sha256_file(Path(str(module.__file__))) for module in (check, front, front_check, quantize)}
    what = {"cut": plan.cut, "precision": plan.precision, "codecs": sorted({plan.codec, *CODECS})}
    made_by = {"code": code, "onnxruntime": version("onnxruntime"), "torch": version("torch"), **_builder()}
    return cached_step(cache, {"step": "front", "models": fingerprints, **what, **made_by}, folder, make)


def cached_samples(
    cache: Path | None,
    fingerprints: tuple[str, ...],
    settings: dict[str, object],
    scratch: Path,
    run: Callable[[], list[check.Sample]],
) -> list[check.Sample]:
    """The target's answers to the built-in prompts; `fingerprints` are of target and tokenizer. Raises what `run` raises."""

    def make(folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / SAMPLES).write_text(json.dumps([asdict(sample) for sample in run()]), "utf-8")

    parts = {"step": "samples", "models": fingerprints, **settings, "check": sha256_file(Path(check.__file__)),
             "torch": version("torch"), "transformers": version("transformers")}  # fmt: skip
    cached_step(cache, parts, scratch, make)
    return [check.Sample(**found) for found in json.loads((scratch / SAMPLES).read_text("utf-8"))]


def cached_check(
    cache: Path | None,
    fingerprints: tuple[str, ...],
    precision: str,
    vocab: DraftVocab | None,
    scratch: Path,
    run: Callable[[], tuple[check.Parity, check.Agreement]],
) -> tuple[check.Parity, check.Agreement]:
    """Parity and agreement of an exported draft; `fingerprints` are of target, draft and tokenizer. Raises what `run` raises."""

    def make(folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        parity, agreement = run()
        (folder / CHECKS).write_text(json.dumps({"parity": asdict(parity), "agreement": asdict(agreement)}), "utf-8")

    prompts = hashlib.sha256("\n".join(check.PROMPTS).encode()).hexdigest()
    code = {"check": sha256_file(Path(check.__file__)), "torch": version("torch"), "prompts": prompts}
    parts = {"step": "check", "models": fingerprints, "precision": precision, **_trimmed(vocab), **code, **_builder()}
    cached_step(cache, parts, scratch, make)
    found = json.loads((scratch / CHECKS).read_text("utf-8"))
    return check.Parity(**found["parity"]), check.Agreement(**found["agreement"])


def _trimmed(vocab: DraftVocab | None) -> dict[str, str]:
    """What a trimmed draft depends on beside that; its list is no part of the model's fingerprint."""
    if vocab is None:
        return {}
    return {"vocab": vocab.fingerprint(), "trim": sha256_file(Path(trimmed_head.__file__)), "onnx_ir": version("onnx-ir")}


def _builder() -> dict[str, str]:
    """What an exported graph depends on beside the model."""
    return {"builder": version("onnxruntime-genai"), "onnx": version("onnx"), "export": sha256_file(Path(export.__file__))}
