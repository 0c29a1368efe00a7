"""What of a text bundle is loaded on this device, each part at its first use: manifest, tokenizer, draft, front and exit head."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from edgecloud.bundle import Bundle

if TYPE_CHECKING:
    from edgecloud.bundle import FrontInfo
    from edgecloud.edge.drafter import ModelDrafter
    from edgecloud.edge.front_drafter import FrontDrafter
    from edgecloud.edge.front_rows import FrontRows
    from edgecloud.edge.model import DraftModel
    from edgecloud.edge.tokenizer import ChatTokenizer


class OnDevice:
    """Threads may share it. Every part raises BundleError where its file cannot be used.

    Args:
        path: of the bundle.
        num_threads: of ONNX Runtime.
        max_context_tokens: longest sequence that is kept; 0: as the bundle says.
        prefilled: told of every prompt that the draft reads: tokens, milliseconds.
    """

    def __init__(self, path: Path, num_threads: int, max_context_tokens: int, prefilled: Callable[[int, float], None]) -> None:
        self._path = path
        self._num_threads = num_threads
        self._max_context_tokens = max_context_tokens
        self._prefilled = prefilled
        self._bundle: Bundle | None = None
        self._tokenizer: ChatTokenizer | None = None
        self._drafter: ModelDrafter | None = None
        self._front: FrontRows | None = None
        self._front_drafter: FrontDrafter | None = None
        self._loading = threading.RLock()

    @property
    def bundle(self) -> Bundle:
        """The manifest, the device's files checked."""
        with self._loading:
            if self._bundle is None:
                bundle = Bundle.open(self._path)
                bundle.verify_files("edge")
                self._bundle = bundle
            return self._bundle

    @property
    def tokenizer(self) -> ChatTokenizer:
        """That both models share."""
        with self._loading:
            if self._tokenizer is None:
                from edgecloud.edge.tokenizer import ChatTokenizer

                bundle = self.bundle
                template = bundle.tokenizer.chat_template
                self._tokenizer = ChatTokenizer(
                    bundle.file(bundle.tokenizer.path),
                    None if template is None else bundle.file(template),
                    bundle.tokenizer.special_tokens,
                )
            return self._tokenizer

    @property
    def window(self) -> int:
        """Tokens that a context may have here."""
        bundle = self.bundle
        window = min(bundle.target.max_context_tokens, bundle.draft.max_context_tokens)
        return min(window, self._max_context_tokens) if self._max_context_tokens else window

    @property
    def drafter(self) -> ModelDrafter:
        """The draft model, which is read from disk when it is first asked."""
        with self._loading:
            if self._drafter is None:
                from edgecloud.edge.drafter import ModelDrafter

                bundle, window, num_threads, prefilled = self.bundle, self.window, self._num_threads, self._prefilled
                vocab_size = min(bundle.draft.vocab_size, bundle.target.vocab_size)

                def load() -> DraftModel:
                    from edgecloud.edge.model import DraftModel

                    return DraftModel.of_bundle(bundle, window, num_threads, prefilled)

                self._drafter = ModelDrafter(load, vocab_size)
            return self._drafter

    def front_rows(self, info: FrontInfo) -> FrontRows:
        """The front, with its key-value cache."""
        with self._loading:
            if self._front is None:
                from edgecloud.edge.front import FrontModel
                from edgecloud.edge.front_rows import FrontRows

                model = FrontModel(self.bundle.file(info.model), self.window, self._num_threads)
                self._front = FrontRows(model, info.cut, info.codec)
            return self._front

    def front_drafter(self, info: FrontInfo) -> FrontDrafter | None:
        """The front as a drafter, if the bundle has an exit head for it: then nothing loads the draft model."""
        head = info.exit_head
        with self._loading:
            if head is not None and self._front_drafter is None:
                from edgecloud.edge.exit_head import ExitHead
                from edgecloud.edge.front_drafter import FrontDrafter

                graph, vocab = self.bundle.file(head.model), self.bundle.file(head.vocab)
                vocab_size, num_threads = self.bundle.target.vocab_size, self._num_threads
                rows = self.front_rows(info)
                self._front_drafter = FrontDrafter(rows, lambda: ExitHead(graph, vocab, vocab_size, num_threads))
            return self._front_drafter

    def drop(self) -> None:
        """The models; what was read of the bundle stays."""
        self._drafter = self._front = self._front_drafter = None
