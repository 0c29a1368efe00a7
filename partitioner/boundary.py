"""What a boundary tensor costs and loses with each codec: bytes, time, and damage to the outputs on the user's samples."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from edgecloud.errors import ConfigError, ModelError
from edgecloud.kernels import codec as kernel
from edgecloud.partitioner.cut_graph import Halves
from edgecloud.partitioner.onnx_model import OnnxModel
from edgecloud.partitioner.ort_session import NONE, Session
from edgecloud.partitioner.samples import Array, Sample
from edgecloud.partitioner.tensor_facts import TensorFact

LossMetric = Literal["relative", "argmax"]
LOSS_METRICS = {
    "relative": "largest, over samples and outputs, of ||y - y'|| / ||y||, where y are the outputs of the whole graph",
    "argmax": "largest, over samples and outputs, share of rows whose largest element is another",
}
LOSSY = ("float16", "int8", "int4")
RAW = ""
TRIAL_ROWS, TRIAL_WIDTH, NUM_TRIALS = 256, 768, 5


@dataclass(frozen=True, slots=True)
class CodecSpeed:
    """Of kernels/codec.py in NumPy, on this machine."""

    encode_ns: float  # an element
    decode_ns: float


@dataclass(frozen=True, slots=True)
class Damage:
    """What a cut does to the outputs."""

    max_error: float  # largest absolute difference
    loss: float  # by the metric; 0 only if every bit is the same, infinite if the codec does not take the values


def measure_codecs(codecs: Sequence[str]) -> dict[str, CodecSpeed]:
    """Medians over a few trials; raw costs nothing."""
    rows = np.random.default_rng(0).standard_normal((TRIAL_ROWS, TRIAL_WIDTH)).astype(np.float32)
    speeds = {RAW: CodecSpeed(0.0, 0.0)}
    for codec in codecs:
        spent: list[tuple[int, int]] = []
        for _ in range(NUM_TRIALS):
            begin = time.perf_counter_ns()
            data = kernel.encode(rows, codec)
            middle = time.perf_counter_ns()
            kernel.decode(data, codec, TRIAL_WIDTH)
            spent.append((middle - begin, time.perf_counter_ns() - middle))
        encode_ns, decode_ns = (statistics.median(times) for times in zip(*spent, strict=True))
        speeds[codec] = CodecSpeed(encode_ns / rows.size, decode_ns / rows.size)
    return speeds


def takes_codec(fact: TensorFact) -> bool:
    """Whether the tensor can be encoded at all: float32 with a last dimension."""
    return fact.dtype == "float32" and len(fact.shape) > 0 and fact.shape[-1] > 0


def encoded_bytes(fact: TensorFact, codec: str) -> int:
    """What the tensor takes on the wire."""
    if codec == RAW:
        return fact.num_bytes
    num_rows = int(np.prod(fact.shape[:-1], dtype=np.int64))
    return num_rows * kernel.row_bytes(codec, fact.shape[-1])


def through(array: Array, codec: str) -> Array:
    """The tensor as it arrives. Raises ConfigError if the codec does not take its values."""
    if codec == RAW or not array.size:
        return array
    width = array.shape[-1]
    rows = np.ascontiguousarray(array, np.float32).reshape(-1, width)
    return kernel.decode(kernel.encode(rows, codec), codec, width).reshape(array.shape)


class Accuracy:
    """The whole graph's outputs on the samples, to hold cuts against.

    Raises:
        ModelError: the model does not run, or its outputs change from run to run.
    """

    def __init__(self, model: OnnxModel, samples: Sequence[Sample], metric: LossMetric, num_threads: int) -> None:
        self._model, self._samples, self._metric, self._num_threads = model, samples, metric, num_threads
        whole = Session(model.proto, num_threads, name=str(model.path))
        self._expected = [whole.run(sample) for sample in samples]
        again = whole.run(samples[0])
        if any(not same_bits(again[name], value) for name, value in self._expected[0].items()):
            raise ModelError(
                f"{model.path} gives other outputs for the same inputs, so no cut of it can be checked; fix its random seed"
            )

    def measure(self, halves: Halves, codecs: Mapping[str, str]) -> Damage:
        """Front, codecs, tail, as the runtime runs them. `codecs`: of boundary tensors; others travel raw."""
        worst = Damage(0.0, 0.0)
        front = None if halves.edge is None else Session(halves.edge, self._num_threads)
        tail = None if halves.cloud is None else Session(halves.cloud, self._num_threads)
        for sample, expected in zip(self._samples, self._expected, strict=True):
            try:
                found = run_halves(halves, front, tail, sample, codecs)
            except ConfigError:
                return Damage(math.inf, math.inf)
            for name, value in expected.items():
                damage = _damage(value, found[name], self._metric)
                worst = Damage(max(worst.max_error, damage.max_error), max(worst.loss, damage.loss))
        return worst

    @property
    def largest(self) -> float:
        """The largest finite absolute value of an output: what a rounding error is small against."""
        values = [np.abs(value.astype(np.float64)) for outputs in self._expected for value in outputs.values()]
        return max(float(value.max(initial=0.0, where=np.isfinite(value))) for value in values)

    def changed_outputs(self, halves: Halves) -> list[str]:
        """Without the runtime's optimizations every node is computed as in the whole: the halves must give the same bits.

        -> outputs that do not, so the cut itself is wrong
        """
        whole = Session(self._model.proto, self._num_threads, level=NONE).run(self._samples[0])
        front = None if halves.edge is None else Session(halves.edge, self._num_threads, level=NONE)
        tail = None if halves.cloud is None else Session(halves.cloud, self._num_threads, level=NONE)
        found = run_halves(halves, front, tail, self._samples[0], {})
        return [name for name, value in whole.items() if not same_bits(value, found[name])]

    def require_same_nodes(self, halves: Halves) -> None:
        """Raises ModelError if there are `changed_outputs`."""
        if changed := self.changed_outputs(halves):
            raise ModelError(
                f"{self._model.path}: output {changed[0]!r} changes when the graph is cut at {halves.boundary}; report this model"
            )


def run_halves(
    halves: Halves, front: Session | None, tail: Session | None, sample: Sample, codecs: Mapping[str, str]
) -> dict[str, Array]:
    """Every output of the graph, computed as a device and a cloud would."""
    made = {} if front is None else front.run(sample)
    if tail is None:
        return made
    held = {**sample, **made}
    sent = {name: through(held[name], codecs.get(name, RAW)) for name in halves.boundary}
    return {**{name: made[name] for name in halves.edge_outputs}, **tail.run(sent)}


def same_bits(first: Array, second: Array) -> bool:
    """Equal in shape, dtype and every bit."""
    return first.shape == second.shape and first.dtype == second.dtype and first.tobytes() == second.tobytes()


def _damage(expected: Array, found: Array, metric: LossMetric) -> Damage:
    if expected.shape != found.shape:
        return Damage(math.inf, math.inf)
    if same_bits(expected, found):
        return Damage(0.0, 0.0)
    y, z = expected.astype(np.float64), found.astype(np.float64)
    if not np.array_equal(np.isfinite(y), np.isfinite(z)):
        return Damage(math.inf, math.inf)
    finite = np.isfinite(y)
    difference = np.abs(np.where(finite, y - np.where(finite, z, 0.0), 0.0))
    max_error = float(difference.max(initial=0.0))
    if metric == "argmax" and y.ndim:
        other = y.reshape(-1, y.shape[-1]).argmax(axis=1) != z.reshape(-1, y.shape[-1]).argmax(axis=1)
        return Damage(max_error, float(other.mean()))
    size = float(np.linalg.norm(np.where(finite, y, 0.0)))
    loss = float(np.linalg.norm(difference)) / size if size else math.inf
    return Damage(max_error, max(loss, float(np.finfo(np.float64).tiny)))  # a bit differs, however little it is
