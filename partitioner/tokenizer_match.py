"""Do draft and target speak the same tokens? And what else the device has to know of the tokenizer."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from edgecloud.errors import ModelError, TokenizerMismatchError
from edgecloud.fingerprint import read_json
from edgecloud.partitioner.model_folder import ModelFolder

SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def require_same_tokenizer(draft: ModelFolder, target: ModelFolder) -> int:
    """Compare id by id, then everything else that decides how text is split.  -> number of tokens

    Models whose embedding is padded beyond the tokenizer, each to another size, are fine.

    Raises:
        TokenizerMismatchError: names the first difference.
        ModelError: a tokenizer.json is missing or broken, or has ids beyond its model's embedding.
    """
    theirs, ours = _load(draft), _load(target)
    drafts, targets = _tokens(draft, theirs), _tokens(target, ours)
    if draft.path == target.path:
        return len(targets)
    for token_id in sorted(drafts.keys() | targets.keys()):
        if drafts.get(token_id) != targets.get(token_id):
            raise TokenizerMismatchError(
                f"the tokenizers differ first at id {token_id}: {_shown(drafts, token_id)} in the draft {draft.path}, "
                f"{_shown(targets, token_id)} in the target {target.path}; take a draft with the target's tokenizer"
            )
    difference = _first_difference(_content(theirs), _content(ours), "")
    if difference is not None:
        raise TokenizerMismatchError(
            f"the tokenizers share their vocabulary but differ at {difference} "
            f"(draft {draft.path}, target {target.path}); take a draft with the target's tokenizer"
        )
    return len(targets)


def special_tokens(folder: Path) -> dict[str, str]:
    """bos_token, eos_token, ...: the names that a chat template may use."""
    found: dict[str, str] = {}
    for file in (folder / "special_tokens_map.json", folder / "tokenizer_config.json"):
        content = read_json(file) if file.is_file() else {}
        for name in SPECIAL_NAMES:
            value = content.get(name)
            value = value.get("content") if isinstance(value, dict) else value
            if isinstance(value, str):
                found[name] = value
    return found


def eos_token_ids(model: ModelFolder) -> list[int]:
    """The ids that end a generation: generation_config.json, else config.json, else the tokenizer's eos_token."""
    generation = model.path / "generation_config.json"
    for content in (read_json(generation) if generation.is_file() else {}, model.config):
        value = content.get("eos_token_id")
        ids = value if isinstance(value, list) else [value]
        if ids and all(isinstance(token_id, int) and not isinstance(token_id, bool) for token_id in ids):
            return list(ids)
    token_id = _load(model).token_to_id(special_tokens(model.path).get("eos_token", ""))
    return [] if token_id is None else [token_id]


def chat_template(folder: Path) -> str | None:
    """The Jinja text, from chat_template.jinja or tokenizer_config.json; None if the model has none."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text("utf-8")
    config = folder / "tokenizer_config.json"
    value: Any = read_json(config).get("chat_template") if config.is_file() else None
    if isinstance(value, list):  # several by name
        named = {entry["name"]: entry["template"] for entry in value if isinstance(entry, dict) and "name" in entry}
        value = named.get("default")
    return value if isinstance(value, str) else None


def _load(model: ModelFolder) -> Tokenizer:
    file = model.path / "tokenizer.json"
    if not file.is_file():
        raise ModelError(f"{file} does not exist; save the fast tokenizer with save_pretrained")
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the Rust side raises bare Exception
        raise ModelError(f"{file} cannot be read as a tokenizer: {error}") from error


def _tokens(model: ModelFolder, tokenizer: Tokenizer) -> dict[int, str]:
    tokens = {token_id: token for token, token_id in tokenizer.get_vocab(with_added_tokens=True).items()}
    if tokens and max(tokens) >= model.vocab_size:
        beyond = max(tokens)
        raise ModelError(
            f"{model.path / 'tokenizer.json'} has id {beyond} ({tokens[beyond]!r}), "
            f"the model's vocab_size is {model.vocab_size}; resize the model's embeddings"
        )
    return tokens


def _shown(tokens: dict[int, str], token_id: int) -> str:
    return repr(tokens[token_id]) if token_id in tokens else "nothing"


def _content(tokenizer: Tokenizer) -> dict[str, Any]:
    """In the library's own current form, so that files of different age compare by meaning."""
    content: dict[str, Any] = json.loads(tokenizer.to_str())
    return {key: value for key, value in content.items() if key not in ("version", "truncation", "padding")}


def _first_difference(a: Any, b: Any, where: str) -> str | None:
    if isinstance(a, dict) and isinstance(b, dict):
        for key in sorted(a.keys() | b.keys()):
            if (found := _first_difference(a.get(key), b.get(key), f"{where}.{key}".lstrip("."))) is not None:
                return found
        return None
    if isinstance(a, list) and isinstance(b, list):
        for i, (left, right) in enumerate(itertools.zip_longest(a, b)):
            if (found := _first_difference(left, right, f"{where}[{i}]")) is not None:
                return found
        return None
    return None if a == b else f"{where}: {str(a)[:80]!r} and {str(b)[:80]!r}"
