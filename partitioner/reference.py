"""What exports are held against: the target in torch, and its answers to the built-in prompts."""

from __future__ import annotations

import tempfile
from functools import cached_property
from pathlib import Path

from transformers import PreTrainedModel

from edgecloud.errors import ModelError
from edgecloud.fingerprint import tokenizer_fingerprint
from edgecloud.partitioner import check, tokenizer_match
from edgecloud.partitioner.model_folder import ModelFolder
from edgecloud.partitioner.report import Remark
from edgecloud.partitioner.steps import cached_samples


class Reference:
    """Each is made when it is first asked for, and once: a check that is in the cache needs neither."""

    def __init__(
        self, target: ModelFolder, num_tokens: int, max_context_tokens: int, *, fp32: bool, cache: Path | None, remark: Remark
    ) -> None:
        """`num_tokens` are the tokenizer's; `fp32` where more than the target's choices is compared."""
        self.target = target
        self.num_tokens = num_tokens
        self._max_context_tokens = max_context_tokens
        self._fp32 = fp32
        self._cache = cache
        self._remark = remark

    @cached_property
    def fingerprint(self) -> str:
        """Of the target."""
        self._remark("fingerprints")
        return self.target.fingerprint()

    @cached_property
    def tokenizer_fingerprint(self) -> str:
        """Of the target's tokenizer."""
        return tokenizer_fingerprint(self.target.path / "tokenizer.json")

    @cached_property
    def model(self) -> PreTrainedModel:
        """The target."""
        return check.load_torch(self.target, fp32=self._fp32)

    @cached_property
    def samples(self) -> list[check.Sample]:
        """Greedy answers. Raises ModelError: the window is too short for one."""
        room = self._max_context_tokens - check.NUM_CONTINUATION_TOKENS
        if room < 1:
            raise ModelError(
                f"a context of {self._max_context_tokens} tokens is too short to check the draft, "
                f"{check.NUM_CONTINUATION_TOKENS + 1} are needed"
            )
        models = self.fingerprint, self.tokenizer_fingerprint
        settings: dict[str, object] = {"room": room, "num_tokens": self.num_tokens, "fp32": self._fp32}
        with tempfile.TemporaryDirectory() as scratch:
            return cached_samples(self._cache, models, settings, Path(scratch) / "samples", lambda: self._answers(room))

    def _answers(self, room: int) -> list[check.Sample]:
        self._remark("the target's answers to the built-in prompts")
        prompts, eos = check.encode_prompts(self.target, room), tokenizer_match.eos_token_ids(self.target)
        return check.continue_greedily(self.model, prompts, eos, self.num_tokens)
