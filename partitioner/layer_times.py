"""What a pass takes, layer by layer, on a machine that is described: the roofline, or what was measured there.

A layer waits for its weights or for its arithmetic, whichever is slower (Williams, Waterman, Patterson 2009), then for the keys and
values that it attends to.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from edgecloud.errors import ModelError
from edgecloud.partitioner.machine_profile import MachineProfile, Measured
from edgecloud.partitioner.model_folder import ModelFolder

BLOCK = 32  # weights that share a scale
# Of one weight, with its share of a block's fp32 scale.
WEIGHT_BYTES = {"int4": 4 / 8 + 4 / BLOCK, "int8": 1 + 4 / BLOCK, "fp16": 2.0, "fp32": 4.0}
DEVICE_KV_BYTES = 4  # of a number in the device's caches: fp32


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A decoder's sizes: all that its times and bytes depend on."""

    name: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    intermediate_size: int
    vocab_size: int
    tied: bool  # embedding and head are one matrix
    fingerprint: str | None = None  # to find what was measured of it
    num_kept_ids: int | None = None  # rows of a trimmed head

    @classmethod
    def of(cls, model: ModelFolder, fingerprint: str | None = None, num_kept_ids: int | None = None) -> ModelShape:
        """From config.json. Raises ModelError: a size is missing."""
        inner = model.config.get("text_config")
        config = inner if isinstance(inner, dict) else model.config

        def size(*names: str) -> int:
            for name in names:
                if isinstance(value := config.get(name), int) and value > 0:
                    return value
            raise ModelError(f"{model.path / 'config.json'} does not say {names[0]}, which a plan needs; give --cut, or no plan")

        hidden, heads = size("hidden_size", "n_embd"), size("num_attention_heads", "n_head")
        return cls(
            name=model.name,
            num_layers=size("num_hidden_layers", "n_layer"),
            hidden_size=hidden,
            num_heads=heads,
            num_kv_heads=_optional(config, "num_key_value_heads") or heads,
            head_size=_optional(config, "head_dim") or hidden // heads,
            intermediate_size=_optional(config, "intermediate_size", "n_inner") or 4 * hidden,
            vocab_size=model.vocab_size,
            tied=bool(model.config.get("tie_word_embeddings")),
            fingerprint=fingerprint,
            num_kept_ids=num_kept_ids,
        )

    @property
    def layer_weights(self) -> int:
        """Numbers in the matrices of a layer."""
        attention = self.hidden_size * self.head_size * 2 * (self.num_heads + self.num_kv_heads)
        return attention + 3 * self.hidden_size * self.intermediate_size

    @property
    def head_weights(self) -> int:
        """Numbers in the head."""
        return self.hidden_size * (self.num_kept_ids or self.vocab_size)

    @property
    def num_weights(self) -> int:
        """Numbers that a pass reads: the layers and the head; of the embedding it reads a row a token."""
        return self.num_layers * self.layer_weights + self.head_weights

    def kv_bytes(self, num_layers: int, num_tokens: int, number_bytes: float = DEVICE_KV_BYTES) -> float:
        """Of the caches of so many layers."""
        return 2 * self.num_kv_heads * self.head_size * number_bytes * num_layers * num_tokens

    def weight_bytes(self, weights: str, num_layers: int | None = None, *, head: bool = True) -> float:
        """Of embedding, the first `num_layers` layers (None: all), and the head."""
        layers = self.num_layers if num_layers is None else num_layers
        own_head = self.head_weights if head and not self.tied else 0
        return WEIGHT_BYTES[weights] * (layers * self.layer_weights + self.hidden_size * self.vocab_size + own_head)


@dataclass(frozen=True, slots=True)
class LayerTimes:
    """One model on one machine, its weights in one format."""

    shape: ModelShape
    machine: MachineProfile
    weights: str

    def __post_init__(self) -> None:
        if self.weights not in self.machine.compute:
            raise ValueError(f"{self.machine.name} has no figure for {self.weights}: {', '.join(self.machine.compute)}")

    def layers_ms(self, first: int, last: int, num_rows: int, context_tokens: float) -> float:
        """Layers first..last-1 over so many rows, the last of which attends to `context_tokens`."""
        shape, bandwidth = self.shape, self.machine.memory_bandwidth
        kv_gb = shape.kv_bytes(1, 1, 2 if self.weights == "fp16" else 4) / 1e9  # of a token
        if measured := self._measured:
            alone = sum(at_rows(measured.rows, measured.layer(layer), num_rows) for layer in range(first, last))
            further_gb = (last - first) * kv_gb * (context_tokens - measured.context_tokens)
            return max(0.0, alone + 1e3 * further_gb / bandwidth)
        attention = 4 * num_rows * max(0.0, context_tokens - num_rows / 2) * shape.num_heads * shape.head_size
        gflop = (2 * num_rows * shape.layer_weights + attention) / 1e9
        one_ms = self._roofline_ms(shape.layer_weights, gflop) + 1e3 * kv_gb * context_tokens / bandwidth
        return (last - first) * (one_ms + self.machine.overheads.layer_ms)

    def ends_ms(self, num_rows: int, head_rows: int) -> float:
        """Embedding, head over the last `head_rows` of the rows, and what is around the layers."""
        if measured := self._measured:
            return at_rows(measured.rows, measured.rest_ms, num_rows if head_rows > 1 else 1) if head_rows else 0.0
        head_ms = self._roofline_ms(self.shape.head_weights, 2 * head_rows * self.shape.head_weights / 1e9) if head_rows else 0.0
        return head_ms + self.machine.overheads.pass_ms

    def draft_ms(self, num_rows: int, context_tokens: float) -> float:
        """A pass of the whole model that yields the last row's logits."""
        return self.layers_ms(0, self.shape.num_layers, num_rows, context_tokens) + self.ends_ms(num_rows, 1)

    def front_ms(self, cut: int, num_rows: int, context_tokens: float) -> float:
        """Embedding and the layers before the cut."""
        return self.layers_ms(0, cut, num_rows, context_tokens) + self.ends_ms(num_rows, 0)

    def tail_ms(self, cut: int, num_rows: int, context_tokens: float, head_rows: int | None = None) -> float:
        """The layers from the cut on, from 0 all of them, and the head over `head_rows` rows, None: over every row."""
        layers_ms = self.layers_ms(cut, self.shape.num_layers, num_rows, context_tokens)
        return layers_ms + self.ends_ms(num_rows, num_rows if head_rows is None else head_rows)

    @property
    def _measured(self) -> Measured | None:
        found = self.machine.find(self.shape.fingerprint, self.weights) if self.shape.fingerprint else None
        return found if found is not None and found.fits(self.shape.num_layers) else None

    def _roofline_ms(self, num_weights: int, gflop: float) -> float:
        gb = num_weights * WEIGHT_BYTES[self.weights] / 1e9
        return 1e3 * max(gb / self.machine.memory_bandwidth, gflop / self.machine.compute[self.weights])


def at_rows(rows: Sequence[int], ms: Sequence[float], num_rows: int) -> float:
    """Of a run. Straight lines between the measured numbers of rows, the last one going on; a single one grows with the rows."""
    if num_rows <= rows[0]:
        return ms[0]
    if len(rows) == 1:
        return ms[0] * num_rows / rows[0]
    at = min(max(bisect_left(rows, num_rows), 1), len(rows) - 1)
    slope = (ms[at] - ms[at - 1]) / (rows[at] - rows[at - 1])
    return max(0.0, ms[at - 1] + slope * (num_rows - rows[at - 1]))


def _optional(config: dict[str, Any], *names: str) -> int | None:
    return next((value for name in names if isinstance(value := config.get(name), int) and value > 0), None)
