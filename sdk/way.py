"""How a generation reaches the cloud: by ids to the whole target, or, in mode `split`, by rows to its tail."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from edgecloud.bundle import Bundle
from edgecloud.edge.courier import Courier
from edgecloud.edge.estimates import Estimates
from edgecloud.edge.patience import EstimatedPatience, FrontPatience
from edgecloud.edge.pilot import Patience
from edgecloud.errors import ConfigError, ModelMismatchError
from edgecloud.options import GenerationOptions
from edgecloud.protocols import Drafter
from edgecloud.types import Service

if TYPE_CHECKING:
    from edgecloud.bundle import FrontInfo
    from edgecloud.edge.front_rows import FrontRows


@dataclass(frozen=True, slots=True)
class Way:
    """What `collaborate` and its pilot need to know of it."""

    estimates: Estimates
    patience: Patience
    new_courier: Callable[..., Courier]
    drafter: Drafter | None = None  # None: the draft model


def whole_way(estimates: Estimates, now_s: float) -> Way:
    """Ids to the whole target."""
    return Way(estimates, EstimatedPatience(estimates, now_s), Courier)


def split_way(front: FrontRows, drafter: Drafter | None, estimates: Estimates, service: Service, now_s: float) -> Way:
    """Rows of the front to the target's tail; the estimates are of the split target."""
    from edgecloud.edge.front_courier import FrontCourier

    courier = partial(FrontCourier, front=front, max_message_bytes=service.max_message_bytes)
    return Way(estimates, FrontPatience(estimates, now_s, front.row_bytes), courier, drafter)


def check_split(options: GenerationOptions, bundle: Bundle) -> FrontInfo:
    """The bundle's front. Raises ConfigError: there is none, or an option would need the prompt's ids in the cloud."""
    if bundle.front is None:
        raise ConfigError(f"mode 'split' needs a front, and {bundle.path} has none; make it with `edgecloud partition --cut K`")
    penalty = options.sampling.repetition_penalty
    if penalty != 1.0:
        raise ConfigError(
            f"repetition_penalty is {penalty!r}; in mode 'split' it takes 1.0, for the cloud does not have the prompt's ids"
        )
    return bundle.front


def check_tail(front: FrontInfo, service: Service, address: str) -> None:
    """Raises ModelMismatchError: this service does not take what the front makes."""
    if front.cut not in service.tail_cuts:
        cuts = f"{min(service.tail_cuts)} to {max(service.tail_cuts)}" if service.tail_cuts else "none"
        raise ModelMismatchError(
            f"the bundle's front has {front.cut} layers; {address} can be entered after {cuts}: serve this bundle's target with a "
            "version and model that can, or use another mode"
        )
    if front.codec not in service.boundary_codecs:
        raise ModelMismatchError(
            f"the bundle's front sends {front.codec}; {address} takes {', '.join(service.boundary_codecs) or 'nothing'}"
        )
