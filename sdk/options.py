"""What a caller may ask of a generation: names, defaults and checks, each written once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypedDict, get_args

from edgecloud.errors import ConfigError, ContextLengthError
from edgecloud.quality import Quality, check_quality
from edgecloud.sampling import SamplingSettings
from edgecloud.types import LossPolicy, ModeChoice, Objective

MODES = get_args(ModeChoice)
OBJECTIVES = get_args(Objective)
LOSS_POLICIES = get_args(LossPolicy)
Prompt = str | Sequence[Mapping[str, str]]  # text, or chat messages with `role` and `content`


class GenerationKeywords(TypedDict, total=False):
    """Keyword arguments of `Client.generate`, `Client.stream` and their like; names as in `transformers.GenerationConfig`."""

    mode: ModeChoice  # "auto"
    quality: Quality | None  # None: exact; "exact", "offline", Risk(...), CloudShare(...)
    max_new_tokens: int  # 256
    num_draft_tokens: int | None  # tokens drafted a round; None: the client's
    stop_strings: Sequence[str]  # the text ends before the first of these
    deadline_s: float | None  # seconds the whole generation may take; None: no limit
    provisional: bool  # True: modes "auto" and "cascade" show the device's guesses at once; False: only what is final
    objective: Objective  # "latency", of mode "auto"
    on_cloud_loss: LossPolicy  # "continue", of modes "auto" and "cascade"
    max_provisional_tokens: int  # 256: guesses at a time while the cloud is silent
    temperature: float  # 0.0: greedy
    top_k: int  # 0: off
    top_p: float  # 1.0: off
    repetition_penalty: float  # 1.0: off
    seed: int  # 0


@dataclass(frozen=True, slots=True)
class GenerationOptions:
    """The same, checked. Raises ConfigError that names the option."""

    mode: ModeChoice = "auto"
    quality: Quality | None = None
    max_new_tokens: int = 256
    num_draft_tokens: int = 4
    stop_strings: Sequence[str] = ()
    deadline_s: float | None = None
    provisional: bool = True
    objective: Objective = "latency"
    on_cloud_loss: LossPolicy = "continue"
    max_provisional_tokens: int = 256
    sampling: SamplingSettings = SamplingSettings()  # noqa: RUF009  # frozen

    def __post_init__(self) -> None:
        """Check every value."""
        if self.mode not in MODES:
            raise ConfigError(f"mode is {self.mode!r}; it takes {', '.join(MODES)}")
        check_quality(self.quality, self.mode)
        check_whole("max_new_tokens", self.max_new_tokens, 1)
        check_whole("num_draft_tokens", self.num_draft_tokens, 1, 64)
        check_whole("max_provisional_tokens", self.max_provisional_tokens, 1)
        for name, choices in (("objective", OBJECTIVES), ("on_cloud_loss", LOSS_POLICIES)):
            if getattr(self, name) not in choices:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; it takes {', '.join(choices)}")
        if not isinstance(self.provisional, bool):
            raise ConfigError(f"provisional is {self.provisional!r}; it takes True or False")
        stops = self.stop_strings
        if not isinstance(stops, Sequence) or isinstance(stops, str) or not all(isinstance(s, str) and s for s in stops):
            raise ConfigError(f"stop_strings is {stops!r}; it takes a list of non-empty strings")
        if self.deadline_s is not None and not (isinstance(self.deadline_s, int | float) and self.deadline_s > 0):
            raise ConfigError(f"deadline_s is {self.deadline_s!r}; it takes seconds above 0")

    @property
    def shows_guesses(self) -> bool:
        """Whether provisional tokens are events."""
        return self.mode in {"auto", "cascade"} and self.provisional

    @property
    def offline(self) -> bool:
        """Whether the device answers alone."""
        return self.mode == "edge" or self.quality == "offline"

    @classmethod
    def from_keywords(cls, keywords: GenerationKeywords, num_draft_tokens: int) -> GenerationOptions:
        """Options from a caller's keywords; `num_draft_tokens` where they name none. Unknown ones are refused."""
        given: dict[str, Any] = dict(keywords)
        if given.get("num_draft_tokens") is None:
            given["num_draft_tokens"] = num_draft_tokens
        sampling = {field.name: given.pop(field.name) for field in fields(SamplingSettings) if field.name in given}
        known = sorted(GenerationKeywords.__annotations__)
        if unknown := sorted(set(given) - set(known)):
            raise ConfigError(f"unknown option {unknown[0]!r}; known are {', '.join(known)}")
        return cls(**given, sampling=SamplingSettings(**sampling))


def check_whole(name: str, value: object, lowest: int, highest: int | None = None) -> int:
    """A whole number within bounds. Raises ConfigError that names it."""
    if not isinstance(value, int) or isinstance(value, bool) or value < lowest or (highest is not None and value > highest):
        bounds = f"from {lowest}" + ("" if highest is None else f" to {highest}")
        raise ConfigError(f"{name} is {value!r}; it takes a whole number {bounds}")
    return value


def check_messages(prompt: object) -> list[Mapping[str, str]]:
    """Chat messages. Raises ConfigError when they are something else."""
    if not isinstance(prompt, Sequence) or not prompt or not all(_is_message(message) for message in prompt):
        raise ConfigError(f"prompt is {str(prompt)[:80]!r}; it takes a string, or messages with the strings `role` and `content`")
    return list(prompt)


def check_fits(num_prompt_tokens: int, max_new_tokens: int, window: int, whose: str) -> None:
    """Raises ContextLengthError when prompt and answer do not fit a window, ConfigError when the prompt is empty."""
    if not num_prompt_tokens:
        raise ConfigError("the prompt is empty; give at least one token")
    if num_prompt_tokens + max_new_tokens > window:
        raise ContextLengthError(
            f"a prompt of {num_prompt_tokens} tokens and {max_new_tokens} new ones do not fit the {whose} of {window}; "
            f"shorten the prompt or ask for fewer"
        )


def _is_message(value: object) -> bool:
    return isinstance(value, Mapping) and all(isinstance(value.get(key), str) for key in ("role", "content"))
