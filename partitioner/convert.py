"""A GGUF file as a Hugging Face folder: fp32 safetensors, config, tokenizer and chat template."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils import logging

from edgecloud.errors import ModelError


def gguf_to_hugging_face(gguf: Path, folder: Path) -> None:
    """Dequantize `gguf` to fp32 and write it to `folder`. Raises ModelError if transformers cannot read it."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        with contextlib.redirect_stderr(io.StringIO()):  # its progress bar has no switch
            loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    except Exception as error:  # transformers and the tokenizers library raise all kinds
        raise ModelError(f"{gguf} cannot be read as GGUF: {error}") from error
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.name_or_path = ""
    clean = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # the loaded one refuses to be saved: it has a quantizer
    clean.load_state_dict(loaded.state_dict())
    clean.tie_weights()
    clean.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    clean.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for weights in folder.glob("*.safetensors"):
        weights.chmod((folder / "config.json").stat().st_mode & 0o777)  # safetensors writes them for the owner only
