"""`edgecloud rejections`: what a device has kept to learn from, how `distill` reads it, and how to get rid of it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from edgecloud.answers import Answer, AnswerFile
from edgecloud.cli.app import app
from edgecloud.cli.output import JsonFlag, print_json
from edgecloud.errors import ConfigError
from edgecloud.rejections import RejectionLog, Segment


@app.command()
def rejections(
    folder: Annotated[Path, typer.Argument(help="Folder that `generate --log-rejections` names.", show_default=False)],
    clear: Annotated[bool, typer.Option("--clear", help="Delete all of it.")] = False,
    answers: Annotated[
        Path | None, typer.Option(help="Add what the target said to this file (.jsonl), for `distill --answers`.")
    ] = None,
    json: JsonFlag = False,
) -> None:
    """Count what is in a log of rejected guesses, hand it on, or delete it."""
    log = RejectionLog(folder)
    if clear and answers is not None:
        raise ConfigError("--clear and --answers exclude each other; write the answers first, then clear")
    if clear:
        num_deleted = log.clear()
        _say(json, {"num_segments_deleted": num_deleted}, f"{num_deleted} segments deleted")
        return
    segments = log.read()
    if answers is not None:
        num_added = _hand_on(segments, AnswerFile(answers))
        _say(json, {"num_answers_added": num_added, "answers": str(answers)}, f"{num_added} answers added to {answers}")
        return
    found = _count(segments, log.num_bytes())
    words = f"{found['num_rejected']} rejected guesses in {found['num_passages']} passages, {found['num_bytes']} bytes"
    _say(json, found, words)


def _count(segments: list[Segment], num_bytes: int) -> dict[str, object]:
    passages = [passage for segment in segments for passage in segment.passages]
    return {
        "num_segments": len(segments),
        "num_passages": len(passages),
        "num_rejected": sum(len(passage.rejected) for passage in passages),
        "num_bytes": num_bytes,
        "days": sorted({segment.day for segment in segments}),
    }


def _hand_on(segments: list[Segment], file: AnswerFile) -> int:
    """Passages whose names the file does not have yet.  -> how many"""
    there = {answer.key for answer in file}
    added = 0
    with file.append_to() as appender:
        for segment in segments:
            for number, passage in enumerate(segment.passages):
                key = f"{segment.source.draft[:8]}/{segment.path.stem}/{number}"
                ids, start = list(passage.ids), passage.answer_start
                if key not in there:
                    appender.add(Answer(key, ids[:start], ids[start:], passage.temperature))
                    added += 1
    return added


def _say(json: bool, found: dict[str, object], words: str) -> None:
    if json:
        print_json(found)
    else:
        sys.stdout.write(f"{words}\n")
