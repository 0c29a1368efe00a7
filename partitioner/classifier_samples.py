"""The user's samples of a classifier: arrays whose first dimension counts them, and what each of them is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgecloud.errors import ConfigError
from edgecloud.graph_bundle import TensorInfo
from edgecloud.partitioner.ort_session import Session
from edgecloud.partitioner.samples import Array, Sample, read_arrays

Labels = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Stack:
    """Samples."""

    arrays: Sample  # [num_samples, ...] each
    num_samples: int

    def run(self, session: Session, outputs: Sequence[str]) -> dict[str, Array]:
        """These outputs of all samples, a row each. One a run, as on a device: what shares a run may move the last bits."""
        found: dict[str, list[Array]] = {name: [] for name in outputs}
        for index in range(self.num_samples):
            for name, value in session.run(self.one(index), outputs).items():
                found[name].append(value)
        return {name: np.concatenate(values) for name, values in found.items()}

    def one(self, index: int) -> Sample:
        """A sample as the graph takes it."""
        return {name: array[index : index + 1] for name, array in self.arrays.items()}


def load_stack(file: Path, inputs: Sequence[TensorInfo]) -> Stack:
    """Read them. A graph that takes a fixed number of rows has to take one.

    Raises:
        ConfigError: the file cannot be read, or its arrays are not the graph's inputs, or of different numbers of samples.
    """
    arrays = read_arrays(file, inputs)
    counts = {name: len(array) if array.ndim else 0 for name, array in arrays.items()}
    if len(set(counts.values())) != 1 or not min(counts.values()):
        raise ConfigError(f"--inputs {file} has {counts} samples; the first dimension counts them, the same number for every input")
    fixed = {tensor.shape[0] for tensor in inputs if tensor.shape and isinstance(tensor.shape[0], int)}
    if fixed - {1}:
        raise ConfigError(f"the graph takes {max(fixed)} rows at a time; export it with one, or with an open first dimension")
    for tensor in inputs:
        wanted, found = tensor.shape[1:], arrays[tensor.name].shape[1:]
        fits = len(wanted) == len(found) and all(not isinstance(w, int) or w == n for w, n in zip(wanted, found, strict=True))
        if not fits:
            raise ConfigError(f"--inputs {file}: samples of {tensor.name!r} have shape {list(found)}, the model takes {wanted}")
    return Stack(arrays, min(counts.values()))


def load_labels(file: Path, num_samples: int, num_classes: int) -> Labels:
    """The class of every sample. Raises ConfigError: they cannot be read, or are not classes of so many samples."""
    try:
        labels = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ConfigError(f"--labels {file} cannot be read: {error}; save whole numbers with numpy.save") from error
    if not isinstance(labels, np.ndarray) or labels.ndim != 1 or labels.dtype.kind not in "iu":
        what = f"{labels.dtype} of shape {list(labels.shape)}" if isinstance(labels, np.ndarray) else "several arrays"
        raise ConfigError(f"--labels {file} holds {what}; it takes one whole number a sample, saved with numpy.save")
    if len(labels) != num_samples:
        raise ConfigError(f"--labels {file} has {len(labels)} labels, --inputs {num_samples} samples; give one for each")
    if labels.size and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
        raise ConfigError(
            f"--labels {file} has labels from {labels.min()} to {labels.max()}, the classifier classes 0 to {num_classes - 1}"
        )
    return labels.astype(np.int64)
