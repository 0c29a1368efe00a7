"""What `edgecloud inspect` shows of a graph bundle."""

from __future__ import annotations

from collections.abc import Sequence

from rich.markup import escape
from rich.table import Table

from edgecloud.graph_bundle import BoundaryTensor, CutInfo, TensorInfo
from edgecloud.partitioner.graph_inspection import GraphInspection

MAX_TENSORS = 3  # of a boundary in a cell


def graph_table(found: GraphInspection) -> Table:
    """The graph and the files."""
    graph, checks = found.graph, found.checks
    state = f"{len(found.problems)} not as listed" if found.problems else "all hashes right"
    rows = {
        "graph": f"{graph.name}, by {found.created_by}, licence {found.licence or 'unknown'}, opset {graph.opset}",
        "fingerprint": graph.fingerprint,
        "inputs": "\n".join(map(_tensor, graph.inputs)),
        "outputs": "\n".join(map(_tensor, graph.outputs)),
        "exits": _exits(found),
        "chosen for": f"{checks['link']}, {checks.get('objective', 'unknown objective')}" if "link" in checks else "unknown",
        "files": f"{found.num_files}, {found.num_bytes / 1e6:.1f} MB, {state}",
        "parts": _parts(found),
    }
    table = Table(title=escape(found.bundle), title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column()
    for name, value in rows.items():
        table.add_row(name, escape(value))
    return table


def cuts_table(found: GraphInspection) -> Table:
    """A row for each cut: what it costs, what it loses, and where its halves lie."""
    loss = escape(f"loss\n{found.checks.get('loss_metric', '')}".strip())
    table = Table(title="cuts", title_justify="left", caption="chosen: *; RAM is an estimate", caption_justify="left")
    table.add_column("cut", no_wrap=True)
    table.add_column("what travels, files")
    for heading in ("device\nms", "cloud\nms", "up\nbytes", "RAM\nMB", "max\nerror", loss):
        table.add_column(heading, justify="right", no_wrap=True)
    for cut in found.cuts:
        table.add_row(*_cells(cut, chosen=cut.name == found.chosen))
    return table


def _exits(found: GraphInspection) -> str:
    if found.exits is None:
        return "none"
    heads = "\n".join(f"{head.name} after {head.tensor}" for head in found.exits.heads)
    said = f"by {found.exits.rule}, calibrated on {found.exits.num_samples} samples; right is by the {found.exits.judge}"
    return f"{heads}\n{said}"


def _parts(found: GraphInspection) -> str:
    if found.edge_is_here and found.cloud_is_here:
        return "the device's and the cloud's"
    if found.edge_is_here:
        return "the device's; the cloud's is not here, this is a device's copy"
    return "the cloud's; the device's is not here, this is the cloud's copy" if found.cloud_is_here else "none is here"


def _cells(cut: CutInfo, *, chosen: bool) -> list[str]:
    files = [name for name in (cut.edge, cut.cloud) if name is not None]
    return [
        f"{cut.name} *" if chosen else cut.name,
        escape("\n".join([_boundary(cut.boundary), *files])),
        f"{cut.edge_ms:.1f}",
        f"{cut.cloud_ms:.1f}",
        str(cut.boundary_bytes),
        f"{cut.edge_ram_bytes / 1e6:.1f}",
        _small(cut.max_error),
        _small(cut.loss),
    ]


def _boundary(tensors: Sequence[BoundaryTensor]) -> str:
    names = [f"{tensor.name} {tensor.codec or 'raw'}" for tensor in tensors[:MAX_TENSORS]]
    more = [f"and {len(tensors) - MAX_TENSORS} more"] if len(tensors) > MAX_TENSORS else []
    return ", ".join([*names, *more]) or "nothing"


def _tensor(tensor: TensorInfo) -> str:
    return f"{tensor.name}: {tensor.dtype} of {[size if size is not None else '?' for size in tensor.shape]}".replace("'", "")


def _small(value: float) -> str:
    return "0" if value == 0 else f"{value:.1e}"
