"""How far a draft's distribution is from its target's, over the tokens that the draft may propose, with its gradient.

Written out by hand: autograd would keep four matrices of [rows, kept] for what two can do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

ROWS = 512  # taken at a time


def mean_kl(draft_hidden: Tensor, draft_head: Tensor, target_hidden: Tensor, target_head: Tensor) -> Tensor:
    """KL(p || q), mean over rows, in nats; p and q renormalised over the kept tokens.

    draft_hidden [rows, draft width], draft_head [kept, draft width], target_hidden [rows, width], target_head [kept, width]:
    what the two models' heads are applied to. Gradients go to the draft's two. fp32.
    """
    loss: Tensor = _MeanKL.apply(draft_hidden, draft_head, target_hidden, target_head)  # type: ignore[no-untyped-call]  # torch's
    return loss


class _MeanKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, draft_hidden: Tensor, draft_head: Tensor, target_hidden: Tensor, target_head: Tensor) -> Tensor:
        num_rows = len(draft_hidden)
        hidden_grad = torch.empty_like(draft_hidden)
        head_grad = torch.zeros_like(draft_head) if ctx.needs_input_grad[1] else None
        total = torch.zeros((), dtype=torch.float64, device=draft_hidden.device)
        for start in range(0, num_rows, ROWS):
            part = slice(start, start + ROWS)
            log_p = (target_hidden[part] @ target_head.T).log_softmax(-1)
            log_q = (draft_hidden[part] @ draft_head.T).log_softmax(-1)
            p = log_p.exp()
            total += torch.dot(p.flatten(), log_p.sub_(log_q).flatten())
            slope = log_q.exp_().sub_(p).div_(num_rows)  # of the mean KL, by the draft's logits
            torch.mm(slope, draft_head, out=hidden_grad[part])
            if head_grad is not None:
                head_grad.addmm_(slope.T, draft_hidden[part])
        ctx.save_for_backward(hidden_grad, head_grad)
        return (total / num_rows).to(draft_hidden.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden_grad, head_grad = ctx.saved_tensors
        return hidden_grad * grads[0], None if head_grad is None else head_grad * grads[0], None, None
