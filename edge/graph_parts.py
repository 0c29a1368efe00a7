"""The device's part of every cut of a graph bundle, in ONNX Runtime: loaded when first used, and kept within a budget of RAM."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

import onnxruntime as ort

from edgecloud.errors import BundleError, ConfigError
from edgecloud.graph_bundle import CutInfo, GraphBundle
from edgecloud.tensors import Array

MAX_WORDS = 300  # of ONNX Runtime's complaint that are passed on


@dataclass(slots=True)
class Part:
    """A loaded graph."""

    session: ort.InferenceSession
    input_names: list[str]
    output_names: list[str]
    ram_bytes: int
    num_runs: int = 0


class GraphParts:
    """Sessions by cut; the one unused longest goes first when there is no room. Threads may share it.

    Args:
        max_ram_bytes: of all sessions together, as bundle.json estimates them; None: no limit. The one in use may exceed it.
    """

    def __init__(self, bundle: GraphBundle, num_threads: int, max_ram_bytes: int | None = None) -> None:
        self._bundle = bundle
        self._num_threads = num_threads
        self._max_ram_bytes = max_ram_bytes
        self._parts: OrderedDict[str, Part] = OrderedDict()
        self._lock = threading.Lock()
        self._loading: dict[str, threading.Lock] = {}
        self._prepared: set[str] = set()  # under way
        self._broken: set[str] = set()

    def has(self, cut: CutInfo) -> bool:
        """Whether a run would not have to load anything."""
        return cut.edge is None or cut.name in self._parts

    def prepare(self, cut: CutInfo) -> bool:
        """Load it beside what goes on.  -> False: there is no room for both, or it has been tried in vain; `run` will see."""
        with self._lock:
            no_room = self._max_ram_bytes is not None and self.ram_bytes + cut.edge_ram_bytes > self._max_ram_bytes
            if no_room or cut.name in self._broken:
                return False
            if cut.name not in self._prepared:
                self._prepared.add(cut.name)
                threading.Thread(target=self._try_load, args=(cut,), name="edgecloud-load", daemon=True).start()
            return True

    def run(self, cut: CutInfo, inputs: Mapping[str, Array]) -> tuple[dict[str, Array], bool]:
        """What crosses the cut and what the device has of the outputs.  -> by name; whether it was not the graph's first run

        Raises:
            BundleError: the graph cannot be loaded.
            ConfigError: it cannot run on these inputs.
        """
        if cut.edge is None:
            return {tensor.name: inputs[tensor.name] for tensor in cut.boundary}, True
        part = self._part(cut)
        try:
            outputs = part.session.run(part.output_names, {name: inputs[name] for name in part.input_names})
        except Exception as error:  # onnxruntime's exceptions share no base class of their own
            words = str(error).strip().partition("\n")[0][:MAX_WORDS]
            raise ConfigError(f"the graph cannot run on these inputs: {words}") from error
        found = dict(zip(part.output_names, outputs, strict=True))
        found |= {tensor.name: inputs[tensor.name] for tensor in cut.boundary if tensor.name in inputs}
        part.num_runs += 1
        return found, part.num_runs > 1

    @property
    def ram_bytes(self) -> int:
        """Of what is loaded, by the bundle's estimate."""
        return sum(part.ram_bytes for part in self._parts.values())

    def _part(self, cut: CutInfo) -> Part:
        with self._lock_of(cut):  # two threads do not load the same
            with self._lock:
                if cut.name in self._parts:
                    self._parts.move_to_end(cut.name)
                    return self._parts[cut.name]
                self._make_room(cut.edge_ram_bytes)
            part = self._load(cut)
            with self._lock:
                self._make_room(part.ram_bytes)
                self._parts[cut.name] = part
            return part

    def _lock_of(self, cut: CutInfo) -> threading.Lock:
        with self._lock:
            return self._loading.setdefault(cut.name, threading.Lock())

    def _make_room(self, num_bytes: int) -> None:
        if self._max_ram_bytes is None:
            return
        while self._parts and self.ram_bytes + num_bytes > self._max_ram_bytes:
            self._parts.popitem(last=False)

    def _try_load(self, cut: CutInfo) -> None:
        try:
            self._part(cut)
        except BundleError:
            self._broken.add(cut.name)  # whoever runs it is told
        finally:
            self._prepared.discard(cut.name)

    def _load(self, cut: CutInfo) -> Part:
        assert cut.edge is not None
        options = ort.SessionOptions()
        options.intra_op_num_threads = self._num_threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        path = self._bundle.file(cut.edge)
        try:
            session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise BundleError(f"{path} is no graph that this version can run: {str(error)[:MAX_WORDS]}") from error
        inputs, outputs = [i.name for i in session.get_inputs()], [o.name for o in session.get_outputs()]
        known = {tensor.name for tensor in self._bundle.graph.inputs}
        missing = ({tensor.name for tensor in cut.boundary} - known | set(cut.edge_outputs)) - set(outputs)
        if missing or not set(inputs) <= known:
            words = (
                f"does not give {sorted(missing)}" if missing else f"takes {sorted(set(inputs) - known)}, no inputs of the graph"
            )
            raise BundleError(f"{path} {words}; make the bundle again")
        return Part(session, inputs, outputs, cut.edge_ram_bytes)
