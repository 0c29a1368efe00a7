"""Mode `split` against `speculative` at the same draft length: cloud compute per token; and the split target against the whole.

The bundle has a front (`edgecloud partition --cut`). Service and device have a core each, the modes take turns. The
agreement is that of front, codec and tail with the whole target, along the target's own greedy answers.
    python benchmarks/split.py --bundle BUNDLE --prompts spec_bench_dev.jsonl
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import harness
import torch
from cloud_passes import read, sample

from edgecloud.bundle import Bundle, FrontInfo
from edgecloud.client import Client
from edgecloud.edge.front import FrontModel
from edgecloud.kernels.codec import decode, encode, row_bytes
from edgecloud.partitioner.check import Sample, continue_greedily, load_torch
from edgecloud.partitioner.damage import Damage, answer_log_probs, compare, decoder_layers, stream_changed, summarize
from edgecloud.partitioner.model_folder import ModelFolder
from edgecloud.types import Reply

MODES = ("speculative", "split")


def measure_agreement(target: torch.nn.Module, front: FrontModel, info: FrontInfo, samples: Sequence[Sample]) -> Damage:
    """Along the target's own answers."""
    layer, positions = decoder_layers(target)[info.cut], []
    for one in samples:
        wanted = answer_log_probs(target, one)
        front.crop_to(0)
        rows = front.extend([*one.prompt_ids, *one.continuation_ids[:-1]])
        sent = torch.from_numpy(decode(encode(rows, info.codec), info.codec, front.width))
        with stream_changed(layer, lambda _, sent=sent: sent):  # type: ignore[misc]
            positions += compare(wanted, answer_log_probs(target, one))
    return summarize(info.cut, info.codec, row_bytes(info.codec, front.width), positions)


def row(replies: Sequence[Reply]) -> dict[str, Any]:
    metrics = [reply.metrics for reply in replies]
    num_tokens = sum(len(reply.token_ids) for reply in replies)
    return {
        "cloud_compute_ms_per_token": [
            round(m.cloud_compute_ms / len(r.token_ids), 2) for m, r in zip(metrics, replies, strict=True)
        ],
        "tpot_ms": [round(m.tpot_ms, 2) for m in metrics],
        "ttft_ms": [round(m.ttft_ms, 1) for m in metrics],
        "target_passes_per_token": round(sum(m.target_passes for m in metrics) / num_tokens, 3),
        "uplink_bytes_per_token": round(sum(m.uplink_bytes for m in metrics) / num_tokens, 1),
        "mean_acceptance_length": round(statistics.mean(m.mean_acceptance_length for m in metrics), 3),
    }


def main() -> None:
    parser = harness.arguments(__doc__, __file__)
    parser.add_argument("--prompts", type=Path, required=True, help="JSON lines with question_id, category, turns")
    parser.add_argument("--per-category", type=int, default=2)
    parser.add_argument("--timed", type=int, default=8, help="prompts that the two modes answer")
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--max-prompt-tokens", type=int, default=400)
    parser.add_argument("--num-draft-tokens", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    path = harness.find_bundle(options.bundle)
    bundle = Bundle.open(path)
    if bundle.front is None:
        raise SystemExit(f"error: {path} has no front; make one with `edgecloud partition --cut K`")
    cloud_cpu, device_cpu = harness.cores()
    replies: dict[str, list[Reply]] = {mode: [] for mode in MODES}
    with harness.serving(path, cloud_cpu) as address, harness.pinned(device_cpu), Client(path, address, num_threads=1) as client:
        questions, _ = sample(client, read(options.prompts), options.per_category, options.max_prompt_tokens, options.seed)
        asked: dict[str, Any] = {"max_new_tokens": options.max_new_tokens, "num_draft_tokens": options.num_draft_tokens}
        for mode in MODES:
            client.generate("Warm up.", mode=mode, max_new_tokens=8)
        for number, question in enumerate(questions[: options.timed]):
            for mode in MODES if number % 2 else MODES[::-1]:
                replies[mode].append(client.generate(question["prompt"], mode=mode, **asked))
        prompts = [client.tokenizer.encode_chat([{"role": "user", "content": question["prompt"]}]) for question in questions]
    rows = {mode: row(of) for mode, of in replies.items()}
    pairs = zip(rows["split"]["cloud_compute_ms_per_token"], rows["speculative"]["cloud_compute_ms_per_token"], strict=True)
    torch.set_num_threads(2)
    target = load_torch(ModelFolder.open(path / "cloud"), fp32=True)
    eos = list(bundle.tokenizer.eos_token_ids)
    samples = continue_greedily(target, prompts, eos, bundle.target.vocab_size, options.max_new_tokens)
    front = FrontModel(bundle.file(bundle.front.model), options.max_prompt_tokens + options.max_new_tokens, 2)
    damage = measure_agreement(target, front, bundle.front, [one for one in samples if one.continuation_ids])
    harness.report(
        options.json_out,
        [
            ("cloud compute per final token, split / speculative", statistics.median(a / b for a, b in pairs), "<=", 0.72),
            ("agreement of the split target with the whole, greedy", damage.agreement, ">=", 0.97),
            ("boundary bytes a position / float16's", damage.bytes_per_position / row_bytes("float16", front.width), "<=", 0.53),
        ],
        {
            "pinning": {"cloud_cpu": cloud_cpu, "device_cpu": device_cpu},
            "front": dataclasses.asdict(bundle.front) | {"model": ""},
            "damage": dataclasses.asdict(damage),
            **rows,
        },
    )


if __name__ == "__main__":
    main()
