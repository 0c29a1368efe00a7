"""Where a real pair's draft guesses right along the target's text: what the replay flies by.

First turns of Spec-Bench's questions, a seeded sample of every category. Of the texts only digits are kept: rank i of an answer is
the place of the target's next token among the draft's candidates, given the prompt and the target's first i tokens: 0, the draft
guesses it (bit i is 1); 9, it is that far down or further.
    python benchmarks/record_acceptance.py --prompts spec_bench_dev.jsonl
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import harness
import numpy as np
from cloud_passes import read, sample

from edgecloud.bundle import Bundle
from edgecloud.client import Client
from edgecloud.edge.model import DraftModel
from edgecloud.kernels.choice import gumbel, process
from edgecloud.sampling import SamplingSettings

AT_A_TIME = 8
LAST_RANK = 9


class Target:
    """The engine, without a service around it."""

    def __init__(self, folder: Path) -> None:
        import torch

        from edgecloud.cloud.engine import Engine
        from edgecloud.cloud.model import TargetModel

        torch.set_num_threads(1)
        self._engine = Engine(TargetModel(folder, "float32", exact="tolerance"), cache_bytes=1 << 30)
        self._number = 0

    def _submit(self, session: bytes, context: Sequence[int], heard: list[Any], settings: SamplingSettings, **asked: Any) -> None:
        from edgecloud.cloud.work import Extend

        self._number += 1
        self._engine.submit(self._number, Extend(session, 0, tuple(context), 0, settings, **asked), heard.append)

    def texts(
        self, prompts: Sequence[list[int]], num_tokens: int, stops: frozenset[int], settings: SamplingSettings
    ) -> list[list[int]]:
        heard: list[list[Any]] = [[] for _ in prompts]
        sessions = [os.urandom(16) for _ in prompts]
        for session, prompt, answers in zip(sessions, prompts, heard, strict=True):
            self._submit(session, prompt, answers, settings, draft_ids=(), max_new_tokens=num_tokens, stop_token_ids=stops)
        while self._engine.has_work:
            self._engine.step()
        for session in sessions:
            self._engine.release(session)
        return [[answer.next_token_id for answer in answers] for answers in heard]


def rank(model: DraftModel, tokens: list[int], token: int, vocab_size: int, settings: SamplingSettings) -> int:
    """How many tokens the draft would rather choose than this one, up to LAST_RANK."""
    logits = model.extend_to(tokens)[:vocab_size]
    if model.entries is not None:  # a trimmed draft, over the whole vocabulary
        kept, logits = logits, np.full(vocab_size, -np.inf, np.float32)
        logits[model.entries.ids] = kept
    scores = process(logits, tokens, settings)
    if not settings.greedy:
        scores += gumbel(settings.seed, len(tokens), vocab_size)
    above = (scores > scores[token]).sum() + (scores[:token] == scores[token]).sum()  # of equals the first is chosen
    return min(int(above), LAST_RANK)


def main() -> None:
    parser = harness.arguments(__doc__, __file__)
    parser.add_argument("--prompts", type=Path, required=True, help="JSON lines with question_id, category, turns")
    parser.add_argument("--per-category", type=int, default=3)
    parser.add_argument("--max-new-tokens", type=int, default=160)
    parser.add_argument("--max-prompt-tokens", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    path = harness.find_bundle(options.bundle)
    bundle = Bundle.open(path)
    stops = frozenset(bundle.tokenizer.eos_token_ids)
    _, cpu = harness.cores()
    with harness.pinned(cpu), Client(path) as client:
        target = Target(path / "cloud")
        draft = DraftModel.of_bundle(bundle, bundle.draft.max_context_tokens, 1)
        vocab_size = min(bundle.draft.vocab_size, bundle.target.vocab_size)
        questions, _ = sample(client, read(options.prompts), options.per_category, options.max_prompt_tokens, options.seed)
        recorded: dict[str, list[dict[str, Any]]] = {}
        for temperature in (0.0, 1.0):
            settings = SamplingSettings(temperature=temperature)
            answers = recorded[f"{temperature:g}"] = []
            for begin in range(0, len(questions), AT_A_TIME):
                some = questions[begin : begin + AT_A_TIME]
                prompts = [client.tokenizer.encode_chat([{"role": "user", "content": q["prompt"]}]) for q in some]
                texts = target.texts(prompts, options.max_new_tokens, stops, settings)
                for question, prompt, text in zip(some, prompts, texts, strict=True):
                    ranks = [rank(draft, prompt + text[:at], token, vocab_size, settings) for at, token in enumerate(text)]
                    answers.append(
                        {
                            "id": question["id"],
                            "category": question["category"],
                            "prompt_tokens": len(prompt),
                            "bits": "".join("01"[place == 0] for place in ranks),
                            "ranks": "".join(map(str, ranks)),
                        }
                    )
                harness.progress(f"temperature {temperature:g}: {len(answers)} of {len(questions)}")
    rates = {key: "".join(a["bits"] for a in answers) for key, answers in recorded.items()}
    harness.report(
        options.json_out,
        [],
        {
            "pinning": {"cpu": cpu},
            "acceptance": {key: round(bits.count("1") / len(bits), 4) for key, bits in rates.items()},
            "answers": recorded,
        },
    )


if __name__ == "__main__":
    main()
