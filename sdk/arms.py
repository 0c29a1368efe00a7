"""Ways of working to measure, by the names that `edgecloud bench --modes` takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

from edgecloud.errors import ConfigError
from edgecloud.quality import Risk
from edgecloud.types import ModeChoice, Objective


@dataclass(frozen=True, slots=True)
class Arm:
    """A way of working to measure."""

    name: str
    mode: ModeChoice
    num_draft_tokens: int | None = None  # of modes speculative and split
    objective: Objective | None = None  # of mode auto
    risk: float | None = None  # of mode cascade

    @property
    def verified(self) -> bool:
        """Whether its text is the target's; that of `split` is the split target's, that of `cascade` in part the draft's."""
        return self.mode not in {"edge", "split", "cascade"}

    @property
    def fixed(self) -> bool:
        """Whether `auto` could have stayed with it and given the same text."""
        return self.mode in {"cloud", "speculative"}

    def options(self) -> dict[str, Any]:
        """Of `Client.generate`."""
        quality = None if self.risk is None else Risk(self.risk)
        given = {
            "mode": self.mode, "num_draft_tokens": self.num_draft_tokens, "objective": self.objective, "quality": quality
        }  # fmt: skip
        return {name: value for name, value in given.items() if value is not None}


def parse_arms(text: str) -> list[Arm]:
    """`cloud`, `speculative:K`, `split:K`, `auto`, `auto:OBJECTIVE`, `cascade:RISK`, `edge`, between commas. Raises ConfigError."""
    arms = [_parse_arm(word.strip()) for word in text.split(",")]
    check_distinct("--modes", [arm.name for arm in arms])
    if not any(arm.mode == "cloud" for arm in arms):
        raise ConfigError(f"--modes {text!r} lacks cloud, against which the others are held; add it")
    return arms


def check_distinct(option: str, names: Sequence[str]) -> None:
    """Raises ConfigError that names what stands there twice."""
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"{option} names {name!r} twice; name it once")


def _parse_arm(word: str) -> Arm:
    mode, colon, detail = word.partition(":")
    match mode:
        case "cloud" | "edge" if not colon:
            return Arm(word, mode)
        case "speculative" | "split" if not colon:
            return Arm(word, mode)
        case "speculative" | "split" if detail.isdecimal() and 1 <= int(detail) <= 64:
            return Arm(word, mode, num_draft_tokens=int(detail))
        case "cascade" if _risk(detail) is not None:
            return Arm(word, mode, risk=_risk(detail))
        case "auto" if not colon:
            return Arm(word, mode)
        case "auto":
            for objective in get_args(Objective):
                if detail == objective:
                    return Arm(word, mode, objective=objective)
    known = (
        f"cloud, speculative:K, split:K (K from 1 to 64), auto, auto:OBJECTIVE ({', '.join(get_args(Objective))}), "
        "cascade:RISK (such as 0.05), edge"
    )
    raise ConfigError(f"--modes has {word!r}; it takes {known}")


def _risk(text: str) -> float | None:
    try:
        return Risk(float(text)).risk
    except (ValueError, ConfigError):
        return None
