"""The target's last hidden states, of which a plain head makes all of its logits."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from edgecloud.errors import ModelError
from edgecloud.partitioner.batches import by_length, padded

TOKENS_A_PASS = 4096
HEAD_TOLERANCE = 1e-3  # of the largest logit
TRIED_TOKENS = 16


def last_states(target: PreTrainedModel, sequences: dict[int, list[int]]) -> dict[int, Tensor]:
    """What the target's head is applied to, for every token of each sequence.  -> [tokens, width] each"""
    found = {}
    for group in by_length(sequences, TOKENS_A_PASS):
        with torch.inference_mode():
            states = target.base_model(input_ids=padded([sequences[n] for n in group], target.device), use_cache=False)
        for row, number in zip(states.last_hidden_state, group, strict=True):
            found[number] = row[: len(sequences[number])]
    return found


def require_plain_head(target: PreTrainedModel) -> None:
    """Raises ModelError: the target does more with its last states than to multiply them by its head."""
    weight = target.get_output_embeddings().weight
    ids = list(range(min(TRIED_TOKENS, len(weight))))
    with torch.inference_mode():
        logits = target(input_ids=padded([ids], target.device), use_cache=False).logits[0].float()
        product = last_states(target, {0: ids})[0].float() @ weight.float().T
    if not (logits - product).abs().max() <= HEAD_TOLERANCE * logits.abs().max():
        raise ModelError(
            f"{target.config.model_type} does more with its last states than to multiply them by its head (soft caps, scales); "
            "no draft and no exit head can be taught by it"
        )
