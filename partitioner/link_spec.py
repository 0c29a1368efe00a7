"""A link as a plan sees it: how long a byte takes each way, and a round trip."""

from __future__ import annotations

import math
from dataclasses import dataclass

from edgecloud.errors import ConfigError

SERVICE_MS = 2.0  # a call's way through gRPC on both sides and to the engine (benchmarks/front_end.py)


@dataclass(frozen=True, slots=True)
class LinkSpec:
    """Rates and round trip between device and cloud."""

    up_mbps: float | None  # None: without limit
    down_mbps: float | None
    rtt_ms: float

    def __post_init__(self) -> None:
        """Check the values."""
        for name, mbps in (("up", self.up_mbps), ("down", self.down_mbps)):
            if mbps is not None and not 0 < mbps < math.inf:
                raise ConfigError(f"a link with {name}={mbps:g}mbit cannot be; give a positive rate")
        if not 0 <= self.rtt_ms < math.inf:
            raise ConfigError(f"a link with rtt={self.rtt_ms:g}ms cannot be; give 0ms or more")

    @property
    def call_ms(self) -> float:
        """What any call takes, however little it sends and asks for."""
        return self.rtt_ms + SERVICE_MS

    def up_ms(self, num_bytes: int) -> float:
        """Time on the line, device to cloud."""
        return _ms(num_bytes, self.up_mbps)

    def down_ms(self, num_bytes: int) -> float:
        """Time on the line, cloud to device."""
        return _ms(num_bytes, self.down_mbps)

    def scaled(self, up_mbps: float, rtt_ms: float) -> LinkSpec:
        """Another link on which the rate down is as many times the rate up as here; both alike if here one has no limit."""
        ratio = self.down_mbps / self.up_mbps if self.up_mbps and self.down_mbps else 1.0
        return LinkSpec(up_mbps, up_mbps * ratio, rtt_ms)

    def __str__(self) -> str:
        up, down = ("unlimited" if mbps is None else f"{mbps:g} Mbit/s" for mbps in (self.up_mbps, self.down_mbps))
        return f"{up} up, {down} down, round trip {self.rtt_ms:g} ms"


def _ms(num_bytes: int, mbps: float | None) -> float:
    return 0.0 if mbps is None else 8e-3 * num_bytes / mbps
