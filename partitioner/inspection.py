"""What is in a bundle, read from its files: nothing is run, and a graph whose bytes are not those of the manifest is not parsed."""

from __future__ import annotations

import collections
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import DecodeError

from edgecloud.bundle import Bundle
from edgecloud.errors import BundleCorruptError

FLOAT_BYTES = 4  # of a number in a key-value cache


@dataclass(frozen=True, slots=True)
class Products:
    """Matrix products of a graph that share one form."""

    count: int
    bits: int | None  # of a weight; None: not quantized
    block_size: int | None  # weights that share a scale
    accuracy_level: int | None  # 4: activations in int8; 1: in fp32; None: not quantized


@dataclass(frozen=True, slots=True)
class GraphContents:
    """One graph of the device, and the memory it needs."""

    path: str
    num_bytes: int  # graph and weights on disk
    products: list[Products]
    num_cached_layers: int
    kv_bytes_per_token: int
    kv_bytes: int  # at the window
    rss_bytes: int | None  # peak of a process with nothing else, as measured at partition time on that machine

    @property
    def ram_bytes(self) -> int:
        """Estimate: weights as on disk, and full caches. Buffers of the runtime come on top."""
        return self.num_bytes + self.kv_bytes


@dataclass(frozen=True, slots=True)
class Inspection:
    """A bundle of a model pair, taken apart."""

    bundle: str
    kind: str
    pair_id: str
    created_by: str
    licence: str | None
    target: dict[str, Any]
    draft: dict[str, Any]
    num_kept_ids: int | None  # tokens that a trimmed draft may propose; None: all, or a list that is not as listed
    front: dict[str, Any] | None
    tokenizer: dict[str, Any]
    window_tokens: int
    num_files: int
    num_bytes: int
    target_is_here: bool  # a device's copy has no cloud/
    graphs: dict[str, GraphContents]  # draft, front
    ram_bytes: int  # estimate for a device that runs them all, at the window
    checks: dict[str, Any]  # what was measured at partition time
    problems: list[str]  # files that are not what the manifest says

    def to_dict(self) -> dict[str, Any]:
        """The object that `edgecloud inspect --json` prints."""
        return asdict(self)


def inspect_bundle(path: Path) -> Inspection:
    """Open a bundle, hash every file, read its graphs.

    Raises:
        BundleError: it cannot be opened. Files that are missing or changed are `problems` of the answer.
    """
    bundle = Bundle.open(path)
    target_is_here = bundle.target_folder is not None and bundle.target_folder.exists()
    listed = bundle.names_below("edge") + (bundle.names_below("cloud") if target_is_here else [])
    broken: dict[str, str] = {}
    for name in listed:
        try:
            bundle.verify_file(name)
        except BundleCorruptError as error:
            broken[name] = str(error)
    window = min(bundle.target.max_context_tokens, bundle.draft.max_context_tokens)
    models = {"draft": bundle.draft.model} | ({} if bundle.front is None else {"front": bundle.front.model})
    graphs = {part: _read(bundle, part, model, window) for part, model in models.items() if model not in broken}
    vocab = None if bundle.draft.vocab in broken else bundle.draft_vocab()
    return Inspection(
        bundle=str(path),
        kind="pair",
        pair_id=bundle.pair_id,
        created_by=bundle.created_by,
        licence=bundle.licence,
        target=asdict(bundle.target),
        draft=asdict(bundle.draft),
        num_kept_ids=None if vocab is None else len(vocab),
        front=None if bundle.front is None else asdict(bundle.front),
        tokenizer=asdict(bundle.tokenizer),
        window_tokens=window,
        num_files=len(bundle.files),
        num_bytes=sum(info.num_bytes for info in bundle.files.values()),
        target_is_here=target_is_here,
        graphs=graphs,
        ram_bytes=sum(graph.ram_bytes for graph in graphs.values()),
        checks=bundle.checks,
        problems=list(broken.values()),
    )


def _read(bundle: Bundle, part: str, model: str, window: int) -> GraphContents:
    try:
        graph = onnx.load(bundle.file(model), load_external_data=False).graph
    except (OSError, DecodeError) as error:
        raise BundleCorruptError(f"{bundle.file(model)} cannot be read as ONNX: {error}; make the bundle again") from error
    caches = [value.type.tensor_type.shape.dim for value in graph.input if value.name.startswith("past_key_values.")]
    per_token = sum(FLOAT_BYTES * math.prod(dim.dim_value for dim in (dims[1], dims[3])) for dims in caches)
    folder = model.rpartition("/")[0]
    names = [name for name in bundle.files if name.startswith(f"{folder}/") and ".onnx" in name]
    measured = bundle.checks if part == "draft" else bundle.checks.get(part, {})
    return GraphContents(
        path=model,
        num_bytes=sum(bundle.files[name].num_bytes for name in names),
        products=_products(graph),
        num_cached_layers=len(caches) // 2,
        kv_bytes_per_token=per_token,
        kv_bytes=per_token * window,
        rss_bytes=measured.get("device", {}).get("peak_rss_bytes"),
    )


def _products(graph: onnx.GraphProto) -> list[Products]:
    forms: collections.Counter[tuple[int | None, int | None, int | None]] = collections.Counter()
    for node in graph.node:
        if node.op_type == "MatMulNBits":
            said = {attribute.name: attribute.i for attribute in node.attribute}
            forms[said.get("bits", 4), said.get("block_size"), said.get("accuracy_level", 0)] += 1
        elif node.op_type == "MatMul":
            forms[None, None, None] += 1
    return [Products(count, *form) for form, count in forms.most_common()]
