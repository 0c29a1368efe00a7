"""`--config FILE` for any command: its options as YAML, under the names they have on the command line, which beats the file."""

from __future__ import annotations

import difflib
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from edgecloud.errors import ConfigError

NOT_CONFIGURED = {"config", "print_config", "json", "help"}  # about this one run


def _load(context: typer.Context, file: Path | None) -> Path | None:
    if file is not None:
        context.default_map = read_config(file, option_names(context))
    return file


ConfigFlag = Annotated[
    Path | None,
    typer.Option("--config", is_eager=True, callback=_load, help="YAML file of these options, as in `cache-mb: 2048`."),
]
PrintConfigFlag = Annotated[bool, typer.Option("--print-config", help="Print what file and command line come to, and end.")]


def option_names(context: typer.Context) -> dict[str, str]:
    """What may stand in a file, and the parameter that it sets: cache-mb -> cache_mb."""
    names = (parameter.name for parameter in context.command.params)
    return {name.replace("_", "-"): name for name in names if name is not None and name not in NOT_CONFIGURED}


def read_config(file: Path, known: dict[str, str]) -> dict[str, str]:
    """Parameters and their values as they would be typed. An empty value leaves the default.

    Raises:
        ConfigError: unreadable, not YAML, or a key that no option has; names it and the nearest.
    """
    try:
        content: Any = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--config {file} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {file} is no YAML: {' '.join(str(error).split())}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"--config {file} holds no options; write lines as in `cache-mb: 2048`")
    values: dict[str, str] = {}
    for key, value in content.items():
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1, 0.0)[0]
            raise ConfigError(f"--config {file} has an unknown key {key!r}; did you mean {near!r}?")
        if isinstance(value, dict | list):
            raise ConfigError(f"--config {file}: {key} is a {type(value).__name__}; it takes one value")
        if value is not None:
            values[known[key]] = str(value)
    return values


def write_config(context: typer.Context) -> None:
    """Print the options as they are in force, as a file that `--config` takes."""
    values = {key: context.params[name] for key, name in option_names(context).items()}
    plain = {key: str(value) if isinstance(value, Path) else value for key, value in values.items()}
    yaml.safe_dump(plain, sys.stdout, sort_keys=False, allow_unicode=True)
