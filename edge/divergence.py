"""Whether the stated risk still holds, judged by what background checks found, generation after generation.

A bet against "of the tokens skipped, a share of at most `risk` differs": who bets on more gains nothing in the mean while that is
true, so a fortune of 1 / delta is had with a chance of at most delta, however long one looks (Ville's inequality). A generation
is one bet, for its tokens hang together; prompts need only come as independently as those of the calibration.
"""

from __future__ import annotations

from collections.abc import Sequence

from edgecloud.types import RiskAlarm

MAX_AUDITED = 32  # tokens of a generation that count: one long odd answer decides nothing
STAKES = (0.125, 0.25, 0.5, 0.9)  # shares of the highest bet that can be paid; evidence is the mean of their fortunes


class Bets:
    """The evidence that the divergence is above `risk`: a fortune that began as 1."""

    def __init__(self, risk: float) -> None:
        self._risk = risk
        self._at_work = [0.0] * len(STAKES)
        self._num_bets = 0

    def add(self, num_audited: int, num_diverged: int) -> float:
        """A generation's checks: of so many tokens, in order, so many differ.  -> the fortune

        Of the fortune, 1 / (n (n + 1)) is put to work before bet n and the rest kept, so that what is lost in good times does not
        hide a change for the worse.
        """
        num_audited = min(num_audited, MAX_AUDITED)
        excess = min(num_diverged, num_audited) - self._risk * num_audited
        self._num_bets += 1
        fresh = 1 / (self._num_bets * (self._num_bets + 1))
        highest = 1 / (self._risk * MAX_AUDITED)
        self._at_work = [
            (fortune + fresh) * (1 + stake * highest * excess) for fortune, stake in zip(self._at_work, STAKES, strict=True)
        ]
        return sum(self._at_work) / len(STAKES) + 1 / (self._num_bets + 1)


class Watch:
    """For one stated risk: the threshold in force, and when it has to be stricter.

    Args:
        risk: what the user stated.
        thresholds: the one calibrated for it, and stricter ones to fall back to, rising.
        delta: chance of a false alarm, for each threshold.
    """

    def __init__(self, risk: float, thresholds: Sequence[float], delta: float) -> None:
        if not 0 < risk < 1 or not 0 < delta < 1:
            raise ValueError(f"risk is {risk!r} and delta {delta!r}; both are above 0 and below 1")
        if list(thresholds) != sorted(set(thresholds)):
            raise ValueError(f"thresholds are {thresholds!r}; they rise")
        self.risk = risk
        self._thresholds = list(thresholds)
        self._delta = delta
        self._begin()

    def _begin(self) -> None:
        self._bets = Bets(self.risk)
        self._num_audited = self._num_diverged = 0

    @property
    def threshold(self) -> float | None:
        """In force for the next generation; None: nothing may be skipped."""
        return self._thresholds[0] if self._thresholds else None

    def add(self, num_audited: int, num_diverged: int) -> RiskAlarm | None:
        """A generation's checks.  -> an alarm, once; the threshold is stricter then"""
        if not num_audited or not self._thresholds:
            return None
        self._num_audited += num_audited
        self._num_diverged += num_diverged
        if self._bets.add(num_audited, num_diverged) < 1 / self._delta:
            return None
        del self._thresholds[0]
        alarm = RiskAlarm(self.risk, self._num_audited, self._num_diverged, self.threshold)
        self._begin()
        return alarm
