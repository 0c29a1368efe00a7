"""The draft model on the device: logits after the last token of a sequence, computing only what its caches lack."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgecloud.bundle import Bundle
from edgecloud.draft_vocab import DraftVocab
from edgecloud.edge.kv_graph import KvGraph
from edgecloud.errors import BundleError, ContextLengthError
from edgecloud.kernels.entries import kept_entries
from edgecloud.tokens import common_prefix

PREFILL_CHUNK_TOKENS = 128


class DraftModel:
    """One token sequence at a time; the graph yields logits of the last position only.

    `on_prefill` is told of every run over more than one token: how many, and the milliseconds it took. A trimmed draft says the
    tokens of its logits, `vocab`, and how many it reads, `vocab_size`; any other has as many logits as it reads tokens.

    Raises:
        BundleError: the file is no graph of the form that edge/kv_graph.py runs, or yields logits of another number of tokens.
    """

    def __init__(
        self,
        path: Path,
        max_context_tokens: int,
        num_threads: int,
        on_prefill: Callable[[int, float], None] = lambda num_tokens, elapsed_ms: None,
        *,
        vocab: DraftVocab | None = None,
        vocab_size: int | None = None,
    ) -> None:
        try:
            self._graph = KvGraph(path, max_context_tokens, PREFILL_CHUNK_TOKENS, num_threads)
            num_logits = int(self._graph.output_shapes["logits"][-1])
            self._logits = np.empty((1, 1, num_logits), np.float32)
            self._graph.bind_output("logits", self._logits, self._logits.shape)
        except Exception as error:  # onnxruntime's exceptions share no base class of their own
            raise BundleError(f"{path} is no draft model that this version can run: {error}") from error
        if vocab is not None and num_logits != len(vocab):
            raise BundleError(f"{path} has logits of {num_logits} tokens, its list names {len(vocab)}; make the bundle again")
        self.vocab_size = num_logits if vocab_size is None else vocab_size  # tokens that it reads
        self.entries = None if vocab is None else kept_entries(vocab.token_ids)  # whose logits they are; None: of all tokens
        self.max_context_tokens = max_context_tokens
        self._on_prefill = on_prefill
        self._tokens: list[int] = []  # whose keys and values are in the buffers

    @classmethod
    def of_bundle(
        cls, bundle: Bundle, max_context_tokens: int, num_threads: int, on_prefill: Callable[[int, float], None] | None = None
    ) -> DraftModel:
        """A bundle's draft. Raises BundleError, and BundleCorruptError for its list of tokens."""
        told = {} if on_prefill is None else {"on_prefill": on_prefill}
        path, size = bundle.file(bundle.draft.model), bundle.draft.vocab_size
        return cls(path, max_context_tokens, num_threads, **told, vocab=bundle.draft_vocab(), vocab_size=size)

    @property
    def num_cached(self) -> int:
        """Tokens whose keys and values count."""
        return len(self._tokens)

    def extend_to(self, tokens: list[int]) -> npt.NDArray[np.float32]:
        """Logits after the last of `tokens`, computing only what the cache lacks.  -> [vocab], or [kept] of a trimmed draft

        The array is the output buffer itself: valid until the next call.

        Raises:
            ContextLengthError: more tokens than the buffers hold.
        """
        if len(tokens) > self.max_context_tokens:
            raise ContextLengthError(f"{len(tokens)} tokens do not fit the draft model's window of {self.max_context_tokens}")
        self.crop_to(min(common_prefix(self._tokens, tokens), len(tokens) - 1))
        num_new, started = len(tokens) - len(self._tokens), time.perf_counter()
        while (start := len(self._tokens)) < len(tokens):
            chunk = tokens[start : start + PREFILL_CHUNK_TOKENS]
            self._graph.run(self._known(chunk), start)
            self._tokens += chunk
        if num_new > 1:
            self._on_prefill(num_new, (time.perf_counter() - started) * 1e3)
        row: npt.NDArray[np.float32] = self._logits[0, 0]
        return row

    def crop_to(self, length: int) -> None:
        """Forget the tokens past `length`."""
        del self._tokens[length:]

    def _known(self, chunk: Sequence[int]) -> list[int]:
        """A target padded beyond the draft's embedding may choose ids that the draft lacks."""
        return [token if token < self.vocab_size else 0 for token in chunk]
