"""Processes of our own on this machine, each on its core: services and links for `demo`, `bench` and the benchmarks."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import IO, Any, cast

from edgecloud.errors import EdgecloudError, ServerError

START_TIMEOUT_S = 300.0  # until a service listens: it reads, checks and hashes its weights
STOP_TIMEOUT_S = 10.0

# A child ends with its parent, even if that was killed: then its standard input ends. -P: the folder we run in is no package.
COMMAND = """
import os, signal, threading
threading.Thread(target=lambda: (os.read(0, 1), os.kill(os.getpid(), signal.SIGTERM)), daemon=True).start()
from edgecloud.cli import main
main()
"""


def two_cpus() -> tuple[int, int] | None:
    """Cores for the service and the device, or None where this process may use only one."""
    cpus = sorted(os.sched_getaffinity(0))
    return (cpus[0], cpus[1]) if len(cpus) > 1 else None


@contextmanager
def pinned(cpu: int | None) -> Iterator[None]:
    """Keep this thread, and threads it starts, to one core. None: leave it be."""
    before = os.sched_getaffinity(0)
    if cpu is not None:
        os.sched_setaffinity(0, {cpu})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextmanager
def listening(arguments: Sequence[str], cpu: int | None = None) -> Iterator[dict[str, Any]]:
    """Run an `edgecloud` command that listens, on one core if asked.  -> what it says of itself; ended on leaving

    Raises:
        ServerError: it ended, or said nothing for START_TIMEOUT_S.
    """
    with tempfile.TemporaryFile() as remarks:
        child = _start(arguments, remarks)
        try:
            if cpu is not None:
                os.sched_setaffinity(child.pid, {cpu})
            stdout = cast("IO[bytes]", child.stdout)
            ready, _, _ = select.select([stdout], [], [], START_TIMEOUT_S)
            line = stdout.readline() if ready else b""
            if not line:
                child.kill()
                raise ServerError(f"`edgecloud {arguments[0]}` does not listen: {_last_line(remarks)}")
            yield json.loads(line)
        finally:
            _end(child)


def run_command(arguments: Sequence[str]) -> dict[str, Any]:
    """An `edgecloud` command to its end; its progress stays on stderr.  -> its JSON. Raises EdgecloudError."""
    child = _start(arguments, None)
    try:
        output = cast("IO[bytes]", child.stdout).read()
        if child.wait() != 0:
            raise EdgecloudError(f"`edgecloud {' '.join(arguments[:2])}` failed with exit code {child.returncode}")
    finally:
        _end(child)
    content: dict[str, Any] = json.loads(output)
    return content


def _start(arguments: Sequence[str], stderr: IO[bytes] | None) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-P", "-c", COMMAND, *arguments, "--json"]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr)


def _end(child: subprocess.Popen[bytes]) -> None:
    try:
        child.terminate()
        child.wait(STOP_TIMEOUT_S)
    finally:
        child.kill()  # no effect on one that has ended
        child.wait()
        for pipe in (child.stdin, child.stdout):
            if pipe is not None:
                pipe.close()


def _last_line(remarks: IO[bytes]) -> str:
    remarks.seek(0)
    lines = [line.strip() for line in remarks.read().decode("utf-8", "replace").splitlines() if line.strip()]
    return lines[-1].removeprefix("error: ") if lines else "it says nothing"
