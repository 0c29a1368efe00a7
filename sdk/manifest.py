"""bundle.json, whatever a bundle holds: read as JSON, turned into checked dataclasses, its files compared with their hashes.

Two kinds of bundles share it, a model pair for text (bundle.py) and a cut ONNX graph (graph_bundle.py).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path, PurePosixPath
from typing import Any, Literal, TypeVar

from edgecloud.errors import BundleCorruptError, BundleKindError, BundleNotFoundError, BundleVersionError
from edgecloud.fingerprint import sha256_file

SCHEMA_VERSION = 3  # 2: front; 3: the draft's vocab; what they say without these is read as before
MANIFEST = "bundle.json"
AGAIN = "copy or make the bundle again"

Kind = Literal["text", "graph"]
T = TypeVar("T")

_OPENED_BY = {
    "text": "a model pair for text; it goes to Client.generate, or Bundle.open",
    "graph": "a cut ONNX graph; it goes to Client.run, or GraphBundle.open",
}


@dataclass(frozen=True, slots=True)
class FileInfo:
    """What a file must be."""

    sha256: str
    num_bytes: int


def is_bundle(path: str | Path) -> bool:
    """Whether a folder claims to be a bundle, of any kind."""
    return (Path(path) / MANIFEST).is_file()


def bundle_kind(path: str | Path) -> Kind:
    """What a bundle holds; a manifest that does not say holds a pair for text. Raises what `Bundle.open` raises for its JSON."""
    return _kind(Path(path) / MANIFEST, _read(Path(path)))


def read_manifest(folder: Path, expected: Kind) -> dict[str, Any]:
    """The fields of a bundle of this kind, `files` already as FileInfo; schema_version and kind are checked and taken out.

    Raises:
        BundleNotFoundError: no such folder, or it has no bundle.json.
        BundleVersionError: written by a newer edgecloud.
        BundleKindError: it is a bundle of the other kind.
        BundleCorruptError: not JSON, or no object.
    """
    content, manifest = _read(folder), folder / MANIFEST
    kind = _kind(manifest, content)
    content.pop("kind", None)
    if kind != expected:
        raise BundleKindError(f"{folder} is {_OPENED_BY[kind]}")
    if "path" in content:  # a field of ours that is no part of the manifest
        raise BundleCorruptError(f"{manifest}: unknown field 'path'; upgrade edgecloud")
    if isinstance(files := content.get("files"), dict):
        content["files"] = {name: build(FileInfo, entry, f"files.{name}", manifest) for name, entry in files.items()}
    return content


def _read(folder: Path) -> dict[str, Any]:
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
    return content


def _kind(manifest: Path, content: dict[str, Any]) -> Kind:
    kind = content.get("kind", "text")
    if kind == "text":
        return "text"
    if kind == "graph":
        return "graph"
    raise BundleCorruptError(f"{manifest}: kind is {kind!r}, known are text and graph; upgrade edgecloud")


def verify_files(folder: Path, files: dict[str, FileInfo], part: Literal["edge", "cloud"]) -> None:
    """Check size and SHA-256 of every file below edge/ or cloud/.

    Raises:
        BundleCorruptError: names the first file that is missing, truncated or changed.
    """
    for name in names_below(files, part):
        verify_file(folder / name, files[name])


def names_below(files: dict[str, FileInfo], part: Literal["edge", "cloud"]) -> list[str]:
    """The listed files of one side."""
    return [name for name in files if PurePosixPath(name).parts[0] == part]


def verify_file(path: Path, expected: FileInfo) -> None:
    """Check size and SHA-256 of one file. Raises BundleCorruptError as `verify_files` does."""
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


def check_inside(folder: Path, names: list[str]) -> None:
    """Raises BundleCorruptError for the first path that leaves the bundle."""
    for name in names:
        if not _stays_inside(folder, name):
            raise BundleCorruptError(f"{folder / MANIFEST} names {name!r}, which lies outside the bundle; do not use it")


def check_listed(folder: Path, names: list[str], files: dict[str, FileInfo]) -> None:
    """Raises BundleCorruptError for the first path without an entry in `files`: nothing would check it."""
    for name in names:
        if name not in files:
            raise BundleCorruptError(f"{folder / MANIFEST} names {name!r} but lists no such file; make the bundle again")


def check_below(folder: Path, names: list[str], part: Literal["edge", "cloud"]) -> None:
    """Raises BundleCorruptError for the first path of another part: verify_files would leave unchecked what that side reads."""
    for name in names:
        if PurePosixPath(name).parts[0] != part:
            raise BundleCorruptError(f"{folder / MANIFEST} names {name!r}, which must lie below {part}/; make the bundle again")


def _stays_inside(folder: Path, name: str) -> bool:
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or "\\" in name or "\0" in name or not pure.parts:
        return False
    try:
        return (folder / name).resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError):  # a link that goes in a circle leads nowhere
        return False


# What JSON may hold for a field of this annotation: the value's types, and those of what it holds.
_JSON_TYPES: dict[str, tuple[tuple[type, ...], tuple[type, ...]]] = {
    "str": ((str,), (object,)),
    "str | None": ((str, type(None)), (object,)),
    "int": ((int,), (object,)),
    "int | None": ((int, type(None)), (object,)),
    "float": ((int, float), (object,)),
    "float | None": ((int, float, type(None)), (object,)),
    "list[int]": ((list,), (int,)),
    "list[str]": ((list,), (str,)),
    "list[int | str | None]": ((list,), (int, str, type(None))),
    "dict[str, str]": ((dict,), (str,)),
    "dict[str, Any]": ((dict,), (object,)),
    "dict[str, Any] | None": ((dict, type(None)), (object,)),
    "dict[str, FileInfo]": ((dict,), (FileInfo,)),
}


def _fits(value: Any, annotation: str) -> bool:
    if annotation not in _JSON_TYPES:  # built before: target, draft, tokenizer, ...
        return True
    kinds, inner = _JSON_TYPES[annotation]
    if not isinstance(value, kinds) or isinstance(value, bool):
        return False
    held = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return inner == (object,) or all(isinstance(item, inner) and not isinstance(item, bool) for item in held)


def build(kind: type[T], entry: Any, name: str, manifest: Path) -> T:
    """A dataclass from a JSON object; BundleCorruptError for unknown, missing and wrongly typed fields."""
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


def build_list(kind: type[T], entries: Any, name: str, manifest: Path) -> list[T]:
    """A list of such dataclasses."""
    if not isinstance(entries, list):
        raise BundleCorruptError(f"{manifest}: {name} is {type(entries).__name__}, not a list; make the bundle again")
    return [build(kind, entry, f"{name}[{index}]", manifest) for index, entry in enumerate(entries)]
