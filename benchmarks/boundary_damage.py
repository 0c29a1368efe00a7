"""Rate against damage of the boundary codecs: what each does to the target's greedy answers, at each cut.

First turns of Spec-Bench's questions, a seeded sample of every category; the target answers, and its answers are read again with
the residual stream that enters layer `cut` sent through the codec at every position. `--schemes` compares what the codecs could
have been instead (boundary_schemes.py).
    python benchmarks/boundary_damage.py --prompts spec_bench_dev.jsonl
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import harness
import torch
from boundary_schemes import SCHEMES
from cloud_passes import read, sample

from edgecloud.bundle import Bundle
from edgecloud.client import Client
from edgecloud.kernels.codec import CODECS
from edgecloud.partitioner.check import Sample, continue_greedily, load_torch
from edgecloud.partitioner.damage import (
    Damage,
    answer_log_probs,
    compare,
    decoder_layers,
    measure_damage,
    stream_changed,
    summarize,
)
from edgecloud.partitioner.model_folder import ModelFolder

LOSSY = [codec for codec in CODECS if codec != "float32"]


def measure_schemes(target: torch.nn.Module, samples: list[Sample], cuts: list[int]) -> list[Damage]:
    layers = decoder_layers(target)
    wanted = [answer_log_probs(target, sample) for sample in samples]
    measured = []
    for name, scheme in SCHEMES.items():
        for cut in cuts:
            positions: list[tuple[bool, float]] = []
            with stream_changed(layers[cut], scheme.change) as widths:
                for log_probs, of in zip(wanted, samples, strict=True):
                    positions += compare(log_probs, answer_log_probs(target, of))
            measured.append(summarize(cut, name, scheme.row_bytes(widths[0]), positions))
            harness.progress(show(measured[-1]))
    return measured


def show(damage: Damage) -> str:
    return (
        f"cut {damage.cut:2d}  {damage.codec:32s} {damage.bytes_per_position:5d} bytes  agreement {damage.agreement:.4f}  "
        f"KL {damage.kl_nats:.2e}  worst {damage.max_kl_nats:.2e}"
    )


def main() -> None:
    parser = harness.arguments(__doc__, __file__)
    parser.add_argument("--prompts", type=Path, required=True, help="JSON lines with question_id, category, turns")
    parser.add_argument("--per-category", type=int, default=2)
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--max-prompt-tokens", type=int, default=400)
    parser.add_argument("--cuts", type=int, nargs="+", default=[5, 10, 15, 20])
    parser.add_argument("--schemes", action="store_true", help="compare ways to encode instead of the codecs")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    path = harness.find_bundle(options.bundle)
    bundle = Bundle.open(path)
    torch.set_num_threads(1)
    with Client(path) as client:
        questions, _ = sample(client, read(options.prompts), options.per_category, options.max_prompt_tokens, options.seed)
        prompts = [client.tokenizer.encode_chat([{"role": "user", "content": question["prompt"]}]) for question in questions]
    target = load_torch(ModelFolder.open(path / "cloud"), fp32=True)
    eos_token_ids = list(bundle.tokenizer.eos_token_ids)
    samples = continue_greedily(target, prompts, eos_token_ids, bundle.target.vocab_size, options.max_new_tokens)
    harness.progress(f"{len(samples)} answers, {sum(len(of.continuation_ids) for of in samples)} tokens")
    figures: list[tuple[str, float, str, float]] = []
    if options.schemes:
        measured = measure_schemes(target, samples, options.cuts)
    else:
        measured = measure_damage(target, samples, options.cuts, LOSSY)
        of = {(damage.cut, damage.codec): damage for damage in measured}
        half = of[options.cuts[0], "float16"].bytes_per_position
        figures = [
            ("bytes per position, int8 / float16", of[options.cuts[0], "int8"].bytes_per_position / half, "<=", 0.53),
            ("agreement, int8, worst cut", min(of[cut, "int8"].agreement for cut in options.cuts), ">=", 0.97),
        ]
        for damage in measured:
            print(show(damage))
    raw: dict[str, Any] = {
        "seed": options.seed,
        "num_answers": len(samples),
        "num_prompt_tokens": sum(len(of.prompt_ids) for of in samples),
        "max_new_tokens": options.max_new_tokens,
        "question_ids": [question["id"] for question in questions],
        "damage": [dataclasses.asdict(damage) for damage in measured],
    }
    harness.report(options.json_out, figures, raw)


if __name__ == "__main__":
    main()
