"""What `Client.run` takes: the inputs of a graph and who is to run it, checked before anything is done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from edgecloud.errors import ConfigError
from edgecloud.exit_scores import Leave, leaves
from edgecloud.exits import Rule
from edgecloud.graph_bundle import CutInfo, GraphBundle, GraphInfo, TensorInfo
from edgecloud.tensors import Array


def check_inputs(graph: GraphInfo, inputs: object) -> dict[str, Array]:
    """The inputs as contiguous arrays. Raises ConfigError that names what is wrong with them; nothing is converted silently."""
    wanted = {tensor.name: tensor for tensor in graph.inputs}
    if not isinstance(inputs, Mapping) or set(inputs) != set(wanted):
        given = ", ".join(map(repr, inputs)) if isinstance(inputs, Mapping) else type(inputs).__name__
        raise ConfigError(f"inputs are {given or 'none'}; {graph.name} takes a mapping with {', '.join(map(repr, wanted))}")
    return {name: _checked(np.asarray(inputs[name]), tensor) for name, tensor in wanted.items()}


def cuts_of(bundle: GraphBundle, mode: str, has_cloud: bool) -> list[CutInfo]:
    """The cuts that a mode may use: those of `auto`, `split`, or the one of that name; without a cloud those that need none.

    Raises:
        ConfigError: there is no such mode or cut, or none is left.
    """
    names = [cut.name for cut in bundle.cuts]
    if mode == "auto":
        found = bundle.cuts
    elif mode == "split":
        found = [cut for cut in bundle.cuts if cut.edge is not None and cut.cloud is not None]
    elif mode in {"edge", "cloud"} or mode in names:
        found = [cut for cut in bundle.cuts if cut.name == mode]
    else:
        raise ConfigError(f"mode is {mode!r}; it takes auto, split, or a cut of the bundle: {', '.join(names)}")
    if not found:
        raise ConfigError(f"mode {mode!r} needs a cut that {bundle.path} does not have; it has {', '.join(names)}")
    reachable = [cut for cut in found if has_cloud or cut.cloud is None]
    if not reachable:
        raise ConfigError(f"mode {mode!r} needs a cloud for {', '.join(cut.name for cut in found)}; give HOST:PORT")
    return reachable


def exits_of(bundle: GraphBundle, cuts: Sequence[CutInfo], risk: float | None, rule: Rule | None) -> dict[str, Leave]:
    """By cut, when the device may leave without asking the cloud; without a risk never.

    Raises:
        ConfigError: the bundle has no exits, or none that keeps the risk.
    """
    if risk is None:
        if rule is not None:
            raise ConfigError(f"exit_rule {rule!r} decides nothing without a risk; say risk=0.05")
        return {}
    if bundle.exits is None:
        raise ConfigError(f"{bundle.path} has no exits, so no risk is known; make some with `edgecloud exits`, or name no risk")
    bundle.exits.points(risk, rule)  # whether the risk can be kept does not depend on the mode
    divided = [cut for cut in cuts if cut.edge is not None and cut.cloud is not None]
    found = {cut.name: leaves(bundle.exits, frozenset(cut.edge_outputs), risk, rule) for cut in divided}
    return {name: leave for name, leave in found.items() if leave is not None}


def _checked(array: Array, tensor: TensorInfo) -> Array:
    sizes = ["any" if not isinstance(size, int) else size for size in tensor.shape]
    if str(array.dtype) != tensor.dtype:
        raise ConfigError(f"input {tensor.name!r} is {array.dtype}, the graph takes {tensor.dtype}; convert it (.astype)")
    fits = len(array.shape) == len(sizes) and all(n > 0 and w in ("any", n) for n, w in zip(array.shape, sizes, strict=True))
    if not fits:
        raise ConfigError(f"input {tensor.name!r} has shape {list(array.shape)}, the graph takes {sizes}, each at least 1")
    return array if array.flags.c_contiguous else array.copy(order="C")
