"""Which kernels run on which device, and that the Triton ones pass its compiler, which no interpreter shows."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from edgecloud.kernels import attention_torch, choice_torch, codec_torch
from edgecloud.kernels.backend import Backend, backend_for

NO_TRITON = "triton has wheels for Linux only; there, `pip install edgecloud[cuda]` lets this run"


def test_everything_but_cuda_gets_torch() -> None:
    torch_kernels = Backend(attention_torch.ragged_paged_attention, choice_torch.choose, codec_torch.decode, attention_torch.TILE)
    assert backend_for("cpu") == backend_for("mps") == torch_kernels


def test_cuda_gets_triton() -> None:
    pytest.importorskip("triton", reason=NO_TRITON)
    from edgecloud.kernels import attention_triton, choice_triton, codec_triton

    triton_kernels = Backend(attention_triton.ragged_paged_attention, choice_triton.choose, codec_triton.decode, 1)
    assert backend_for("cuda") == triton_kernels


WITHOUT_TRITON = """
import sys

sys.modules["triton"] = None  # importing it now fails as if it were not installed
from edgecloud.errors import ConfigError
from edgecloud.kernels.backend import backend_for

print(backend_for("cpu").choose.__module__)
try:
    backend_for("cuda")
except ConfigError as error:
    print(error)
"""


def test_a_server_without_triton_serves_on_the_cpu_and_says_what_cuda_needs() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True, check=False, cwd="/")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "edgecloud.kernels.choice_torch",
        "device cuda needs triton, which is not installed; pip install edgecloud[cuda]",
    ]


# Compiles for a GPU that need not be there, and prints the shared memory that each program takes.
COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from edgecloud.kernels import attention_triton, choice_triton, codec_triton
from edgecloud.kernels.codec import FORMS


def shared_bytes(kernel, types, **constants):
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in kernel.arg_names}
    compiled = triton.compile(ASTSource(kernel, signature, constexprs=constants), target=GPUTarget("cuda", 80, 32))
    return compiled.metadata.shared


for dtype, precision, dim, on in (("fp32", "ieee", 256, False), ("bf16", "tf32", 128, True), ("fp16", "tf32", 16, False)):
    types = dict.fromkeys(("query", "keys", "values", "out"), "*" + dtype)
    types |= {"slots": "*i32", "tiles": "*i32", "scaling": "fp32", "softcap": "fp32"}
    constants = dict(HEAD_DIM=dim - 1, VALUE_DIM=dim, HEAD_BLOCK=dim, VALUE_BLOCK=dim, GROUP=3, WINDOWED=on, CAPPED=on)
    constants |= dict(TILE_ROWS=attention_triton.TILE_ROWS, BLOCK_KEYS=attention_triton.BLOCK_KEYS, PRECISION=precision)
    constants |= dict(query_stride=1, key_stride=1, value_stride=1)  # as Triton specializes them
    print(shared_bytes(attention_triton._attend, types, **constants))
types = {"logits": "*bf16", "integers": "*i64", "reals": "*fp64", "scores": "*fp64", "ids": "*i64"}
print(shared_bytes(choice_triton._best_of_chunk, types, CHUNK=choice_triton.CHUNK, stride=1))
for form in FORMS.values():
    types = {"rows": "*fp32", "data": "*u8", "unit": "fp32"}
    constants = dict(BITS=form.bits, GROUP=form.group, BLOCK=triton.next_power_of_2(form.group), stride=1)
    print(shared_bytes(codec_triton._encode_group, types, **constants))
    print(shared_bytes(codec_triton._decode_chunk, types, BITS=form.bits, GROUP=form.group, CHUNK=codec_triton.CHUNK, stride=1))
"""
MAX_SHARED_BYTES = 99 * 1024  # of a program on a consumer's GPU; servers' have more


def test_the_kernels_compile_for_a_gpu_and_fit_it(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason=NO_TRITON)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, "-c", COMPILE]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd="/", env=environment)
    assert done.returncode == 0, done.stderr
    shared = [int(line) for line in done.stdout.split()]
    assert len(shared) == 8
    assert max(shared) <= MAX_SHARED_BYTES
