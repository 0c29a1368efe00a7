"""How far a long measurement is: a bar for a person, a line now and then for a log. On stderr."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

REMARK_EVERY = 14  # generations or prompts, where there is no terminal


@contextmanager
def generations(
    console: Console, remark: Callable[[str], None], things: str = "generations"
) -> Iterator[Callable[[int, int], None]]:
    """-> what to tell how many of how many of these things are done"""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(things, total=None, visible=False)

        def progress(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total, visible=True)
            if not console.is_terminal and done % REMARK_EVERY == 0:
                remark(f"{done} of {total} {things}")

        yield progress
