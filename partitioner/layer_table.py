"""Layer by layer: what a model takes on a device and in a cloud, and what crosses every boundary."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from edgecloud.kernels.codec import CODECS, row_bytes
from edgecloud.partitioner.layer_times import WEIGHT_BYTES, LayerTimes, ModelShape
from edgecloud.partitioner.machine_profile import MachineProfile


@dataclass(frozen=True, slots=True)
class LayerRow:
    """One layer, the device's weights in one format. Times in ms."""

    layer: int
    device_decode_ms: float  # one row
    device_verify_ms: float  # K + 1 rows
    device_prefill_ms: float  # the prompt
    cloud_decode_ms: float
    cloud_verify_ms: float
    cloud_prefill_ms: float

    @property
    def times(self) -> tuple[float, ...]:
        """In the order of the fields."""
        return (
            self.device_decode_ms, self.device_verify_ms, self.device_prefill_ms,
            self.cloud_decode_ms, self.cloud_verify_ms, self.cloud_prefill_ms,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class LayerTable:
    """All layers, and what they weigh."""

    model: str
    device: str
    cloud: str
    device_weights: str
    cloud_weights: str
    num_draft_tokens: int
    prompt_tokens: int
    context_tokens: int
    rows: tuple[LayerRow, ...]
    layer_bytes: dict[str, float]  # weights of a layer, by format
    head_bytes: dict[str, float]  # of the head, by format
    kv_bytes_per_token: float  # of a layer, on the device
    boundary_bytes: dict[str, int]  # of a position, by codec; the same at every boundary

    def to_dict(self) -> dict[str, Any]:
        """The object that --json prints."""
        return asdict(self)

    def to_table(self) -> Table:
        """For a terminal; layers that take the same are one line."""
        table = Table(title=f"{self.model}: ms a layer", title_justify="left", box=SIMPLE_HEAD, padding=(0, 1))
        table.add_column("layers")
        verify = f"verify, {self.num_draft_tokens + 1} rows"
        for place in (f"device {self.device_weights}", f"cloud {self.cloud_weights}"):
            for what in ("decode", verify, f"prefill, {self.prompt_tokens}"):
                table.add_column(f"{place}: {what}", justify="right")
        for first, last in self._alike():
            name = f"{first}" if first == last else f"{first} to {last}"
            row = self.rows[first]
            table.add_row(name, *(f"{ms:.3f}" for ms in row.times))
        return table

    def lines(self) -> list[str]:
        """Bytes, in words."""
        weights = ", ".join(f"{name} {value / 1e6:.1f} MB" for name, value in self.layer_bytes.items())
        boundary = ", ".join(f"{name} {value}" for name, value in self.boundary_bytes.items())
        return [
            f"device: {self.device}; cloud: {self.cloud}; a context of {self.context_tokens} tokens",
            f"weights of a layer: {weights}; its keys and values: {self.kv_bytes_per_token / 1e3:.1f} kB a token",
            f"bytes a position at any boundary: {boundary}",
        ]

    def _alike(self) -> list[tuple[int, int]]:
        spans: list[tuple[int, int]] = []
        for row in self.rows:
            same = spans and self.rows[spans[-1][0]].times == row.times
            spans = [*spans[:-1], (spans[-1][0], row.layer)] if same else [*spans, (row.layer, row.layer)]
        return spans


def layer_table(
    shape: ModelShape, device: MachineProfile, cloud: MachineProfile, device_weights: str, num_draft_tokens: int = 4,
    prompt_tokens: int = 128,
) -> LayerTable:  # fmt: skip
    """Every layer's times for decoding, verifying and reading a prompt. Raises ValueError: the device cannot run that format."""
    here, there = LayerTimes(shape, device, device_weights), LayerTimes(shape, cloud, cloud.serves)
    work = ((1, prompt_tokens), (num_draft_tokens + 1, prompt_tokens), (prompt_tokens, prompt_tokens))
    rows = tuple(
        LayerRow(layer, *(times.layers_ms(layer, layer + 1, *one) for times in (here, there) for one in work))
        for layer in range(shape.num_layers)
    )
    return LayerTable(
        model=shape.name,
        device=device.name,
        cloud=cloud.name,
        device_weights=device_weights,
        cloud_weights=cloud.serves,
        num_draft_tokens=num_draft_tokens,
        prompt_tokens=prompt_tokens,
        context_tokens=prompt_tokens,
        rows=rows,
        layer_bytes={name: shape.layer_weights * size for name, size in WEIGHT_BYTES.items()},
        head_bytes={name: shape.head_weights * size for name, size in WEIGHT_BYTES.items()},
        kv_bytes_per_token=shape.kv_bytes(1, 1),
        boundary_bytes={codec: row_bytes(codec, shape.hidden_size) for codec in CODECS},
    )
