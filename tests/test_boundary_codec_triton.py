"""The boundary codec in Triton against the definition: on a GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from plain_codec import KNOWN_ANSWERS, in_range, known_row, row_blocks

from edgecloud.errors import ConfigError
from edgecloud.kernels import codec
from edgecloud.kernels.codec import CODECS, row_bytes

pytest.importorskip("triton", reason="triton has wheels for Linux only; there, `pip install edgecloud[cuda]` lets this run")

from edgecloud.kernels import codec_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PHASES = [Phase.explicit, Phase.reuse, Phase.generate]  # shrinking would take minutes in the interpreter


@pytest.mark.parametrize("name", CODECS)
def test_known_answers(name: str) -> None:
    assert codec_triton.encode(torch.from_numpy(known_row()).to(DEVICE), name).cpu().numpy().tobytes().hex() == KNOWN_ANSWERS[name]


@given(row_blocks(), st.sampled_from(CODECS))
@settings(max_examples=60, phases=PHASES)
def test_it_gives_the_same_bytes_and_the_same_floats(rows: npt.NDArray[np.float32], name: str) -> None:
    rows = in_range(rows, name)
    data = codec.encode(rows, name)
    assert torch.equal(codec_triton.encode(torch.from_numpy(rows).to(DEVICE), name).cpu(), torch.from_numpy(data))
    decoded = codec_triton.decode(torch.from_numpy(data).to(DEVICE), name, rows.shape[1])
    assert decoded.cpu().numpy().tobytes() == codec.decode(data, name, rows.shape[1]).tobytes()


@given(st.sampled_from(["int8", "int4"]), st.sampled_from([1, 33, 73, 1025]), st.randoms(use_true_random=False))
@settings(max_examples=20, phases=PHASES)
def test_a_strangers_bytes_decode_to_what_the_definition_says(name: str, width: int, random: object) -> None:
    data = np.frombuffer(random.randbytes(2 * row_bytes(name, width)), np.uint8).reshape(2, -1)  # type: ignore[attr-defined]
    with np.errstate(all="ignore"):
        decoded = codec_triton.decode(torch.from_numpy(data.copy()).to(DEVICE), name, width)
    assert np.array_equal(decoded.cpu().numpy(), codec.decode(data, name, width), equal_nan=True)


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_it_takes_tensors_as_they_lie(name: str) -> None:
    rows = np.random.default_rng(0).standard_t(2, size=(145, 3)).astype(np.float32)
    turned = torch.from_numpy(rows).to(DEVICE).T
    data = codec_triton.encode(turned, name)
    assert np.array_equal(data.cpu().numpy(), codec.encode(np.ascontiguousarray(rows.T), name))
    wide = torch.empty(3, data.shape[1] + 1, dtype=torch.uint8, device=DEVICE)
    wide[:, 1:] = data
    for dtype in (torch.float32, torch.bfloat16):
        decoded = codec_triton.decode(wide[:, 1:], name, 145, dtype)
        assert torch.equal(decoded.cpu(), torch.from_numpy(codec.decode(data.cpu().numpy(), name, 145)).to(dtype))


def test_it_refuses_what_the_definition_refuses() -> None:
    with pytest.raises(ConfigError, match="broken"):
        codec_triton.encode(torch.full((1, 8), torch.nan, device=DEVICE), "int4")
    with pytest.raises(ConfigError, match="uint8"):
        codec_triton.decode(torch.zeros(1, 13, dtype=torch.uint8, device=DEVICE), "int8", 8)
