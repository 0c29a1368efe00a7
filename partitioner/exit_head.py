"""An exit head while it learns: from a row that leaves the front to what the target says next, on the target's own answers.

    hidden = norm(row) L + (silu(norm(row) G) * norm(row) U) D        L: [width, width], G, U: [width, rank], D: [rank, width]
    logits = norm(hidden) g H                                         H: the target's own head, of the frequent tokens

H stays as it is. L begins as the ridge regression of the target's last states, which alone is far better than a random start.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from edgecloud.errors import ConfigError

EPSILON = 1e-6  # of the norms
RIDGE = 1e-2  # weight of the penalty against that of a row
WARMUP_STEPS = 20
GRADIENT_NORM = 1.0


@dataclass(frozen=True, slots=True)
class ExitSettings:
    """How a head is trained. Raises ConfigError."""

    num_kept: int = 8192  # tokens that it may propose
    rank: int = 512
    max_epochs: int = 10
    rows_a_step: int = 512
    rate: float = 1e-3  # of AdamW; it falls to nothing over all epochs
    patience: int = 2  # epochs without a better one before it stops
    seed: int = 0

    def __post_init__(self) -> None:
        """Check every value."""
        for name in ("num_kept", "rank", "max_epochs", "rows_a_step", "patience"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it takes 1 or more")
        if not self.rate > 0:
            raise ConfigError(f"rate is {self.rate}; it takes more than 0")


@dataclass(frozen=True, slots=True)
class ExitLessons:
    """Positions of answers, on the device and in the type that a head is trained with."""

    rows: Tensor  # [n, width], of the front, as the service decodes them
    states: Tensor  # [n, width], what the target's head is applied to there
    token_ids: Tensor  # [n], what the target says next


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """How good the head is after an epoch, on answers that it does not learn from."""

    epoch: int  # 0: the regression alone
    kl_nats: float  # KL(target || head), mean over positions, over the kept tokens
    agreement: float  # share of positions where its first choice is the target's


class ExitHead(nn.Module):
    """All but the shared head. fp32."""

    def __init__(self, lessons: ExitLessons, rank: int, seed: int) -> None:
        super().__init__()
        width = lessons.rows.shape[1]
        generator = torch.Generator().manual_seed(seed)
        gate, up = (torch.randn(width, rank, generator=generator) / width**0.5 for _ in range(2))
        channels = lessons.states.float().square().mean(0).sqrt() + EPSILON
        linear = _ridge(normed(lessons.rows.float()), lessons.states.float() / channels)
        sureness = (normed(lessons.rows.float()) @ linear).square().mean().sqrt()  # below 1, for a regression shrinks
        self.linear = nn.Parameter(linear)
        self.gate = nn.Parameter(gate.to(linear.device))
        self.up = nn.Parameter(up.to(linear.device))
        self.down = nn.Parameter(torch.zeros(rank, width, device=linear.device))
        self.scale = nn.Parameter(channels * sureness)

    def forward(self, rows: Tensor) -> Tensor:
        """What the shared head is applied to.  [n, width] -> [n, width]"""
        x = normed(rows)
        hidden = x @ self.linear + (functional.silu(x @ self.gate) * (x @ self.up)) @ self.down
        return normed(hidden) * self.scale


def train_exit_head(
    training: ExitLessons,
    held_out: ExitLessons,
    head: Tensor,
    kept_ids: Tensor,
    settings: ExitSettings,
    progress: Callable[[CurvePoint], None] = lambda _: None,
) -> tuple[ExitHead, list[CurvePoint]]:
    """KL to the target's distribution over the kept tokens.  -> the head as it was when it was best, and its curve

    The tensors' device is where it computes, the shared head's dtype in what; weights are fp32. On a CPU the same arguments give
    the same bits.

    Args:
        training: learnt from.
        held_out: of other prompts; decides when to stop.
        head: [kept, width], the target's.
        kept_ids: [kept], rising.
        settings: how.
        progress: told of every point of the curve.
    """
    device = training.rows.device.type
    mixed = torch.autocast(device, head.dtype, enabled=head.dtype != torch.float32)
    generator = torch.Generator().manual_seed(settings.seed)
    model = ExitHead(training, settings.rank, settings.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.rate, betas=(0.9, 0.95), weight_decay=0.0)
    num_steps = -(-len(training.rows) // settings.rows_a_step)
    with mixed:
        curve = [CurvePoint(0, *_examine(model, held_out, head, kept_ids))]
    progress(curve[0])
    best, best_at = copy.deepcopy(model.state_dict()), curve[0]
    for epoch in range(1, settings.max_epochs + 1):
        order = torch.randperm(len(training.rows), generator=generator).to(training.rows.device)
        for number, chosen in enumerate(torch.split(order, settings.rows_a_step), (epoch - 1) * num_steps):
            left = 1 - number / (settings.max_epochs * num_steps)
            optimizer.param_groups[0]["lr"] = settings.rate * min(left, (number + 1) / WARMUP_STEPS)
            optimizer.zero_grad()
            with mixed:
                loss = _kl(model(training.rows[chosen]), training.states[chosen], head)
            torch.autograd.backward(loss)
            nn.utils.clip_grad_norm_(model.parameters(), GRADIENT_NORM)
            optimizer.step()
        with mixed:
            point = CurvePoint(epoch, *_examine(model, held_out, head, kept_ids))
        curve.append(point)
        progress(point)
        if point.agreement > best_at.agreement:
            best, best_at = copy.deepcopy(model.state_dict()), point
        elif epoch - best_at.epoch >= settings.patience:
            break
    model.load_state_dict(best)
    return model, curve


def normed(rows: Tensor) -> Tensor:
    """With a mean square of 1."""
    found: Tensor = rows * torch.rsqrt(rows.float().square().mean(-1, keepdim=True) + EPSILON)
    return found


def _ridge(rows: Tensor, wanted: Tensor) -> Tensor:
    """The matrix that takes `rows` nearest to `wanted`.  [n, width] and [n, width] -> [width, width]"""
    penalty = RIDGE * len(rows) * torch.eye(rows.shape[1], device=rows.device)
    found: Tensor = torch.linalg.solve(rows.T @ rows + penalty, rows.T @ wanted)
    return found


def _kl(hidden: Tensor, states: Tensor, head: Tensor) -> Tensor:
    """KL(target || head), mean over rows, in nats."""
    log_p, log_q = ((each.to(head.dtype) @ head.T).float().log_softmax(-1) for each in (states, hidden))
    kl: Tensor = functional.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
    return kl


def _examine(model: ExitHead, lessons: ExitLessons, head: Tensor, kept_ids: Tensor) -> tuple[float, float]:
    """-> KL, agreement"""
    kl, right, num = 0.0, 0, len(lessons.rows)
    with torch.inference_mode():
        for part in torch.split(torch.arange(num, device=lessons.rows.device), 1024):
            hidden = model(lessons.rows[part])
            kl += float(_kl(hidden, lessons.states[part], head)) * len(part)
            guesses = kept_ids[(hidden.to(head.dtype) @ head.T).argmax(-1)]
            right += int((guesses == lessons.token_ids[part]).sum())
    return kl / num, right / num
