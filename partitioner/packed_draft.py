"""A draft as what it has beyond its target: its layers in int4, and norms. Embedding and head stay the target's.

Six layers of SmolLM2-135M take 12 MB, where the same draft as a Hugging Face folder takes 200. What is unpacked has the weights
that were packed, bit by bit: those of a draft that was made for int4 are whole numbers of their scales already.
"""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from edgecloud.draft_vocab import DRAFT_VOCAB
from edgecloud.errors import ModelError
from edgecloud.partitioner.atomic import atomic_folder
from edgecloud.partitioner.fetch import cache_folder
from edgecloud.partitioner.model_folder import CLOUD_FILES, ModelFolder
from edgecloud.partitioner.rounding import BLOCK, LOWEST, in_blocks, rounded

PACKED = "layers.int4"  # a safetensors file by another name: no model by itself
CONFIG, WEIGHTS = "config.json", "model.safetensors"
TARGET, LAYERS = "target_fingerprint", "layer_list"  # what its header tells
READABLE = 0o644  # safetensors writes for the owner only
CODES, SCALES, WIDTH = ".codes", ".scales", ".width"


def pack(layers: Mapping[str, Tensor], layer_list: str, target_fingerprint: str, folder: Path) -> None:
    """Write the weights that are not the target's.

    Args:
        layers: by their names in the model; matrices are rounded.
        layer_list: name of the list of layers, such as `model.layers`.
        target_fingerprint: whose the others are.
        folder: of the packed draft; is there.
    """
    tensors: dict[str, Tensor] = {}
    for name, weights in layers.items():
        if weights.ndim != 2:
            tensors[name] = weights.detach().float().clone()
            continue
        codes, scales = in_blocks(weights.detach().float())
        nibbles = (codes - LOWEST).to(torch.uint8).flatten(1)
        tensors[name + CODES] = nibbles[:, 0::2] | nibbles[:, 1::2] << 4
        tensors[name + SCALES] = scales.half()
        tensors[name + WIDTH] = torch.tensor(weights.shape[1])
    save_file(tensors, folder / PACKED, {TARGET: target_fingerprint, LAYERS: layer_list})
    (folder / PACKED).chmod(READABLE)


def open_draft(draft: str, target: ModelFolder) -> ModelFolder:
    """A Hugging Face folder, or a packed draft, which is unpacked into the cache first. Raises ModelError."""
    folder = Path(draft)
    if not (folder / PACKED).is_file():
        return ModelFolder.open(draft)
    return dataclasses.replace(ModelFolder.open(unpacked(folder, target)), name=folder.resolve().name)


def unpacked(folder: Path, target: ModelFolder) -> Path:
    """A Hugging Face folder of a packed draft, in the cache: the same for the same two. Raises ModelError."""
    fingerprint = target.fingerprint()
    digest = hashlib.sha256(fingerprint.encode())
    for name in (PACKED, CONFIG, DRAFT_VOCAB):
        if not (folder / name).is_file():
            raise ModelError(f"{folder} holds {PACKED} and no {name}; copy the whole packed draft")
        digest.update((folder / name).read_bytes())
    place = cache_folder() / "drafts" / digest.hexdigest()[:32]
    if place.is_dir():
        return place
    weights, layer_list = own_weights(folder / PACKED, fingerprint, target.name)
    weights |= _others(target, layer_list, weights)
    try:
        with atomic_folder(place) as made:
            save_file(weights, made / WEIGHTS, {"format": "pt"})
            (made / WEIGHTS).chmod(READABLE)
            for name in CLOUD_FILES:
                if (target.path / name).is_file() and "index" not in name:
                    shutil.copyfile(target.path / name, made / name)
            for name in (CONFIG, DRAFT_VOCAB):
                shutil.copyfile(folder / name, made / name)
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"{folder} cannot be unpacked to {place}: {error}; free some space, or name another EDGECLOUD_HOME"
        ) from error
    return place


def own_weights(path: Path, fingerprint: str, target: str) -> tuple[dict[str, Tensor], str]:
    """-> the draft's own weights in fp32, name of the list of layers"""
    weights: dict[str, Tensor] = {}
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            packed = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no mapping
        if header[TARGET] != fingerprint:
            raise ModelError(
                f"{path} was made for a target with fingerprint {header[TARGET]}, {target} has {fingerprint}; give that target"
            )
        for name, tensor in packed.items():
            if name.endswith(CODES):
                matrix = name.removesuffix(CODES)
                weights[matrix] = _matrix(tensor, packed[matrix + SCALES], int(packed[matrix + WIDTH]))
            elif not name.endswith((SCALES, WIDTH)):
                weights[name] = tensor
        return weights, header[LAYERS]
    except (OSError, SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise ModelError(f"{path} is no packed draft, or not whole ({error}); copy it again") from error


def _matrix(nibbles: Tensor, scales: Tensor, width: int) -> Tensor:
    codes = torch.stack([nibbles & 15, nibbles >> 4], -1).view(*scales.shape, BLOCK).float() + LOWEST
    found: Tensor = (codes * scales.float()[..., None]).flatten(1)[:, :width]
    return found.contiguous()


def _others(target: ModelFolder, layer_list: str, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the draft shares with its target: embedding and head, rounded as they were while it learnt."""
    found: dict[str, Tensor] = {}
    for path in target.weights:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118  # it is no mapping
                if not name.startswith(f"{layer_list}.") and name not in own:
                    tensor = file.get_tensor(name).float()
                    found[name] = rounded(tensor) if tensor.ndim == 2 else tensor
    return found
