"""Links to measure over, as `edgecloud link` makes them: by name, by round trip, by trace."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from edgecloud.edge.link_config import parse_duration_ms, read_trace
from edgecloud.errors import ConfigError

TRACE_RTT_MS = 60.0  # a trace of throughput tells no round trip


@dataclass(frozen=True, slots=True)
class Link:
    """A link to try, as `edgecloud link` takes it. Its median round trip is `rtt_ms + jitter_ms`."""

    name: str
    rtt_ms: float
    jitter_ms: float = 0.0  # each direction waits a further uniform(0, jitter_ms)
    up_mbps: float | None = None  # None: as the trace says, unlimited without one
    down_mbps: float | None = None
    trace: str | None = None  # file of the rates

    def arguments(self, cloud: str) -> list[str]:
        """Of `edgecloud link`."""
        words = ["link", "--listen", "0", "--to", cloud, "--rtt", f"{self.rtt_ms:g}ms", "--jitter", f"{self.jitter_ms:g}ms"]
        for name, mbps in (("--up", self.up_mbps), ("--down", self.down_mbps)):
            words += [] if mbps is None else [name, f"{mbps:g}mbit"]
        return words + ([] if self.trace is None else ["--trace", self.trace])


SAME_BUILDING = Link("same building", 3, 0, 1000, 1000)
WIFI = Link("home Wi-Fi", 18, 2, 20, 100)
LTE = Link("LTE", 60, 15, 30, 168)  # US speed tests: 75 ms, 30 up, 168 down
LOW_BAND_5G = Link("5G", 46, 15, 76, 154)  # US speed tests, low band: 61 ms, 76 up, 154 down

NAMED = {"wifi": WIFI, "lte": LTE, "5g": LOW_BAND_5G}


def parse_link(text: str) -> Link:
    """`wifi`, `lte`, `5g`; a round trip such as `20ms`; or `trace:FILE`, `trace:FILE@RTT`. Raises ConfigError."""
    word = text.strip()
    if word.lower() in NAMED:
        return replace(NAMED[word.lower()], name=word.lower())
    if word.startswith("trace:"):
        return _parse_trace(word)
    try:
        rtt_ms = parse_duration_ms(word)
    except ConfigError:
        known = ", ".join(NAMED)
        raise ConfigError(f"--links has {text!r}; it takes {known}, a round trip such as 20ms, or trace:FILE[@RTT]") from None
    return Link(f"{rtt_ms:g}ms", rtt_ms)


def _parse_trace(word: str) -> Link:
    text = word.removeprefix("trace:")
    name, at, rtt = text.rpartition("@")
    if not at or Path(text).is_file():
        name, rtt_ms = text, TRACE_RTT_MS
    else:
        rtt_ms = parse_duration_ms(rtt)
    read_trace(name)
    return Link(f"{Path(name).stem} {rtt_ms:g}ms", rtt_ms, trace=name)
