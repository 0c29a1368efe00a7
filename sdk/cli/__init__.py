"""The `edgecloud` command: one file a subcommand, one place where errors become exit codes."""

from __future__ import annotations

import sys


def main() -> None:
    """Entry point of the console script. Exit 0 on success, 1 on failure, 2 on bad usage, 130 on Ctrl-C."""
    try:
        from edgecloud.cli.app import run
    except ModuleNotFoundError as error:
        if error.name not in {"typer", "rich"}:
            raise
        sys.stderr.write("error: the command line needs typer and rich; install edgecloud[cli]\n")
        raise SystemExit(1) from None
    raise SystemExit(run(sys.argv[1:]))
