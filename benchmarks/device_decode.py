"""Device decode: our path against a bare ONNX Runtime loop and against onnxruntime-genai's own loop.

The same file, prompt, window and number of threads, pinned to one core; in every repetition each loop decodes the same
tokens, in changing order. Prefill is not counted. Reported: the median over repetitions of the ratio of tokens/s.
    python benchmarks/device_decode.py --repetitions 15
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import numpy as np
import onnxruntime as ort

from edgecloud.bundle import Bundle
from edgecloud.client import Client
from edgecloud.edge.drafter import ModelDrafter
from edgecloud.edge.local import decode_locally
from edgecloud.edge.model import DraftModel
from edgecloud.sampling import SamplingSettings

Loop = Callable[[list[int], int], tuple[float, list[int]]]  # prompt, number of tokens -> seconds a token, the tokens


def our_loop(graph: Path, window: int, sampling: SamplingSettings) -> Loop:
    model = DraftModel(graph, window, 1)
    drafter = ModelDrafter(lambda: model, model.vocab_size)

    def decode(prompt: list[int], num_tokens: int) -> tuple[float, list[int]]:
        model.crop_to(0)
        rounds = decode_locally(prompt, drafter, sampling, num_tokens, ())
        tokens = list(next(rounds).token_ids)
        start = time.perf_counter()
        for round_ in rounds:
            tokens += round_.token_ids
        return (time.perf_counter() - start) / (num_tokens - 1), tokens

    return decode


def bare_loop(graph: Path, window: int) -> Loop:
    """Nothing but buffers bound once, the run, and an argmax."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    logits = np.zeros((1, 1, session.get_outputs()[0].shape[-1]), np.float32)
    mask = np.ones((1, window), np.int64)
    binding.bind_output("logits", "cpu", 0, np.float32, logits.shape, logits.ctypes.data)
    caches = [i for i in session.get_inputs() if i.name.startswith("past_key_values")]
    buffers = {i.name: np.zeros((1, i.shape[1], window, i.shape[3]), np.float32) for i in caches}
    for name, buffer in buffers.items():
        binding.bind_input(name, "cpu", 0, np.float32, buffer.shape, buffer.ctypes.data)
        present = name.replace("past_key_values", "present")
        binding.bind_output(present, "cpu", 0, np.float32, buffer.shape, buffer.ctypes.data)

    def run(ids: np.ndarray[Any, Any], length: int) -> int:
        binding.bind_input("input_ids", "cpu", 0, np.int64, ids.shape, ids.ctypes.data)
        binding.bind_input("attention_mask", "cpu", 0, np.int64, (1, length), mask.ctypes.data)
        session.run_with_iobinding(binding)
        return int(logits.argmax())

    def decode(prompt: list[int], num_tokens: int) -> tuple[float, list[int]]:
        token = run(np.array([prompt], np.int64), len(prompt))
        tokens, ids = [token], np.empty((1, 1), np.int64)
        start = time.perf_counter()
        for length in range(len(prompt) + 1, len(prompt) + num_tokens):
            ids[0, 0] = token
            token = run(ids, length)
            tokens.append(token)
        return (time.perf_counter() - start) / (num_tokens - 1), tokens

    decode.buffers = buffers  # type: ignore[attr-defined]  # the binding does not keep them alive
    return decode


def genai_loop(bundle: Bundle, window: int, folder: Path) -> Loop:
    """The generator of onnxruntime-genai, on the same files and a configuration made from the graph."""
    import onnxruntime_genai as og

    graph = bundle.file(bundle.draft.model)
    for file in graph.parent.iterdir():
        (folder / file.name).symlink_to(file)
    inputs = {i.name: i.shape for i in ort.InferenceSession(str(graph)).get_inputs()}
    _, kv_heads, _, head_size = inputs["past_key_values.0.key"]
    config = json.loads((bundle.target_folder / "config.json").read_text())  # type: ignore[operator]
    names = {"past_key_names": "past_key_values.%d.key", "past_value_names": "past_key_values.%d.value"}
    presents = {"present_key_names": "present.%d.key", "present_value_names": "present.%d.value"}
    decoder = {
        "session_options": {"intra_op_num_threads": 1, "provider_options": []},
        "filename": graph.name,
        "head_size": head_size,
        "hidden_size": config["hidden_size"],
        "inputs": {"input_ids": "input_ids", "attention_mask": "attention_mask", **names},
        "outputs": {"logits": "logits", **presents},
        "num_attention_heads": config["num_attention_heads"],
        "num_hidden_layers": sum(name.endswith(".key") for name in inputs),
        "num_key_value_heads": kv_heads,
    }
    model_part = {
        "type": "llama", "context_length": window, "vocab_size": bundle.draft.vocab_size, "decoder": decoder,
        "bos_token_id": 1, "eos_token_id": bundle.draft.vocab_size - 1, "pad_token_id": 0,
    }  # fmt: skip
    search = {"do_sample": False, "max_length": window, "past_present_share_buffer": True}
    (folder / "genai_config.json").write_text(json.dumps({"model": model_part, "search": search}))
    model = og.Model(str(folder))

    def decode(prompt: list[int], num_tokens: int) -> tuple[float, list[int]]:
        params = og.GeneratorParams(model)
        params.set_search_options(max_length=window, do_sample=False)
        generator = og.Generator(model, params)
        generator.append_tokens(prompt)
        generator.generate_next_token()  # from the prefill's logits
        start = time.perf_counter()
        for _ in range(num_tokens - 1):
            generator.generate_next_token()
        return (time.perf_counter() - start) / (num_tokens - 1), generator.get_sequence(0)[len(prompt) :].tolist()

    return decode


def main() -> None:
    parser = harness.arguments(__doc__, __file__)
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--num-tokens", type=int, default=64)
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
