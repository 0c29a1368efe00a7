"""Does a risk hold? Tests on prompts, whose tokens depend on one another, so that a prompt is one observation.

Learn then Test (Angelopoulos, Bates, Candes, Jordan, Lei 2021): each threshold is a hypothesis "the risk is exceeded", tested in a
fixed order from the safest until one is not rejected. Then the chance that a threshold taken is too low is at most delta.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import stdtr

NUM_BETS = 16
MOST_OF_A_BET = 0.95  # of what could lose everything to one loss of 1
PRIOR_WEIGHT = 1e-3  # of a loss of 0 that the first bet is made on: it decides only while nothing was seen
NEEDED_FACTOR = 1.2  # prompts needed beside what growth says: a bet has to learn

Floats = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Exits:
    """What one threshold did, a row a prompt."""

    tokens: Counts  # [prompts] of the answer
    skipped: Counts  # [prompts] tokens without verification
    diverged: Counts  # [prompts] of them, not the target's choice

    def __post_init__(self) -> None:
        if not (len(self.tokens) == len(self.skipped) == len(self.diverged)):
            raise ValueError(f"{len(self.tokens)}, {len(self.skipped)} and {len(self.diverged)} prompts are not the same ones")
        if (self.diverged > self.skipped).any() or (self.skipped > self.tokens).any() or (self.diverged < 0).any():
            raise ValueError("a prompt has more diverged than skipped tokens, more skipped ones than tokens, or less than none")

    def part(self, rows: slice | Counts) -> Exits:
        """The same of some prompts."""
        return Exits(self.tokens[rows], self.skipped[rows], self.diverged[rows])

    @property
    def losses(self) -> Floats:
        """Of each prompt that skips at all, the share of skipped tokens that diverged.  -> [prompts with exits]"""
        some = self.skipped > 0
        shares: Floats = self.diverged[some] / self.skipped[some]
        return shares

    @property
    def exit_share(self) -> float:
        """Skipped tokens of all tokens."""
        return float(self.skipped.sum() / max(1, self.tokens.sum()))

    @property
    def divergence(self) -> float:
        """Diverged tokens of all skipped ones; 0 where none was skipped."""
        return float(self.diverged.sum() / max(1, self.skipped.sum()))

    def p_value(self, risk: float) -> float:
        """Of "the divergence is above the risk, averaged over answers or over tokens"; 1 where nothing was skipped.

        Over answers the test is valid for every number of prompts, over tokens for many (`betting_p_value`, `ratio_p_value`).
        """
        return max(betting_p_value(self.losses, risk), ratio_p_value(self.diverged, self.skipped, risk))


def betting_p_value(losses: Floats, risk: float) -> float:
    """p-value of "the mean loss is above `risk`", for independent losses from 0 to 1, however they are distributed.

    Whoever believes it sees a player, who bets against it on one loss after another, grow rich only by luck: under the hypothesis
    the wealth prod(1 - bet_i * (loss_i - risk)) is a supermartingale, so it ever reaches 1/p with probability at most p (Ville;
    Waudby-Smith and Ramdas 2024, "Estimating means of bounded random variables by betting"). Each bet is the one that would
    have grown the wealth most so far, which adapts to the variance. With no loss at all it takes ln(1/p)/ln(1 + risk) of them.
    """
    if len(losses) == 0:
        return 1.0
    growth = _growth(losses, risk)
    prior = PRIOR_WEIGHT * _growth(np.zeros(1), risk)
    before = np.vstack([prior, prior + np.cumsum(growth, axis=0)[:-1]])  # [n, NUM_BETS] what each bet would have made so far
    log_wealth = np.cumsum(growth[np.arange(len(losses)), before.argmax(axis=1)])
    return float(min(1.0, math.exp(-max(0.0, log_wealth.max()))))


def _growth(losses: Floats, risk: float) -> Floats:
    """Logarithm of what each bet makes of a wealth of 1.  [n] -> [n, NUM_BETS]"""
    bets = np.linspace(0.0, MOST_OF_A_BET / (1.0 - risk), NUM_BETS)
    made: Floats = np.log1p(-bets * (losses[:, None] - risk))
    return made


def ratio_p_value(diverged: Counts, skipped: Counts, risk: float) -> float:
    """p-value of E[diverged] > risk * E[skipped], by a t-test on diverged - risk * skipped of each prompt.

    For many prompts: a rare kind of prompt that none of them is of stays unseen. That is what the other test is for.
    """
    excess = diverged - risk * skipped
    if len(excess) < 2 or excess.mean() >= 0:
        return 1.0
    spread = excess.std(ddof=1) / math.sqrt(len(excess))
    return 0.0 if spread == 0 else float(stdtr(len(excess) - 1, excess.mean() / spread))


def fixed_sequence(p_values: Iterable[float], delta: float) -> int | None:
    """Hypotheses tested in their order until one is not rejected.  -> the last rejected, None where the first stands"""
    last = None
    for at, p_value in enumerate(p_values):
        if p_value > delta:
            break
        last = at
    return last


def num_flawless(risk: float, delta: float) -> int:
    """Answers with exits and without divergence that it takes, at least, to show that a risk holds."""
    return math.ceil(math.log(1 / delta) / math.log1p(MOST_OF_A_BET / (1.0 - risk) * risk))


def prompts_needed(tested: Iterable[Exits], risk: float, delta: float) -> int | None:
    """About how many prompts like these it would take until some threshold passes; None where the risk looks exceeded at each."""
    fastest = 0.0
    for exits in tested:
        if len(exits.losses) and exits.divergence < risk:
            a_prompt = float(_growth(exits.losses, risk).sum(axis=0).max()) / len(exits.skipped)
            fastest = max(fastest, a_prompt)
    if fastest * 1e6 < math.log(1 / delta):
        return None
    return math.ceil(NEEDED_FACTOR * math.log(1 / delta) / fastest)
