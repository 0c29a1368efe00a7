"""Any causal language model whose state is keys and values per position is a target; any other is refused, never served wrongly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from edgecloud.cloud.attention import KVPool, PagedBatch, tensor_ids
from edgecloud.cloud.model import TargetModel
from edgecloud.cloud.pages import PagePool, PageTable
from edgecloud.errors import ModelError
from edgecloud.kernels.attention import Segment

NUM_TOKENS = 40
SIZES = {
    "vocab_size": 260,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
}


def save_random(folder: Path, kind: str, **extra: Any) -> Path:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SIZES, **extra})
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("kind", "extra"),
    [
        ("llama", {}),
        ("qwen3", {}),  # norms on queries and keys
        ("mistral", {"sliding_window": 16}),
        ("gemma2", {"sliding_window": 8}),  # windowed and full layers in turn, capped scores
        ("gpt_neox", {}),  # as many key heads as query heads, parallel blocks
        ("cohere", {}),
    ],
)
def test_paged_logits_are_the_stock_models_beyond_the_window(kind: str, extra: dict[str, Any], tmp_path: Path) -> None:
    folder = save_random(tmp_path, kind, **extra)
    target = TargetModel(folder)
    ids = [(31 * i + 7) % 260 for i in range(NUM_TOKENS)]
    table, pool = PageTable(PagePool(64, 4)), KVPool(256)
    chunks = []
    for start, stop in ((0, 17), (17, 18), (18, 23), (23, NUM_TOKENS)):
        table.reserve(stop)
        batch = PagedBatch(
            input_ids=tensor_ids(ids[start:stop], target.device)[None],
            position_ids=tensor_ids(list(range(start, stop)), target.device)[None],
            slots=tensor_ids(table.slots(start, stop), target.device),
            segments=[Segment(0, stop - start, stop, table.runs(stop))],
            logits_rows=tensor_ids(list(range(stop - start)), target.device),
            pool=pool,
        )
        chunks.append(target.forward(batch))
        table.length = stop
    stock = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.inference_mode():
        expected = stock(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    torch.testing.assert_close(torch.cat(chunks), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "extra"),
    [
        ("mamba", {}),  # a recurrent state, no keys and values
        ("gpt_oss", {"num_local_experts": 4, "num_experts_per_tok": 2}),  # attention sinks
        ("stablelm", {}),  # does not hand our batch through
    ],
)
def test_other_architectures_are_refused_by_name(kind: str, extra: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=rf"{kind}.*not supported as a target|not supported as a target.*{kind}"):
        TargetModel(save_random(tmp_path, kind, **extra))
