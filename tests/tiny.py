"""Tiny random Llama models as Hugging Face folders: real formats and a real byte-level tokenizer, made in a second."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # ids 0, 1, 2; the 256 bytes follow
END_OF_TURN_ID = 2
TOKENIZER_SIZE = len(SPECIAL_TOKENS) + 256
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def make_tiny_llama(
    folder: Path,
    *,
    seed: int = 0,
    num_layers: int = 2,
    hidden_size: int = 64,
    num_heads: int = 2,
    num_kv_heads: int = 1,
    vocab_size: int = TOKENIZER_SIZE + 1,
    scale: float = 0.3,
    max_position_embeddings: int = 512,
    tie_word_embeddings: bool = False,
    eos_token_id: int | Sequence[int] = END_OF_TURN_ID,
    special_tokens: Sequence[str] = SPECIAL_TOKENS,
) -> Path:
    """Write a random fp32 Llama with a byte-level tokenizer (any text round-trips) and a ChatML template.

    `scale` spreads the logits so that greedy ties are rare; the same arguments give the same weights. `vocab_size` may
    be padded beyond the tokenizer's 259 tokens. `hidden_size` must be a multiple of 32, the int4 block size.
    """
    folder.mkdir(parents=True, exist_ok=True)
    eos = eos_token_id if isinstance(eos_token_id, int) else list(eos_token_id)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        max_position_embeddings=max_position_embeddings,
        initializer_range=scale,
        tie_word_embeddings=tie_word_embeddings,
        bos_token_id=1,
        eos_token_id=eos,
        pad_token_id=0,
        dtype="float32",
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=eos, pad_token_id=0)
    model.save_pretrained(folder)
    _save_tokenizer(folder, special_tokens)
    return folder


def _save_tokenizer(folder: Path, special_tokens: Sequence[str]) -> None:
    vocab = {token: i for i, token in enumerate(special_tokens)}
    for token in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocab[token] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(special_tokens))
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=special_tokens[1],
        eos_token=special_tokens[2],
        pad_token=special_tokens[0],
        unk_token=special_tokens[0],
    )
    wrapped.chat_template = CHAT_TEMPLATE
    wrapped.save_pretrained(folder)
