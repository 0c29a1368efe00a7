"""Training a draft's adapter on what the target corrected: towards the target where it was wrong, and nowhere else."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from peft import PeftModel, set_peft_model_state_dict
from torch import Tensor
from torch.nn import functional

from edgecloud.errors import ConfigError
from edgecloud.partitioner.adapter import adapter_tensors
from edgecloud.partitioner.corrections import Correction

MAX_GRADIENT = 1.0


@dataclass(frozen=True, slots=True)
class LearningSettings:
    """How an adapter is trained."""

    num_epochs: int = 3
    learning_rate: float = 1e-3
    anchor: float = 0.5  # weight of staying as it was, where the draft was not wrong
    seed: int = 0  # of the order of the corrections

    def __post_init__(self) -> None:
        if self.num_epochs < 1:
            raise ConfigError(f"epochs is {self.num_epochs}; it takes 1 or more")
        if not 0 < self.learning_rate < 1:
            raise ConfigError(f"learning rate is {self.learning_rate}; it lies between 0 and 1")
        if not 0 <= self.anchor < 1e3:
            raise ConfigError(f"anchor is {self.anchor}; it takes a number from 0")


@dataclass(frozen=True, slots=True)
class Epoch:
    """How far the training is. Number 0 is before it."""

    number: int
    loss: float | None
    agreement: float | None  # of the held-out answers' tokens, those that the draft's greedy choice is; None: nothing is held out


def train(
    adapted: PeftModel,
    corrections: Sequence[Correction],
    settings: LearningSettings,
    proposable: Sequence[int] | None = None,
    *,
    up_only: bool = False,
    held_out: Sequence[Correction] = (),
    seen: Callable[[Epoch], None] = lambda epoch: None,
) -> list[Epoch]:
    """Train the adapter, a passage a step. The same arguments give the same adapter on a CPU with as many threads.

    With `held_out`, the adapter is left as it was when it agreed best with these.

    Args:
        adapted: the draft with its adapter.
        corrections: what to learn.
        settings: how.
        proposable: ids that the draft may propose; None: all.
        up_only: leave A as it is and train B alone, so that averaging adapters averages what they do (Sun et al. 2024, FFA-LoRA).
        held_out: to be measured on, after every epoch.
        seen: is told of every epoch.
    """
    for name, weight in adapted.named_parameters():
        weight.requires_grad_("lora_B" in name or ("lora_A" in name and not up_only))
    weights = [weight for weight in adapted.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=settings.learning_rate, weight_decay=0.0)
    rows = None if proposable is None else torch.tensor(proposable, device=weights[0].device)
    order = random.Random(settings.seed)  # noqa: S311  # not a secret
    epochs: list[Epoch] = []
    best: dict[str, Tensor] = {}

    def finish(loss: float | None) -> None:
        epoch = Epoch(len(epochs), loss, agreement(adapted, held_out, rows) if held_out else None)
        if not epochs or (epoch.agreement or 0.0) > max(earlier.agreement or 0.0 for earlier in epochs):
            best.update({name: tensor.clone() for name, tensor in adapter_tensors(adapted).items()})
        epochs.append(epoch)
        seen(epoch)

    finish(None)
    for _ in range(settings.num_epochs):
        total = 0.0
        for correction in order.sample(list(corrections), len(corrections)):
            loss = correction_loss(adapted, correction, settings.anchor, rows)
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(weights, MAX_GRADIENT)
            optimizer.step()
            optimizer.zero_grad()
            total += loss.item()
        finish(total / len(corrections))
    if held_out:
        set_peft_model_state_dict(adapted, best)
    return epochs


def correction_loss(adapted: PeftModel, correction: Correction, anchor: float, rows: Tensor | None = None) -> Tensor:
    """Cross-entropy of the target's tokens where the draft was wrong, and `anchor` times KL(old || new) elsewhere, in nats."""
    logits = _logits(adapted, correction, (*correction.refused, *correction.others), rows)
    num_refused = len(correction.refused)
    loss = functional.cross_entropy(
        logits[:num_refused] / (correction.temperature or 1.0), _targets(correction, correction.refused, logits, rows)
    )
    if anchor and correction.others:
        with torch.no_grad(), adapted.disable_adapter():
            old = _logits(adapted, correction, correction.others, rows).log_softmax(dim=1)
        new = logits[num_refused:].log_softmax(dim=1)
        loss = loss + anchor * functional.kl_div(new, old, log_target=True, reduction="batchmean")
    return loss


@torch.no_grad()
def agreement(model: torch.nn.Module, corrections: Sequence[Correction], rows: Tensor | None = None) -> float:
    """Of all tokens of these answers that the draft may propose, the share that are its greedy choice, given those before."""
    num_same = num_tokens = 0
    for correction in corrections:
        positions = (*correction.refused, *correction.others)
        logits = _logits(model, correction, positions, rows)
        num_same += int((logits.argmax(dim=1) == _targets(correction, positions, logits, rows)).sum())
        num_tokens += len(positions)
    return num_same / num_tokens


def _logits(model: torch.nn.Module, correction: Correction, positions: Sequence[int], rows: Tensor | None) -> Tensor:
    """What decides the tokens at `positions`.  -> [positions, proposable ids] float32"""
    device = next(model.parameters()).device
    ids = torch.tensor([correction.ids[: max(positions)]], device=device)
    before = torch.tensor([at - 1 for at in positions], device=device)
    logits: Tensor = model(input_ids=ids, use_cache=False, logits_to_keep=before).logits[0].float()
    return logits if rows is None else logits[:, rows]


def _targets(correction: Correction, positions: Sequence[int], logits: Tensor, rows: Tensor | None) -> Tensor:
    ids = torch.tensor([correction.ids[at] for at in positions], device=logits.device)
    return ids if rows is None else torch.searchsorted(rows, ids)
