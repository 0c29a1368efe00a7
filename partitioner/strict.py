"""A dataclass out of a file that a person wrote: every key known, every value of its kind, and a message that names what is not."""

from __future__ import annotations

import types
from dataclasses import MISSING, fields
from difflib import get_close_matches
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

T = TypeVar("T")


def from_mapping(kind: type[T], content: Any, where: str = "") -> T:
    """A dataclass from a mapping, its fields by their annotations. Raises ValueError that names the key."""
    if not isinstance(content, dict):
        raise ValueError(  # noqa: TRY004  # one error for all that a file can get wrong
            f"{where or 'the file'} holds a {type(content).__name__}; it takes keys and values"
        )
    hints = get_type_hints(kind)
    prefix = f"{where}." if where else ""
    for key in content:
        if key not in hints:
            near = get_close_matches(str(key), hints, 1, 0.0)[0]
            raise ValueError(f"unknown key {prefix}{key}; did you mean {near}?")
    for field in fields(kind):  # type: ignore[arg-type]  # always a dataclass here
        if field.name not in content and field.default is MISSING:
            raise ValueError(f"{prefix}{field.name} is missing")
    return kind(**{key: _value(hints[key], value, prefix + key) for key, value in content.items()})


def _value(kind: Any, value: Any, where: str) -> Any:
    origin = get_origin(kind)
    if isinstance(kind, types.UnionType):
        return None if value is None else _value(get_args(kind)[0], value, where)
    if origin is tuple:
        if not isinstance(value, list):
            raise ValueError(f"{where} is {value!r}; it takes a list")
        return tuple(_value(get_args(kind)[0], item, f"{where}[{at}]") for at, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise ValueError(f"{where} is {value!r}; it takes keys and values")
        return {str(key): _value(get_args(kind)[1], item, f"{where}.{key}") for key, item in value.items()}
    if kind is float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < float("inf"):
            raise ValueError(f"{where} is {value!r}; it takes a number")
        return float(value)
    if kind in (int, str):
        if isinstance(value, bool) or not isinstance(value, kind):
            raise ValueError(f"{where} is {value!r}; it takes {'a whole number' if kind is int else 'text'}")
        return value
    return from_mapping(kind, value, where)
