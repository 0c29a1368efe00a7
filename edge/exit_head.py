"""An exit head on the device: what a row of the front says of the next token, over the tokens that the head may propose.

The graph has no cache and no state. It takes rows as the service decodes them, so whatever the front has sent will do.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from edgecloud.draft_vocab import DraftVocab
from edgecloud.errors import BundleError
from edgecloud.kernels.entries import kept_entries

INPUT, OUTPUT = "rows", "logits"  # [rows, width] -> [rows, tokens that it may propose], float32


class ExitHead:
    """Raises BundleError: the file is no graph of this form, or its list of tokens is not that of its logits.

    Args:
        path: the graph.
        vocab: file of the tokens that it may propose, one for each of its logits.
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
            self.width, num_logits = int(shapes[INPUT][-1]), int(shapes[OUTPUT][-1])
        except Exception as error:  # onnxruntime's exceptions share no base class of their own
            raise BundleError(f"{path} is no exit head that this version can run: {error}") from error
        try:
            kept = DraftVocab.read(vocab)
            kept.require(vocab_size, [])
        except ValueError as error:
            raise BundleError(f"{vocab}: {error}; make the bundle again") from error
        if len(kept) != num_logits:
            raise BundleError(f"{path} has logits of {num_logits} tokens, {vocab} names {len(kept)}; make the bundle again")
        self.entries = kept_entries(kept.token_ids)  # whose logits they are

    def logits(self, row: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Of the token that follows.  [width] -> [kept]"""
        [found] = self._session.run([OUTPUT], {INPUT: row[None]})
        logits: npt.NDArray[np.float32] = found[0]
        return logits
