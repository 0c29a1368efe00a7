"""A draft cut out of its target: some of the target's layers, its embedding, and a head of the tokens that it may propose."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from edgecloud.errors import ConfigError, ModelError
from edgecloud.partitioner.packed_draft import pack
from edgecloud.partitioner.rounding import rounded as as_int4


def default_layers(num_layers: int, num_kept: int) -> list[int]:
    """The first two thirds of them from the beginning, the others from the end: where models read, and where they decide."""
    if not 1 <= num_kept <= num_layers:
        raise ConfigError(f"a draft of {num_kept} layers cannot be cut out of {num_layers}; ask for 1 to {num_layers}")
    num_last = num_kept // 3
    return [*range(num_kept - num_last), *range(num_layers - num_last, num_layers)]


class Student:
    """The draft while it learns: layers and final norm. Embedding and head stay the target's, and one where they are one.

    Args:
        target: the stock model, in fp32.
        layers: which of its layers to begin with, ascending.
        kept_ids: tokens that the draft may propose, ascending.
        rounded: embedding and head are what int4 keeps of them.

    Raises:
        ConfigError: a layer is out of range. ModelError: the target's layers are not one list.
    """

    def __init__(self, target: PreTrainedModel, layers: Sequence[int], kept_ids: Tensor, *, rounded: bool = True) -> None:
        num_layers = target.config.get_text_config().num_hidden_layers
        if not layers or list(layers) != sorted(set(layers)) or not 0 <= layers[0] <= layers[-1] < num_layers:
            raise ConfigError(f"layers are {list(layers)}; give different ones from 0 to {num_layers - 1}, in order")
        self.kept_ids = kept_ids
        self.model = _cut(target, layers)
        self.model.requires_grad_(False)
        self.decoder: nn.Module = self.model.base_model
        embedding = self.model.get_input_embeddings()
        for parameter in self.decoder.parameters():
            if parameter is not embedding.weight:
                parameter.requires_grad_(True)
        head = self.model.get_output_embeddings().weight
        if rounded:
            with torch.no_grad():
                for weights in {embedding.weight, head}:  # often one
                    weights.copy_(as_int4(weights))
        self.head = head[kept_ids]

    def hidden(self, ids: Tensor) -> Tensor:
        """What the head is applied to.  [sequences, tokens] -> [sequences, tokens, width]"""
        states: Tensor = self.decoder(input_ids=ids, use_cache=False).last_hidden_state
        return states

    def trained(self) -> dict[str, nn.Parameter]:
        """By name."""
        return {name: p for name, p in self.decoder.named_parameters() if p.requires_grad}

    def round(self) -> None:
        """Make all matrices what int4 keeps of them."""
        with torch.no_grad():
            for weights in self.trained().values():
                if weights.ndim == 2:
                    weights.copy_(as_int4(weights))

    def save(self, folder: Path) -> None:
        """A Hugging Face folder, without tokenizer."""
        self.model.save_pretrained(folder)

    def save_packed(self, folder: Path, target_fingerprint: str) -> None:
        """What it has beyond its target, without tokenizer."""
        prefix = f"{self.model.base_model_prefix}."
        layers = {prefix + name: weights for name, weights in self.trained().items()}
        pack(layers, layer_list(self.model)[0], target_fingerprint, folder)
        self.model.config.save_pretrained(folder)


def _cut(target: PreTrainedModel, layers: Sequence[int]) -> PreTrainedModel:
    name, num_layers = layer_list(target)
    config = copy.deepcopy(target.config)
    text = config.get_text_config()
    for key, value in list(vars(text).items()):  # one entry a layer, such as layer_types
        if isinstance(value, list) and len(value) == num_layers:
            setattr(text, key, [value[layer] for layer in layers])
    text.num_hidden_layers = len(layers)
    weights = {}
    for key, value in target.state_dict().items():
        if key.startswith(f"{name}."):
            number, _, rest = key.removeprefix(f"{name}.").partition(".")
            if int(number) in layers:
                weights[f"{name}.{layers.index(int(number))}.{rest}"] = value
        else:
            weights[key] = value
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    model.load_state_dict({key: value.clone() for key, value in weights.items()})
    assert isinstance(model, PreTrainedModel)
    return model.to(target.device)


def layer_list(model: PreTrainedModel) -> tuple[str, int]:
    """Name and length of the list of decoder layers. Raises ModelError: there is not exactly one."""
    num_layers = model.config.get_text_config().num_hidden_layers
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module) == num_layers]
    if len(lists) != 1:
        raise ModelError(f"{model.config.model_type} does not keep its {num_layers} layers in one list; it cannot be distilled")
    return lists[0], num_layers
