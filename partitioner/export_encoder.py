"""A sentence encoder of BERT's form as an ONNX graph: token ids in, one normalized vector a sentence out."""

from __future__ import annotations

import warnings
from pathlib import Path

from edgecloud.errors import ModelError

ENCODER_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
OUTPUT = "embedding"
OPSET = 17


def export_encoder(folder: Path, graph: Path) -> None:
    """Mean of the last hidden states over the mask, normalized, as sentence-transformers pools it. Raises ModelError."""
    import torch
    from transformers import AutoModel

    class SentenceEncoder(torch.nn.Module):  # type: ignore[misc,unused-ignore]  # a type checker without torch
        def __init__(self) -> None:
            super().__init__()
            self.bert = AutoModel.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)

        def forward(self, ids: torch.Tensor, mask: torch.Tensor, types: torch.Tensor) -> torch.Tensor:
            states = self.bert(input_ids=ids, attention_mask=mask, token_type_ids=types).last_hidden_state
            weights = mask[..., None].to(states.dtype)
            mean = (states * weights).sum(1) / weights.sum(1).clamp(min=1e-9)
            return torch.nn.functional.normalize(mean, dim=-1)

    try:
        encoder = SentenceEncoder().eval()
        mask = torch.ones(2, 16, dtype=torch.int64)
        mask[1, 12:] = 0
        sample = (torch.arange(32).reshape(2, 16), mask, torch.zeros_like(mask))
        axes = {**{name: {0: "batch", 1: "tokens"} for name in INPUTS}, OUTPUT: {0: "batch"}}
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # of the tracing exporter, which needs no package beside torch
            torch.onnx.export(
                encoder, sample, str(graph), input_names=list(INPUTS), output_names=[OUTPUT], dynamic_axes=axes,
                opset_version=OPSET, dynamo=False,
            )  # fmt: skip
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ModelError(f"{folder} cannot be exported as a sentence encoder: {error}") from error
