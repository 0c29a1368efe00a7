"""A machine's profile from what was timed on it: kept as a file, it stands for a machine that is not at hand."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace

from edgecloud.partitioner.device import NUM_PREFILL_TOKENS, DeviceFigures
from edgecloud.partitioner.layer_times import WEIGHT_BYTES, ModelShape
from edgecloud.partitioner.machine_profile import Energy, MachineProfile, Measured


def fitted(
    name: str,
    num_weights: int,
    measured: Measured,
    pass_ms: Sequence[float],
    *,
    ram: float,
    energy: Energy | None = None,
    source: str = "measured",
) -> MachineProfile:
    """Bandwidth from the pass over fewest rows, arithmetic from the one over most: what other models take by the roofline.

    Args:
        name: of the machine.
        num_weights: that a pass of the timed model reads.
        measured: its passes, layer by layer.
        pass_ms: the same as a whole.
        ram: GB that a model may use.
        energy: what is known of it.
        source: where and how it was measured.
    """
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
    layers = tuple((round(ms * (1 - head_share) / shape.num_layers, 4),) for ms in pass_ms)
    return Measured(fingerprint, weights, context_tokens, tuple(rows), layers, tuple(round(ms * head_share, 3) for ms in pass_ms))


def measured_by_export(
    like: MachineProfile, fingerprint: str, shape: ModelShape, weights: str, figures: DeviceFigures
) -> MachineProfile:
    """The machine at hand, from what a partition times of the draft; what it did not time is as `like` has it, in proportion."""
    pass_ms = figures.decode_ms, figures.prefill_ms_per_token * NUM_PREFILL_TOKENS
    measured = spread_over_layers(fingerprint, shape, weights, NUM_PREFILL_TOKENS, (1, NUM_PREFILL_TOKENS), pass_ms)
    source = f"measured when the draft was exported, {figures.num_threads} thread(s)"
    here = fitted("this machine", shape.num_weights, measured, pass_ms, ram=ram_gb(), energy=like.energy, source=source)
    ratio = here.compute[weights] / like.compute[weights] if weights in like.compute else 1.0
    others = {name: round(gflops * ratio, 1) for name, gflops in like.compute.items() if name != weights}
    return replace(here, compute={**here.compute, **others})


def ram_gb() -> float:
    """Of this machine."""
    return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9, 1)
