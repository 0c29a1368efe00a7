"""Teach a draft its target's distribution, on the target's own answers.

A step is a pure function of the settings and its number, so a run that was killed goes on from its checkpoint to the same curve.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer
from transformers import PreTrainedModel

from edgecloud.errors import ConfigError
from edgecloud.partitioner.batches import by_length, padded
from edgecloud.partitioner.checkpoint import read_notes, restore, write_checkpoint
from edgecloud.partitioner.kl import mean_kl
from edgecloud.partitioner.lessons import Lessons
from edgecloud.partitioner.muon import Muon
from edgecloud.partitioner.on_policy import OnPolicy
from edgecloud.partitioner.rounding import rounded_for_now
from edgecloud.partitioner.student import Student

SHUFFLED_TOGETHER = 512  # sequences that are sorted by length among themselves
WARMUP_STEPS = 20
DECAY = 0.3  # of all steps: the last ones, in which the rates fall to nothing
OWN = 1 / 3  # of all steps: the last ones, some of which learn from the draft's own samples
STEADY = min(1 - DECAY, 1 - OWN)  # of all steps: the first ones, which are the same however many there are
GRADIENT_NORM = 1.0
HELD_OUT = 20  # one prompt in so many is kept out of the training


@dataclass(frozen=True, slots=True)
class DistillSettings:
    """All that decides the result, besides target and answers. Raises ConfigError."""

    layers: tuple[int, ...]  # of the target, to begin with
    num_kept: int  # tokens that the draft may propose
    num_steps: int
    tokens_a_step: int = 8192  # padding included
    matrix_rate: float = 2e-3  # of Muon, scaled as for AdamW
    vector_rate: float = 1e-3  # of AdamW, for norms
    prompt_share: float = 0.5  # of the prompts' positions, drawn anew each time, that are learnt from
    own_share: float = 0.0  # of the steps, all in the last third: those that learn from the draft's own samples
    rounded: bool = True  # learns, and is examined, with its weights as int4 keeps them
    seed: int = 0
    evaluate_every: int = 50  # steps
    patience: int = 8  # evaluations without a better one before it stops

    def __post_init__(self) -> None:
        """Check every value."""
        for name in ("num_kept", "num_steps", "tokens_a_step", "evaluate_every", "patience"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it takes 1 or more")
        if not (0 <= self.prompt_share <= 1 and 0 <= self.own_share <= 1 and self.matrix_rate > 0 and self.vector_rate > 0):
            raise ConfigError("rates are above 0, and the shares of prompts and own samples from 0 to 1")


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """How good the draft is after so many steps, on prompts that it does not learn from."""

    step: int
    positions: int  # learnt from so far, repetitions counted
    kl: float  # of the training since the point before, nats
    agreement: float  # of its first choice with the target's token, greedy answers
    top3: float  # the target's token is among its first three


class Distillation:
    """One run.

    Args:
        target: the stock model in fp32.
        student: the draft, on the target's device.
        lessons: prepared.
        settings: how.
        folder: of the checkpoint.
    """

    def __init__(
        self, target: PreTrainedModel, student: Student, lessons: Lessons, settings: DistillSettings, folder: Path
    ) -> None:
        self._student, self._lessons, self._settings, self._folder = student, lessons, settings, folder
        self._device = student.head.device
        self._target_head = target.get_output_embeddings().weight.detach()[student.kept_ids]
        held_out = [is_held_out(answer.prompt_ids) for answer in lessons.answers]
        self._training = [n for n, out in enumerate(held_out) if not out]
        self._examined = [n for n, out in enumerate(held_out) if out and lessons.answers[n].temperature == 0]
        if not self._training or not self._examined:
            raise ConfigError(
                f"{len(held_out)} answers leave {len(self._training)} to learn from and {len(self._examined)} greedy ones of other "
                "prompts to examine by; give more prompts, 200 or more are of use"
            )
        matrices = {n: p for n, p in student.trained().items() if p.ndim == 2}
        others = {n: p for n, p in student.trained().items() if n not in matrices}
        self._optimizers: list[Optimizer] = [
            Muon(matrices.values(), lr=settings.matrix_rate),
            AdamW(others.values(), lr=settings.vector_rate, betas=(0.9, 0.95), weight_decay=0.0),
        ]
        self._on_policy = OnPolicy(target, student, [lessons.answers[n] for n in self._training])
        self.curve: list[CurvePoint] = []
        self._step = self._positions = 0
        self._best = -1.0

    @property
    def num_training(self) -> int:
        """Answers that it learns from."""
        return len(self._training)

    @property
    def num_examined(self) -> int:
        """Answers that it is examined by."""
        return len(self._examined)

    def run(self, progress: Callable[[CurvePoint], None]) -> list[CurvePoint]:
        """Train to the end, from the checkpoint if there is one; afterwards the student is what it was when it was best."""
        notes = read_notes(self._folder / "latest")
        if notes is not None:
            self._take_up(notes)
        batches = self._batches()
        for _ in range(self._step):
            next(batches)
        kl_sum = torch.zeros((), dtype=torch.float64)
        since = 0
        while self._step < self._settings.num_steps and not self._stalled():
            kl, positions = self._learn(next(batches))
            kl_sum, since = kl_sum + kl * positions, since + positions
            self._step += 1
            self._positions += positions
            if self._step % self._settings.evaluate_every == 0 or self._step == self._settings.num_steps:
                agreement, top3 = self.examine()
                point = CurvePoint(self._step, self._positions, float(kl_sum) / since, agreement, top3)
                self.curve.append(point)
                kl_sum, since = torch.zeros((), dtype=torch.float64), 0
                self._keep(point)
                progress(point)
        restore(self._folder / "best", self._student.trained(), ())
        return self.curve

    def examine(self) -> tuple[float, float]:
        """Agreement and top-3 agreement over the held-out greedy answers' tokens."""
        with self._as_shipped():
            return self._examine()

    def _examine(self) -> tuple[float, float]:
        lessons = self._lessons
        sequences = {n: lessons.answers[n].ids[:-1] for n in self._examined}
        right = right3 = total = 0
        kept = self._student.kept_ids
        for group in by_length(sequences, self._settings.tokens_a_step):
            with torch.inference_mode():
                hidden = self._student.hidden(padded([sequences[n] for n in group], self._device))
                for row, number in zip(hidden, group, strict=True):
                    answer = lessons.answers[number]
                    first = len(answer.prompt_ids) - 1
                    logits = row[first : len(answer.ids) - 1] @ self._student.head.T
                    guesses = kept[logits.topk(min(3, len(kept))).indices]
                    same = guesses == torch.tensor(answer.answer_ids, device=self._device)[:, None]
                    right, right3, total = right + int(same[:, 0].sum()), right3 + int(same.sum()), total + len(same)
        return right / total, right3 / total

    def _learn(self, batch: Sequence[int]) -> tuple[float, int]:
        rate = self._rate()
        for optimizer, top in zip(self._optimizers, (self._settings.matrix_rate, self._settings.vector_rate), strict=True):
            optimizer.param_groups[0]["lr"] = top * rate
            optimizer.zero_grad(set_to_none=True)
        with self._as_shipped():
            learnt, states = self._from_itself() if self._learns_from_itself() else self._from_answers(batch)
            loss = mean_kl(learnt, self._student.head, states, self._target_head)
            torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(self._student.trained().values(), GRADIENT_NORM)
        for optimizer in self._optimizers:
            optimizer.step()
        return float(loss.detach()), len(learnt)

    def _as_shipped(self) -> AbstractContextManager[None]:
        return rounded_for_now(self._student.trained().values()) if self._settings.rounded else nullcontext()

    def _from_answers(self, batch: Sequence[int]) -> tuple[Tensor, Tensor]:
        rows, places, states = self._positions_of(batch)
        hidden = self._student.hidden(padded([self._lessons.answers[n].ids[:-1] for n in batch], self._device))
        return hidden[rows, places], states

    def _from_itself(self) -> tuple[Tensor, Tensor]:
        ids, first, states = self._on_policy.sample(np.random.default_rng((self._settings.seed, 3, self._step)))
        return self._student.hidden(ids)[:, first:].flatten(0, 1), states

    def _learns_from_itself(self) -> bool:
        drawn = np.random.default_rng((self._settings.seed, 2, self._step)).random()
        late = self._step >= (1 - OWN) * self._settings.num_steps
        return late and self._on_policy.possible and bool(drawn < self._settings.own_share / OWN)

    def _positions_of(self, batch: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Of the whole answers and some of their prompts: row in the batch, place in the row, the target's state there."""
        random = np.random.default_rng((self._settings.seed, 1, self._step))
        rows: list[npt.NDArray[np.int64]] = []
        places, states = [], []
        for row, number in enumerate(batch):
            answer = self._lessons.answers[number]
            first = len(answer.prompt_ids) - 1
            some = np.flatnonzero(random.random(first) < self._settings.prompt_share)
            at = np.concatenate([some, np.arange(first, len(answer.ids) - 1)])
            rows.append(np.full(len(at), row))
            places.append(at)
            states.append(self._lessons.states(number, at))
        found = torch.from_numpy(np.concatenate(states)).to(self._device, torch.float32)
        return torch.from_numpy(np.concatenate(rows)), torch.from_numpy(np.concatenate(places)), found

    def _batches(self) -> Iterator[list[int]]:
        """Without end; the n-th is the same in every run."""
        epoch = 0
        while True:
            random = np.random.default_rng((self._settings.seed, 0, epoch))
            order = random.permutation(self._training)
            groups = []
            for start in range(0, len(order), SHUFFLED_TOGETHER):
                part = {int(n): self._lessons.answers[n].ids[:-1] for n in order[start : start + SHUFFLED_TOGETHER]}
                groups += by_length(part, self._settings.tokens_a_step)
            for at in random.permutation(len(groups)):
                yield groups[at]
            epoch += 1

    def _rate(self) -> float:
        done, total = self._step, self._settings.num_steps
        falling = max(1, math.ceil(DECAY * total))
        return min(1.0, (done + 1) / WARMUP_STEPS, (total - done) / falling)

    def _stalled(self) -> bool:
        best = max(range(len(self.curve)), key=lambda at: self.curve[at].agreement, default=0)
        return len(self.curve) - 1 - best >= self._settings.patience

    def _keep(self, point: CurvePoint) -> None:
        notes = {"settings": self._described(), "step": self._step, "positions": self._positions, "best": self._best}
        notes["curve"] = [asdict(each) for each in self.curve]
        if point.agreement > self._best:
            notes["best"] = self._best = point.agreement
            write_checkpoint(self._folder / "best", self._student.trained(), (), notes)
        write_checkpoint(self._folder / "latest", self._student.trained(), self._optimizers, notes)

    def _take_up(self, notes: dict[str, Any]) -> None:
        before, now = dict(notes["settings"]), self._described()
        num_before, num_now = before.pop("num_steps"), now.pop("num_steps")
        if before != now:
            raise ConfigError(f"{self._folder} holds a run with other settings or answers; take another --work folder or remove it")
        if num_before != num_now and notes["step"] > STEADY * min(num_before, num_now):
            raise ConfigError(
                f"{self._folder} is at step {notes['step']} of {num_before}, where steps depend on their number; "
                f"go on with {num_before}, or take another --work folder"
            )
        restore(self._folder / "latest", self._student.trained(), self._optimizers)
        self.curve = [CurvePoint(**point) for point in notes["curve"]]
        self._step, self._positions, self._best = notes["step"], notes["positions"], notes["best"]

    def _described(self) -> dict[str, Any]:
        described = asdict(self._settings) | {"num_answers": len(self._lessons.answers)}
        return described | {"layers": list(self._settings.layers), "num_positions": self._lessons.num_positions}


def is_held_out(prompt_ids: Sequence[int]) -> bool:
    """By the prompt alone, so that all answers to it are on one side."""
    digest = hashlib.sha256(np.array(prompt_ids, np.int64).tobytes()).digest()
    return digest[0] % HELD_OUT == 0
