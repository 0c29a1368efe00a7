"""Three simulated devices learn together without exchanging text: agreement with the target on each device's own domain.

The draft is the target without some of its layers, so that there is something to learn in minutes. A device's log holds where the
draft's greedy choice is not the target's, for answers that the target gave before; other answers of the same domain are held
out. Needs a python that has edgecloud[federated] (--flower).
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from harness import RESULTS
from transformers import AutoModelForCausalLM

from edgecloud.fingerprint import model_fingerprint, tokenizer_fingerprint
from edgecloud.machine import machine
from edgecloud.partitioner.adapter import load_draft
from edgecloud.partitioner.corrections import Correction
from edgecloud.partitioner.learn import begin_adapter, merge_adapter
from edgecloud.partitioner.learning import agreement
from edgecloud.partitioner.model_folder import ModelFolder
from edgecloud.rejections import Passage, RejectionLog, Source

ROOT = Path(__file__).resolve().parents[1]
EDGECLOUD = [sys.executable, "-c", "from edgecloud.cli import main; main()"]
DOMAINS = {"sums": "gsm", "code": "he", "questions": "spec"}  # and how the keys of their answers begin


def main() -> None:
    options = parse()
    scratch: Path = options.scratch
    draft = pruned(options.target, scratch / "draft", options.drop)
    model = load_draft(draft)
    answers = [json.loads(line) for line in options.answers.read_text().splitlines()]
    held_out: dict[str, list[Correction]] = {}
    command = [options.flower, str(ROOT / "examples/federated/run.py"), str(draft.path), str(scratch / "begin.safetensors"),
               "-o", str(scratch / "averaged.safetensors"), "--rounds", str(options.rounds), "--epochs", str(options.epochs),
               "--learning-rate", str(options.learning_rate), "--clip", str(options.clip), "--noise", str(options.noise),
               "--edgecloud", shlex.join(EDGECLOUD)]  # fmt: skip
    devices: dict[str, dict[str, float]] = {}
    tokenizer = tokenizer_fingerprint(draft.path / "tokenizer.json")
    source = Source(model_fingerprint(options.target), model_fingerprint(draft.path), tokenizer)
    num_wanted = options.passages + options.held_out
    for name, key in DOMAINS.items():
        chosen = [answer for answer in answers if answer["key"].startswith(key)][:num_wanted]
        passages = [passage_of(model, answer, options) for answer in chosen]
        log = RejectionLog(scratch / name)
        log.clear()
        log.prepare()
        for passage in passages[: options.passages]:
            log.add(source, passage)
        held_out[name] = [
            Correction(p.ids, tuple(range(p.answer_start, len(p.ids))), (), 0.0) for p in passages[options.passages :]
        ]
        num_refused = sum(len(passage.rejected) for passage in passages[: options.passages])
        devices[name] = {"logged_positions": num_refused, "before": agreement(model, held_out[name])}
        print(name, devices[name], flush=True)
        command += ["--log", str(scratch / name)]
    begin_adapter(draft.path, scratch / "begin.safetensors", options.rank, seed=0)
    rounds = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1])
    merge_adapter(draft.path, scratch / "averaged.safetensors", scratch / "learned", overwrite=True)
    learned = load_draft(ModelFolder.open(scratch / "learned"))
    for name, corrections in held_out.items():
        devices[name]["after"] = agreement(learned, corrections)
        devices[name]["held_out_tokens"] = sum(len(correction.refused) for correction in corrections)
        print(name, devices[name], flush=True)
    settings = {name: value for name, value in vars(options).items() if isinstance(value, int | float | list)}
    report = {"settings": settings, "machine": machine(), "rounds": rounds, "devices": devices}
    (RESULTS / "federated.json").write_text(json.dumps(report, indent=2) + "\n")


def pruned(target: Path, folder: Path, drop: Sequence[int]) -> ModelFolder:
    """The target without some layers, as a draft."""
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    model.model.layers = torch.nn.ModuleList([layer for at, layer in enumerate(model.model.layers) if at not in drop])
    for at, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = at
    model.config.num_hidden_layers = len(model.model.layers)
    model.config.layer_types = None
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((target / name).read_bytes())
    return ModelFolder.open(folder)


@torch.inference_mode()
def passage_of(model: torch.nn.Module, answer: dict[str, list[int]], options: argparse.Namespace) -> Passage:
    """What a device would have logged of an answer, were every token of it drafted."""
    prompt, ids = answer["prompt_ids"][-options.prompt_tokens :], answer["answer_ids"][: options.answer_tokens]
    tokens, start = prompt + ids, len(prompt)
    guesses = model(torch.tensor([tokens]), use_cache=False).logits[0].argmax(dim=1).tolist()
    refused = tuple((at, guesses[at - 1]) for at in range(start, len(tokens)) if guesses[at - 1] != tokens[at])
    return Passage(tuple(tokens), start, refused, 0.0)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", type=Path, required=True)
    parser.add_argument("--answers", type=Path, required=True, help="JSON lines with key, prompt_ids and answer_ids, greedy")
    parser.add_argument("--flower", required=True, help="a python that has Flower")
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--drop", type=int, nargs="*", default=[10, 12, 14, 16, 18, 20, 22, 24, 26])
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--clip", type=float, default=20.0)
    parser.add_argument("--noise", type=float, default=0.0)
    parser.add_argument("--passages", type=int, default=8, help="logged by each device")
    parser.add_argument("--held-out", type=int, default=6, help="passages of each domain, beside those")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--answer-tokens", type=int, default=96)
    return parser.parse_args()


if __name__ == "__main__":
    main()
