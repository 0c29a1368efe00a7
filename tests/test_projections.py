"""Functions in the place of a target's modules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from edgecloud.cloud.projections import _norm, _norm_of_both_signs


@pytest.mark.parametrize("width", [64, 576, 1000, 4096])
@pytest.mark.parametrize("outlier", [0.0, 100.0, 10_000.0])
def test_a_norm_of_both_signs_is_the_norm(width: int, outlier: float) -> None:
    """To the rounding of float32 over a row, of which little is left in bfloat16."""
    generator = torch.Generator().manual_seed(width)
    norm = LlamaRMSNorm(width, 1e-5).to(torch.bfloat16)
    norm.weight.data = (0.5 + torch.rand(width, generator=generator)).to(torch.bfloat16)
    rows = torch.randn(50, width, generator=generator)
    rows[:, 5] += outlier
    rows = rows.to(torch.bfloat16)
    function: Any = _norm(norm)
    assert function.func is _norm_of_both_signs
    with torch.inference_mode():
        got, expected = function(rows), norm(rows)
        assert (got != expected).float().mean().item() < 2e-3
        torch.testing.assert_close(got, expected, rtol=2**-7, atol=1e-6)
        for first, last in ((0, 1), (3, 5), (7, 24), (49, 50)):
            assert torch.equal(function(rows[first:last]), got[first:last])
