"""The slow steps of a partition, each kept in the cache under everything that decides its outcome."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from edgecloud.fingerprint import sha256_file
from edgecloud.partitioner import check, export
from edgecloud.partitioner.model_folder import ModelFolder
from edgecloud.partitioner.step_cache import cached_step

CHECKS = "checks.json"


def cached_export(
    cache: Path | None, model: ModelFolder, fingerprint: str, folder: Path, precision: export.Precision, cut: int | None = None
) -> bool:
    """The model's graph in `folder`, as `export.export_graph` writes it.  -> whether it was in the cache

    `cut` names the layers of a graph that is only a front. Raises what `export_graph` raises.
    """
    parts = {"step": "export", "model": fingerprint, "precision": precision, "cut": cut, **_builder()}
    return cached_step(cache, parts, folder, lambda made: export.export_graph(model, made, precision))


def cached_check(
    cache: Path | None,
    fingerprints: tuple[str, ...],
    precision: str,
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
    cached_step(cache, {"step": "check", "models": fingerprints, "precision": precision, **code, **_builder()}, scratch, make)
    found = json.loads((scratch / CHECKS).read_text("utf-8"))
    return check.Parity(**found["parity"]), check.Agreement(**found["agreement"])


def _builder() -> dict[str, str]:
    """What an exported graph depends on beside the model."""
    return {"builder": version("onnxruntime-genai"), "onnx": version("onnx"), "export": sha256_file(Path(export.__file__))}
