"""Is the exported draft the model it was made from, and how often does it guess what the target says?"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel
from transformers.utils import logging

from edgecloud.cost import tokens_per_round
from edgecloud.draft_vocab import DraftVocab
from edgecloud.errors import ModelError
from edgecloud.partitioner.graph import DraftGraph
from edgecloud.partitioner.model_folder import ModelFolder

PROMPTS = (
    "Why is the sky blue? Answer in two sentences.",
    "Write a short story about a fox who learns to read.",
    "List five things to pack for a weekend in the mountains.",
    "Translate to French: Good morning, where is the train station?",
    "Write a Python function that returns the n-th Fibonacci number.",
    "A shop sells pens at 3 dollars each. How much do 7 pens cost? Explain.",
)
NUM_CONTINUATION_TOKENS = 40
NUM_PARITY_STEPS = 4  # positions a prompt at which a one-token step is compared, after the prompt itself
MAX_PARITY_DIFF = 1e-4  # of the largest logit; right exports measure 3e-6, fp16 weights would measure 5e-4
NUM_SURVIVAL = 8
NUM_DRAFT_TOKENS = 4  # the draft length that the report predicts for


@dataclasses.dataclass(frozen=True, slots=True)
class Sample:
    """A prompt and the target's own greedy continuation."""

    prompt_ids: list[int]
    continuation_ids: list[int]


@dataclasses.dataclass(frozen=True, slots=True)
class Parity:
    """How far the unquantized export is from torch."""

    max_abs_diff: float
    max_relative_diff: float  # max_abs_diff over the largest absolute logit
    bound: float
    num_positions: int


@dataclasses.dataclass(frozen=True, slots=True)
class Agreement:
    """Greedy draft against greedy target, on the target's text."""

    acceptance_rate: float
    num_positions: int
    survival: list[float]  # S_1..S_8, over all starting positions
    num_draft_tokens: int
    tokens_per_round: float
    target_passes_per_token: float


def load_torch(model: ModelFolder, *, fp32: bool) -> PreTrainedModel:
    """The stock model, never with code from its folder. Raises ModelError."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        loaded, info = AutoModelForCausalLM.from_pretrained(
            model.path,
            dtype=torch.float32 if fp32 else "auto",
            trust_remote_code=False,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise ModelError(f"{model.path} cannot be loaded by transformers: {error}") from error
    if info["missing_keys"]:  # transformers would go on with random weights
        missing = ", ".join(sorted(info["missing_keys"])[:3])
        raise ModelError(f"{model.path} lacks weights that its config asks for ({missing}); fetch or save the model again")
    if not isinstance(loaded, PreTrainedModel):
        raise ModelError(f"{model.path} is no model of transformers")
    return loaded.eval()


def encode_prompts(model: ModelFolder, max_tokens: int, prompts: Sequence[str] = PROMPTS) -> list[list[int]]:
    """Token ids, through the chat template if there is one; cut to `max_tokens`."""
    tokenizer = AutoTokenizer.from_pretrained(model.path, trust_remote_code=False, local_files_only=True)
    if not tokenizer.chat_template:
        return [tokenizer.encode(prompt)[:max_tokens] for prompt in prompts]
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    return [tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)[:max_tokens] for chat in chats]


def continue_greedily(
    target: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    eos_token_ids: list[int],
    num_tokens: int,
    max_new_tokens: int = NUM_CONTINUATION_TOKENS,
) -> list[Sample]:
    """What the target itself says after each prompt. Rows that pad its vocabulary beyond `num_tokens` are no tokens."""
    vocab_size = target.get_output_embeddings().weight.shape[0]
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=eos_token_ids or None,
        pad_token_id=0,
        suppress_tokens=list(range(num_tokens, vocab_size)) or None,
    )
    samples = []
    for prompt in prompts:
        ids = torch.tensor([list(prompt)])
        with torch.inference_mode():
            output = target.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
        samples.append(Sample(list(prompt), output[0, len(prompt) :].tolist()))
    return samples


def check_parity(draft: torch.nn.Module, graph: DraftGraph, samples: Sequence[Sample]) -> Parity:
    """Compare an unquantized export with torch: after each prompt, and after single steps that use the KV buffers.

    Raises:
        ModelError: they differ by more than MAX_PARITY_DIFF of the largest logit.
    """
    worst, worst_relative, num_positions = 0.0, 0.0, 0
    for sample in samples:
        steps = sample.continuation_ids[:NUM_PARITY_STEPS]
        with torch.inference_mode():
            logits = draft(input_ids=torch.tensor([sample.prompt_ids + steps])).logits[0, len(sample.prompt_ids) - 1 :]
        expected: npt.NDArray[np.float32] = logits.float().numpy()  # [1 + steps, vocab]
        expected = expected if graph.kept is None else expected[:, graph.kept]
        graph.crop_to(0)
        pieces = [sample.prompt_ids, *([token] for token in steps)]
        for row, piece in zip(expected, pieces, strict=True):
            difference = float(np.abs(graph.extend(piece)[: len(row)] - row).max())
            worst = max(worst, difference)
            worst_relative = max(worst_relative, difference / float(np.abs(row).max()))
            num_positions += 1
            if not difference / float(np.abs(row).max()) <= MAX_PARITY_DIFF:  # also when it is NaN
                raise ModelError(
                    f"the exported graph is not the model: its logits differ from torch's by {difference:.3g} "
                    f"({difference / float(np.abs(row).max()):.2g} of the largest, allowed {MAX_PARITY_DIFF:g}); "
                    "the model builder does not support this model as it should"
                )
    return Parity(worst, worst_relative, MAX_PARITY_DIFF, num_positions)


def measure_agreement(graph: DraftGraph, samples: Sequence[Sample], num_tokens: int) -> Agreement:
    """The draft's greedy choice among the tokenizer's tokens, or those that it keeps, at every position of the target's text.

    Raises:
        ModelError: its logits are not finite.
    """
    runs = []
    for sample in samples:
        graph.crop_to(0)
        pieces = [sample.prompt_ids, *([token] for token in sample.continuation_ids[:-1])]
        guesses = []
        for piece in pieces:
            logits = graph.extend(piece)
            if not np.isfinite(logits).all():
                raise ModelError("the exported draft yields logits that are not finite; take --precision fp32 or another draft")
            guesses.append(int(logits[:num_tokens].argmax() if graph.kept is None else graph.kept[logits.argmax()]))
        runs.append([guess == token for guess, token in zip(guesses, sample.continuation_ids, strict=True)])
    survival = estimate_survival(runs)
    matches = list(itertools.chain.from_iterable(runs))
    per_round = tokens_per_round(survival[:NUM_DRAFT_TOKENS])
    return Agreement(
        sum(matches) / max(1, len(matches)), len(matches), survival, NUM_DRAFT_TOKENS, per_round, 1.0 / per_round
    )  # fmt: skip


def estimate_survival(runs: Sequence[Sequence[bool]], num_survival: int = NUM_SURVIVAL) -> list[float]:
    """S_i: share of positions, with i positions left, from which the first i guesses are all right.  -> S_1..S_n

    Where no text is long enough, S_i is 0.
    """
    survival = []
    for length in range(1, num_survival + 1):
        windows = [run[start : start + length] for run in runs for start in range(len(run) - length + 1)]
        survival.append(sum(map(all, windows)) / len(windows) if windows else 0.0)
    return survival


def graph_buffers(samples: Sequence[Sample]) -> int:
    """How many tokens the KV buffers of a checked graph must hold."""
    return max(len(sample.prompt_ids) + len(sample.continuation_ids) for sample in samples) + 1


def open_graph(path: Path, samples: Sequence[Sample], vocab: DraftVocab | None = None) -> DraftGraph:
    """The graph with room for every sample, on two threads."""
    return DraftGraph(path, graph_buffers(samples), num_threads=2, vocab=vocab)
