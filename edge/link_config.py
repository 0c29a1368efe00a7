"""What a simulated link is: its options, their parsers, its throughput traces, and the arithmetic of its rate.

Apart from `relay`, which carries the bytes: nothing here waits, and a wrong value ends here as a ConfigError.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal, cast

from edgecloud.errors import ConfigError

BYTES_PER_S = 125_000.0  # in one Mbit/s
MIN_SLICE_BYTES, MAX_SLICE_BYTES = 1500, 64 * 1024
SLICE_S = 0.005  # a slice takes this long on the line: a slow link delivers smoothly
MILLISECONDS = {"us": 1e-3, "ms": 1.0, "s": 1e3, "min": 60e3}
MEGABITS = {"bit": 1e-6, "kbit": 1e-3, "mbit": 1.0, "gbit": 1e3}

# seconds since the link began -> (Mbit/s at that time, the time until which it stays so)
RateFunction = Callable[[float], tuple[float, float]]
OutageKind = Literal["stall", "cut"]


@dataclass(frozen=True, slots=True)
class Outage:
    """A time without service. `stall` holds the bytes back; `cut` resets connections and refuses new ones."""

    start_s: float  # since the link began
    duration_s: float
    kind: OutageKind = "stall"

    def __post_init__(self) -> None:
        """Check the values."""
        if not (0 <= self.start_s < math.inf and 0 < self.duration_s < math.inf):
            raise ConfigError(f"an outage of {self.duration_s:g}s at {self.start_s:g}s cannot be; write one such as 3s@10s")
        if self.kind not in ("stall", "cut"):
            raise ConfigError(f"outage kind {self.kind!r} is unknown; choose stall or cut")

    @property
    def end_s(self) -> float:
        """The first moment of service again."""
        return self.start_s + self.duration_s


@dataclass(frozen=True, slots=True)
class Trace:
    """A throughput trace: `mbps[i]` holds from `starts_s[i]` to the next start.

    The last rate holds as long as the one before it, then the trace begins again. A single rate holds forever.
    """

    path: Path
    starts_s: tuple[float, ...]  # the first is 0
    mbps: tuple[float, ...]

    @property
    def period_s(self) -> float:
        """Seconds until the trace repeats."""
        return 2 * self.starts_s[-1] - self.starts_s[-2] if len(self.starts_s) > 1 else math.inf

    def rate(self, time_s: float) -> tuple[float, float]:
        """As RateFunction."""
        period_s = self.period_s
        position_s = time_s % period_s
        index = bisect_right(self.starts_s, position_s) - 1
        end_s = self.starts_s[index + 1] if index + 1 < len(self.starts_s) else period_s
        # the nanosecond: rounding must never leave a reader of the trace on the spot
        return self.mbps[index], max(time_s + (end_s - position_s), time_s + 1e-9)


@dataclass(frozen=True, slots=True)
class LinkConfig:
    """One link. "up" is from the device to the server. Raises ConfigError for values that cannot work."""

    listen_port: int  # 0: any free one
    to_host: str
    to_port: int
    host: str = "127.0.0.1"  # the address to listen on
    rtt_ms: float = 0.0  # half of it in each direction
    jitter_ms: float = 0.0  # each chunk waits a further uniform(0, jitter_ms); order is kept
    up_mbps: float | None = None  # None: as the trace says, unlimited without one
    down_mbps: float | None = None
    trace: Trace | None = None
    outages: tuple[Outage, ...] = ()
    seed: int = 0  # of the jitter

    def __post_init__(self) -> None:
        """Check the values."""
        if not 0 <= self.listen_port <= 65535:
            raise ConfigError(f"--listen {self.listen_port} is no port; give 1 to 65535, or 0 for any free one")
        for name, host in (("--host", self.host), ("--to", self.to_host)):
            if not _is_host(host):
                raise ConfigError(f"{name} {host!r} is no host; give a name or an address such as 127.0.0.1")
        if not 1 <= self.to_port <= 65535:
            raise ConfigError(f"--to {self.to_host}:{self.to_port} is no address; write HOST:PORT with a port of 1 to 65535")
        for name, value_ms in (("--rtt", self.rtt_ms), ("--jitter", self.jitter_ms)):
            if not 0 <= value_ms < math.inf:
                raise ConfigError(f"{name} {value_ms:g}ms cannot be; give 0ms or more")
        for name, mbps in (("--up", self.up_mbps), ("--down", self.down_mbps)):
            if mbps is not None and not 0 < mbps < math.inf:
                raise ConfigError(f"{name} {mbps:g}mbit cannot be; give a positive rate, or leave {name} out for no limit")
        if self.trace is not None and self.down_mbps is not None:
            raise ConfigError(
                f"--down {self.down_mbps:g}mbit and --trace {self.trace.path} both set the down rate; drop one of them"
            )

    @property
    def up_rate(self) -> RateFunction:
        """The up rate: `up_mbps`, else the trace, else infinite."""
        return self.trace.rate if self.trace and self.up_mbps is None else constant_rate(self.up_mbps)

    @property
    def down_rate(self) -> RateFunction:
        """The down rate: the trace, else `down_mbps`, else infinite."""
        return self.trace.rate if self.trace else constant_rate(self.down_mbps)


def constant_rate(mbps: float | None) -> RateFunction:
    """A rate that never changes; None is infinite."""
    rate = math.inf if mbps is None else mbps
    return lambda _time_s: (rate, math.inf)


class Pacer:
    """Serializes bytes at a rate that may change with time; one for all connections of a direction.

    A bucket of size zero: n bytes occupy the line for exactly n / rate, and an idle line saves nothing up. Deadlines
    follow from each other and not from when a timer fired, so lateness does not add up.
    """

    def __init__(self, rate: RateFunction, outages: Sequence[Outage] = ()) -> None:
        self._rate = rate
        self._stalls = sorted((o for o in outages if o.kind == "stall"), key=lambda o: o.start_s)
        self.free_at_s = 0.0

    def service_from(self, time_s: float) -> float:
        """`time_s`, or the end of the stall that holds it."""
        for stall in self._stalls:
            if stall.start_s <= time_s < stall.end_s:
                time_s = stall.end_s
        return time_s

    def slice_bytes(self, time_s: float) -> int:
        """How much to put on the line at once."""
        mbps, _ = self._rate(time_s)
        return int(min(MAX_SLICE_BYTES, max(MIN_SLICE_BYTES, mbps * BYTES_PER_S * SLICE_S)))

    def send(self, num_bytes: int, time_s: float) -> float:
        """The time at which the last of `num_bytes` that came at `time_s` leaves the line."""
        self.free_at_s = max(self.free_at_s, time_s)
        left_bytes = float(num_bytes)
        while left_bytes > 0:
            mbps, until_s = self._segment(self.free_at_s)
            left_s = left_bytes / (mbps * BYTES_PER_S) if mbps else math.inf
            if self.free_at_s + left_s <= until_s:
                self.free_at_s += left_s
                break
            left_bytes -= (until_s - self.free_at_s) * mbps * BYTES_PER_S
            self.free_at_s = until_s
        return self.free_at_s

    def _segment(self, time_s: float) -> tuple[float, float]:
        if not self._stalls:
            return self._rate(time_s)
        service_s = self.service_from(time_s)
        if service_s > time_s:
            return 0.0, service_s
        mbps, until_s = self._rate(time_s)
        return mbps, min([until_s, *(stall.start_s for stall in self._stalls if stall.start_s > time_s)])


def parse_duration_ms(text: str) -> float:
    """Milliseconds in "60ms", "1.5s", "250us" or "1min"; a bare number counts milliseconds. Raises ConfigError."""
    return _quantity(text, {**MILLISECONDS, "": 1.0}, "duration", "60ms or 1.5s")


def parse_rate_mbps(text: str) -> float:
    """Mbit/s in "5mbit", "500kbit" or "1gbit" (a "/s" may follow). The unit is required. Raises ConfigError."""
    units = {**MEGABITS, **{f"{unit}/s": mbps for unit, mbps in MEGABITS.items()}}
    mbps = _quantity(text, units, "rate", "5mbit or 500kbit")
    if not mbps:
        raise ConfigError(f"{text!r} is no rate that delivers; give a positive one such as 5mbit or 500kbit")
    return mbps


def parse_outage(text: str, kind: OutageKind = "stall") -> Outage:
    """DURATION@START with units, such as "3s@10s"; a suffix ":cut" or ":stall" overrides `kind`. Raises ConfigError."""
    span, _, suffix = text.partition(":")
    duration, at, start = span.partition("@")
    if not (at and duration and start) or suffix not in ("", "stall", "cut") or text.endswith(":"):
        raise ConfigError(f"{text!r} is no outage; write DURATION@START such as 3s@10s or 3s@10s:cut")
    duration_s, start_s = (_quantity(part, MILLISECONDS, "duration with a unit", "3s@10s") / 1e3 for part in (duration, start))
    return Outage(start_s, duration_s, cast("OutageKind", suffix or kind))


def parse_address(text: str) -> tuple[str, int]:
    """Host and port of "HOST:PORT" or "[IPV6]:PORT". Raises ConfigError."""
    match = re.fullmatch(r"(?:\[([^\[\]]+)\]|([^:\[\]\s]+)):([0-9]{1,5})", text.strip())
    if match is None:
        raise ConfigError(f"{text!r} is no address; write HOST:PORT such as 127.0.0.1:7070")
    return match[1] or match[2], int(match[3])


def read_trace(path: str | Path) -> Trace:
    """Read lines of `time_s mbit_per_s`; blank lines and lines that begin with # do not count.

    The first time becomes 0. Raises ConfigError naming file and line: unreadable, not two finite numbers, a time that
    does not grow, a negative rate; or, for the whole file, no rate above 0.
    """
    trace = Path(path)
    try:
        lines = trace.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text file"
        raise ConfigError(f"--trace {trace} cannot be read: {reason}; give a file of `time_s mbit_per_s` lines") from None
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip() and not line.lstrip().startswith("#")]
    points = [_trace_point(line, f"{trace}, line {number}") for number, line in numbered]
    for (before, after), (number, _) in zip(pairwise(points), numbered[1:], strict=True):
        if after[0] <= before[0]:
            raise ConfigError(
                f"{trace}, line {number}: time {after[0]:g} does not come after {before[0]:g}; sort the lines by time"
            )
    if not any(mbps for _, mbps in points):
        raise ConfigError(f"{trace} has no rate above 0, so nothing would ever arrive; give at least one")
    return Trace(trace, tuple(time_s - points[0][0] for time_s, _ in points), tuple(mbps for _, mbps in points))


def _is_host(text: str) -> bool:
    try:
        return bool(text.encode("idna"))
    except UnicodeError:
        return False


def _trace_point(line: str, where: str) -> tuple[float, float]:
    try:
        time_s, mbps = (float(word) for word in line.split())
    except ValueError:
        raise ConfigError(f"{where}: {line.strip()[:40]!r} is not `time_s mbit_per_s`; write two numbers") from None
    if not (math.isfinite(time_s) and 0 <= mbps < math.inf):
        raise ConfigError(f"{where}: {line.strip()[:40]!r} cannot be; times are finite and rates 0 or more")
    return time_s, mbps


def _quantity(text: str, units: dict[str, float], what: str, example: str) -> float:
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([a-z/]*)", text.strip().lower())
    value = float(match[1]) * units[match[2]] if match and match[2] in units else math.inf
    if not math.isfinite(value):
        raise ConfigError(f"{text!r} is no {what}; write it as {example}")
    return value
