"""The watch over a stated risk: silent while it holds, loud when the domain has shifted."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgecloud.edge.divergence import MAX_AUDITED, Bets, Watch
from edgecloud.types import RiskAlarm

DELTA = 0.1


def generations(rng: np.random.Generator, rate: float, number: int, spread: float = 0.0) -> list[tuple[int, int]]:
    """What checks find: prompts of unlike length and, with `spread`, of unlike difficulty; the mean rate is as stated."""
    found = []
    for _ in range(number):
        num_audited = int(rng.integers(0, 30))
        own = rng.beta(rate / spread, (1 - rate) / spread) if spread else rate
        found.append((num_audited, int(rng.binomial(num_audited, own))))
    return found


def first_alarm(watch: Watch, found: list[tuple[int, int]]) -> int | None:
    """The number of the generation that raised it."""
    return next((at for at, counts in enumerate(found) if watch.add(*counts) is not None), None)


@pytest.mark.parametrize("spread", [0.0, 0.5], ids=["alike", "unlike"])
@pytest.mark.parametrize("risk", [0.01, 0.05, 0.1])
def test_no_alarm_while_the_risk_just_holds_but_for_a_share_of_delta(risk: float, spread: float) -> None:
    rng = np.random.default_rng(5)
    num_alarms = sum(first_alarm(Watch(risk, [0.9], DELTA), generations(rng, risk, 200, spread)) is not None for _ in range(300))
    assert num_alarms <= DELTA * 300 + 3 * (DELTA * (1 - DELTA) * 300) ** 0.5


@pytest.mark.parametrize("risk", [0.01, 0.05, 0.1])
@pytest.mark.parametrize("num_before", [0, 100], ids=["from the first prompt", "after a hundred good ones"])
def test_a_shifted_domain_raises_the_alarm(risk: float, num_before: int) -> None:
    rng = np.random.default_rng(6)
    for _ in range(50):
        before, after = generations(rng, risk / 2, num_before), generations(rng, 4 * risk, 150)
        assert first_alarm(Watch(risk, [0.9], DELTA), before + after) is not None


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 60), st.floats(0, 1)), max_size=40), st.sampled_from([0.01, 0.05, 0.5]))
def test_a_fortune_is_never_below_nothing(found: list[tuple[int, float]], risk: float) -> None:
    bets = Bets(risk)
    for num_audited, share in found:
        assert bets.add(num_audited, round(share * num_audited)) > 0


def test_in_the_mean_a_bet_gains_nothing_while_the_risk_holds() -> None:
    """Exactly: over all that one generation can bring, after any past."""
    from math import comb

    for past in ([], [(10, 3), (30, 0), (5, 5)]):
        for num_audited in (1, 7, MAX_AUDITED):
            fortunes = []
            for num_diverged in range(num_audited + 1):
                bets = Bets(0.05)
                before = 1.0
                for counts in past:
                    before = bets.add(*counts)
                chance = comb(num_audited, num_diverged) * 0.05**num_diverged * 0.95 ** (num_audited - num_diverged)
                fortunes.append(chance * bets.add(num_audited, num_diverged))
            assert sum(fortunes) == pytest.approx(before)


def test_every_alarm_makes_the_threshold_stricter_until_nothing_is_skipped() -> None:
    watch = Watch(0.05, [0.8, 0.9], DELTA)
    assert watch.threshold == 0.8
    alarms: list[RiskAlarm] = []
    for _ in range(50):
        alarms += filter(None, [watch.add(20, 10)])
    assert [alarm.threshold for alarm in alarms] == [0.9, None]
    assert watch.threshold is None
    assert all(alarm.num_diverged * 2 == alarm.num_audited > 0 for alarm in alarms)


@pytest.mark.parametrize("arguments", [(0.0, [0.9], 0.1), (0.05, [0.9], 1.0), (0.05, [0.9, 0.8], 0.1)])
def test_nonsense_is_refused(arguments: tuple[float, list[float], float]) -> None:
    with pytest.raises(ValueError, match="are"):
        Watch(*arguments)
