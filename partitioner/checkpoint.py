"""Where a training stands, on disk: weights and optimizer state as safetensors, the rest as JSON; whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Optimizer

from edgecloud.errors import ModelError
from edgecloud.partitioner.atomic import atomic_folder

TENSORS, NOTES = "tensors.safetensors", "notes.json"


def write_checkpoint(
    folder: Path, parameters: Mapping[str, Tensor], optimizers: Sequence[Optimizer], notes: Mapping[str, Any]
) -> None:
    """Replace the one that is there."""
    tensors = {f"weight/{name}": value.detach() for name, value in parameters.items()}
    for at, optimizer in enumerate(optimizers):
        for number, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{at}/{number}/{name}": value for name, value in state.items() if isinstance(value, Tensor)}
    with atomic_folder(folder) as partial:
        save_file({name: value.contiguous().cpu() for name, value in tensors.items()}, partial / TENSORS)
        (partial / NOTES).write_text(json.dumps(dict(notes), indent=1), "utf-8")


def read_notes(folder: Path) -> dict[str, Any] | None:
    """None: there is no checkpoint. Raises ModelError: it is broken."""
    if not (folder / NOTES).is_file():
        return None
    try:
        notes: dict[str, Any] = json.loads((folder / NOTES).read_text("utf-8"))
    except ValueError as error:
        raise ModelError(f"{folder / NOTES} is broken ({error}); remove {folder} to begin again") from error
    return notes


def restore(folder: Path, parameters: Mapping[str, Tensor], optimizers: Sequence[Optimizer]) -> None:
    """Put weights and optimizers where they were. Raises ModelError: the checkpoint is of something else, or broken."""
    try:
        tensors = load_file(folder / TENSORS)
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(tensors[f"weight/{name}"])
        for at, optimizer in enumerate(optimizers):
            content = optimizer.state_dict()
            states: dict[int, dict[str, Tensor]] = {}
            for key, value in tensors.items():
                if key.startswith(f"optimizer/{at}/"):
                    _, _, number, name = key.split("/")
                    states.setdefault(int(number), {})[name] = value
            optimizer.load_state_dict({"state": states, "param_groups": content["param_groups"]})
    except (OSError, SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise ModelError(f"the checkpoint in {folder} does not fit ({error}); remove it to begin again") from error
