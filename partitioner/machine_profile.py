"""What a device or a cloud can do, as a file: measured there or taken from what others published.

The same form for both sides, so that a plan can be made for machines that are not at hand. Shipped ones lie in profiles/, each
figure with its source.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from edgecloud.errors import ConfigError
from edgecloud.partitioner.strict import from_mapping

PROFILES = Path(__file__).with_name("profiles")
WEIGHT_FORMATS = ("int4", "int8", "fp16", "fp32")


def _require_at_least_0(what: object, names: Iterable[str]) -> None:
    for name in names:
        if not getattr(what, name) >= 0:
            raise ValueError(f"{name} is {getattr(what, name)}; it must be at least 0")


@dataclass(frozen=True, slots=True)
class Overheads:
    """Time that does not depend on how much is computed."""

    layer_ms: float = 0.0  # launching a layer's kernels
    pass_ms: float = 0.0  # around the layers

    def __post_init__(self) -> None:
        _require_at_least_0(self, ("layer_ms", "pass_ms"))


@dataclass(frozen=True, slots=True)
class Energy:
    """Above what the machine draws when it does nothing for us.

    What an operation takes is the watts times its time: that is what a meter shows, and what others publish.
    """

    active_watts: float = 0.0  # while it computes
    waiting_watts: float = 0.0  # while an answer of the cloud is waited for: a radio kept awake
    joules_per_mb_sent: float = 0.0
    joules_per_mb_received: float = 0.0

    def __post_init__(self) -> None:
        _require_at_least_0(self, [field.name for field in fields(self)])

    @property
    def known(self) -> bool:
        """Whether any figure is given."""
        return self != Energy()


@dataclass(frozen=True, slots=True)
class Measured:
    """Passes of one model on this machine, timed. Beats what compute and bandwidth would say of it."""

    fingerprint: str  # of the model's folder
    weights: str  # format of them
    context_tokens: int  # that a pass attends to
    rows: tuple[int, ...]  # of the passes, rising
    layer_ms: tuple[tuple[float, ...], ...]  # [rows][layer]; a single one: all layers take so long
    rest_ms: tuple[float, ...]  # [rows]: embedding, head, and what is around the layers

    def __post_init__(self) -> None:
        if self.weights not in WEIGHT_FORMATS:
            raise ValueError(f"weights is {self.weights!r}; it is one of {', '.join(WEIGHT_FORMATS)}")
        if not self.rows or list(self.rows) != sorted(set(self.rows)) or self.rows[0] < 1:
            raise ValueError(f"rows is {list(self.rows)}; it takes rising numbers from 1")
        if not len(self.rows) == len(self.layer_ms) == len(self.rest_ms):
            raise ValueError(
                f"rows, layer_ms and rest_ms have lengths {len(self.rows)}, {len(self.layer_ms)} and {len(self.rest_ms)}"
            )
        if len({len(layers) for layers in self.layer_ms}) != 1 or not self.layer_ms[0]:
            raise ValueError("layer_ms must name as many layers for every number of rows, at least one")
        if any(ms < 0 for row in (*self.layer_ms, self.rest_ms) for ms in row):
            raise ValueError("a measured time is negative")

    def fits(self, num_layers: int) -> bool:
        """Whether it can be of a model of so many layers."""
        return len(self.layer_ms[0]) in (1, num_layers)

    def layer(self, number: int) -> list[float]:
        """-> [rows] milliseconds"""
        return [layers[number if len(layers) > 1 else 0] for layers in self.layer_ms]


@dataclass(frozen=True, slots=True)
class MachineProfile:
    """One machine."""

    name: str
    compute: dict[str, float]  # GFLOP/s by format of the weights: what it cannot run is not named
    memory_bandwidth: float  # GB/s
    ram: float  # GB that a model may use
    source: str = ""
    overheads: Overheads = Overheads()
    energy: Energy = Energy()
    price_per_hour: float | None = None  # US dollars
    measured: tuple[Measured, ...] = ()

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.compute) - set(WEIGHT_FORMATS)):
            raise ValueError(f"compute names {unknown[0]!r}; it takes {', '.join(WEIGHT_FORMATS)}")
        if not self.compute or min(self.compute.values()) <= 0:
            raise ValueError(f"compute is {self.compute}; it takes GFLOP/s above 0 for at least one format")
        for name in ("memory_bandwidth", "ram"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0")
        if self.price_per_hour is not None and self.price_per_hour < 0:
            raise ValueError(f"price_per_hour is {self.price_per_hour}; it must be at least 0")

    @property
    def serves(self) -> str:
        """The format in which a cloud keeps the target: fp16 where it has arithmetic for it, else fp32."""
        return "fp16" if "fp16" in self.compute else "fp32"

    def find(self, fingerprint: str | None, weights: str) -> Measured | None:
        """What was measured of that model here."""
        return next((m for m in self.measured if (m.fingerprint, m.weights) == (fingerprint, weights)), None)

    def to_json(self) -> str:
        """The text of a file that `load_profile` takes."""
        return json.dumps(asdict(self), indent=1) + "\n"


def known_profiles() -> list[str]:
    """Names that `load_profile` takes."""
    return sorted(path.stem for path in PROFILES.glob("*.yaml"))


def load_profile(name: str | Path, option: str = "--device") -> MachineProfile:
    """A shipped profile by name, or a .yaml or .json file; `option` is what a message calls it.

    Raises:
        ConfigError: no such profile, unreadable, an unknown key, or a figure that cannot be.
    """
    path = Path(name)
    if not path.suffix and not path.exists():
        path = PROFILES / f"{name}.yaml"
        if not path.is_file():
            known = ", ".join(known_profiles())
            raise ConfigError(f"{option} {name} is neither a file nor a profile; profiles: {known}")
    try:
        text = path.read_text("utf-8")
        content: Any = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except OSError as error:
        raise ConfigError(f"{option} {name} cannot be read: {error.strerror}") from error
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{option} {name} is no {path.suffix.lstrip('.') or 'YAML'}: {' '.join(str(error).split())}") from error
    try:
        return from_mapping(MachineProfile, content)
    except ValueError as error:
        raise ConfigError(f"{option} {name}: {error}") from error
