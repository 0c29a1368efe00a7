"""The front's part of a partition: exported in fp32, held against torch, written in the bits that were asked for, measured."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path

from edgecloud.errors import ModelError
from edgecloud.partitioner.candidate import CODECS
from edgecloud.partitioner.check import Parity
from edgecloud.partitioner.child import ChildError
from edgecloud.partitioner.device import measure_front
from edgecloud.partitioner.export import GRAPH_FILES
from edgecloud.partitioner.front_check import FrontQuality, check_front_parity, measure_front_qualities, open_front
from edgecloud.partitioner.inputs import FrontPlan
from edgecloud.partitioner.quantize import quantize_front
from edgecloud.partitioner.reference import Reference
from edgecloud.partitioner.report import ExitHeadReport, FrontReport, Remark
from edgecloud.partitioner.steps import CHECKS, cached_front, cached_front_layers

FRONT_FOLDER = "edge/front"


class FrontMaker:
    """Makes the front of one bundle, below `folder`/edge/front."""

    def __init__(self, reference: Reference, plan: FrontPlan, folder: Path, cache: Path | None, remark: Remark) -> None:
        """`reference` holds the model in fp32."""
        self._reference = reference
        self._plan = plan
        self._folder = folder
        self._cache = cache
        self._remark = remark
        self._graph = folder / FRONT_FOLDER / GRAPH_FILES[0]
        self._found: tuple[int, Parity, dict[str, FrontQuality]] | None = None

    def make_and_check(self) -> dict[str, FrontQuality]:
        """Write the graph, or take it from the cache.  -> what the split target is worth, by boundary codec

        Raises:
            ModelError: the model cannot be cut, or what came of it is not its first layers.
            BundleError: there is no room.
        """
        plan, reference, made = self._plan, self._reference, self._folder / "front"
        self._remark(f"the front, layers 0 to {plan.cut - 1} of {plan.num_layers} in {plan.precision}")
        if cached_front(self._cache, (reference.fingerprint, reference.tokenizer_fingerprint), plan, made, self._make):
            self._remark("it was in the cache")
        found = json.loads((made / CHECKS).read_text("utf-8"))
        (made / CHECKS).unlink()
        self._graph.parent.parent.mkdir(parents=True, exist_ok=True)
        made.rename(self._graph.parent)
        qualities = {codec: FrontQuality(**quality) for codec, quality in found["qualities"].items()}
        self._found = found["width"], Parity(**found["parity"]), qualities
        return qualities

    def report(self, exit_head: ExitHeadReport | None = None) -> FrontReport:
        """What was found, and speed and memory here. Raises ModelError if the graph does not run in a process of its own."""
        assert self._found is not None, "make_and_check comes first"
        self._remark("speed and memory of the front, one thread")
        try:
            device = measure_front(self._graph)
        except ChildError as error:
            raise ModelError(f"the exported front does not run: {error}") from error
        plan, (width, parity, qualities) = self._plan, self._found
        return FrontReport(
            plan.cut, plan.num_layers, plan.precision, plan.codec, width, graph_bytes(self._graph), parity,
            qualities[plan.codec], device, qualities, exit_head,
        )  # fmt: skip

    def _make(self, folder: Path) -> None:
        """All of it in one folder, as the cache keeps it."""
        plan, reference, samples = self._plan, self._reference, self._reference.samples
        scratch = self._folder / "front-fp32"
        self._remark("exporting its layers in fp32")
        if cached_front_layers(self._cache, reference.target, reference.fingerprint, scratch, plan.cut):
            self._remark("they were in the cache")
        exported = scratch / GRAPH_FILES[0]
        parity = check_front_parity(reference.model, plan.cut, open_front(exported, samples), samples)
        folder.mkdir(parents=True)
        graph = open_front(quantize_front(exported, folder, plan.precision), samples)
        shutil.rmtree(scratch)
        self._remark("agreement of the split target with the target, by boundary codec")
        codecs = list(dict.fromkeys((plan.codec, *CODECS)))
        qualities = measure_front_qualities(reference.model, plan.cut, graph, codecs, samples)
        found = {
            "width": graph.width,
            "parity": asdict(parity),
            "qualities": {name: asdict(one) for name, one in qualities.items()},
        }
        (folder / CHECKS).write_text(json.dumps(found), "utf-8")


def graph_bytes(graph: Path) -> int:
    """A graph and its weights, on disk."""
    return sum(file.stat().st_size for file in (graph.with_name(name) for name in GRAPH_FILES) if file.is_file())
