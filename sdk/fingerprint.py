"""What makes two machines sure that they mean the same model: SHA-256 over what decides the text, nothing else."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from edgecloud.errors import ModelError

# Keys of config.json and tokenizer.json that do not change a logit or a token.
CONFIG_NOISE = frozenset({"_name_or_path", "transformers_version", "use_cache"})
TOKENIZER_NOISE = frozenset({"truncation", "padding"})


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def model_fingerprint(folder: Path) -> str:
    """Fingerprint of a Hugging Face folder: its config.json and every safetensors file, in order of name.

    Raises:
        ModelError: config.json is missing or not JSON, or there are no safetensors.
    """
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise ModelError(f"{folder} holds no *.safetensors file; save the model with save_pretrained")
    digest = hashlib.sha256()
    digest.update(_canonical(read_json(folder / "config.json"), CONFIG_NOISE))
    for path in weights:
        try:
            digest.update(f"{path.name} {sha256_file(path)}\n".encode())
        except OSError as error:
            raise ModelError(f"{path} cannot be read: {error.strerror}") from error
    return digest.hexdigest()


def tokenizer_fingerprint(tokenizer_json: Path) -> str:
    """Fingerprint of a tokenizer.json, whatever its formatting. Raises ModelError."""
    return hashlib.sha256(_canonical(read_json(tokenizer_json), TOKENIZER_NOISE)).hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises ModelError that names the file and what is wrong."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path} does not exist; a Hugging Face model folder has one") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds a {type(content).__name__}, not a JSON object")
    return content


def _canonical(content: dict[str, Any], noise: frozenset[str]) -> bytes:
    kept = {key: value for key, value in content.items() if key not in noise}
    return json.dumps(kept, sort_keys=True, ensure_ascii=True, separators=(",", ":")).encode()
