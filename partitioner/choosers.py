"""Draft and target as roll-outs need them: a guess with its score, and the choices along a text in one pass."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from transformers import DynamicCache

from edgecloud.errors import ModelError
from edgecloud.kernels.choice_numpy import choose
from edgecloud.kernels.entries import kept_entries
from edgecloud.partitioner.graph import DraftGraph
from edgecloud.sampling import SamplingSettings
from edgecloud.tokens import common_prefix


class GraphGuesser:
    """The exported draft; implements `rollout.Guesser`. Raises ModelError: its logits are not finite."""

    def __init__(self, graph: DraftGraph, num_tokens: int, sampling: SamplingSettings) -> None:
        """`num_tokens` are the tokenizer's; a padded vocabulary has more. A graph with a trimmed head proposes what it keeps."""
        self._graph = graph
        self._num_logits = num_tokens if graph.kept is None else len(graph.kept)
        self._entries = None if graph.kept is None else kept_entries(graph.kept.tolist())
        self._sampling = sampling
        self._tokens: list[int] = []  # whose keys and values are in the graph's buffers

    def guess(self, tokens: Sequence[int]) -> tuple[int, float]:
        """The coupled choice from the draft's logits, and the probability of its most likely token."""
        keep = min(common_prefix(self._tokens, tokens), len(tokens) - 1)
        self._graph.crop_to(keep)
        logits = self._graph.extend(tokens[keep:])[: self._num_logits]
        self._tokens = list(tokens)
        if not np.isfinite(logits).all():
            raise ModelError("the draft yields logits that are not finite; verify the bundle, or make it again")
        warmth = 1.0 if self._sampling.greedy else self._sampling.temperature
        weights = np.exp((logits.astype(np.float64) - logits.max()) / warmth)
        return choose(logits, tokens, self._sampling, self._entries), float(1.0 / weights.sum())


class TorchChooser:
    """The target in torch with a KV cache of its own; implements `rollout.Chooser`."""

    def __init__(self, model: torch.nn.Module, num_tokens: int, sampling: SamplingSettings) -> None:
        self._model = model
        self._num_tokens = num_tokens
        self._sampling = sampling
        self._cache = DynamicCache()
        self._tokens: list[int] = []  # in the cache

    def choose(self, tokens: Sequence[int], first: int) -> list[int]:
        """Computes what the cache lacks, and the positions asked for.  -> [len(tokens) - first + 1]"""
        keep = min(common_prefix(self._tokens, tokens), first - 1)
        if keep < len(self._tokens):
            self._cache.crop(keep - len(self._tokens))  # so many are removed
        num_asked = len(tokens) - first + 1
        with torch.inference_mode():
            output = self._model(
                input_ids=torch.tensor([tokens[keep:]]), past_key_values=self._cache, use_cache=True, logits_to_keep=num_asked
            )
        self._tokens = list(tokens)
        rows = output.logits[0, -num_asked:, : self._num_tokens].float()
        if self._sampling.greedy:
            greedy: list[int] = rows.argmax(dim=1).tolist()
            return greedy
        logits = rows.numpy()
        return [choose(row, tokens[: first + at], self._sampling) for at, row in enumerate(logits)]
