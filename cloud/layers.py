"""Decoder layers of Llama's form, each as one plain function: fewer frames, views and copies between the products.

A layer is such a one by what it consists of, and by trial: `fuse` lets each run both ways, and keeps the function only where the
bits are the same. So no model is named here, and one that looks like Llama but is not stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  # torch's own habit
from torch import Tensor, nn

from edgecloud.cloud.attention import AttentionForm, PagedBatch, attend
from edgecloud.cloud.projections import Function, is_packed, joint

LOUD = 1024.0  # a power of two, so that weights come back as they were: what clips large values shows


class Rotary:
    """Rotates heads by their positions, as transformers' apply_rotary_pos_emb does; its tables are made once for all layers."""

    def __init__(self) -> None:
        self._embeddings: tuple[Tensor, Tensor] | None = None

    def __call__(self, heads: Tensor, embeddings: tuple[Tensor, Tensor]) -> Tensor:
        """heads: [rows, heads, dim]; embeddings: cosines and sines, [1, rows, dim] each  -> [rows, heads, dim]"""
        if embeddings is not self._embeddings:
            cos, sin = embeddings
            half = sin.shape[-1] // 2
            self._cos, self._sin = cos[0].unsqueeze(1), torch.cat([-sin[0, :, :half], sin[0, :, half:]], -1).unsqueeze(1)
            self._half, self._embeddings = half, embeddings
        return (heads * self._cos).add_(torch.roll(heads, self._half, -1).mul_(self._sin))


@dataclass(frozen=True, slots=True)
class FusedLayer:
    """What a layer of this form computes."""

    index: int
    form: AttentionForm
    rotary: Rotary
    attention_norm: Function
    qkv: Function
    attention_out: Function
    mlp_norm: Function
    gate_up: Function
    activation: Function
    down: Function

    def __call__(
        self, hidden_states: Tensor, *, position_embeddings: tuple[Tensor, Tensor], paged_batch: PagedBatch, **_: Any
    ) -> Tensor:
        """The signature that transformers calls.  [1, rows, width] -> the same"""
        form = self.form
        x = hidden_states[0]
        qkv = self.qkv(self.attention_norm(x)).view(len(x), form.heads + 2 * form.kv_heads, form.head_dim)
        num_turned = form.heads + form.kv_heads
        turned = self.rotary(qkv[:, :num_turned], position_embeddings)
        query, key = turned[:, : form.heads], turned[:, form.heads :]
        attended = attend(self.index, query, key, qkv[:, num_turned:], form, paged_batch)
        x = self.attention_out(attended.flatten(1)).add_(x)
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, -1)
        return self.down(self.activation(gate).mul_(up)).add_(x).unsqueeze(0)


def fuse(model: nn.Module, forms: dict[int, AttentionForm], forward: Callable[[], Any]) -> int:
    """Let every layer that can be a plain function be one, from now on. `forms`: what attention each layer asks for.

    `forward` runs the whole model once or more, over rows of any positions: they are what the layers are tried on.

    -> how many layers are
    """
    rotary = Rotary()
    trials = [_Trial(layer, fused) for layer in model.modules() if (fused := _fused(layer, forms, rotary)) is not None]
    if not trials:
        return 0
    for trial in trials:
        trial.layer.forward = trial
    try:
        forward()
    finally:
        for trial in trials:
            del trial.layer.forward
    good = [trial for trial in trials if trial.num_rows and not trial.differed]
    for trial in good:
        trial.layer.forward = trial.fused
    return len(good)


class _Trial:
    """Stands in for a layer's forward, which it does, and compares."""

    def __init__(self, layer: Any, fused: FusedLayer) -> None:
        self.layer = layer
        self.fused = fused
        self.num_rows = 0
        self.differed = False
        self._forward = layer.forward

    def __call__(self, hidden_states: Tensor, **kwargs: Any) -> Any:
        self.num_rows += hidden_states.shape[1]
        with _loud(self.layer):
            self._compare(hidden_states, kwargs)
        return self._compare(hidden_states, kwargs)

    def _compare(self, hidden_states: Tensor, kwargs: dict[str, Any]) -> Any:
        expected = self._forward(hidden_states, **kwargs)
        try:
            self.differed |= not torch.equal(self.fused(hidden_states, **kwargs), expected)
        except (AttributeError, TypeError, ValueError, IndexError, RuntimeError):  # of another form than it looked
            self.differed = True
        return expected


@contextmanager
def _loud(layer: Any) -> Iterator[None]:
    """Norms give values so large that a clip would show."""
    weights = [layer.input_layernorm.weight, layer.post_attention_layernorm.weight]
    for weight in weights:
        weight.data.mul_(LOUD)
    try:
        yield
    finally:
        for weight in weights:
            weight.data.mul_(1 / LOUD)


def _fused(layer: nn.Module, forms: dict[int, AttentionForm], rotary: Rotary) -> FusedLayer | None:
    """A layer that consists of what Llama's does, as one function; None: it does not."""
    match _parts(layer):
        case {"input_layernorm": attention_norm, "self_attn": attention, "post_attention_layernorm": mlp_norm, "mlp": mlp, **other}:
            if other or not all(hasattr(norm, "weight") for norm in (attention_norm, mlp_norm)):
                return None
        case _:
            return None
    match _parts(attention), _parts(mlp):
        case (
            {"q_proj": query, "k_proj": key, "v_proj": value, "o_proj": out, **rest},
            {"gate_proj": gate, "up_proj": up, "down_proj": down, "act_fn": activation, **other},
        ) if not rest and not other:
            pass
        case _:
            return None
    qkv, gate_up = joint([query, key, value]), joint([gate, up])
    index = getattr(attention, "layer_idx", None)
    if qkv is None or gate_up is None or index not in forms:
        return None
    silu = F.silu if isinstance(activation, nn.SiLU) else activation
    return FusedLayer(index, forms[index], rotary, attention_norm, qkv, out, mlp_norm, gate_up, silu, down)


def _parts(module: nn.Module) -> dict[str, Any]:
    """Modules, and functions that stand in for modules, by name."""
    members = {**vars(module), **module._modules}
    return {name: part for name, part in members.items() if isinstance(part, nn.Module) or is_packed(part)}
