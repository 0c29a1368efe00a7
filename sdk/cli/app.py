"""The application: registers the subcommands and turns every error into one line `error: ...`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import typer

from edgecloud.errors import ConfigError, EdgecloudError

COMMANDS = (
    "fetch", "distill", "partition", "partition_graph", "exits", "inspect", "verify", "calibrate", "serve", "health", "token",
    "generate", "run", "link", "profile", "bench", "demo",
)  # fmt: skip

app = typer.Typer(
    name="edgecloud",
    help="One token sequence, two machines: a small model on the device drafts, a large model in the cloud verifies.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def run(arguments: Sequence[str]) -> int:
    """Run one command line. Returns the exit code and never lets a traceback of a foreseen error through."""
    from edgecloud.cli.exits import is_for_exits
    from edgecloud.cli.partition_graph import is_for_graph

    words = list(arguments)
    if is_for_graph(words):
        words[0] = "partition-graph"
    elif is_for_exits(words):
        words[0] = "exits"
    try:
        code = app(args=words, standalone_mode=False)
    except EdgecloudError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2 if isinstance(error, ConfigError) else 1
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except BrokenPipeError:  # the reader of our output has gone: not a failure worth a traceback
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    except Exception as error:
        if not hasattr(error, "format_message"):  # typer's usage errors have it
            raise
        message = error.format_message()
        if message:
            sys.stderr.write(f"error: {message}\n")
        return int(getattr(error, "exit_code", 2))
    return int(code or 0)


def _register() -> None:
    import importlib

    for command in COMMANDS:
        importlib.import_module(f"edgecloud.cli.{command}")


_register()
