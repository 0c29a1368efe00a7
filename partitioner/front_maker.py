"""The front's part of a partition: exported in fp32, held against torch, written in the bits that were asked for, measured."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

from edgecloud.errors import ModelError
from edgecloud.partitioner.check import Parity, Sample
from edgecloud.partitioner.child import ChildError
from edgecloud.partitioner.device import measure_front
from edgecloud.partitioner.export import GRAPH_FILES
from edgecloud.partitioner.front import export_front
from edgecloud.partitioner.front_check import FrontQuality, check_front_parity, measure_front_quality, open_front
from edgecloud.partitioner.inputs import FrontPlan
from edgecloud.partitioner.model_folder import ModelFolder
from edgecloud.partitioner.quantize import quantize_front
from edgecloud.partitioner.report import FrontReport, Remark

FRONT_FOLDER = "edge/front"


class FrontMaker:
    """Makes the front of one bundle, below `folder`/edge/front."""

    def __init__(self, target: ModelFolder, plan: FrontPlan, folder: Path, remark: Remark) -> None:
        self._target = target
        self._plan = plan
        self._folder = folder
        self._remark = remark
        self._graph = folder / FRONT_FOLDER / GRAPH_FILES[0]
        self._found: tuple[int, Parity, FrontQuality] | None = None

    def make_and_check(self, target: torch.nn.Module, samples: Sequence[Sample]) -> None:
        """Write the graph; `target` is the model in fp32.

        Raises:
            ModelError: the model cannot be cut, or what came of it is not its first layers.
            BundleError: there is no room.
        """
        plan = self._plan
        self._remark(f"exporting the front, layers 0 to {plan.cut - 1} of {plan.num_layers}")
        scratch = self._folder / "front-fp32"
        scratch.mkdir()
        exported = export_front(self._target, plan.cut, scratch)
        parity = check_front_parity(target, plan.cut, open_front(exported, samples), samples)
        self._remark(f"the front in {plan.precision}")
        self._graph.parent.mkdir(parents=True)
        graph = open_front(quantize_front(exported, self._graph.parent, plan.precision), samples)
        shutil.rmtree(scratch)
        self._remark(f"agreement of the split target, boundary {plan.codec}, with the target")
        self._found = graph.width, parity, measure_front_quality(target, plan.cut, graph, plan.codec, samples)

    def report(self) -> FrontReport:
        """What was found, and speed and memory here. Raises ModelError if the graph does not run in a process of its own."""
        assert self._found is not None, "make_and_check comes first"
        self._remark("speed and memory of the front, one thread")
        try:
            device = measure_front(self._graph)
        except ChildError as error:
            raise ModelError(f"the exported front does not run: {error}") from error
        plan, (width, parity, quality) = self._plan, self._found
        return FrontReport(
            plan.cut, plan.num_layers, plan.precision, plan.codec, width, graph_bytes(self._graph), parity, quality, device
        )  # fmt: skip


def graph_bytes(graph: Path) -> int:
    """A graph and its weights, on disk."""
    return sum(file.stat().st_size for file in (graph.with_name(name) for name in GRAPH_FILES) if file.is_file())
