"""What exports are held against: the target in torch, and its answers to the built-in prompts."""

from __future__ import annotations

from functools import cached_property

import torch

from edgecloud.errors import ModelError
from edgecloud.partitioner import check
from edgecloud.partitioner.inputs import Inputs
from edgecloud.partitioner.report import Remark


class Reference:
    """Each is made when it is first asked for: a check that is in the cache needs neither."""

    def __init__(self, inputs: Inputs, eos_token_ids: list[int], remark: Remark) -> None:
        self._inputs = inputs
        self._eos_token_ids = eos_token_ids
        self._remark = remark

    @cached_property
    def model(self) -> torch.nn.Module:
        """The target; in fp32 where more than its choices is compared."""
        inputs = self._inputs
        return check.load_torch(inputs.target, fp32=inputs.draft.path == inputs.target.path or inputs.front is not None)

    @cached_property
    def samples(self) -> list[check.Sample]:
        """Greedy answers. Raises ModelError: the window is too short for one."""
        target, draft = self._inputs.target, self._inputs.draft
        shortest = min(target.max_context_tokens, draft.max_context_tokens)
        room = shortest - check.NUM_CONTINUATION_TOKENS
        if room < 1:
            raise ModelError(
                f"a context of {shortest} tokens is too short to check the draft, {check.NUM_CONTINUATION_TOKENS + 1} are needed"
            )
        self._remark("the target's answers to the built-in prompts")
        prompts = check.encode_prompts(target, room)
        return check.continue_greedily(self.model, prompts, self._eos_token_ids, self._inputs.num_tokens)
