"""What `Client.run` gives back: the outputs of a graph, and what they took."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgecloud.tensors import Array


@dataclass(frozen=True, slots=True)
class InferenceMetrics:
    """What one run took, as the device measured it; queue and cloud as the service did. Bytes are serialized messages."""

    total_ms: float
    edge_ms: float = 0.0  # the device's graph, and encoding what travels
    uplink_ms: float = 0.0  # until the service had the whole request, and the device knew: a round trip is in it
    queue_ms: float = 0.0
    cloud_ms: float = 0.0  # decoding, and the cloud's graph
    downlink_ms: float = 0.0  # the rest of the call
    uplink_bytes: int = 0  # of all attempts together
    downlink_bytes: int = 0
    num_attempts: int = 0  # calls of the service
    num_batched: int = 0  # requests that shared the cloud's run


@dataclass(frozen=True, slots=True, eq=False)
class InferenceReply(Mapping[str, "Array"]):
    """The outputs by name, as a mapping: `reply["output"]`, `dict(reply)`."""

    outputs: dict[str, Array]
    cut: str  # edge: all of it on the device; cloud: all of it in the cloud; cut-1, ...: divided there
    metrics: InferenceMetrics
    fell_back: str | None = None  # why the device computed it all although the cloud was asked; None: as it was chosen
    exit: str | None = None  # the exit at which it left: the answer is that exit's and nobody verified it; None: the whole graph's

    def __getitem__(self, name: str) -> Array:
        return self.outputs[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.outputs)

    def __len__(self) -> int:
        return len(self.outputs)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the values, as `edgecloud run --json` prints it."""
        shapes = {name: {"dtype": str(array.dtype), "shape": list(array.shape)} for name, array in self.outputs.items()}
        where = {"cut": self.cut, "exit": self.exit, "fell_back": self.fell_back}
        return {**where, "outputs": shapes, "metrics": asdict(self.metrics)}
