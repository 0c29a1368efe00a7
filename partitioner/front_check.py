"""Is an exported front the target's first layers, and what does it change in the target's answers?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from edgecloud.errors import ModelError
from edgecloud.kernels.codec import decode, encode, row_bytes
from edgecloud.partitioner.check import MAX_PARITY_DIFF, NUM_PARITY_STEPS, Parity, Sample, graph_buffers
from edgecloud.partitioner.damage import answer_log_probs, compare, decoder_layers
from edgecloud.partitioner.graph import FrontGraph

Rows = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class FrontQuality:
    """The split target, front and codec as in the bundle, against the target, along the target's own greedy answers."""

    median_relative_error: float  # of the front's rows before the codec: |difference| / |row|, Euclidean
    max_relative_error: float
    agreement: float  # share of positions where both choose the same token
    kl_nats: float  # mean over positions of KL(target || split target)
    bytes_per_position: int
    num_positions: int


def check_front_parity(target: torch.nn.Module, cut: int, graph: FrontGraph, samples: Sequence[Sample]) -> Parity:
    """Compare a front in fp32 with torch's stream entering layer `cut`: a prompt in one run, then runs of two rows.

    Raises:
        ModelError: a row differs by more than MAX_PARITY_DIFF of its largest value.
    """
    worst, worst_relative, num_positions = 0.0, 0.0, 0
    for sample in samples:
        tokens = [*sample.prompt_ids, *sample.continuation_ids[: 2 * NUM_PARITY_STEPS]]
        expected = stream_entering(target, cut, tokens)
        rows = _rows(graph, [len(sample.prompt_ids)] + [2] * NUM_PARITY_STEPS, tokens)
        differences = np.abs(rows - expected).max(axis=1)
        relative = differences / np.abs(expected).max(axis=1)
        worst, worst_relative = max(worst, float(differences.max())), max(worst_relative, float(relative.max()))
        num_positions += len(tokens)
        if not relative.max() <= MAX_PARITY_DIFF:  # also when it is NaN
            raise ModelError(
                f"the exported front is not the model's first {cut} layers: its rows differ from torch's by {relative.max():.2g} "
                f"of their largest value, allowed {MAX_PARITY_DIFF:g}; the model builder does not support this model as it should"
            )
    return Parity(worst, worst_relative, MAX_PARITY_DIFF, num_positions)


def measure_front_quality(
    target: torch.nn.Module, cut: int, graph: FrontGraph, codec: str, samples: Sequence[Sample]
) -> FrontQuality:
    """Errors of its rows, and the answers of the target when they enter layer `cut` encoded and decoded."""
    return measure_front_qualities(target, cut, graph, [codec], samples)[codec]


def measure_front_qualities(
    target: torch.nn.Module, cut: int, graph: FrontGraph, codecs: Sequence[str], samples: Sequence[Sample]
) -> dict[str, FrontQuality]:
    """The same for several codecs; each costs a pass of the target a sample."""
    errors: list[float] = []
    positions: dict[str, list[tuple[bool, float]]] = {codec: [] for codec in codecs}
    for sample in samples:
        tokens = [*sample.prompt_ids, *sample.continuation_ids[:-1]]
        expected = stream_entering(target, cut, tokens)
        rows = _rows(graph, [len(tokens)], tokens)
        errors += (np.linalg.norm(rows - expected, axis=1) / np.linalg.norm(expected, axis=1)).tolist()
        wanted = answer_log_probs(target, sample)
        for codec in codecs:
            with entering(decoder_layers(target)[cut], decode(encode(rows, codec), codec, graph.width)):
                positions[codec] += compare(wanted, answer_log_probs(target, sample))
    return {
        codec: FrontQuality(
            median_relative_error=float(np.median(errors)),
            max_relative_error=max(errors),
            agreement=sum(same for same, _ in of_codec) / len(of_codec),
            kl_nats=sum(kl for _, kl in of_codec) / len(of_codec),
            bytes_per_position=row_bytes(codec, graph.width),
            num_positions=len(of_codec),
        )
        for codec, of_codec in positions.items()
    }


def open_front(path: Path, samples: Sequence[Sample]) -> FrontGraph:
    """The front with room for every sample, on two threads."""
    return FrontGraph(path, graph_buffers(samples), num_threads=2)


def stream_entering(target: torch.nn.Module, cut: int, tokens: Sequence[int]) -> Rows:
    """-> [len(tokens), width]. Raises ModelError where the model's layers cannot be found."""
    found: list[Tensor] = []

    def keep(_: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(args[0] if args else kwargs["hidden_states"])

    handle = decoder_layers(target)[cut].register_forward_pre_hook(keep, with_kwargs=True)
    try:
        with torch.inference_mode():
            target(input_ids=torch.tensor([list(tokens)]), use_cache=False, logits_to_keep=1)
    finally:
        handle.remove()
    rows: Rows = found[0][0].float().numpy()
    return rows


@contextmanager
def entering(layer: torch.nn.Module, rows: Rows) -> Iterator[None]:
    """Within it, these rows enter `layer`, whatever came out of the one before."""

    def replace(_: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]  # [1, positions, width]
        ours = torch.from_numpy(rows)[None].to(hidden.dtype)
        return ((ours, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": ours})

    handle = layer.register_forward_pre_hook(replace, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _rows(graph: FrontGraph, sizes: Sequence[int], tokens: Sequence[int]) -> Rows:
    """All rows of `tokens`, in runs of these sizes, as far as they go."""
    graph.crop_to(0)
    pieces = []
    for size in sizes:
        if piece := tokens[graph.length : graph.length + size]:
            pieces.append(graph.extend(piece))
    return np.concatenate(pieces)
