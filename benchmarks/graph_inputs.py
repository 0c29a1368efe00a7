"""Graphs to cut and real inputs for them: a rendered page and a rendered line for PP-OCR, sentences for MiniLM."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper
from PIL import Image, ImageDraw, ImageFont
from tokenizers import Tokenizer

from edgecloud.partitioner.fetch import fetch
from edgecloud.prompts import PROMPTS

Inputs = dict[str, npt.NDArray[np.generic]]
LOSS = {"ppocr-det": "relative", "ppocr-rec": "argmax", "minilm": "relative"}  # the names `edgecloud fetch` knows
NUM_SENTENCES, NUM_TOKENS = 4, 32


def write_graph(name: str, folder: Path) -> tuple[Path, Path]:
    """-> the model as it is cut, and a sample for it as .npz"""
    fetched = fetch(name).path
    model, sample = fetched, folder / f"{name}.npz"
    if name == "ppocr-rec":
        model = folder / "ppocr-rec.onnx"
        onnx.save(_with_scores_only(onnx.load(fetched)), model)
    inputs = {"ppocr-det": _page, "ppocr-rec": _line}[name]() if name != "minilm" else _sentences(fetched.parent)
    np.savez(sample, **inputs)  # type: ignore[arg-type]
    return model, sample


def _page() -> Inputs:
    """Eight lines of text.  -> x [1, 3, 256, 320]"""
    image = Image.new("RGB", (320, 256), "white")
    for number, line in enumerate(PROMPTS[:8]):
        ImageDraw.Draw(image).text((8, 8 + 30 * number), line, fill="black", font=ImageFont.load_default(14))
    return {"x": _pixels(image)}


def _line() -> Inputs:
    """-> x [1, 3, 48, 320]"""
    image = Image.new("RGB", (320, 48), "white")
    ImageDraw.Draw(image).text((8, 8), PROMPTS[0], fill="black", font=ImageFont.load_default(28))
    return {"x": _pixels(image)}


def _pixels(image: Image.Image) -> npt.NDArray[np.float32]:
    """As PP-OCR takes them: -1 to 1, channels first."""
    return np.ascontiguousarray((np.asarray(image, np.float32) / 127.5 - 1).transpose(2, 0, 1)[None])


def _sentences(folder: Path) -> Inputs:
    """Token ids of sentences put together until they fill their rows.  -> three inputs, each [4, 32]"""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(NUM_TOKENS)
    tokenizer.enable_padding(length=NUM_TOKENS)
    encoded = tokenizer.encode_batch([" ".join(PROMPTS[3 * row : 3 * row + 3]) for row in range(NUM_SENTENCES)])
    return {
        "input_ids": np.array([row.ids for row in encoded], np.int64),
        "attention_mask": np.array([row.attention_mask for row in encoded], np.int64),
        "token_type_ids": np.array([row.type_ids for row in encoded], np.int64),
    }


def _with_scores_only(model: onnx.ModelProto) -> onnx.ModelProto:
    """The best character of every step and its probability, which is what CTC decoding reads, in place of 3 MB of probabilities."""
    [probabilities] = [value.name for value in model.graph.output]
    model.graph.node.append(helper.make_node("ArgMax", [probabilities], ["character"], axis=2, keepdims=0))
    model.graph.node.append(helper.make_node("ReduceMax", [probabilities], ["score"], axes=[2], keepdims=0))
    del model.graph.output[:]
    shape = ["lines", "steps"]
    model.graph.output.append(helper.make_tensor_value_info("character", TensorProto.INT64, shape))
    model.graph.output.append(helper.make_tensor_value_info("score", TensorProto.FLOAT, shape))
    return model
