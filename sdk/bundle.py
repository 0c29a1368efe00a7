"""A bundle: the folder that `edgecloud partition` writes, and what device and cloud may believe of it.

    bundle.json   schema version, pair id, fingerprints, SHA-256 of every file
    edge/draft/   model.onnx, model.onnx.data, tokenizer.json, chat_template.jinja
    cloud/        the target as a Hugging Face folder

The device needs bundle.json and edge/ only. Nothing in a bundle is executed and no path leaves it.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from edgecloud.errors import BundleError
from edgecloud.manifest import (
    MANIFEST,
    SCHEMA_VERSION,
    FileInfo,
    build,
    check_below,
    check_inside,
    check_listed,
    is_bundle,
    read_manifest,
    verify_files,
)


@dataclass(frozen=True, slots=True)
class TargetInfo:
    """The cloud's model."""

    name: str
    fingerprint: str  # fingerprint.model_fingerprint
    folder: str | None  # inside the bundle; None when the cloud takes it from the hub
    hub_id: str | None
    revision: str | None
    vocab_size: int
    max_context_tokens: int
    dtype: str
    num_parameters: int


@dataclass(frozen=True, slots=True)
class DraftInfo:
    """The device's model, an ONNX graph with GroupQueryAttention and shared past and present buffers."""

    name: str
    fingerprint: str  # of the Hugging Face folder that it was exported from
    model: str  # path of the graph inside the bundle
    quantization: str  # int4, fp32
    vocab_size: int  # columns of the logits; may be padded beyond the tokenizer's
    max_context_tokens: int


@dataclass(frozen=True, slots=True)
class TokenizerInfo:
    """The tokenizer that both models share."""

    fingerprint: str  # fingerprint.tokenizer_fingerprint
    path: str
    chat_template: str | None  # path of the Jinja file; None: prompts go in as they are
    special_tokens: dict[str, str]  # bos_token, eos_token, ...: names a chat template may use
    eos_token_ids: list[int]  # generation ends after one of these


@dataclass(frozen=True, slots=True)
class Bundle:
    """A checked manifest and where it lies. Files are checked by `verify_files`."""

    path: Path
    pair_id: str
    created_by: str
    licence: str | None
    target: TargetInfo
    draft: DraftInfo
    tokenizer: TokenizerInfo
    files: dict[str, FileInfo]
    checks: dict[str, Any] = field(default_factory=dict)  # the partition report
    cut_points: list[int] = field(default_factory=list)
    calibration: dict[str, Any] | None = None

    @classmethod
    def open(cls, path: str | Path) -> Bundle:
        """Read and check the manifest.

        Raises:
            BundleNotFoundError: no such folder, or it has no bundle.json.
            BundleVersionError: written by a newer edgecloud.
            BundleKindError: it holds a cut ONNX graph.
            BundleCorruptError: not JSON, a field is missing, unknown or of another type, or a path leaves the bundle.
        """
        folder = Path(path)
        manifest = folder / MANIFEST
        content = read_manifest(folder, "text")
        for key, part in (("target", TargetInfo), ("draft", DraftInfo), ("tokenizer", TokenizerInfo)):
            content[key] = build(part, content.get(key), key, manifest)
        bundle = build(cls, {**content, "path": folder}, "", manifest)
        bundle._check_paths()
        return bundle

    def file(self, name: str) -> Path:
        """Where a file of the bundle lies."""
        return self.path / name

    @property
    def target_folder(self) -> Path | None:
        """The target's Hugging Face folder, if the bundle carries it."""
        return None if self.target.folder is None else self.path / self.target.folder

    def verify_files(self, part: Literal["edge", "cloud"]) -> None:
        """Check size and SHA-256 of every file below edge/ or cloud/.

        Raises:
            BundleCorruptError: names the first file that is missing, truncated or changed.
        """
        verify_files(self.path, self.files, part)

    def to_json(self) -> str:
        """The text of bundle.json."""
        content = asdict(self)
        del content["path"]
        return json.dumps({"schema_version": SCHEMA_VERSION, **content}, indent=2) + "\n"

    def _check_paths(self) -> None:
        folders = [] if self.target.folder is None else [self.target.folder]
        check_inside(self.path, [*self.files, *folders])
        read_on_device = [self.draft.model, self.tokenizer.path]
        read_on_device += [name for name in (self.tokenizer.chat_template,) if name is not None]
        check_listed(self.path, read_on_device, self.files)
        check_below(self.path, read_on_device, "edge")
        check_below(self.path, folders, "cloud")


__all__ = [
    "MANIFEST",
    "SCHEMA_VERSION",
    "Bundle",
    "BundleError",
    "DraftInfo",
    "FileInfo",
    "TargetInfo",
    "TokenizerInfo",
    "is_bundle",
]
