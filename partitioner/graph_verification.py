"""Run every cut of a graph bundle against the whole graph in it: is the accuracy that is recorded still true here?"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

from edgecloud.errors import BundleCorruptError, BundleError, ConfigError
from edgecloud.graph_bundle import CutInfo, GraphBundle
from edgecloud.machine import machine
from edgecloud.partitioner.boundary import Accuracy, LossMetric
from edgecloud.partitioner.cut_graph import Halves
from edgecloud.partitioner.findings import ERROR_TOLERANCE, Finding, Verification
from edgecloud.partitioner.graph_inspection import part_is_here
from edgecloud.partitioner.graph_prepare import Remark
from edgecloud.partitioner.onnx_model import OnnxModel, load_model
from edgecloud.partitioner.samples import load_samples

ROUNDING = 1e-4  # of the largest output: another processor's kernels round otherwise
ROWS_TOLERANCE = 0.01  # absolute, of rows with another argmax: rounding turns a near tie


def verify_graph_bundle(path: Path, inputs: Sequence[Path], *, remark: Remark = lambda _: None) -> Verification:
    """Hash every file, then run front, codecs and tail of every cut on the samples.

    Raises:
        ConfigError: no samples, or they do not fit the graph.
        BundleError: it cannot be opened, a file is missing or changed, a side or the whole graph is not in it, or a graph has other
            inputs or outputs than its cut.
        ModelError: a graph does not run.
    """
    bundle = GraphBundle.open(path)
    if not inputs:
        raise ConfigError(f"{path} holds a cut graph, which is verified on samples of yours; give --inputs SAMPLE.npz")
    _require_both_sides(bundle)
    remark("checksums")
    bundle.verify_files("edge")
    bundle.verify_files("cloud")
    model = _whole(bundle)
    samples = load_samples(inputs, model)
    remark("the whole graph on the samples")
    metric = _loss_metric(bundle)
    accuracy = Accuracy(model, samples, metric or "relative", len(os.sched_getaffinity(0)))
    findings: list[Finding] = []
    notes = _notes(bundle, metric, len(samples))
    for cut in bundle.cuts:
        remark(f"cut {cut.name}")
        halves = _halves(bundle, cut)
        damage = accuracy.measure(halves, {tensor.name: tensor.codec for tensor in cut.boundary})
        if math.isinf(max(damage.max_error, damage.loss)):
            notes.append(
                f"{cut.name} has no figure: a codec refuses the values, or an output has another shape, NaN, or should be 0"
            )
        rounding = ROUNDING * accuracy.largest
        findings.append(_at_most(f"{cut.name}: max error", cut.max_error, damage.max_error, rounding))
        if metric is not None:
            slack = ROUNDING if metric == "relative" else ROWS_TOLERANCE
            findings.append(_at_most(f"{cut.name}: loss", cut.loss, damage.loss, slack))
        num_changed = len(accuracy.changed_outputs(halves))
        findings.append(Finding(f"{cut.name}: outputs with other bits, raw", 0.0, num_changed, 0.0, passed=not num_changed))
    coded = [cut.name for cut in bundle.cuts if any(tensor.codec for tensor in cut.boundary)]
    if any(not finding.passed and finding.what.partition(":")[0] in coded for finding in findings):
        notes.append("what a codec loses depends on the samples: other ones than those that the bundle was made with may lose more")
    return Verification(str(path), findings, notes)


def _require_both_sides(bundle: GraphBundle) -> None:
    mend = "verify the bundle where edge/ and cloud/ are"
    if not part_is_here(bundle, "cloud"):
        raise BundleError(f"{bundle.path} has no cloud/, it is a device's copy; {mend}")
    if not part_is_here(bundle, "edge"):
        raise BundleError(f"{bundle.path} has no edge/, it is the cloud's copy; {mend}")


def _whole(bundle: GraphBundle) -> OnnxModel:
    """The undivided graph, with the inputs and outputs of the manifest."""
    for cut in bundle.cuts:
        name = {"edge": cut.edge, "cloud": cut.cloud}.get(cut.name)
        if name is not None:
            model = load_model(bundle.file(name))
            _require_names(bundle, name, model, [tensor.name for tensor in bundle.graph.outputs])
            return replace(model, inputs=bundle.graph.inputs, outputs=bundle.graph.outputs)
    raise BundleError(f"{bundle.path} holds no undivided graph to verify against; partition without pins and --max-ram to get one")


def _halves(bundle: GraphBundle, cut: CutInfo) -> Halves:
    """A cut as it was carried out, read back from its files."""
    inputs = {tensor.name for tensor in bundle.graph.inputs}
    boundary = [tensor.name for tensor in cut.boundary]
    edge = cloud = None
    if cut.edge is not None:
        front = load_model(bundle.file(cut.edge))
        edge = front.proto
        _require_names(bundle, cut.edge, front, [*cut.edge_outputs, *(name for name in boundary if name not in inputs)], inputs)
    if cut.cloud is not None:
        tail = load_model(bundle.file(cut.cloud))
        cloud = tail.proto
        _require_names(bundle, cut.cloud, tail, cut.cloud_outputs, set(boundary))
    return Halves(edge, cloud, boundary, cut.edge_outputs, cut.cloud_outputs)


def _require_names(
    bundle: GraphBundle, name: str, model: OnnxModel, outputs: Sequence[str], inputs: set[str] | None = None
) -> None:
    """The graph makes what the manifest says, from what it gets."""
    known = {tensor.name for tensor in bundle.graph.inputs} if inputs is None else inputs
    needs, gives = {tensor.name for tensor in model.inputs}, {tensor.name for tensor in model.outputs}
    for what, missing in (("takes", needs - known), ("does not give", set(outputs) - gives)):
        if missing:
            raise BundleCorruptError(f"{bundle.file(name)} {what} {min(missing)!r}, unlike its cut; make the bundle again")


def _loss_metric(bundle: GraphBundle) -> LossMetric | None:
    return next((metric for metric in get_args(LossMetric) if metric == bundle.checks.get("loss_metric")), None)


def _notes(bundle: GraphBundle, metric: LossMetric | None, num_samples: int) -> list[str]:
    notes = []
    if metric is None:
        notes.append("loss was not measured: the bundle does not say how it is defined")
    recorded, here = bundle.checks.get("machine"), machine()
    if isinstance(recorded, dict) and any(recorded.get(key) != here[key] for key in ("cpu", "versions")):
        notes.append("recorded on another processor or with other versions than here; the last bits may differ")
    was = bundle.checks.get("num_samples")
    if was != num_samples:
        notes.append(
            f"recorded with {was if isinstance(was, int) else 'an unknown number of'} samples, measured with {num_samples}"
        )
    return notes


def _at_most(what: str, recorded: float, measured: float, slack: float) -> Finding:
    limit = recorded * ERROR_TOLERANCE + slack
    return Finding(what, recorded, measured if math.isfinite(measured) else None, limit, measured <= limit)
