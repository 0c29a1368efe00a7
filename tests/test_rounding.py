"""What a draft learns with is what ONNX Runtime's quantizer will make of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnxruntime.capi._pybind_state import quantize_matmul_4bits

from edgecloud.partitioner.rounding import BLOCK, rounded, rounded_for_now


def _by_onnx_runtime(weights: torch.Tensor) -> torch.Tensor:
    """[out, in] quantized and widened again, scales in fp32."""
    num_out, num_in = weights.shape
    num_blocks = -(-num_in // BLOCK)
    codes = np.zeros((num_out, num_blocks, BLOCK // 2), np.uint8)
    scales = np.zeros(num_out * num_blocks, np.float32)
    zeros = np.zeros(num_out * ((num_blocks + 1) // 2), np.uint8)
    matrix = np.ascontiguousarray(weights.numpy().T)
    quantize_matmul_4bits(codes, matrix, scales, zeros, BLOCK, num_out, num_in, True)
    both = np.stack([codes & 15, codes >> 4], -1).reshape(num_out, num_blocks, BLOCK).astype(np.float32) - 8
    return torch.from_numpy((both * scales.reshape(num_out, num_blocks, 1)).reshape(num_out, -1)[:, :num_in])


@given(st.integers(0, 2**31), st.integers(1, 5), st.sampled_from([1, 31, 32, 33, 96]))
def test_rounds_as_the_quantizer_does(seed: int, num_out: int, num_in: int) -> None:
    weights = torch.randn(num_out, num_in, generator=torch.Generator().manual_seed(seed))
    expected, got = _by_onnx_runtime(weights), rounded(weights)
    torch.testing.assert_close(got, expected, rtol=2**-10, atol=0)  # its scales are still in fp32


def test_rounding_twice_changes_nothing() -> None:
    once = rounded(torch.randn(64, 576, generator=torch.Generator().manual_seed(1)))
    assert torch.equal(rounded(once), once)


def test_a_block_of_zeros_stays() -> None:
    assert torch.equal(rounded(torch.zeros(2, 64)), torch.zeros(2, 64))


def test_what_is_learnt_at_rounded_weights_reaches_the_exact_ones() -> None:
    weight, norm = torch.nn.Parameter(torch.randn(4, 32)), torch.nn.Parameter(torch.randn(32))
    exact, x = weight.detach().clone(), torch.randn(3, 32)
    with rounded_for_now([weight, norm]):
        assert torch.equal(weight, rounded(exact))
        ((x * norm) @ weight.T).square().sum().backward()
    assert torch.equal(weight, exact)
    assert weight.grad is not None
    product = (x * norm) @ rounded(exact).T
    torch.testing.assert_close(weight.grad, 2 * product.T @ (x * norm).detach())


def test_exact_weights_come_back_after_a_failure() -> None:
    weight = torch.nn.Parameter(torch.randn(4, 32))
    exact = weight.detach().clone()
    with pytest.raises(RuntimeError), rounded_for_now([weight]):
        raise RuntimeError
    assert torch.equal(weight, exact)
