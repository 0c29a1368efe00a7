"""Our Muon takes torch's steps, up to what bfloat16 rounds away."""

from __future__ import annotations

import pytest
import torch

from edgecloud.partitioner.muon import Muon, orthogonalised


@pytest.mark.parametrize("shape", [(8, 8), (24, 40), (40, 24)])
def test_singular_values_come_near_to_one(shape: tuple[int, int]) -> None:
    matrix = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalised(matrix))
    assert values.max() < 1.3
    assert values.median() > 0.6
    wide = orthogonalised(matrix.double())
    torch.testing.assert_close(orthogonalised(matrix).double(), wide, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("shape", [(16, 48), (48, 16)])
def test_steps_are_torchs(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(1)
    begin = torch.randn(*shape, generator=generator)
    ours, theirs = torch.nn.Parameter(begin.clone()), torch.nn.Parameter(begin.clone())
    optimizers = [
        Muon([ours], lr=0.01),
        torch.optim.Muon([theirs], lr=0.01, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
    ]
    for _ in range(5):
        gradient = torch.randn(*shape, generator=generator)
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        for optimizer in optimizers:
            optimizer.step()
    moved, expected = ours.detach() - begin, theirs.detach() - begin
    assert (moved - expected).norm() < 0.02 * expected.norm()
