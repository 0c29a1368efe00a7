"""What a boundary codec does to a target's answers: rate against damage, for each split point.

The residual stream that enters layer `cut` goes through encode and decode, at every position, as it would between a front and a
tail; the rest of the target runs as it is. Layers before the cut are the target's own: what a quantized front does comes on top.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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
    tallies = {(cut, codec): _Tally() for cut in cuts for codec in codecs}
    for sample in samples:
        wanted = answer_log_probs(model, sample)
        for (cut, codec), tally in tallies.items():
            with through_codec(layers[cut], codec) as widths:
                tally.add(wanted, answer_log_probs(model, sample))
            tally.bytes_per_position = row_bytes(codec, widths[0])
    return [tally.damage(cut, codec) for (cut, codec), tally in tallies.items()]


def decoder_layers(model: torch.nn.Module) -> torch.nn.ModuleList:
    """The layers of a causal LM, in order. Raises ModelError."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None  # type: ignore[operator]
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, torch.nn.ModuleList):
        raise ModelError(f"{type(model).__name__} has no list of decoder layers that it could be cut at; take another architecture")
    return layers


@contextmanager
def through_codec(layer: torch.nn.Module, codec: str) -> Iterator[list[int]]:
    """Within it, what enters `layer` has been encoded and decoded. Yields the widths of the rows so far."""
    widths: list[int] = []

    def replace(_: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]  # [batch, positions, width]
        width = hidden.shape[-1]
        widths.append(width)
        data = codec_torch.encode(hidden.reshape(-1, width).to(torch.float32), codec)
        decoded = codec_torch.decode(data, codec, width, hidden.dtype).reshape(hidden.shape)
        return ((decoded, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": decoded})

    handle = layer.register_forward_pre_hook(replace, with_kwargs=True)
    try:
        yield widths
    finally:
        handle.remove()


def answer_log_probs(model: torch.nn.Module, sample: Sample) -> Tensor:
    """Of every token, at every position of the answer, given the answer before it. -> [answer, vocab] float32"""
    ids = torch.tensor([sample.prompt_ids + sample.continuation_ids[:-1]])
    with torch.inference_mode():
        logits: Tensor = model(input_ids=ids, use_cache=False, logits_to_keep=len(sample.continuation_ids)).logits[0]
    return logits.float().log_softmax(dim=1)


class _Tally:
    """Sums over samples."""

    def __init__(self) -> None:
        self.bytes_per_position = 0
        self._num_agreed = 0
        self._kl: list[float] = []

    def add(self, wanted: Tensor, got: Tensor) -> None:
        self._num_agreed += int((wanted.argmax(dim=1) == got.argmax(dim=1)).sum())
        self._kl += (wanted.exp() * (wanted - got)).sum(dim=1).clamp(min=0.0).tolist()

    def damage(self, cut: int, codec: str) -> Damage:
        num = len(self._kl)
        return Damage(cut, codec, self.bytes_per_position, self._num_agreed / num, sum(self._kl) / num, max(self._kl), num)
