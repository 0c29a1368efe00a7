"""What a plan may be: a mode with its cut, bits, draft and draft length; and what it is made for: link and work."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from edgecloud.partitioner.layer_times import ModelShape

PlanMode = Literal["edge", "cloud", "speculative", "split"]
DRAFT_LENGTHS = (1, 2, 3, 4, 6, 8)
FrontWeights = Literal["int4", "int8", "fp16"]
FRONT_WEIGHTS: tuple[FrontWeights, ...] = get_args(FrontWeights)
CODECS = ("int4", "int8", "float16")
TOKEN_BYTES = 3  # of an id on the wire, at most, for vocabularies below 2 million
REQUEST_BYTES = 45  # of a request beside ids and rows: session, hashes, numbers


@dataclass(frozen=True, slots=True)
class Connection:
    """The link that is planned for."""

    name: str
    rtt_ms: float
    up_mbps: float | None = None  # None: unlimited

    def __post_init__(self) -> None:
        if not self.rtt_ms >= 0:
            raise ValueError(f"rtt_ms is {self.rtt_ms}; it must be at least 0")
        if self.up_mbps is not None and not self.up_mbps > 0:
            raise ValueError(f"up_mbps is {self.up_mbps}; it must be above 0")


@dataclass(frozen=True, slots=True)
class Workload:
    """The answer that is planned for."""

    prompt_tokens: int = 128
    answer_tokens: int = 128
    max_context_tokens: int = 2048  # for which the device has room

    def __post_init__(self) -> None:
        for name in ("prompt_tokens", "answer_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")

    @property
    def mean_context_tokens(self) -> float:
        """That a token of the answer attends to."""
        return self.prompt_tokens + self.answer_tokens / 2


@dataclass(frozen=True, slots=True)
class Draft:
    """A model that may draft, and how often it is right."""

    name: str
    shape: ModelShape
    weights: str
    survival: tuple[float, ...]  # S_1, S_2, ...: the first i guesses are all the target's
    measured: bool  # else assumed


@dataclass(frozen=True, slots=True)
class Candidate:
    """One division of labour."""

    mode: PlanMode
    draft: str | None = None  # name of the draft
    num_draft_tokens: int = 0
    cut: int = 0  # layers on the device, of mode split
    front: FrontWeights | None = None  # format of their weights
    codec: str | None = None  # of the boundary

    @property
    def sends_prompt_ids(self) -> bool:
        """Whether the cloud reads the prompt as tokens."""
        return self.mode in ("cloud", "speculative")

    @property
    def short(self) -> str:
        """Without the bits."""
        length = f", K = {self.num_draft_tokens}" if self.num_draft_tokens else ""
        return f"{self.mode}{f' at {self.cut}' if self.mode == 'split' else ''}{length}"

    def __str__(self) -> str:
        words: list[str] = [self.mode]
        if self.mode == "split":
            words.append(f"at layer {self.cut}, front {self.front}, boundary {self.codec}")
        if self.num_draft_tokens:
            words.append(f"K = {self.num_draft_tokens}")
        return ", ".join(words)


def candidates(
    target: ModelShape, drafts: Sequence[Draft], front_weights: Sequence[FrontWeights], codecs: Sequence[str] = CODECS
) -> Iterator[Candidate]:
    """Every plan there is: mode x cut x bits x draft x K."""
    yield Candidate("cloud")
    for draft in drafts:
        yield Candidate("edge", draft.name)
        for length in DRAFT_LENGTHS:
            yield Candidate("speculative", draft.name, length)
    for cut in range(1, target.num_layers):
        for front in front_weights:
            for codec in codecs:
                split = Candidate("split", cut=cut, front=front, codec=codec)
                for draft in drafts:
                    for length in DRAFT_LENGTHS:
                        yield replace(split, draft=draft.name, num_draft_tokens=length)
