"""What a graph engine is asked and what it answers: plain data, which travels between processes as it is."""

from __future__ import annotations

import math

import msgspec

from edgecloud.cloud.work import Failed, Gone, Overloaded


class TensorData(msgspec.Struct, frozen=True):
    """A tensor as it travels; see edgecloud.tensors."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    codec: str
    data: bytes


class RunCut(msgspec.Struct, frozen=True, tag=True):
    """Run the cloud's part of a cut. Checked against its TensorSpecs."""

    cut: str
    inputs: tuple[TensorData, ...]
    sent_s: float  # of time.monotonic(), which all processes of a machine share
    tenant: str = ""
    deadline_s: float = math.inf  # of the same clock

    @property
    def num_rows(self) -> int | None:
        """The first dimension, if all inputs have the same; None: they cannot be put together with another request's."""
        firsts = {tensor.shape[:1] for tensor in self.inputs}
        return next(iter(firsts))[0] if len(firsts) == 1 and () not in firsts else None

    @property
    def form(self) -> tuple[object, ...]:
        """What another request must be equal in to share a run: the cut, and all of the shapes but the first dimension."""
        return (self.cut, *sorted((tensor.name, tensor.shape[1:]) for tensor in self.inputs))


class Inferred(msgspec.Struct, frozen=True, tag=True):
    """The outputs."""

    outputs: tuple[TensorData, ...]
    compute_ms: float
    num_batched: int  # requests that shared this run


class Unfit(msgspec.Struct, frozen=True, tag=True):
    """The graph cannot run on these inputs."""

    reason: str


GraphAnswer = Inferred | Unfit | Overloaded | Failed | Gone


class TensorSpec(msgspec.Struct, frozen=True):
    """An input of a cut's cloud graph."""

    name: str
    dtype: str
    shape: tuple[int | None, ...]  # None: any size
    codec: str  # that the bundle has chosen for it; as it is will do as well


class CutSpec(msgspec.Struct, frozen=True):
    """The cloud's part of a cut."""

    name: str
    inputs: tuple[TensorSpec, ...]
    batches: bool  # whether inputs and outputs have a first dimension of any size: requests may be put together
