"""Layers as plain functions: the same bits as the modules they replace, and only where nothing else is hidden in those."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import make_tiny_llama
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama import modeling_llama

from edgecloud.cloud.attention import KVPool, Rows, pack
from edgecloud.cloud.layers import FusedLayer
from edgecloud.cloud.model import TargetModel
from edgecloud.cloud.pages import PagePool, PageTable

NUM_LAYERS = 2
SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
}


def load(folder: Path, kind: str, dtype: str = "float32", **extra: Any) -> TargetModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SIZES, **extra})).save_pretrained(folder)
    return TargetModel(folder, dtype)


@pytest.mark.parametrize(
    ("kind", "extra", "num_fused"),
    [
        ("llama", {}, NUM_LAYERS),
        ("llama", {"attention_bias": True, "mlp_bias": True, "hidden_act": "gelu"}, NUM_LAYERS),
        ("qwen2", {}, NUM_LAYERS),  # biases on queries, keys and values alone
        ("mistral", {"sliding_window": 16}, NUM_LAYERS),
        ("qwen3", {}, 0),  # norms on queries and keys
        ("granite", {"residual_multiplier": 0.5}, 0),  # made of the same parts
        ("gemma2", {}, 0),
        ("cohere", {}, 0),
        ("gpt_neox", {}, 0),
    ],
)
def test_layers_of_llamas_form_are_functions(kind: str, extra: dict[str, Any], num_fused: int, tmp_path: Path) -> None:
    assert load(tmp_path / "m", kind, **extra).num_fused_layers == num_fused


def clipping(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda module, *args, **kwargs: forward(module, *args, **kwargs).clamp(-300, 300)


def far_away(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def later_positions_differ(module: Any, *args: Any, position_ids: Tensor, **kwargs: Any) -> Tensor:
        return forward(module, *args, **kwargs) * torch.where(position_ids > 200, 2.0, 1.0).unsqueeze(-1)

    return later_positions_differ


@pytest.mark.parametrize(("part", "otherwise"), [("LlamaMLP", clipping), ("LlamaDecoderLayer", far_away)])
def test_what_the_trials_tokens_would_not_show_is_found(
    part: str, otherwise: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replaced = getattr(modeling_llama, part)
    monkeypatch.setattr(replaced, "forward", otherwise(replaced.forward))
    assert load(tmp_path / "m", "llama").num_fused_layers == 0


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def target(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TargetModel:
    folder = make_tiny_llama(
        tmp_path_factory.mktemp("layers") / "m", num_heads=6, num_kv_heads=2, hidden_size=192, vocab_size=64, scale=0.1
    )
    target = TargetModel(folder, request.param, exact="bitwise")
    assert target.num_fused_layers == NUM_LAYERS
    return target


texts = st.lists(st.lists(st.integers(0, 63), min_size=1, max_size=40), min_size=1, max_size=4)


def logits_of(target: TargetModel, texts: list[list[int]]) -> list[Tensor]:
    """Of every text, each after every token, all in one pass.  -> [tokens, vocab] each"""
    pages = PagePool(60, 4)
    parts = [Rows(PageTable(pages), 0, text, len(text)) for text in texts]
    for rows in parts:
        rows.table.reserve(len(rows.ids))
    logits = target.forward(pack(parts, KVPool(240), target.device))
    return list(logits.split([len(text) for text in texts]))  # type: ignore[no-untyped-call]


@settings(max_examples=20, deadline=None)
@given(texts)
def test_a_pass_has_the_bits_that_the_modules_give(target: TargetModel, texts: list[list[int]]) -> None:
    fused = logits_of(target, texts)
    layers = [module for module in target._model.modules() if isinstance(vars(module).get("forward"), FusedLayer)]
    functions = [vars(layer).pop("forward") for layer in layers]
    try:
        stock = logits_of(target, texts)
    finally:
        for layer, function in zip(layers, functions, strict=True):
            layer.forward = function
    assert all(torch.equal(a, b) for a, b in zip(fused, stock, strict=True))


@settings(max_examples=20, deadline=None)
@given(texts)
def test_a_row_has_the_same_bits_alone_and_in_company(target: TargetModel, texts: list[list[int]]) -> None:
    for together, text in zip(logits_of(target, texts), texts, strict=True):
        assert torch.equal(together, logits_of(target, [text])[0])
