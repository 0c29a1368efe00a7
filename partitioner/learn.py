"""A draft that learns from service: on one machine from its log alone, or with others by adapters that travel.

learn            draft + log                     -> draft
begin_adapter    draft                           -> adapter that all devices begin with
train_adapter    draft + adapter + device's log  -> adapter
merge_adapter    draft + averaged adapter        -> draft
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from edgecloud.errors import ConfigError, RejectionLogError
from edgecloud.partitioner.adapter import (
    AdapterInfo,
    adapter_tensors,
    load_draft,
    read_info,
    save_adapter,
    save_merged,
    with_adapter,
    with_new_adapter,
)
from edgecloud.partitioner.corrections import draft_vocab, read_corrections, split_corrections
from edgecloud.partitioner.learning import Epoch, LearningSettings, train
from edgecloud.partitioner.model_folder import ModelFolder


@dataclass(frozen=True, slots=True)
class Learned:
    """What came of it."""

    num_passages: int  # learned from
    num_refused: int  # guesses in them
    num_held_out: int  # passages
    epochs: list[Epoch]
    num_adapter_parameters: int

    @property
    def best(self) -> Epoch:
        """The epoch that was kept, if passages were held out."""
        return max(self.epochs, key=lambda epoch: (epoch.agreement or 0.0, -epoch.number))


def learn(
    draft: str | Path,
    log: Path,
    destination: Path,
    settings: LearningSettings,
    *,
    rank: int = 8,
    any_draft: bool = False,
    overwrite: bool = False,
    device: str = "cpu",
    seen: Callable[[Epoch], None] = lambda epoch: None,
) -> Learned:
    """Train a draft on its device's log, and write it with what it learned merged in.

    Raises:
        RejectionLogError: the log has too little, is of other models, or nothing was gained on what was held out.
        ModelError: the draft cannot be loaded. ConfigError: a setting cannot work, or the destination is there.
    """
    _check_destination(destination, overwrite)
    _check_device(device)
    folder = ModelFolder.open(draft)
    fingerprint = folder.fingerprint()
    info = AdapterInfo(fingerprint, rank)
    corrections, held_out = split_corrections(read_corrections(log, folder, fingerprint, any_draft=any_draft))
    adapted = with_new_adapter(load_draft(folder, device), info.rank, settings.seed)
    num_parameters = sum(tensor.numel() for tensor in adapter_tensors(adapted).values())
    epochs = train(adapted, corrections, settings, draft_vocab(folder), held_out=held_out, seen=seen)
    learned = Learned(
        len(corrections), sum(len(correction.refused) for correction in corrections), len(held_out), epochs, num_parameters
    )
    if learned.best.number == 0:
        raise RejectionLogError(
            f"nothing was gained: the draft as it is agrees with {learned.best.agreement:.3f} of the target's tokens in "
            f"{len(held_out)} held-out passages, and with no more after any epoch; log more, or take a smaller learning rate"
        )
    save_merged(adapted, folder, destination)
    return learned


def begin_adapter(draft: str | Path, file: Path, rank: int, seed: int) -> AdapterInfo:
    """Write an adapter that changes nothing yet. Raises ModelError, ConfigError."""
    folder = ModelFolder.open(draft)
    info = AdapterInfo(folder.fingerprint(), rank)
    save_adapter(with_new_adapter(load_draft(folder), rank, seed), file, info)
    return info


def train_adapter(
    draft: str | Path,
    adapter: Path,
    log: Path,
    file: Path,
    settings: LearningSettings,
    *,
    any_draft: bool = False,
    device: str = "cpu",
    seen: Callable[[Epoch], None] = lambda epoch: None,
) -> Learned:
    """Train a given adapter on a device's log, B alone, and write it to `file`. Raises what `learn` raises, but for gains."""
    _check_device(device)
    folder = ModelFolder.open(draft)
    fingerprint = folder.fingerprint()
    info = read_info(adapter, fingerprint)
    corrections = read_corrections(log, folder, fingerprint, any_draft=any_draft)
    adapted = with_adapter(load_draft(folder, device), adapter, info)
    epochs = train(adapted, corrections, settings, draft_vocab(folder), up_only=True, seen=seen)
    save_adapter(adapted, file, info)
    num_parameters = sum(tensor.numel() for name, tensor in adapter_tensors(adapted).items() if "lora_B" in name)
    return Learned(len(corrections), sum(len(correction.refused) for correction in corrections), 0, epochs, num_parameters)


def merge_adapter(draft: str | Path, adapter: Path, destination: Path, *, overwrite: bool = False) -> None:
    """Write the draft with an adapter added to its weights. Raises ModelError, ConfigError, OSError."""
    _check_destination(destination, overwrite)
    folder = ModelFolder.open(draft)
    info = read_info(adapter, folder.fingerprint())
    save_merged(with_adapter(load_draft(folder), adapter, info), folder, destination)


def _check_destination(destination: Path, overwrite: bool) -> None:
    if destination.exists() and not overwrite:
        raise ConfigError(f"{destination} exists; choose another place, or give --overwrite")


def _check_device(device: str) -> None:
    if device != "cpu" and not (device == "cuda" and torch.cuda.is_available()):
        raise ConfigError(f"device is {device!r}; it takes cpu, or cuda where torch finds one")
