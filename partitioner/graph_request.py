"""What a user asks of the division of an ONNX graph, checked before anything is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from edgecloud.errors import ConfigError
from edgecloud.partitioner.boundary import LOSS_METRICS, LOSSY, LossMetric
from edgecloud.partitioner.cut_search import Objective
from edgecloud.partitioner.dag import Side
from edgecloud.partitioner.link_spec import LinkSpec


@dataclass(frozen=True, slots=True)
class GraphRequest:
    """What a user asks for."""

    model: Path
    bundle: Path
    inputs: tuple[Path, ...] = ()
    objective: Objective = "latency"
    link: LinkSpec = field(default_factory=lambda: LinkSpec(20.0, 20.0, 40.0))
    cloud_speed: float = 4.0  # the cloud computes so many times as fast as this device
    cloud_profile: Path | None = None  # or as this file says
    device_profile: Path | None = None  # None: measured here
    save_profile: Path | None = None
    max_ram_bytes: int | None = None
    max_loss: float = 0.0
    loss_metric: LossMetric = "relative"
    codecs: tuple[str, ...] | None = None  # None: all, if any loss is allowed
    pins: Mapping[str, Side] = field(default_factory=dict)
    num_threads: int = 0  # 0: as many as this process may use
    timing_s: float = 4.0  # for all halves in turn; at most that for the nodes too. Each runs five times whatever is left
    overwrite: bool = False

    def __post_init__(self) -> None:
        """Check the values."""
        if not 0 < self.cloud_speed < float("inf"):
            raise ConfigError(f"--cloud-speed {self.cloud_speed:g} cannot be; 4 means four times as fast as this device")
        if not 0 <= self.max_loss < float("inf"):
            raise ConfigError(f"--max-loss {self.max_loss:g} cannot be; give 0 or more, such as 0.01")
        if self.max_ram_bytes is not None and self.max_ram_bytes < 1:
            raise ConfigError(f"--max-ram {self.max_ram_bytes} cannot be; give a positive number of bytes, such as 64mb")
        if self.loss_metric not in LOSS_METRICS:
            raise ConfigError(f"--loss {self.loss_metric!r} is unknown; it takes {', '.join(LOSS_METRICS)}")
        for codec in self.codecs or ():
            if codec not in LOSSY:
                raise ConfigError(f"--boundary {codec!r} is unknown; it takes raw, {', '.join(LOSSY)}")
        if self.codecs and not self.max_loss:
            raise ConfigError(
                f"--boundary {','.join(self.codecs)} loses accuracy; say how much may be lost, such as --max-loss 0.01"
            )
        if not 0 <= self.timing_s < float("inf"):
            raise ConfigError(f"timing_s is {self.timing_s:g}; it takes seconds, 0 or more")
        if self.num_threads < 0:
            raise ConfigError(f"--threads {self.num_threads} cannot be; give 0 for as many as there are, or more")
