"""Three loops that decode the same file: ours, a bare ONNX Runtime one, and the generator of onnxruntime-genai."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from edgecloud.bundle import Bundle
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
