"""Folders that appear whole or not at all.

The content is built in a hidden sibling that its maker holds locked; it gets its name by one rename. What a killed
process leaves behind is unlocked, so the next run can tell and removes it.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from edgecloud.partitioner.download import fsync_folder


@contextlib.contextmanager
def atomic_folder(destination: Path) -> Iterator[Path]:
    """A folder to fill; it replaces `destination` when the block ends, and vanishes if the block raises.

    An existing destination is moved aside, replaced and then removed; killed between the two renames, the next call
    for the same destination puts it back. Raises OSError.
    """
    parent = destination.parent
    parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(destination)
    partial = Path(tempfile.mkdtemp(prefix=_prefix(destination, "partial"), suffix=f"-{os.getpid()}", dir=parent))
    lock = os.open(partial, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        partial.chmod(0o755)
        yield partial
        _sync_tree(partial)
        aside = Path(tempfile.mkdtemp(prefix=_prefix(destination, "old"), dir=parent))
        if destination.exists():
            destination.rename(aside)  # rename replaces an empty folder
        partial.rename(destination)
        fsync_folder(parent)
        shutil.rmtree(aside, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        os.close(lock)


def remove_leftovers(destination: Path) -> None:
    """Remove what killed runs left beside `destination`; put back what was moved aside if nothing took its place."""
    for kept in destination.parent.glob(glob.escape(_prefix(destination, "old")) + "*"):
        if not destination.exists() and any(kept.iterdir()):
            kept.rename(destination)
        else:
            shutil.rmtree(kept, ignore_errors=True)
    for partial in destination.parent.glob(glob.escape(_prefix(destination, "partial")) + "*"):
        try:
            lock = os.open(partial, os.O_RDONLY)
        except OSError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(partial, ignore_errors=True)
        except OSError:  # someone is filling it
            continue
        finally:
            os.close(lock)


@contextlib.contextmanager
def exclusive(lock_file: Path) -> Iterator[None]:
    """Wait for, then hold, a lock that ends with the process, however it ends."""
    lock_file.parent.mkdir(parents=True, exist_ok=True)
    with lock_file.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def link_or_copy(source: Path, destination: Path) -> None:
    """A second name for the same bytes where the file system allows it, else a copy."""
    real = source.resolve()
    try:
        os.link(real, destination)
    except OSError:
        shutil.copyfile(real, destination)


def _prefix(destination: Path, kind: str) -> str:
    return f".{destination.name}.{kind}-"


def _sync_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    for path in [p for p in folder.rglob("*") if p.is_dir()]:
        fsync_folder(path)
    fsync_folder(folder)
