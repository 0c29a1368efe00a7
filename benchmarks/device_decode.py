"""Device decode: our path against a bare ONNX Runtime loop and against onnxruntime-genai's own loop.

The same file, prompt, window and number of threads, pinned to one core; in every repetition each loop decodes the same
tokens, in changing order. Prefill is not counted. Reported: the median over repetitions of the ratio of tokens/s.
    python benchmarks/device_decode.py --repetitions 40
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import harness
from device_loops import bare_loop, genai_loop, our_loop

from edgecloud.bundle import Bundle
from edgecloud.client import Client
from edgecloud.sampling import SamplingSettings


def main() -> None:
    parser = harness.arguments(__doc__, __file__)
    parser.add_argument("--repetitions", type=int, default=40)
    parser.add_argument("--num-tokens", type=int, default=32)
    options = parser.parse_args()
    path = harness.find_bundle(options.bundle)
    bundle = Bundle.open(path)
    graph, window = bundle.file(bundle.draft.model), bundle.draft.max_context_tokens
    with Client(path) as client:
        prompt = client.tokenizer.encode_chat([{"role": "user", "content": harness.PROMPT}])
    _, cpu = harness.cores()
    with harness.pinned(cpu), tempfile.TemporaryDirectory() as folder:
        loops = {
            "ours": our_loop(graph, window, SamplingSettings()),
            "bare": bare_loop(graph, window),
            "genai": genai_loop(bundle, window, Path(folder)),
            "ours, temperature 1": our_loop(graph, window, SamplingSettings(temperature=1.0)),
        }
        tokens = {name: loop(prompt, options.num_tokens)[1] for name, loop in loops.items()}  # and warm
        seconds: dict[str, list[float]] = {name: [] for name in loops}
        for number in range(options.repetitions):
            order = list(loops)
            for name in order[number % len(order) :] + order[: number % len(order)]:
                seconds[name].append(loops[name](prompt, options.num_tokens)[0])
    ratios = {
        f"{ours} / {other}": [b / a for a, b in zip(seconds[ours], seconds[other], strict=True)]
        for ours in ("ours", "ours, temperature 1")
        for other in ("bare", "genai")
    }
    spreads = {name: harness.spread(values) for name, values in ratios.items()}
    harness.report(
        options.json_out,
        [(f"device decode, tokens/s, {name}", spreads[name]["median"], ">=", 0.95) for name in list(ratios)[:2]],
        {
            "pinning": {"device_cpu": cpu},
            "num_prompt_tokens": len(prompt),
            "num_tokens": options.num_tokens,
            "same_tokens": {name: tokens[name] == tokens["bare"] for name in loops},
            "tokens_per_s": {name: harness.spread([1 / s for s in values]) for name, values in seconds.items()},
            "ratios": spreads,
            "raw_ms_per_token": {name: [round(s * 1e3, 4) for s in values] for name, values in seconds.items()},
        },
    )


if __name__ == "__main__":
    main()
