"""Where a command's words go: the answer to stdout, everything else to stderr."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer
from rich.console import Console

JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout; progress stays on stderr.")]


def progress_console() -> Console:
    """For progress and remarks; stdout stays clean."""
    return Console(stderr=True)


def table_console() -> Console:
    """For tables a person reads on stdout."""
    return Console()


def print_json(content: dict[str, Any]) -> None:
    """One object, one line."""
    sys.stdout.write(json.dumps(content, ensure_ascii=False) + "\n")
    sys.stdout.flush()
