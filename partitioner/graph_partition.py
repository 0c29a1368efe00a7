"""`edgecloud partition model.onnx`: profile, plan, cut, check, measure, and a bundle that appears whole or not at all."""

from __future__ import annotations

import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import onnx

from edgecloud.errors import BundleError
from edgecloud.fingerprint import sha256_file
from edgecloud.graph_bundle import GraphBundle, GraphInfo
from edgecloud.machine import machine
from edgecloud.manifest import MANIFEST, FileInfo
from edgecloud.partitioner.atomic import atomic_folder, link_or_copy
from edgecloud.partitioner.download import NO_SPACE
from edgecloud.partitioner.graph_plan import Plan, cost_ms, make_plan
from edgecloud.partitioner.graph_prepare import Prepared, Remark, prepare
from edgecloud.partitioner.graph_report import GraphReport
from edgecloud.partitioner.graph_request import GraphRequest
from edgecloud.partitioner.inputs import check_destination, require_space

MARGIN_BYTES = 1 << 20


def partition_graph(request: GraphRequest, *, dry_run: bool = False, remark: Remark = lambda _: None) -> GraphReport:
    """Do it. With `dry_run` everything is computed, measured and checked, and nothing is written.

    Raises:
        ConfigError: options, samples or profiles that cannot work; a budget of memory that nothing fits.
        ModelError: the file is no model that can be cut, or it does not run.
        BundleError: the bundle cannot be written.
    """
    begin = time.monotonic()
    destination = check_destination(request.bundle, request.overwrite)
    prepared = prepare(request, remark)
    plan = make_plan(prepared, remark)
    cuts = [info for info, _ in plan.cuts]
    report = GraphReport(
        bundle=str(destination),
        model=prepared.model.name,
        fingerprint=prepared.model.fingerprint,
        dry_run=dry_run,
        objective=request.objective,
        link=str(request.link),
        num_nodes=len(prepared.structure.live),
        num_groups=prepared.dag.num_nodes,
        total_ms=prepared.device.total_ms,
        cloud_share=prepared.cloud_share,
        cuts=cuts,
        chosen=plan.chosen,
        costs_ms={cut.name: round(cost_ms(cut, request), 3) for cut in cuts},
        proven=plan.proven,
        bound_ms=round(plan.bound_ms, 3),
        regions=plan.regions,
        max_loss=request.max_loss,
        loss_metric=request.loss_metric,
        notes=_notes(prepared) + [f"{name} has no cut within the limits, so nothing can leave there" for name in plan.lost_exits],
    )
    if not dry_run:
        remark("writing the bundle")
        _write(destination, prepared, plan, report)
    return replace(report, seconds=round(time.monotonic() - begin, 1))


def _notes(prepared: Prepared) -> list[str]:
    notes = []
    if prepared.request.cloud_profile is None:
        notes.append(
            f"the cloud is taken to be {prepared.request.cloud_speed:g} times as fast as this device; --cloud-profile measures"
        )
    if not prepared.request.inputs:
        notes.append("no --inputs: times and equality are those of made-up inputs")
    return notes


def _write(destination: Path, prepared: Prepared, plan: Plan, report: GraphReport) -> None:
    halves = [(info, candidate.halves) for info, candidate in plan.cuts]
    model = prepared.model
    needed = sum(m.ByteSize() for _, half in halves for m in (half.edge, half.cloud) if m is not None) + MARGIN_BYTES
    try:
        parent = next(folder for folder in destination.parents if folder.exists())
        require_space(parent, needed)
        with atomic_folder(destination) as folder:
            for info, half in halves:
                for name, proto in ((info.edge, half.edge), (info.cloud, half.cloud)):
                    if name is not None and proto is not None:
                        _save(folder, name, proto, model.proto)
            files = {
                path.relative_to(folder).as_posix(): FileInfo(sha256_file(path), path.stat().st_size)
                for path in sorted(folder.rglob("*"))
                if path.is_file()
            }
            bundle = GraphBundle(
                path=folder,
                created_by=f"edgecloud {version('edgecloud')}",
                licence=_licence(model.proto),
                graph=GraphInfo(
                    prepared.model.name,
                    prepared.model.fingerprint,
                    prepared.model.opset,
                    prepared.model.inputs,
                    prepared.model.outputs,
                ),
                cuts=[info for info, _ in halves],
                chosen=report.chosen,
                files=files,
                checks={**report.checks(), "num_samples": len(prepared.samples), "machine": machine()},
                exits=prepared.exits,
            )
            (folder / MANIFEST).write_text(bundle.to_json(), "utf-8")
            GraphBundle.open(folder)  # what cannot be read back gets no name
    except OSError as error:
        if error.errno in NO_SPACE:
            raise BundleError(f"no room for {destination}: it takes {needed / 1e6:.0f} MB; free some space") from error
        raise BundleError(f"{destination} cannot be written: {error}") from error


def _save(folder: Path, name: str, proto: onnx.ModelProto, whole: onnx.ModelProto) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    twin = folder / ("edge/whole.onnx" if name == "cloud/whole.onnx" else "cloud/whole.onnx")
    if proto is whole and twin.is_file():
        link_or_copy(twin, path)
    else:
        path.write_bytes(proto.SerializeToString())


def _licence(proto: onnx.ModelProto) -> str | None:
    return next((entry.value for entry in proto.metadata_props if entry.key.lower() in ("license", "licence")), None)
