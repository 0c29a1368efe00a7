"""How sure a model is of its next token: the score by which exits are calibrated and taken."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from edgecloud.sampling import SamplingSettings


def top_probability(logits: npt.NDArray[np.floating], sampling: SamplingSettings) -> float:
    """The probability of the most likely token, by softmax at the request's temperature, or at 1 where that is 0.

    logits: [vocab].
    """
    z = np.subtract(logits, logits.max(), dtype=np.float64)
    return float(1 / np.exp(z / (sampling.temperature or 1.0)).sum())
