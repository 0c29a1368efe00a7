"""The cloud's part of every cut of a graph bundle, in ONNX Runtime: the one module of the cloud that knows it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnxruntime as ort

from edgecloud.cloud.graph_work import CutSpec, TensorSpec
from edgecloud.errors import BundleError, ConfigError, ModelError
from edgecloud.graph_bundle import CutInfo, GraphBundle
from edgecloud.tensors import Array

DTYPE_OF = {
    "tensor(float)": "float32",
    "tensor(double)": "float64",
    "tensor(float16)": "float16",
    "tensor(bool)": "bool",
    **{f"tensor({kind}{bits})": f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)},
}
MAX_WORDS = 300  # of ONNX Runtime's complaint that are passed on


class GraphRunner:
    """One session a cut, all loaded: a broken one is found before anybody asks.

    Args:
        device: `cpu`, `cuda`, `cuda:1`. CUDA has never been run by us.
        num_threads: of ONNX Runtime; 0: as many as there are cores.

    Raises:
        BundleError: a graph cannot be loaded, or is not what bundle.json says.
        ModelError: this onnxruntime has no such device.
    """

    def __init__(self, bundle: GraphBundle, device: str, num_threads: int) -> None:
        self._providers = _providers(device)
        self._num_threads = num_threads
        self._sessions: dict[str, ort.InferenceSession] = {}
        self.specs: dict[str, CutSpec] = {}
        for cut in bundle.cuts:
            if cut.cloud is not None:
                session = self._sessions[cut.name] = self._load(bundle.file(cut.cloud))
                self.specs[cut.name] = _spec(cut, session, bundle.file(cut.cloud))

    def run(self, cut: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """The cut's cloud outputs, by name. Raises ConfigError: the graph cannot run on these inputs."""
        session = self._sessions[cut]
        names = [output.name for output in session.get_outputs()]
        try:
            outputs = session.run(names, dict(inputs))
        except Exception as error:  # onnxruntime's exceptions share no base class of their own
            words = str(error).strip().partition("\n")[0][:MAX_WORDS]
            raise ConfigError(f"the graph of {cut} cannot run on these inputs: {words}") from error
        return {name: np.asarray(output) for name, output in zip(names, outputs, strict=True)}

    def _load(self, path: Path) -> ort.InferenceSession:
        options = ort.SessionOptions()
        options.intra_op_num_threads = self._num_threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        try:
            session = ort.InferenceSession(str(path), options, providers=self._providers)
        except Exception as error:
            raise BundleError(f"{path} is no graph that this version can run: {str(error)[:MAX_WORDS]}") from error
        wanted = self._providers[0] if isinstance(self._providers[0], str) else self._providers[0][0]
        if wanted not in session.get_providers():  # onnxruntime only warns, and takes the CPU
            raise ModelError(f"onnxruntime could not start {wanted}; serve with --device cpu, or mend its installation")
        return session


def _providers(device: str) -> list[str | tuple[str, dict[str, str]]]:
    """Raises ModelError."""
    kind, _, number = device.partition(":")
    if kind == "cpu" and not number:
        return ["CPUExecutionProvider"]
    if kind != "cuda" or (number and not number.isdigit()):
        raise ModelError(f"device is {device!r}; a graph takes cpu, cuda or cuda:N")
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        raise ModelError(f"device is {device}, and this onnxruntime has no CUDA; install onnxruntime-gpu, or serve on cpu")
    return [("CUDAExecutionProvider", {"device_id": number or "0"}), "CPUExecutionProvider"]


def _spec(cut: CutInfo, session: ort.InferenceSession, path: Path) -> CutSpec:
    """Raises BundleError: the graph does not take the boundary, or does not give the outputs."""
    found, codec_of = session.get_inputs(), {tensor.name: tensor.codec for tensor in cut.boundary}
    given = [output.name for output in session.get_outputs()]
    for what, names, wanted in (("takes", [i.name for i in found], codec_of), ("gives", given, cut.cloud_outputs)):
        if set(names) != set(wanted):
            raise BundleError(f"{path} {what} {sorted(names)}, bundle.json says {sorted(wanted)}; make the bundle again")
    for tensor in [*found, *session.get_outputs()]:
        if tensor.type not in DTYPE_OF:
            raise BundleError(f"{path} has {tensor.name} of type {tensor.type}, which cannot travel; make the bundle again")
    inputs = tuple(
        TensorSpec(i.name, DTYPE_OF[i.type], tuple(n if isinstance(n, int) and n > 0 else None for n in i.shape), codec_of[i.name])
        for i in found
    )
    ends = [i.shape for i in [*found, *session.get_outputs()]]
    return CutSpec(cut.name, inputs, batches=bool(found) and all(shape and not isinstance(shape[0], int) for shape in ends))
