"""Steps of a partition by what went into them: what was exported once is not exported again, also after a killed run.

A step is a folder in the cache, named by the hash of everything that decides its content. It appears whole or not at all; its files
are compared with their checksums before they are taken.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from edgecloud.fingerprint import sha256_file
from edgecloud.partitioner.atomic import atomic_folder, exclusive, link_or_copy
from edgecloud.partitioner.fetch import cache_folder

MANIFEST = "step.json"
MAX_STEPS = 12  # kept, the latest used; an export of a small model is about 100 MB


def usable_cache(remark: Callable[[str], None]) -> Path | None:
    """The cache folder; None, said aloud, where it cannot be written to."""
    cache = cache_folder()
    existing = next(folder for folder in (cache, *cache.absolute().parents) if folder.exists())
    if existing.is_dir() and os.access(existing, os.W_OK):
        return cache
    remark(f"the cache {cache} cannot be written to, so nothing is kept for another run; set EDGECLOUD_HOME to a folder of yours")
    return None


def step_key(parts: Mapping[str, object]) -> str:
    """The name of a step: a hash over what decides its content."""
    return hashlib.sha256(json.dumps(dict(parts), sort_keys=True).encode()).hexdigest()[:32]


def cached_step(
    cache: Path | None, parts: Mapping[str, object], destination: Path, make: Callable[[Path], object], *, linked: bool = True
) -> bool:
    """Fill `destination`, a folder that is not there yet, from the cache, or by `make`, and keep it.  -> whether it was there

    Files are second names of those in the cache, unless `linked` is False: onnx loads no weights from a file with two names.
    Runs at the same time wait for one another. Without a cache `make` fills `destination` itself. Raises OSError, and what
    `make` raises.
    """
    if cache is None:
        make(destination)
        return False
    folder = cache / "steps" / step_key(parts)
    with exclusive(cache / "locks" / f"{folder.name}.lock"):
        found = _whole(folder)
        if not found:
            with atomic_folder(folder) as partial:
                make(partial / "content")
                _write_manifest(partial, parts)
        os.utime(folder)
        _fill(folder / "content", destination, link_or_copy if linked else shutil.copyfile)
    _forget_old(folder.parent, keep=folder)
    return found


def _write_manifest(folder: Path, parts: Mapping[str, object]) -> None:
    content = folder / "content"
    files = {path.relative_to(content).as_posix(): sha256_file(path) for path in sorted(content.rglob("*")) if path.is_file()}
    (folder / MANIFEST).write_text(json.dumps({"made_of": dict(parts), "files": files}, indent=1) + "\n", "utf-8")


def _whole(folder: Path) -> bool:
    try:
        files = json.loads((folder / MANIFEST).read_text("utf-8"))["files"]
        return all(sha256_file(folder / "content" / name) == expected for name, expected in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _fill(source: Path, destination: Path, put: Callable[[Path, Path], object]) -> None:
    for path in sorted(source.rglob("*")):
        to = destination / path.relative_to(source)
        if path.is_dir():
            to.mkdir(parents=True, exist_ok=True)
        else:
            to.parent.mkdir(parents=True, exist_ok=True)
            put(path, to)


def _forget_old(steps: Path, keep: Path) -> None:
    kept = sorted((path for path in steps.iterdir() if not path.name.startswith(".")), key=_last_use, reverse=True)
    for path in kept[MAX_STEPS:]:
        if path != keep:
            shutil.rmtree(path, ignore_errors=True)


def _last_use(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:  # another run has removed it
        return 0.0
