"""An exit head on the device: what a row of the front says of the next token, over the tokens that the head may propose.

The graph has no cache and no state. It takes rows as the service decodes them, so whatever the front has sent will do.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from edgecloud.errors import BundleError

INPUT, OUTPUT = "rows", "logits"  # [rows, width] -> [rows, tokens that it may propose], float32


class ExitHead:
    """Raises BundleError: the file is no graph of this form, or its list of tokens is not that of its logits.

    Args:
        path: the graph.
        vocab: {"token_ids": [...]}, rising, one for each of its logits.
        vocab_size: of the target.
        num_threads: of ONNX Runtime.
    """

    def __init__(self, path: Path, vocab: Path, vocab_size: int, num_threads: int) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = num_threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        try:
            self._session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
            shapes = {value.name: value.shape for value in (*self._session.get_inputs(), *self._session.get_outputs())}
            self.width, num_tokens = int(shapes[INPUT][-1]), int(shapes[OUTPUT][-1])
        except Exception as error:  # onnxruntime's exceptions share no base class of their own
            raise BundleError(f"{path} is no exit head that this version can run: {error}") from error
        self.token_ids = _read_token_ids(vocab, num_tokens, vocab_size)
        self._logits = np.full(vocab_size, -np.inf, np.float32)

    def logits(self, row: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Of the token that follows, -inf where the head may not propose it.  [width] -> [vocab], valid until the next call"""
        [found] = self._session.run([OUTPUT], {INPUT: row[None]})
        self._logits[self.token_ids] = found[0]
        return self._logits


def _read_token_ids(vocab: Path, num_tokens: int, vocab_size: int) -> npt.NDArray[np.int64]:
    try:
        ids = np.array(json.loads(vocab.read_text("utf-8"))["token_ids"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BundleError(f"{vocab} is no list of token ids: {error}; make the bundle again") from error
    if ids.dtype.kind != "i" or ids.shape != (num_tokens,) or (np.diff(ids) <= 0).any() or ids[0] < 0 or ids[-1] >= vocab_size:
        raise BundleError(f"{vocab} does not hold {num_tokens} rising ids below {vocab_size}; make the bundle again")
    return ids.astype(np.int64)
