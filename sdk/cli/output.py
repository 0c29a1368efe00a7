"""Where a command's words go: the answer to stdout, everything else to stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer
from rich.console import Console

JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout; progress stays on stderr.")]


TABLE_WIDTH = 100  # where there is no terminal


def progress_console() -> Console:
    """For progress and remarks; stdout stays clean."""
    return Console(stderr=True)


def remarks(console: Console) -> Callable[[str], None]:
    """-> what prints a dim line"""

    def remark(text: str) -> None:
        console.print(text, style="dim", highlight=False, soft_wrap=True)

    return remark


def table_console() -> Console:
    """For tables a person reads on stdout."""
    console = Console()
    return console if console.is_terminal else Console(width=TABLE_WIDTH)


def print_json(content: dict[str, Any]) -> None:
    """One object, one line."""
    sys.stdout.write(json.dumps(content, ensure_ascii=False) + "\n")
    sys.stdout.flush()
