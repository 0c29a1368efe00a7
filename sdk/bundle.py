"""A bundle: the folder that `edgecloud partition` writes, and what device and cloud may believe of it.

    bundle.json   schema version, pair id, fingerprints, SHA-256 of every file
    edge/draft/   model.onnx, model.onnx.data, tokenizer.json, chat_template.jinja
    edge/front/   model.onnx, model.onnx.data: the target's first layers, for mode `split`
    cloud/        the target as a Hugging Face folder

The device needs bundle.json and edge/ only. Nothing in a bundle is executed and no path leaves it.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path, PurePosixPath
from typing import Any, Literal, TypeVar

from edgecloud.errors import BundleCorruptError, BundleError, BundleNotFoundError, BundleVersionError
from edgecloud.fingerprint import sha256_file

SCHEMA_VERSION = 2  # 2: front; what 1 says is read as before
MANIFEST = "bundle.json"
AGAIN = "copy or make the bundle again"

T = TypeVar("T")


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
class FileInfo:
    """What a file must be."""

    sha256: str
    num_bytes: int


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
            BundleCorruptError: not JSON, a field is missing, unknown or of another type, or a path leaves the bundle.
        """
        folder = Path(path)
        manifest = folder / MANIFEST
        try:
            content = json.loads(manifest.read_text("utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            message = f"{folder} is no bundle: it has no {MANIFEST}; make one with `edgecloud partition`"
            raise BundleNotFoundError(message) from None
        except (OSError, ValueError, RecursionError) as error:
            raise BundleCorruptError(f"{manifest} cannot be read as JSON: {error}; make the bundle again") from error
        if not isinstance(content, dict):
            kind = type(content).__name__
            raise BundleCorruptError(f"{manifest} holds a {kind}, not an object; make the bundle again")
        version = content.pop("schema_version", None)
        if type(version) is not int or version < 1:
            raise BundleCorruptError(f"{manifest}: schema_version is {version!r}; make the bundle again")
        if version > SCHEMA_VERSION:
            raise BundleVersionError(
                f"{manifest} has schema version {version}, this edgecloud reads up to {SCHEMA_VERSION}; upgrade edgecloud"
            )
        if "path" in content:  # a field of ours that is no part of the manifest
            raise BundleCorruptError(f"{manifest}: unknown field 'path'; upgrade edgecloud")
        if isinstance(files := content.get("files"), dict):
            content["files"] = {name: _build(FileInfo, entry, f"files.{name}", manifest) for name, entry in files.items()}
        for key, part in (("target", TargetInfo), ("draft", DraftInfo), ("tokenizer", TokenizerInfo)):
            content[key] = _build(part, content.get(key), key, manifest)
        if content.get("front") is not None:
            content["front"] = _build(FrontInfo, content["front"], "front", manifest)
        bundle = _build(cls, {**content, "path": folder}, "", manifest)
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
        for name in self.names_below(part):
            self.verify_file(name)

    def names_below(self, part: Literal["edge", "cloud"]) -> list[str]:
        """The listed files of one side."""
        return [name for name in self.files if PurePosixPath(name).parts[0] == part]

    def verify_file(self, name: str) -> None:
        """Check size and SHA-256 of one listed file. Raises BundleCorruptError as `verify_files` does."""
        path, expected = self.path / name, self.files[name]
        try:
            if not path.is_file():  # a pipe would be waited for
                path.stat()
                raise BundleCorruptError(f"{path} is no regular file; {AGAIN}")
            found_bytes = path.stat().st_size
            if found_bytes != expected.num_bytes:
                raise BundleCorruptError(f"{path} has {found_bytes} bytes, {MANIFEST} says {expected.num_bytes}; {AGAIN}")
            found = sha256_file(path)
        except OSError as error:
            raise BundleCorruptError(f"{path} cannot be read: {error.strerror}; {AGAIN}") from error
        if found != expected.sha256:
            raise BundleCorruptError(f"{path} has SHA-256 {found[:16]}..., {MANIFEST} says {expected.sha256[:16]}...; {AGAIN}")

    def to_json(self) -> str:
        """The text of bundle.json."""
        content = asdict(self)
        del content["path"]
        return json.dumps({"schema_version": SCHEMA_VERSION, **content}, indent=2) + "\n"

    def _check_paths(self) -> None:
        manifest = self.path / MANIFEST
        folders = [] if self.target.folder is None else [self.target.folder]
        for name in [*self.files, *folders]:
            if not _stays_inside(self.path, name):
                raise BundleCorruptError(f"{manifest} names {name!r}, which lies outside the bundle; do not use it")
        if self.front is not None and self.front.cut not in self.cut_points:
            raise BundleCorruptError(f"{manifest}: the front is cut at {self.front.cut}, cut_points are {self.cut_points}; {AGAIN}")
        front_model = None if self.front is None else self.front.model
        read_on_device = [self.draft.model, self.tokenizer.path]
        read_on_device += [name for name in (self.tokenizer.chat_template, front_model) if name is not None]
        for name in read_on_device:
            if name not in self.files:
                raise BundleCorruptError(f"{manifest} names {name!r} but lists no such file; make the bundle again")
        # Else verify_files would leave unchecked what that side reads.
        for names, part in ((read_on_device, "edge"), (folders, "cloud")):
            for name in names:
                if PurePosixPath(name).parts[0] != part:
                    raise BundleCorruptError(f"{manifest} names {name!r}, which must lie below {part}/; make the bundle again")


def is_bundle(path: str | Path) -> bool:
    """Whether a folder claims to be a bundle."""
    return (Path(path) / MANIFEST).is_file()


def _stays_inside(folder: Path, name: str) -> bool:
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or "\\" in name or "\0" in name or not pure.parts:
        return False
    try:
        return (folder / name).resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError):  # a link that goes in a circle leads nowhere
        return False


# What JSON may hold for a field of this annotation: the value's type, and that of what it holds.
_JSON_TYPES: dict[str, tuple[tuple[type, ...], type]] = {
    "str": ((str,), object),
    "str | None": ((str, type(None)), object),
    "int": ((int,), object),
    "list[int]": ((list,), int),
    "dict[str, str]": ((dict,), str),
    "dict[str, Any]": ((dict,), object),
    "dict[str, Any] | None": ((dict, type(None)), object),
    "dict[str, FileInfo]": ((dict,), FileInfo),
}


def _fits(value: Any, annotation: str) -> bool:
    if annotation not in _JSON_TYPES:  # built before: target, draft, tokenizer, front
        return True
    kinds, inner = _JSON_TYPES[annotation]
    if not isinstance(value, kinds) or isinstance(value, bool):
        return False
    held = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return inner is object or all(isinstance(item, inner) and not isinstance(item, bool) for item in held)


def _build(kind: type[T], entry: Any, name: str, manifest: Path) -> T:
    """A dataclass from a JSON object; unknown, missing and wrongly typed fields are errors."""
    if not isinstance(entry, dict):
        raise BundleCorruptError(f"{manifest}: {name} is {type(entry).__name__}, not an object; make the bundle again")
    known = {f.name: str(f.type) for f in fields(kind)}  # type: ignore[arg-type]  # T is always a dataclass here
    prefix = f"{name}." if name else ""
    if unknown := sorted(set(entry) - set(known)):
        raise BundleCorruptError(f"{manifest}: unknown field {prefix + unknown[0]!r}; upgrade edgecloud")
    for key, value in entry.items():
        if not _fits(value, known[key]):
            raise BundleCorruptError(f"{manifest}: {prefix}{key} is {value!r}, expected {known[key]}; make the bundle again")
    try:
        return kind(**entry)
    except (TypeError, ValueError) as error:
        raise BundleCorruptError(f"{manifest}: {name or 'the manifest'}: {error}; make the bundle again") from error


__all__ = ["Bundle", "BundleError", "DraftInfo", "FileInfo", "FrontInfo", "TargetInfo", "TokenizerInfo", "is_bundle"]
