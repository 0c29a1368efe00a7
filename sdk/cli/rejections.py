"""`edgecloud rejections`: what a device has kept to learn from, and how to get rid of it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from edgecloud.cli.app import app
from edgecloud.cli.output import JsonFlag, print_json
from edgecloud.rejections import RejectionLog


@app.command()
def rejections(
    folder: Annotated[Path, typer.Argument(help="Folder that `generate --log-rejections` names.", show_default=False)],
    clear: Annotated[bool, typer.Option("--clear", help="Delete all of it.")] = False,
    json: JsonFlag = False,
) -> None:
    """Count what is in a log of rejected guesses, or delete it."""
    log = RejectionLog(folder)
    if clear:
        num_deleted = log.clear()
        _say(json, {"num_segments_deleted": num_deleted}, f"{num_deleted} segments deleted")
        return
    segments = log.read()
    passages = [passage for segment in segments for passage in segment.passages]
    days = [segment.day for segment in segments]
    found = {
        "num_segments": len(segments),
        "num_passages": len(passages),
        "num_rejected": sum(len(passage.rejected) for passage in passages),
        "num_bytes": log.num_bytes(),
        "days": sorted({*days}),
    }
    span = f", {min(days)} to {max(days)}" if days else ""
    words = f"{found['num_rejected']} rejected guesses in {found['num_passages']} passages, {found['num_bytes']} bytes{span}"
    _say(json, found, words)


def _say(json: bool, found: dict[str, object], words: str) -> None:
    if json:
        print_json(found)
    else:
        sys.stdout.write(f"{words}\n")
