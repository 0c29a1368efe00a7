"""A low-rank adapter beside a draft's linear layers: what is trained, sent between machines, and at last added to the weights.

Hu et al. 2021, LoRA: W + (alpha / r) B A. The file holds its tensors and says of which draft it is.
"""

from __future__ import annotations

import shutil
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from edgecloud.errors import ConfigError, ModelError
from edgecloud.partitioner.atomic import atomic_folder
from edgecloud.partitioner.check import load_torch
from edgecloud.partitioner.model_folder import ModelFolder

FORMAT = "edgecloud-adapter-1"
OWN_FILES = frozenset({"config.json", "generation_config.json", "model.safetensors.index.json"})  # written with the weights


@dataclass(frozen=True, slots=True)
class AdapterInfo:
    """Whose adapter it is, and its shape."""

    draft: str  # fingerprint of the draft without it
    rank: int

    def __post_init__(self) -> None:
        if not 1 <= self.rank <= 256:
            raise ConfigError(f"rank is {self.rank}; it takes a whole number from 1 to 256")


def load_draft(draft: ModelFolder, device: str = "cpu") -> PreTrainedModel:
    """The model of a folder in float32, without dropout. Raises ModelError."""
    return load_torch(draft, fp32=True).to(torch.device(device))


def with_new_adapter(model: torch.nn.Module, rank: int, seed: int) -> PeftModel:
    """An adapter that changes nothing yet: A is random, B is zero."""
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by a name that the next version drops
        torch.manual_seed(seed)
        return get_peft_model(model, config).eval()


def with_adapter(model: torch.nn.Module, file: Path, info: AdapterInfo) -> PeftModel:
    """The adapter of a file that `read_info` has read. Raises ModelError when its tensors do not fit the model."""
    adapted = with_new_adapter(model, info.rank, seed=0)
    wanted = adapter_tensors(adapted)
    with safe_open(file, framework="pt") as stored:
        given = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118  # no mapping
    if {name: tensor.shape for name, tensor in given.items()} != {name: tensor.shape for name, tensor in wanted.items()}:
        raise ModelError(f"{file} holds other tensors than an adapter of rank {info.rank} of this draft; begin another")
    if not all(tensor.isfinite().all() for tensor in given.values()):
        raise ModelError(f"{file} holds a number that is not finite; train with a smaller learning rate")
    set_peft_model_state_dict(adapted, given)
    return adapted


def adapter_tensors(adapted: PeftModel) -> dict[str, Tensor]:
    """What of it is the adapter, on the CPU."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(get_peft_model_state_dict(adapted).items())}


def save_adapter(adapted: PeftModel, file: Path, info: AdapterInfo) -> None:
    """Write its tensors; the file appears whole. Raises OSError."""
    partial = file.with_name(f".{file.name}.partial")
    save_file(adapter_tensors(adapted), partial, {"format": FORMAT, **{key: str(value) for key, value in asdict(info).items()}})
    partial.replace(file)


def read_info(file: Path, draft_fingerprint: str) -> AdapterInfo:
    """What a file says of itself. Raises ModelError when it is no adapter, or one of another draft."""
    try:
        with safe_open(file, framework="pt") as stored:
            metadata: dict[str, Any] = stored.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{file} cannot be read as safetensors: {error}") from error
    if metadata.get("format") != FORMAT or not str(metadata.get("rank")).isdecimal():
        raise ModelError(f"{file} is no adapter of edgecloud; `edgecloud adapter begin` makes one")
    info = AdapterInfo(str(metadata.get("draft")), int(metadata["rank"]))
    if info.draft != draft_fingerprint:
        raise ModelError(
            f"{file} is an adapter of the draft {info.draft}, this draft is {draft_fingerprint}; give the one it was begun for"
        )
    return info


def save_merged(adapted: PeftModel, draft: ModelFolder, destination: Path) -> None:
    """The draft with the adapter added to its weights, as a Hugging Face folder; it appears whole. Raises OSError."""
    merged = adapted.merge_and_unload()
    with atomic_folder(destination) as folder:
        for file in sorted(draft.path.iterdir()):
            if file.is_file() and file.suffix in {".json", ".jinja", ".txt", ".md"} and file.name not in OWN_FILES:
                shutil.copyfile(file, folder / file.name)
        merged.save_pretrained(folder)
        for weights in folder.glob("*.safetensors"):
            weights.chmod(0o644)  # safetensors writes them for the owner only
