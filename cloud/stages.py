"""A model whose decoder layers rows may enter at: a pass takes each row through the layers from its own on.

Rows of a pass are in the order of the layers that they enter at, so that the rows at work in a layer are the first ones. The others
lie behind them, untouched, until it is their turn; to products they may be padding. A layer that nobody has reached is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from edgecloud.cloud.attention import Entry, PagedBatch
from edgecloud.kernels.attention import Segments

Forward = Callable[..., Any]


class Stages:
    """The decoder layers of a model. `padded`: with how many rows a product over so many is made, where more come behind."""

    def __init__(self, layers: Sequence[nn.Module], padded: Callable[[int], int]) -> None:
        self._layers = layers
        self._padded = padded

    def __len__(self) -> int:
        return len(self._layers)

    @contextmanager
    def entered(self, batch: PagedBatch) -> Iterator[None]:
        """While it lasts, the model runs `batch`, whose rows enter as its entries say. Layers that all have reached run as ever."""
        entries = {entry.layer: entry for entry in batch.entries}
        first, last = min(entries), max(entries)
        now = _Stage(batch, entries[first], self._padded)
        forwards: list[Forward] = []
        for index in range(last + 1):
            if index in entries:
                later = [entry for entry in batch.entries if entry.layer > index]
                now = _Stage(batch, later[0] if later else None, self._padded)
            forwards.append(now.layer(self._layers[index].forward, entries.get(index)))
        with _replaced(self._layers, forwards):
            yield

    @contextmanager
    def recorded(self) -> Iterator[list[Tensor]]:
        """While it lasts, what every layer takes is added to the list.  [1, rows, width] each"""
        taken: list[Tensor] = []

        def recording(forward: Forward) -> Forward:
            def run(hidden_states: Tensor, **kwargs: Any) -> Any:
                taken.append(hidden_states.clone())
                return forward(hidden_states, **kwargs)

            return run

        with _replaced(self._layers, [recording(layer.forward) for layer in self._layers]):
            yield taken


class _Stage:
    """Layers that the same rows go through: those before `later`'s; None: all."""

    def __init__(self, batch: PagedBatch, later: Entry | None, padded: Callable[[int], int]) -> None:
        self._is_whole = later is None
        self._num_rows = len(batch.slots) if later is None else later.row
        self._num_padded = padded(self._num_rows)
        segments = Segments(batch.segments[: later.segment if later else None], bitwise=batch.segments.bitwise)
        self._batch = batch if later is None else replace(batch, slots=batch.slots[: later.row], segments=segments)
        self._sliced: dict[int, tuple[Any, Any]] = {}  # by what it was made of, and that

    def layer(self, forward: Forward, entry: Entry | None) -> Forward:
        """What a layer does, before which `entry` comes in."""

        def run(hidden_states: Tensor, **kwargs: Any) -> Any:
            if entry is not None:
                at = entry.row
                for hidden in entry.hidden:
                    hidden_states[0, at : at + len(hidden)] = hidden
                    at += len(hidden)
            if self._is_whole:
                return forward(hidden_states, **kwargs)
            if self._num_rows:
                kwargs = {name: self._first(value) for name, value in kwargs.items() if name != "paged_batch"}
                out = forward(hidden_states[:, : self._num_padded], paged_batch=self._batch, **kwargs)
                hidden_states[:, : self._num_rows] = out[:, : self._num_rows]
            return hidden_states

        return run

    def _first(self, value: Any) -> Any:
        """Of what a layer is given for each row (positions, and what they turn by) the first ones': once for all layers."""
        if not isinstance(value, Tensor | tuple):
            return value
        if id(value) not in self._sliced:
            parts = value if isinstance(value, tuple) else (value,)
            first = tuple(part[:, : self._num_padded] for part in parts)
            self._sliced[id(value)] = (first if isinstance(value, tuple) else first[0], value)
        return self._sliced[id(value)][0]


@contextmanager
def _replaced(layers: Sequence[nn.Module], forwards: Sequence[Forward]) -> Iterator[None]:
    """The first layers do something else while it lasts."""
    before = [vars(layer).get("forward") for layer in layers[: len(forwards)]]
    try:
        for layer, forward in zip(layers, forwards, strict=False):
            vars(layer)["forward"] = forward
        yield
    finally:
        for layer, former in zip(layers, before, strict=False):
            if former is None:
                del vars(layer)["forward"]
            else:
                vars(layer)["forward"] = former
