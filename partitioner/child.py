"""Run a Python module in a process of its own: its memory, its output and its crash stay there.

The child watches a pipe from its parent and ends when the parent does, even if that was killed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence

WATCHDOG = """
import os, runpy, sys, threading
pipe = os.dup(0)
threading.Thread(target=lambda: (os.read(pipe, 1), os._exit(1)), daemon=True).start()
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TQDM_DISABLE": "1"}


class ChildError(Exception):
    """The process failed; `last_lines` of its output say why."""

    def __init__(self, module: str, exit_code: int, output: str) -> None:
        lines = [line.strip() for line in output.splitlines() if line.strip()]
        self.last_lines = lines[-3:]
        self.out_of_space = any(words in output for words in ("No space left on device", "File too large", "Disk quota exceeded"))
        super().__init__(f"{module} ended with exit code {exit_code}: {' | '.join(self.last_lines) or 'no output'}")


def run_module(module: str, arguments: Sequence[str]) -> str:
    """`python -m module arguments`, offline.  -> its standard output

    Raises:
        ChildError: it ended with another exit code than 0.
    """
    command = [sys.executable, "-c", WATCHDOG, module, *arguments]
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as remarks:
        child = subprocess.Popen(  # our own interpreter
            command, stdin=subprocess.PIPE, stdout=output, stderr=remarks, env={**os.environ, **OFFLINE}
        )
        try:
            exit_code = child.wait()
        finally:
            child.kill()
            child.wait()
            if child.stdin is not None:
                child.stdin.close()
        output.seek(0)
        remarks.seek(0)
        said = output.read().decode("utf-8", "replace")
        if exit_code != 0:
            raise ChildError(module, exit_code, f"{said}\n{remarks.read().decode('utf-8', 'replace')}")
        return said
