"""The prompts that a draft is taught with, as the target's tokens: the user's, asked several ways, and such as the target makes up.

A chat model that is given only the opening of a user's turn writes that turn itself (Magpie, Xu et al. 2024): prompts without end,
in the target's own domain.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from transformers import AutoTokenizer

from edgecloud.answers import Question
from edgecloud.errors import ConfigError

SAMPLED_TEMPERATURE = 0.8
PLACE = "\u241f"  # stands for a user's words, to see what the template puts around them


def questions(
    folder: Path, prompts: Sequence[str], *, num_samples: int, num_own: int, max_prompt_tokens: int, seed: int
) -> Iterator[Question]:
    """Each prompt greedily, then `num_samples` times at temperature 0.8, then `num_own` of the target's own, most of them greedily.

    Prompts of more than `max_prompt_tokens` tokens are left out.

    Raises:
        ConfigError: no prompt is short enough; own prompts are asked for, and the model has no chat template.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    texts = [_chat(tokenizer, prompt) for prompt in prompts] if tokenizer.chat_template else list(prompts)
    encoded = [tokenizer.encode(text, add_special_tokens=not tokenizer.chat_template) for text in texts]
    usable = [(number, ids) for number, ids in enumerate(encoded) if 0 < len(ids) <= max_prompt_tokens]
    if not usable:
        raise ConfigError(f"none of the {len(prompts)} prompts has 1 to {max_prompt_tokens} tokens; give shorter ones")
    opening, closing = _around(tokenizer) if num_own else ([], [])
    return _all(usable, opening, closing, num_samples, num_own, seed)


def _all(
    prompts: Sequence[tuple[int, list[int]]], opening: list[int], closing: list[int], num_samples: int, num_own: int, seed: int
) -> Iterator[Question]:
    for number, ids in prompts:
        yield Question(f"prompt{number}/greedy", ids)
    for sample in range(num_samples):
        for number, ids in prompts:
            yield Question(f"prompt{number}/sample{sample}", ids, SAMPLED_TEMPERATURE, seed + sample)
    for number in range(num_own):
        yield Question(f"own{number}", opening, SAMPLED_TEMPERATURE if number % 3 == 0 else 0.0, seed + number, closing)


def _chat(tokenizer: AutoTokenizer, words: str) -> str:
    chat = [{"role": "user", "content": words}]
    text: str = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    return text


def _around(tokenizer: AutoTokenizer) -> tuple[list[int], list[int]]:
    if not tokenizer.chat_template:
        raise ConfigError("the target has no chat template, so it cannot make up prompts; give more of your own")
    before, place, after = _chat(tokenizer, PLACE).partition(PLACE)
    eos = tokenizer.eos_token
    if not place or not after.startswith(eos):  # the target ends the turn itself: what follows its stop token is ours
        raise ConfigError("the target's chat template does not end a user's turn with the end token; give prompts of your own")
    encode = tokenizer.encode
    return encode(before, add_special_tokens=False), encode(after.removeprefix(eos), add_special_tokens=False)
