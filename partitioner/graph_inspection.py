"""What is in a graph bundle, read from its manifest, and whether every file is what the manifest says. Nothing is run or parsed."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from edgecloud.errors import BundleCorruptError
from edgecloud.exits import Exits
from edgecloud.graph_bundle import CutInfo, GraphBundle, GraphInfo
from edgecloud.manifest import names_below, verify_file


@dataclass(frozen=True, slots=True)
class GraphInspection:
    """A bundle of a cut graph, taken apart."""

    bundle: str
    kind: str
    created_by: str
    licence: str | None
    graph: GraphInfo
    chosen: str
    cuts: list[CutInfo]
    num_files: int
    num_bytes: int
    edge_is_here: bool  # the cloud's copy has no edge/
    cloud_is_here: bool  # a device's copy has no cloud/
    checks: dict[str, Any]  # what was measured at partition time
    problems: list[str]  # files that are not what the manifest says
    exits: Exits | None  # of a classifier that has some

    def to_dict(self) -> dict[str, Any]:
        """The object that `edgecloud inspect --json` prints."""
        return asdict(self)


def inspect_graph_bundle(path: Path) -> GraphInspection:
    """Open a graph bundle and hash every file of the parts that are here.

    Raises:
        BundleError: it cannot be opened. Files that are missing or changed are `problems` of the answer.
    """
    bundle = GraphBundle.open(path)
    edge, cloud = part_is_here(bundle, "edge"), part_is_here(bundle, "cloud")
    absent: set[str] = set()
    if edge != cloud:  # with neither this is nobody's copy: everything is missing
        absent = set(names_below(bundle.files, "cloud" if edge else "edge"))
    problems = []
    for name, info in bundle.files.items():
        if name in absent:
            continue
        try:
            verify_file(bundle.file(name), info)
        except BundleCorruptError as error:
            problems.append(str(error))
    return GraphInspection(
        bundle=str(path),
        kind="graph",
        created_by=bundle.created_by,
        licence=bundle.licence,
        graph=bundle.graph,
        chosen=bundle.chosen,
        cuts=bundle.cuts,
        num_files=len(bundle.files),
        num_bytes=sum(info.num_bytes for info in bundle.files.values()),
        edge_is_here=edge,
        cloud_is_here=cloud,
        checks=bundle.checks,
        problems=problems,
        exits=bundle.exits,
    )


def part_is_here(bundle: GraphBundle, part: Literal["edge", "cloud"]) -> bool:
    """Whether this copy has a side's folder, or that side has no files at all."""
    return not names_below(bundle.files, part) or bundle.file(part).exists()
