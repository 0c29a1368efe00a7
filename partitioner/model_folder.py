"""A Hugging Face folder, checked before anything heavy is loaded: is it a causal LM, and are its weights whole?"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgecloud.errors import ModelError
from edgecloud.fingerprint import model_fingerprint, read_json, sha256_file
from edgecloud.partitioner.fetch import MANIFEST, RECIPES, model_path

# What the cloud needs of a folder; weights come in addition.
CLOUD_FILES = (
    "config.json", "generation_config.json", "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja",
    "chat_template.json", "LICENSE", "LICENSE.txt", "NOTICE",
)  # fmt: skip
SIZES = ("vocab_size", "max_position_embeddings", "num_hidden_layers")
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """What the files say of a model, without loading it."""

    path: Path
    name: str
    config: dict[str, Any]
    weights: list[Path]
    vocab_size: int  # rows of the embedding; may be padded beyond the tokenizer's
    max_context_tokens: int
    num_layers: int
    num_parameters: int
    num_bytes: int  # of the weights
    dtype: str  # of most weights
    licence: str | None
    note: str | None  # a caution that goes with these weights

    @classmethod
    def open(cls, model: str | Path) -> ModelFolder:
        """Check a folder, or a fetched model's name.

        Raises:
            ModelError: no such folder, no config.json of a causal LM, no safetensors, or weights that are cut off.
        """
        path = _resolve(model)
        config = read_json(path / "config.json")
        _require_causal_lm(path, config)
        text = config.get("text_config") if isinstance(config.get("text_config"), dict) else None
        sizes = [_whole_number(path, text or config, key) for key in SIZES]
        weights = sorted(path.glob("*.safetensors"))
        if not weights:
            pickled = next(path.glob("*.bin"), None)
            hint = f"; {pickled.name} is a pickle, which is never read" if pickled else ""
            raise ModelError(f"{path} holds no *.safetensors file{hint}; save the model with save_pretrained")
        _require_shards(path, {file.name for file in weights})
        tensors = [tensor for file in weights for tensor in _read_header(file)]
        by_dtype: dict[str, int] = {}
        for dtype, count in tensors:
            by_dtype[dtype] = by_dtype.get(dtype, 0) + count
        dtype = max(by_dtype, key=lambda key: by_dtype[key], default="F32")
        manifest = _fetch_manifest(path)
        return cls(
            path=path,
            name=str(manifest.get("name") or path.name),
            config=config,
            weights=weights,
            vocab_size=sizes[0],
            max_context_tokens=sizes[1],
            num_layers=sizes[2],
            num_parameters=sum(by_dtype.values()),
            num_bytes=sum(file.stat().st_size for file in weights),
            dtype=DTYPES.get(dtype, dtype.lower()),
            licence=manifest.get("licence") or _licence(path),
            note=manifest.get("note"),
        )

    def fingerprint(self) -> str:
        """`model_fingerprint`, after a fetched model's files were compared with what was fetched. Raises ModelError."""
        for name, entry in _fetch_manifest(self.path).get("files", {}).items():
            path = self.path / name
            if path.suffix == ".safetensors" and sha256_file(path) != entry["sha256"]:
                raise ModelError(f"{path} was changed since it was fetched; run `edgecloud fetch {self.name} --force`")
        return model_fingerprint(self.path)


def _resolve(model: str | Path) -> Path:
    path = Path(model)
    if path.is_dir():
        return path.resolve()
    name = str(model)
    if name in RECIPES:
        path = model_path(name)
        if not path.is_dir():
            raise ModelError(f"{name} is not in the cache ({path}); run `edgecloud fetch {name}` first")
        return path.resolve()
    what = "is a file, not a model folder" if path.exists() else "does not exist"
    raise ModelError(f"{path} {what}; give a Hugging Face folder, or a name that `edgecloud fetch` knows: {', '.join(RECIPES)}")


def _require_causal_lm(path: Path, config: dict[str, Any]) -> None:
    architectures = config.get("architectures") or []
    if not any(str(name).endswith(("ForCausalLM", "LMHeadModel")) for name in architectures):
        found = ", ".join(map(str, architectures)) or "no architecture"
        raise ModelError(f"{path / 'config.json'} names {found}; edgecloud takes causal language models (...ForCausalLM)")
    if "auto_map" in config:
        raise ModelError(f"{path / 'config.json'} asks for code out of the model's repository (auto_map), which is never run")


def _whole_number(path: Path, config: dict[str, Any], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise ModelError(f"{path / 'config.json'}: {key} is {value!r}; it must be a whole number above 0")
    return value


def _require_shards(path: Path, found: set[str]) -> None:
    index = path / "model.safetensors.index.json"
    if not index.exists():
        return
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ModelError(f"{index} has no weight_map; fetch or save the model again")
    if missing := sorted(set(map(str, weight_map.values())) - found):
        raise ModelError(f"{path / missing[0]} is missing, {index.name} names it; fetch or save the model again")


def _read_header(file: Path) -> list[tuple[str, int]]:
    """The dtype and number of elements of every tensor. Raises ModelError for a file that is not whole."""
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 0 < length <= size - 8:
                raise ModelError(f"{file} is truncated or no safetensors file ({size} bytes); fetch or save the model again")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        expected = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        tensors = [(str(entry["dtype"]), math.prod(entry["shape"])) for entry in header.values()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ModelError(f"{file} cannot be read as safetensors: {error}; fetch or save the model again") from error
    if size != expected:
        what = "truncated" if size < expected else "too long"
        raise ModelError(f"{file} is {what}: {size} bytes, its header says {expected}; fetch or save the model again")
    return tensors


def _fetch_manifest(path: Path) -> dict[str, Any]:
    manifest = path / MANIFEST
    return read_json(manifest) if manifest.is_file() else {}


def _licence(path: Path) -> str | None:
    """From the model card's front matter, else from the first words of a licence file."""
    card = path / "README.md"
    if card.is_file():
        front = card.read_text("utf-8", "replace").split("---")
        for line in front[1].splitlines() if len(front) > 2 else []:
            key, _, value = line.partition(":")
            if key.strip() == "license" and value.strip():
                return value.strip().strip("'\"")
    for file in (path / "LICENSE", path / "LICENSE.txt"):
        if file.is_file():
            start = file.read_text("utf-8", "replace")[:400].lower()
            known = {"apache license": "apache-2.0", "mit license": "mit"}
            return next((name for words, name in known.items() if words in start), None)
    return None
