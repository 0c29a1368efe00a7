"""A machine's profile from what was timed on it: kept as a file, it stands for a machine that is not at hand."""

from __future__ import annotations

from collections.abc import Sequence

from edgecloud.partitioner.layer_times import WEIGHT_BYTES, ModelShape
from edgecloud.partitioner.machine_profile import Energy, MachineProfile, Measured


def fitted(
    name: str,
    num_weights: int,
    measured: Measured,
    *,
    ram: float,
    energy: Energy | None = None,
    source: str = "measured",
) -> MachineProfile:
    """Bandwidth from the pass over fewest rows, arithmetic from the one over most: what other models take by the roofline.

    Args:
        name: of the machine.
        num_weights: of the model that was timed.
        measured: its passes.
        ram: GB that a model may use.
        energy: what is known of it.
        source: where and how it was measured.
    """
    pass_ms = [sum(layers) + rest for layers, rest in zip(measured.layer_ms, measured.rest_ms, strict=True)]
    bandwidth = num_weights * WEIGHT_BYTES[measured.weights] / 1e6 / pass_ms[0]
    compute = 2 * num_weights * measured.rows[-1] / 1e6 / pass_ms[-1]
    return MachineProfile(
        name=name,
        source=source,
        compute={measured.weights: round(compute, 1)},
        memory_bandwidth=round(bandwidth, 2),
        ram=ram,
        energy=energy or Energy(),
        measured=(measured,),
    )


def spread_over_layers(
    fingerprint: str, shape: ModelShape, weights: str, context_tokens: int, rows: Sequence[int], pass_ms: Sequence[float]
) -> Measured:
    """Passes of which only the whole was timed: layers are alike, and the head has its share of the weights."""
    head_share = shape.head_weights / (shape.head_weights + shape.num_layers * shape.layer_weights)
    layers = tuple((ms * (1 - head_share) / shape.num_layers,) * shape.num_layers for ms in pass_ms)
    return Measured(fingerprint, weights, context_tokens, tuple(rows), layers, tuple(ms * head_share for ms in pass_ms))
