"""How long to wait for an answer before it counts as late, and before the cloud counts as lost."""

from __future__ import annotations

from edgecloud.edge.estimates import FIRST_PACKET_MS, Estimates

UNKNOWN_MS = 300.0  # an answer's time before any was seen
UNKNOWN_ROW_MS = 50.0  # of a front, before any was seen
UNKNOWN_MS_PER_BYTE = 0.008  # 1 Mbit/s
MARGIN_MS = 10.0  # timers and threads
LEAST_LOST_S = 1.0
LOST_FACTOR = 4.0


class EstimatedPatience:
    """Implements `pilot.Patience` by what is known."""

    def __init__(self, estimates: Estimates, now_s: float) -> None:
        self._estimates = estimates
        self._starts_idle = estimates.link.sent_to_idle(now_s)

    def overdue_s(self, num_new_tokens: int, streaming: bool) -> float:
        """The expected time and twice the mean deviation."""
        known = self._estimates
        deviation = known.cloud.stream_deviation_ms if streaming else known.link.deviation_ms
        return (self._expected_ms(num_new_tokens, streaming) + 2 * deviation + MARGIN_MS) / 1e3

    def lost_s(self, num_new_tokens: int, streaming: bool) -> float:
        """Several times that, and the time in which a radio wakes."""
        idle_ms = FIRST_PACKET_MS if self._starts_idle and not streaming else 0.0
        return max(LEAST_LOST_S, LOST_FACTOR * self._expected_ms(num_new_tokens, streaming) / 1e3) + idle_ms / 1e3

    def _expected_ms(self, num_new_tokens: int, streaming: bool) -> float:
        known = self._estimates
        if streaming:
            return known.cloud.stream_ms(0)
        cloud_ms = known.cloud.verify_ms(num_new_tokens, 0) if known.cloud.known else UNKNOWN_MS
        return cloud_ms + (UNKNOWN_MS if known.link.rtt_ms is None else known.link.rtt_ms)


class FrontPatience:
    """The same for mode `split`: before an answer can come, the front makes rows of the new tokens and these go up."""

    def __init__(self, estimates: Estimates, now_s: float, row_bytes: int) -> None:
        self._answer = EstimatedPatience(estimates, now_s)
        self._estimates = estimates
        self._row_bytes = row_bytes

    def overdue_s(self, num_new_tokens: int, streaming: bool) -> float:
        """As EstimatedPatience says, and the rows' time."""
        return self._answer.overdue_s(num_new_tokens, streaming) + self._rows_s(num_new_tokens)

    def lost_s(self, num_new_tokens: int, streaming: bool) -> float:
        """Several times that."""
        return self._answer.lost_s(num_new_tokens, streaming) + LOST_FACTOR * self._rows_s(num_new_tokens)

    def _rows_s(self, num_rows: int) -> float:
        known = self._estimates
        row_ms = known.device.front_row_ms or UNKNOWN_ROW_MS
        return num_rows * (row_ms + self._row_bytes * (known.link.uplink_ms_per_byte or UNKNOWN_MS_PER_BYTE)) / 1e3
