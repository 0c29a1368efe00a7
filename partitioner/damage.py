"""What a boundary codec does to a target's answers: rate against damage, for each split point.

The residual stream that enters layer `cut` goes through encode and decode, at every position, as it would between a front and a
tail; the rest of the target runs as it is. Layers before the cut are the target's own: what a quantized front does comes on top.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from edgecloud.errors import ConfigError, ModelError
from edgecloud.kernels import codec_torch
from edgecloud.kernels.codec import require_codec, row_bytes
from edgecloud.partitioner.check import Sample


@dataclass(frozen=True, slots=True)
class Damage:
    """The target with a codec at a cut against the target, along the target's own greedy answers."""

    cut: int  # layers before the boundary
    codec: str
    bytes_per_position: int
    agreement: float  # share of positions where both choose the same token
    kl_nats: float  # mean over positions of KL(target || target with codec)
    max_kl_nats: float  # of the worst position
    num_positions: int

    def __post_init__(self) -> None:
        if not 0.0 <= self.agreement <= 1.0 or self.num_positions < 1:
            raise ValueError(f"agreement of {self.agreement} over {self.num_positions} positions cannot be")


def measure_damage(model: torch.nn.Module, samples: Sequence[Sample], cuts: Sequence[int], codecs: Sequence[str]) -> list[Damage]:
    """For each cut, each codec; a forward pass a sample for each, and one without.

    Raises:
        ConfigError: a cut that is no boundary of two layers, an unknown codec, no sample with an answer, or a stream beyond the
            range of a codec.
        ModelError: the model's layers cannot be found.
    """
    layers = decoder_layers(model)
    for cut in cuts:
        if not 0 < cut < len(layers):
            raise ConfigError(f"cut {cut} is out of range; a model of {len(layers)} layers can be cut at 1 to {len(layers) - 1}")
    for codec in codecs:
        require_codec(codec)
    samples = [sample for sample in samples if sample.continuation_ids]
    if not samples:
        raise ConfigError("no sample has an answer to measure on; give samples with continuation_ids")
    compared: dict[tuple[int, str], list[tuple[bool, float]]] = {(cut, codec): [] for cut in cuts for codec in codecs}
    for sample in samples:
        wanted = answer_log_probs(model, sample)
        for cut, codec in compared:
            with stream_changed(layers[cut], partial(through_codec, codec=codec)) as widths:
                compared[cut, codec] += compare(wanted, answer_log_probs(model, sample))
    return [summarize(cut, codec, row_bytes(codec, widths[0]), positions) for (cut, codec), positions in compared.items()]


def through_codec(rows: Tensor, codec: str) -> Tensor:
    """What is left of rows on the other side.  [n, width] float32 -> [n, width] float32"""
    return codec_torch.decode(codec_torch.encode(rows, codec), codec, rows.shape[1])


def decoder_layers(model: torch.nn.Module) -> torch.nn.ModuleList:
    """The layers of a causal LM, in order. Raises ModelError."""
    get_decoder = getattr(model, "get_decoder", None)
    decoder = get_decoder() if callable(get_decoder) else None
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, torch.nn.ModuleList):
        raise ModelError(f"{type(model).__name__} has no list of decoder layers that it could be cut at; take another architecture")
    return layers


@contextmanager
def stream_changed(layer: torch.nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[list[int]]:
    """Within it, rows that enter `layer` are changed: [n, width] float32 to the same. Yields the widths of those so far."""
    widths: list[int] = []

    def replace(_: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]  # [batch, positions, width]
        widths.append(hidden.shape[-1])
        changed = change(hidden.flatten(0, -2).to(torch.float32)).to(hidden.dtype).reshape(hidden.shape)
        return ((changed, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": changed})

    handle = layer.register_forward_pre_hook(replace, with_kwargs=True)
    try:
        yield widths
    finally:
        handle.remove()


def answer_log_probs(model: torch.nn.Module, sample: Sample) -> Tensor:
    """Of every token, at every position of the answer, given the answer before it. -> [answer, vocab] float32"""
    ids, num_positions = torch.tensor([sample.prompt_ids + sample.continuation_ids[:-1]]), len(sample.continuation_ids)
    with torch.inference_mode():
        logits: Tensor = model(input_ids=ids, use_cache=False, logits_to_keep=num_positions).logits[0, -num_positions:]
    return logits.float().log_softmax(dim=1)


def compare(wanted: Tensor, got: Tensor) -> list[tuple[bool, float]]:
    """For each position, whether both choose the same token, and KL(wanted || got) in nats. Log probabilities: [answer, vocab]"""
    same = wanted.argmax(dim=1) == got.argmax(dim=1)
    kl = (wanted.exp() * (wanted - got)).sum(dim=1).clamp(min=0.0)  # of equals it is a rounding error, of either sign
    return list(zip(same.tolist(), kl.tolist(), strict=True))


def summarize(cut: int, codec: str, bytes_per_position: int, positions: Sequence[tuple[bool, float]]) -> Damage:
    """Over all positions of all samples."""
    same, kl = zip(*positions, strict=True)
    num = len(positions)
    return Damage(cut, codec, bytes_per_position, sum(same) / num, sum(kl) / num, max(kl), num)
