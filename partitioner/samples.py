"""Inputs of the user's: they give dynamic dimensions their size, time the nodes, and judge what a codec damages."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgecloud.errors import ConfigError
from edgecloud.graph_bundle import TensorInfo
from edgecloud.partitioner.onnx_model import OnnxModel

Array = npt.NDArray[np.generic]
Sample = dict[str, Array]


def load_samples(files: Sequence[Path], model: OnnxModel) -> list[Sample]:
    """One sample a file, an .npz with an array for every input. Without files, one that is made up if all shapes are fixed.

    Raises:
        ConfigError: a file cannot be read, or its arrays are not the model's inputs; names the input and what it takes.
    """
    if files:
        return [_load(file, model) for file in files]
    for tensor in model.inputs:
        if not all(isinstance(size, int) for size in tensor.shape):
            raise ConfigError(
                f"input {tensor.name!r} of {model.path} has the dynamic shape {tensor.shape}; give --inputs SAMPLE.npz"
            )
    generator = np.random.default_rng(0)
    return [{tensor.name: _invent(tensor, generator) for tensor in model.inputs}]


def _load(file: Path, model: OnnxModel) -> Sample:
    sample = read_arrays(file, model.inputs)
    for tensor in model.inputs:
        _check_shape(file, tensor, sample[tensor.name])
    return sample


def read_arrays(file: Path, inputs: Sequence[TensorInfo]) -> Sample:
    """An array for every input, of its dtype; the shape is not looked at. Raises ConfigError as `load_samples`."""
    try:
        found = np.load(file, allow_pickle=False)
        if not isinstance(found, np.lib.npyio.NpzFile):
            raise ConfigError(f"--inputs {file} holds one array without a name; save it with numpy.savez, NAME=ARRAY")
        with found as archive:
            sample = {name: archive[name] for name in archive.files}
    except OSError as error:
        raise ConfigError(f"--inputs {file} cannot be read: {error.strerror or error}; save it with numpy.savez") from error
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"--inputs {file} is no .npz of plain arrays: {error}; save it with numpy.savez") from error
    known = [tensor.name for tensor in inputs]
    if unknown := sorted(set(sample) - set(known)):
        near = get_close_matches(unknown[0], known, 1, 0.0)
        raise ConfigError(f"--inputs {file} has an array {unknown[0]!r}, the model no such input; did you mean {near[0]!r}?")
    for tensor in inputs:
        if tensor.name not in sample:
            raise ConfigError(f"--inputs {file} lacks the input {tensor.name!r}, {tensor.dtype} of shape {tensor.shape}")
        if (dtype := sample[tensor.name].dtype).name != tensor.dtype:
            raise ConfigError(
                f"--inputs {file}: {tensor.name!r} is {dtype}, the model takes {tensor.dtype}; convert it with astype"
            )
    return sample


def _check_shape(file: Path, tensor: TensorInfo, array: Array) -> None:
    fits = len(array.shape) == len(tensor.shape) and all(
        not isinstance(wanted, int) or wanted == size for wanted, size in zip(tensor.shape, array.shape, strict=True)
    )
    if not fits:
        raise ConfigError(f"--inputs {file}: {tensor.name!r} has shape {list(array.shape)}, the model takes {tensor.shape}")


def _invent(tensor: TensorInfo, generator: np.random.Generator) -> Array:
    shape = tuple(int(size) for size in tensor.shape if size is not None)
    dtype = np.dtype(tensor.dtype)
    if np.issubdtype(dtype, np.floating):
        return generator.standard_normal(shape).astype(dtype)
    return np.zeros(shape, dtype)  # an index of anything
