"""Prompts to measure with: a dozen built in, or those of a file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgecloud.errors import ConfigError

PROMPTS = (
    "Why is the sky blue?",
    "Write a short poem about the sea.",
    "Explain what a hash table is to a ten-year-old.",
    "List three healthy breakfasts.",
    "Translate to French: Where is the train station?",
    "A train travels 120 km in two hours. What is its average speed?",
    "Write a Python function that reverses a string.",
    "Summarise the story of Romeo and Juliet in two sentences.",
    "What should I pack for a week of hiking in the mountains?",
    "Who was Ada Lovelace?",
    "Write an e-mail that asks a colleague to move a meeting to Friday.",
    "What is the difference between weather and climate?",
)

KEYS = ("turns", "question", "prompt")  # of a line of JSON, the first that is there; of `turns`, its first


def read_prompts(file: Path, option: str = "--prompts") -> list[str]:
    """A prompt a line; of a .jsonl, the first of the keys `turns`, `question`, `prompt` in the object on each line.

    `option` is what the user gave the file by.

    Raises:
        ConfigError: the file cannot be read or holds no prompt, or a line is something else; names the line.
    """
    try:
        lines = file.read_text("utf-8").splitlines()
    except OSError as error:
        raise ConfigError(f"{option} {file} cannot be read: {error.strerror}; give a file with a prompt a line") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{option} {file} is no UTF-8 text; give a file with a prompt a line, or a .jsonl") from error
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise ConfigError(f"{option} {file} is empty; give a file with a prompt a line")
    if file.suffix != ".jsonl":
        return [line.strip() for _, line in numbered]
    return [_prompt_of(line, f"{option} {file}, line {number}") for number, line in numbered]


def spread_evenly(prompts: Sequence[str], num_prompts: int) -> list[str]:
    """So many of them, taken at even distances, for files go by topic; all of them if there are no more, or for 0."""
    if not 0 < num_prompts < len(prompts):
        return list(prompts)
    return [prompts[at * len(prompts) // num_prompts] for at in range(num_prompts)]


def _prompt_of(line: str, where: str) -> str:
    try:
        content: Any = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{where} is no JSON ({error}); write an object a line, or name the file .txt") from error
    if not isinstance(content, dict) or not (found := [key for key in KEYS if key in content]):
        raise ConfigError(f"{where} is no object with a key of {', '.join(KEYS)}: {line.strip()[:60]!r}")
    value = content[found[0]]
    text = value[0] if isinstance(value, list) and value else value
    if not isinstance(text, str) or not text.strip():
        raise ConfigError(f"{where}: {found[0]} is {str(value)[:60]!r}; it takes text")
    return text
