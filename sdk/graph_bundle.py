"""A graph bundle: one ONNX graph, cut in several places, so that the cut can move while an app runs.

The chosen cut lies at edge/edge.onnx and cloud/cloud.onnx, others at edge/cuts/NAME/edge.onnx and cloud/cuts/NAME/cloud.onnx,
the graph as a whole at edge/whole.onnx and cloud/whole.onnx. The device needs bundle.json and edge/ only, the cloud cloud/.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from edgecloud.errors import BundleCorruptError, ConfigError
from edgecloud.exits import Exits
from edgecloud.manifest import (
    MANIFEST,
    SCHEMA_VERSION,
    FileInfo,
    build,
    build_list,
    check_below,
    check_inside,
    check_listed,
    read_manifest,
    verify_files,
)

# tensors that may cross, as NumPy names them
DTYPES = frozenset(
    {"bool", "float16", "float32", "float64"} | {f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)}
)
CODECS = ("", "float32", "float16", "int8", "int4")  # "": the elements as they are; else rows of shape[-1], kernels/codec.py
CUT_NAME = re.compile(r"edge|cloud|cut-[1-9][0-9]{0,8}")


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """An input or output of the graph."""

    name: str
    dtype: str
    shape: list[int | str | None]  # a name or null: may differ from run to run

    def __post_init__(self) -> None:
        """Check the values."""
        _check_tensor(self.name, self.dtype, self.shape)


@dataclass(frozen=True, slots=True)
class BoundaryTensor:
    """A tensor that travels from the device to the cloud: an input of the graph, or an output of the cut's edge graph."""

    name: str
    dtype: str
    shape: list[int | str | None]
    codec: str  # "": raw

    def __post_init__(self) -> None:
        """Check the values."""
        _check_tensor(self.name, self.dtype, self.shape)
        if self.codec not in CODECS:
            raise ValueError(f"codec {self.codec!r} is unknown; known: {', '.join(CODECS[1:])}, or none")
        if self.codec and (self.dtype != "float32" or not self.shape):
            raise ValueError(f"codec {self.codec} takes float32 with a last dimension, {self.name} is {self.dtype} {self.shape}")


@dataclass(frozen=True, slots=True)
class GraphInfo:
    """The whole graph."""

    name: str
    fingerprint: str  # SHA-256 over the model file and its external data
    opset: int  # of the default domain
    inputs: list[TensorInfo]  # in the order of the model; every one is needed
    outputs: list[TensorInfo]

    def __post_init__(self) -> None:
        """Check the values."""
        for what, tensors in (("inputs", self.inputs), ("outputs", self.outputs)):
            names = [tensor.name for tensor in tensors]
            if not names or len(set(names)) != len(names):
                raise ValueError(f"{what} are {names}; they must be there and have different names")


@dataclass(frozen=True, slots=True)
class CutInfo:
    """One division of the graph. Times and bytes are those of the samples that it was made with.

    A run: the device feeds the inputs to `edge` (if any), sends `boundary`, the cloud feeds those to `cloud` (if any) and
    returns `cloud_outputs`. What `edge` needs are the inputs that its graph names.
    """

    name: str  # edge: nothing travels; cloud: the device computes nothing; cut-1, cut-2, ...
    edge: str | None  # path of the device's graph
    cloud: str | None  # path of the cloud's graph
    boundary: list[BoundaryTensor]
    edge_outputs: list[str]  # outputs of the whole graph that the device has itself
    cloud_outputs: list[str]  # the others; they come back raw
    edge_ms: float  # of `edge` on the device, codec not counted
    cloud_ms: float  # of `cloud` in the cloud, codec not counted
    codec_ms: float  # encoding on the device and decoding in the cloud
    boundary_bytes: int  # payload up
    output_bytes: int  # payload down
    edge_ram_bytes: int  # estimate: weights and the largest sum of live activations of `edge`
    max_error: float  # largest absolute difference of an output from the whole graph's; 0: bit by bit the same
    loss: float  # accuracy lost, as `checks.loss_metric` defines it

    def __post_init__(self) -> None:
        """Check the values."""
        if not CUT_NAME.fullmatch(self.name):
            raise ValueError(f"a cut is named {self.name!r}; names are edge, cloud, cut-1, cut-2, ...")
        if (self.edge is not None, self.cloud is not None) != (self.name != "cloud", self.name != "edge"):
            raise ValueError(f"cut {self.name} has edge {self.edge!r} and cloud {self.cloud!r}, which its name rules out")
        names = [tensor.name for tensor in self.boundary]
        if len(set(names)) != len(names) or (self.name == "edge" and (names or self.cloud_outputs)):
            raise ValueError(f"cut {self.name} sends {names} for {self.cloud_outputs}, which cannot be")
        if self.name == "cloud" and self.edge_outputs:
            raise ValueError(f"cut cloud gives {self.edge_outputs} on the device, which has no graph there")
        for key in ("edge_ms", "cloud_ms", "codec_ms", "boundary_bytes", "output_bytes", "edge_ram_bytes", "max_error", "loss"):
            if not 0 <= getattr(self, key) < math.inf:
                raise ValueError(f"{key} of cut {self.name} is {getattr(self, key)}; it must be 0 or more")


@dataclass(frozen=True, slots=True)
class GraphBundle:
    """A checked manifest of a graph bundle and where it lies. Files are checked by `verify_files`."""

    path: Path
    created_by: str
    licence: str | None
    graph: GraphInfo
    cuts: list[CutInfo]
    chosen: str  # name of the cut that is best for the stated link and objective
    files: dict[str, FileInfo]
    checks: dict[str, Any] = field(default_factory=dict)  # objective, link, loss metric, profile, limits
    exits: Exits | None = None  # of a classifier that has some

    @classmethod
    def open(cls, path: str | Path) -> GraphBundle:
        """Read and check the manifest.

        Raises:
            BundleNotFoundError: no such folder, or it has no bundle.json.
            BundleVersionError: written by a newer edgecloud.
            BundleKindError: it holds a model pair for text.
            BundleCorruptError: not JSON, a field is missing, unknown or cannot be, or a path leaves the bundle.
        """
        folder = Path(path)
        manifest = folder / MANIFEST
        content = read_manifest(folder, "graph")
        graph = content.get("graph")
        if isinstance(graph, dict):
            parts = {key: build_list(TensorInfo, graph.get(key), f"graph.{key}", manifest) for key in ("inputs", "outputs")}
            graph = {**graph, **parts}
        content["graph"] = build(GraphInfo, graph, "graph", manifest)
        cuts = content.get("cuts")
        if isinstance(cuts, list):
            cuts = [_with_boundary(cut, f"cuts[{index}].boundary", manifest) for index, cut in enumerate(cuts)]
        content["cuts"] = build_list(CutInfo, cuts, "cuts", manifest)
        if content.get("exits") is not None:
            content["exits"] = Exits.from_dict(content["exits"], manifest)
        bundle = build(cls, {**content, "path": folder}, "", manifest)
        bundle._check()
        return bundle

    def cut(self, name: str) -> CutInfo:
        """The cut of this name. Raises ConfigError."""
        for cut in self.cuts:
            if cut.name == name:
                return cut
        known = ", ".join(cut.name for cut in self.cuts)
        raise ConfigError(f"{self.path} has no cut {name!r}; it has {known}")

    def file(self, name: str) -> Path:
        """Where a file of the bundle lies."""
        return self.path / name

    def verify_files(self, part: Literal["edge", "cloud"]) -> None:
        """Check size and SHA-256 of every file below edge/ or cloud/. Raises BundleCorruptError that names the first wrong one."""
        verify_files(self.path, self.files, part)

    @property
    def graph_hash(self) -> int:
        """64 bits that stand for the graph and its cuts (InferRequest.graph_hash); never 0."""
        digest = hashlib.blake2b(self.graph.fingerprint.encode(), digest_size=8)
        for cut in sorted(self.cuts, key=lambda cut: cut.name):
            hashes = [self.files[name].sha256 for name in (cut.edge, cut.cloud) if name is not None]
            sent = [f"{tensor.name}:{tensor.codec}" for tensor in cut.boundary]
            digest.update(json.dumps([cut.name, hashes, sent]).encode())
        return int.from_bytes(digest.digest(), "little") or 1

    @property
    def own_outputs(self) -> list[str]:
        """Outputs of the graph that are no exit's."""
        of_exits = frozenset[str]() if self.exits is None else self.exits.outputs
        return [tensor.name for tensor in self.graph.outputs if tensor.name not in of_exits]

    def to_json(self) -> str:
        """The text of bundle.json."""
        content = asdict(self)
        del content["path"]
        if self.exits is None:
            del content["exits"]
        return json.dumps({"schema_version": SCHEMA_VERSION, "kind": "graph", **content}, indent=2, allow_nan=False) + "\n"

    def _check(self) -> None:
        manifest = self.path / MANIFEST
        names = [cut.name for cut in self.cuts]
        if not names or len(set(names)) != len(names):
            raise BundleCorruptError(f"{manifest}: cuts are {names}; they must be there and differ; make the bundle again")
        if self.chosen not in names:
            raise BundleCorruptError(f"{manifest}: chosen is {self.chosen!r}, cuts are {names}; make the bundle again")
        outputs = sorted(tensor.name for tensor in self.graph.outputs)
        for cut in self.cuts:
            if sorted([*cut.edge_outputs, *cut.cloud_outputs]) != outputs:
                raise BundleCorruptError(
                    f"{manifest}: cut {cut.name} gives {[*cut.edge_outputs, *cut.cloud_outputs]}, the graph {outputs}; "
                    "make the bundle again"
                )
        if self.exits is not None and not {self.exits.output, *self.exits.outputs} <= set(outputs):
            raise BundleCorruptError(f"{manifest}: exits name outputs that the graph, {outputs}, does not have; make it again")
        on_device = [cut.edge for cut in self.cuts if cut.edge is not None]
        in_cloud = [cut.cloud for cut in self.cuts if cut.cloud is not None]
        check_inside(self.path, [*self.files, *on_device, *in_cloud])
        check_listed(self.path, [*on_device, *in_cloud], self.files)
        check_below(self.path, on_device, "edge")
        check_below(self.path, in_cloud, "cloud")


def _with_boundary(cut: Any, name: str, manifest: Path) -> Any:
    return {**cut, "boundary": build_list(BoundaryTensor, cut.get("boundary"), name, manifest)} if isinstance(cut, dict) else cut


def _check_tensor(name: str, dtype: str, shape: list[int | str | None]) -> None:
    if dtype not in DTYPES:
        raise ValueError(f"tensor {name!r} is {dtype}; a run can pass {', '.join(sorted(DTYPES))}")
    if any(isinstance(size, int) and size < 0 for size in shape):
        raise ValueError(f"tensor {name!r} has shape {shape}; a size is 0 or more, or unknown")


__all__ = ["BoundaryTensor", "CutInfo", "GraphBundle", "GraphInfo", "TensorInfo"]
