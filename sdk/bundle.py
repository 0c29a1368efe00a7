"""A bundle: the folder that `edgecloud partition` writes, and what device and cloud may believe of it.

    bundle.json   schema version, pair id, fingerprints, SHA-256 of every file
    edge/draft/   model.onnx, model.onnx.data, tokenizer.json, chat_template.jinja, draft_vocab.json if its head is trimmed
    edge/front/   model.onnx, model.onnx.data: the target's first layers, for mode `split`
    cloud/        the target as a Hugging Face folder

The device needs bundle.json and edge/ only. Nothing in a bundle is executed and no path leaves it.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from edgecloud.draft_vocab import DraftVocab
from edgecloud.errors import BundleCorruptError, BundleError
from edgecloud.manifest import (
    AGAIN,
    MANIFEST,
    SCHEMA_VERSION,
    FileInfo,
    build,
    check_below,
    check_inside,
    check_listed,
    is_bundle,
    names_below,
    read_manifest,
    verify_file,
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
    vocab_size: int  # tokens that it reads; may be padded beyond the tokenizer's
    max_context_tokens: int
    vocab: str | None = None  # path of the list of tokens that it may propose, draft_vocab.py; None: all that it reads


@dataclass(frozen=True, slots=True)
class FrontInfo:
    """The target's embedding and first layers for the device, an ONNX graph of the draft's form whose output are rows."""

    model: str  # path of the graph inside the bundle
    cut: int  # layers in the front; the cloud goes on with this one, counted from 0
    num_layers: int  # of the whole target
    width: int  # channels of a row
    quantization: str  # int4, int8, fp16, fp32
    codec: str  # kernels/codec.py: how rows travel
    max_context_tokens: int

    def __post_init__(self) -> None:
        if not 1 <= self.cut < self.num_layers:
            raise ValueError(f"cut is {self.cut}, a model of {self.num_layers} layers is cut at 1 to {self.num_layers - 1}")
        if self.width < 1 or self.max_context_tokens < 1:
            raise ValueError(f"width is {self.width} and max_context_tokens {self.max_context_tokens}, both are 1 or more")


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
    front: FrontInfo | None = None  # for mode `split`
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
        if content.get("front") is not None:
            content["front"] = build(FrontInfo, content["front"], "front", manifest)
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

    def draft_vocab(self) -> DraftVocab | None:
        """The tokens that the draft may propose; None: all.

        Raises:
            BundleCorruptError: the list is missing, damaged, or not one of this pair's tokens.
        """
        if self.draft.vocab is None:
            return None
        try:
            vocab = DraftVocab.read(self.path / self.draft.vocab)
            vocab.require(min(self.draft.vocab_size, self.target.vocab_size), self.tokenizer.eos_token_ids)
        except ValueError as error:
            raise BundleCorruptError(f"{self.path / self.draft.vocab}: {error}; {AGAIN}") from error
        return vocab

    def verify_files(self, part: Literal["edge", "cloud"]) -> None:
        """Check size and SHA-256 of every file below edge/ or cloud/.

        Raises:
            BundleCorruptError: names the first file that is missing, truncated or changed.
        """
        verify_files(self.path, self.files, part)

    def names_below(self, part: Literal["edge", "cloud"]) -> list[str]:
        """The listed files of one side."""
        return names_below(self.files, part)

    def verify_file(self, name: str) -> None:
        """Check size and SHA-256 of one listed file. Raises BundleCorruptError as `verify_files` does."""
        verify_file(self.path / name, self.files[name])

    def to_json(self) -> str:
        """The text of bundle.json."""
        content = asdict(self)
        del content["path"]
        return json.dumps({"schema_version": SCHEMA_VERSION, **content}, indent=2) + "\n"

    def _check_paths(self) -> None:
        folders = [] if self.target.folder is None else [self.target.folder]
        check_inside(self.path, [*self.files, *folders])
        if self.front is not None and self.front.cut not in self.cut_points:
            raise BundleCorruptError(
                f"{self.path / MANIFEST}: the front is cut at {self.front.cut}, cut_points are {self.cut_points}; {AGAIN}"
            )
        read_on_device = [self.draft.model, self.tokenizer.path]
        front_model = None if self.front is None else self.front.model
        named = (self.tokenizer.chat_template, front_model, self.draft.vocab)
        read_on_device += [name for name in named if name is not None]
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
    "FrontInfo",
    "TargetInfo",
    "TokenizerInfo",
    "is_bundle",
]
