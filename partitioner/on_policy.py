"""Positions that a draft meets when it goes on by itself, after its own tokens and not the target's.

Generalized knowledge distillation (Agarwal et al. 2024; DistillSpec, Zhou et al. 2024). The draft samples, the target only judges.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from edgecloud.answers import Answer
from edgecloud.partitioner.last_states import last_states
from edgecloud.partitioner.student import Student

NUM_TOGETHER = 32
NUM_SAMPLED_TOKENS = 24
LONGEST_CONTEXT = 256  # a target without a cache reads it anew


class OnPolicy:
    """Makes such positions.

    Args:
        target: the stock model.
        student: the draft, as it is when it is asked.
        answers: whose beginnings the draft goes on from.
    """

    def __init__(self, target: PreTrainedModel, student: Student, answers: Sequence[Answer]) -> None:
        self._target, self._student = target, student
        self._answers = [answer for answer in answers if len(answer.prompt_ids) < LONGEST_CONTEXT]

    @property
    def possible(self) -> bool:
        """Whether any prompt is short enough."""
        return bool(self._answers)

    def sample(self, random: np.random.Generator) -> tuple[Tensor, int, Tensor]:
        """Contexts of one length, each with what the draft says next.

        -> ids [sequences, tokens], the first place learnt from, the target's states from there [sequences * places, width]
        """
        chosen = self._answers[random.integers(len(self._answers))]
        length = int(random.integers(len(chosen.prompt_ids), min(LONGEST_CONTEXT, len(chosen.ids)) + 1))
        fitting = [answer for answer in self._answers if len(answer.prompt_ids) <= length <= len(answer.ids)]
        picked = random.choice(len(fitting), min(NUM_TOGETHER, len(fitting)), replace=False)
        device = self._student.head.device
        contexts = torch.tensor([fitting[at].ids[:length] for at in picked], device=device)
        generator = torch.Generator(device).manual_seed(int(random.integers(2**62)))
        ids = self._go_on(contexts, generator)
        states = last_states(self._target, {row: sequence.tolist() for row, sequence in enumerate(ids)})
        return ids, length - 1, torch.cat([states[row][length - 1 :] for row in range(len(ids))])

    def _go_on(self, ids: Tensor, generator: torch.Generator) -> Tensor:
        student, cache, latest = self._student, None, ids
        with torch.no_grad():
            for _ in range(NUM_SAMPLED_TOKENS - 1):
                output = student.decoder(input_ids=latest, past_key_values=cache, use_cache=True)
                cache = output.past_key_values
                probabilities = (output.last_hidden_state[:, -1] @ student.head.T).softmax(-1)
                latest = student.kept_ids[torch.multinomial(probabilities, 1, generator=generator)]
                ids = torch.cat([ids, latest], dim=1)
        return ids
