"""replay.py with what it flies compiled by mypyc: the same sources and the same numbers, in about half the time.

Compiled into build/replay once for each state of the sources (half a minute); needs a C compiler. Options as replay.py.
    python benchmarks/replay_compiled.py --traces TRACES
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import EXTENSION_SUFFIXES, ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SDK = ("cost", "errors", "tokens", "types")
EDGE = ("controller", "estimates", "link_config", "patience", "pilot", "plan", "retry")
VIRTUAL = ("virtual", "virtual_cloud", "virtual_device", "virtual_link", "virtual_text")
SOURCES = {  # by the place that a module's name asks for
    **{f"edgecloud/{name}.py": ROOT / "sdk" / f"{name}.py" for name in SDK},
    **{f"edgecloud/edge/{name}.py": ROOT / "edge" / f"{name}.py" for name in EDGE},
    **{f"{name}.py": ROOT / "benchmarks" / f"{name}.py" for name in VIRTUAL},
}


class Compiled(MetaPathFinder):
    """Finds the compiled modules, before anybody else finds their sources."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        file = self._folder / (name.replace(".", "/") + EXTENSION_SUFFIXES[0])
        return spec_from_file_location(name, file) if file.exists() else None


def compiled() -> Path:
    """The folder of the compiled modules; made if the sources have changed."""
    digest = hashlib.sha256(sys.version.encode())
    for source in SOURCES.values():
        digest.update(source.read_bytes())
    folder = ROOT / "build" / "replay" / digest.hexdigest()[:16]
    if folder.exists():
        return folder
    print(f"compiling into {folder} ...", file=sys.stderr)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent) as scratch:
        for place, source in SOURCES.items():
            copy = Path(scratch) / place
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, copy)
        for package in ("edgecloud", "edgecloud/edge"):
            (Path(scratch) / package / "__init__.py").touch()
        made = subprocess.run(
            [sys.executable, "-m", "mypyc", *SOURCES],
            check=False,
            cwd=scratch,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        if made.returncode:
            raise SystemExit(f"error: mypyc failed; is there a C compiler? replay.py needs none.\n{made.stdout[-2000:]}")
        shutil.rmtree(Path(scratch) / "build")
        Path(scratch).rename(folder)
        Path(scratch).mkdir()  # for the context manager to remove
    return folder


def main() -> None:
    sys.meta_path.insert(0, Compiled(compiled()))
    import replay

    replay.main()


if __name__ == "__main__":
    main()
