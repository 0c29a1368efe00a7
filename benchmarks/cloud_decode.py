"""One stream of the service's `Decode` against `model.generate` of transformers: tokens/s, same dtype, one thread each.

`grpc` is the whole way: service process, loopback, RemoteVerifier. `engine` is the engine alone, in the process of
`generate`. All run on one core in turns, the client on the other; a time is a whole call, prompt included. Two processes of
the same program differ by 3 % here, by where their memory lies, so all are started several times. Reported: the median over
all repetitions of the ratio of tokens/s.
    python benchmarks/cloud_decode.py --starts 4 --repetitions 12
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import harness

from edgecloud.bundle import Bundle
from edgecloud.client import Client
from edgecloud.edge.remote import Cloud, RemoteVerifier
from edgecloud.edge.retry import Timeout
from edgecloud.sampling import SamplingSettings

LOOPS = ["grpc", "generate", "engine"]


def worker(bundle: str) -> None:
    """Run transformers and the engine, on the core of the service."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    from edgecloud.cloud.engine import Engine
    from edgecloud.cloud.model import TargetModel
    from edgecloud.cloud.work import Answer, Extend, Extended

    torch.set_num_threads(1)
    folder = Bundle.open(Path(bundle)).target_folder
    assert folder is not None
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    stock.generation_config = GenerationConfig(do_sample=False, pad_token_id=0)  # no end token: as many as asked for
    engine = Engine(TargetModel(folder))

    def generate(prompt: list[int], num_tokens: int) -> list[int]:
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            output = stock.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_tokens)
        tokens: list[int] = output[0, len(prompt) :].tolist()
        return tokens

    def extend(prompt: list[int], num_tokens: int) -> list[int]:
        answers: list[Answer] = []
        session_id = os.urandom(16)
        request = Extend(session_id, 0, tuple(prompt), 0, SamplingSettings(), max_new_tokens=num_tokens)
        engine.submit(0, request, answers.append)
        while engine.has_work:
            engine.step()
        engine.release(session_id)
        return [answer.next_token_id for answer in answers if isinstance(answer, Extended)]

    def answer(loop: str, prompt: list[int], num_tokens: int) -> dict[str, Any]:
        start = time.perf_counter()
        tokens = (generate if loop == "generate" else extend)(prompt, num_tokens)
        return {"seconds": time.perf_counter() - start, "tokens": tokens, "dtype": str(stock.dtype)}

    harness.answer_requests(answer)


def measure(bundle: Path, prompt: list[int], num_tokens: int, num_repetitions: int) -> tuple[dict[str, list[float]], Any]:
    """Seconds of every call, and the first answer of each loop, from processes started afresh."""
    cloud_cpu, device_cpu = harness.cores()
    with (
        harness.serving(bundle, cloud_cpu) as address,
        harness.Worker([str(bundle)], cloud_cpu) as other,
        harness.pinned(device_cpu),
    ):
        cloud = Cloud(address, None, Timeout())

        def run(loop: str) -> dict[str, Any]:
            if loop != "grpc":
                return other.ask(loop=loop, prompt=prompt, num_tokens=num_tokens)
            verifier = RemoteVerifier(cloud)
            start = time.perf_counter()
            rounds = list(verifier.decode(prompt, num_tokens, SamplingSettings(), ()))
            seconds = time.perf_counter() - start
            verifier.release()
            return {"seconds": seconds, "tokens": [token for round_ in rounds for token in round_.token_ids]}

        warm = {loop: run(loop) for loop in LOOPS}
        seconds: dict[str, list[float]] = {loop: [] for loop in LOOPS}
        for number in range(num_repetitions):
            for loop in LOOPS[number % 3 :] + LOOPS[: number % 3]:
                seconds[loop].append(run(loop)["seconds"])
        cloud.close()
    return seconds, warm


def main() -> None:
    if "--worker" in sys.argv:
        return worker(sys.argv[-1])
    parser = harness.arguments(__doc__, __file__)
    parser.add_argument("--starts", type=int, default=4)
    parser.add_argument("--repetitions", type=int, default=12)
    parser.add_argument("--num-tokens", type=int, default=24)
    options = parser.parse_args()
    bundle = harness.find_bundle(options.bundle)
    with Client(bundle) as client:
        prompt = client.tokenizer.encode_chat([{"role": "user", "content": harness.PROMPT}])
    runs = [measure(bundle, prompt, options.num_tokens, options.repetitions) for _ in range(options.starts)]
    ratios = {
        loop: [[g / s for s, g in zip(seconds[loop], seconds["generate"], strict=True)] for seconds, _ in runs]
        for loop in ("grpc", "engine")
    }
    spreads = {loop: harness.spread([ratio for of_start in starts for ratio in of_start]) for loop, starts in ratios.items()}
    every = {loop: [second for seconds, _ in runs for second in seconds[loop]] for loop in LOOPS}
    cpus = harness.cores()
    harness.report(
        options.json_out,
        [
            ("cloud Decode over gRPC, tokens/s / model.generate", spreads["grpc"]["median"], ">=", 1.0),
            ("engine alone, tokens/s / model.generate", spreads["engine"]["median"], ">=", 1.0),
        ],
        {
            "pinning": {"cloud_cpu": cpus[0], "device_cpu": cpus[1]},
            "dtype": runs[0][1]["generate"]["dtype"],
            "num_prompt_tokens": len(prompt),
            "num_tokens": options.num_tokens,
            "same_tokens": all(warm[loop]["tokens"] == warm["generate"]["tokens"] for _, warm in runs for loop in LOOPS),
            "tokens_per_s": {loop: harness.spread([options.num_tokens / s for s in values]) for loop, values in every.items()},
            "ratios": spreads,
            "median_ratio_of_each_start": {
                loop: [harness.spread(of_start)["median"] for of_start in starts] for loop, starts in ratios.items()
            },
            "raw_s": {loop: [round(s, 4) for s in values] for loop, values in every.items()},
        },
    )
    return None


if __name__ == "__main__":
    main()
