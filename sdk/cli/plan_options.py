"""Options of `edgecloud partition` that a plan is made of, and the plan that they ask for."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from edgecloud.errors import ConfigError

if TYPE_CHECKING:
    from edgecloud.partitioner.candidate import Connection, Workload
    from edgecloud.partitioner.inputs import Inputs
    from edgecloud.partitioner.losses import Loss
    from edgecloud.partitioner.plan import Plan
    from edgecloud.partitioner.prediction import Scene
    from edgecloud.partitioner.report import PartitionReport
    from edgecloud.partitioner.search import Constraints, Search

Objective = Literal["latency", "cost", "energy", "privacy"]
USUAL_DEVICE, USUAL_CLOUD, USUAL_LINK = "xeon-core", "cpu", "wifi"
USUAL_MAX_LOSS = 0.03
ASSUMED_ACCEPTANCE = 0.7  # of a token; SmolLM2-135M and its int4 draft have 0.71 to 0.75
NUM_SURVIVAL = 16

DeviceOption = Annotated[
    str | None, typer.Option(help="Plan for this device: a profile's name or file; default: this machine as measured.")
]
CloudDeviceOption = Annotated[str, typer.Option(help="Plan for this cloud: a profile's name or file.")]
LinkOption = Annotated[str, typer.Option(help="Plan for this link: wifi, lte, 5g, or a round trip, or both: 20ms@5mbit.")]
ObjectiveOption = Annotated[
    Objective, typer.Option(help="Least time of an answer, cloud compute, device energy, or time with the prompt kept.")
]
KeepPromptFlag = Annotated[bool, typer.Option("--keep-prompt-on-device", help="Only plans that send no prompt ids.")]
MaxRamOption = Annotated[str | None, typer.Option(help="Most memory of the device's process, such as 400mb.")]
MaxLossOption = Annotated[
    float,
    typer.Option(help="Most share of tokens that may differ from the full target's. What was not measured counts as 1."),
]
TpotOption = Annotated[str | None, typer.Option(help="Most time per token, such as 50ms.")]
AcceptanceOption = Annotated[
    float | None, typer.Option(help="How often a drafted token is right; default: as measured, 0.7 in a dry run.")
]
PromptTokensOption = Annotated[int, typer.Option(help="Of the answers that are planned for: tokens of the prompt.")]
AnswerTokensOption = Annotated[int, typer.Option(help="And of the answer.")]
DamageOption = Annotated[
    Path | None, typer.Option(help="JSON of measured agreement by cut, front and codec; without it a split's loss is unknown.")
]
ReportOption = Annotated[Path | None, typer.Option(help="Folder for plan.json and plan.html with plots; takes edgecloud[bench].")]


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """As given on the command line."""

    device: str | None
    cloud_device: str
    link: str
    objective: Objective
    keep_prompt: bool
    max_ram: str | None
    max_loss: float
    tpot: str | None
    acceptance: float | None
    prompt_tokens: int
    answer_tokens: int
    damage: Path | None

    @property
    def asks(self) -> bool:
        """Whether anything says what the plan is for; else the draft is exported, as ever."""
        limits = self.keep_prompt, self.max_ram, self.tpot, self.damage
        return self.objective != "latency" or any(limits) or self.max_loss != USUAL_MAX_LOSS

    def check(self) -> None:
        """Before anything slow. Raises ConfigError."""
        from edgecloud.partitioner.losses import read_losses
        from edgecloud.partitioner.machine_profile import load_profile

        load_profile(self.device or USUAL_DEVICE)
        load_profile(self.cloud_device, "--cloud-device")
        _connection(self.link)
        _ = self._constraints, self._workload
        if self.acceptance is not None and not 0 < self.acceptance < 1:
            raise ConfigError(f"--acceptance is {self.acceptance}; it takes a share between 0 and 1")
        if self.damage is not None:
            read_losses(self.damage)

    def plan(self, inputs: Inputs, report: PartitionReport | None, tried: Sequence[Loss] = ()) -> Plan:
        """For these models: with what a partition measured, or on assumptions; `tried` are losses of fronts that were exported.

        Raises:
            NoPlanError: nothing keeps to the constraints.
            ConfigError, ModelError: a value or a model that a plan cannot be made of.
        """
        from edgecloud.partitioner.plan import make_plan

        scene = self.scene(inputs, report, tried)
        return make_plan(scene, _connection(self.link), self.objective, self._constraints, [])

    def search_any_loss(self, scene: Scene) -> Search:
        """Every plan, as if any loss were allowed. Raises NoPlanError, ConfigError."""
        from edgecloud.partitioner.search import search

        return search(scene, _connection(self.link), self.objective, replace(self._constraints, max_loss=1.0))

    def scene(self, inputs: Inputs, report: PartitionReport | None, tried: Sequence[Loss] = ()) -> Scene:
        """Machines, models and work. Raises ConfigError, ModelError."""
        from edgecloud.cost import survival
        from edgecloud.partitioner.candidate import Draft
        from edgecloud.partitioner.fitted import measured_by_export
        from edgecloud.partitioner.front_times import FrontTimes
        from edgecloud.partitioner.layer_times import ModelShape
        from edgecloud.partitioner.losses import Losses, losses_of_front, read_losses
        from edgecloud.partitioner.machine_profile import load_profile
        from edgecloud.partitioner.prediction import Scene

        device = load_profile(self.device or USUAL_DEVICE)
        cloud = load_profile(self.cloud_device, "--cloud-device")
        known = {measured.fingerprint for profile in (device, cloud) for measured in profile.measured}
        own = report.target_fingerprint if report else inputs.target.fingerprint() if known else None
        drafts_own = report.draft_fingerprint if report else own if inputs.draft.path == inputs.target.path else None
        num_kept_ids = None if inputs.vocab is None else len(inputs.vocab)
        target, drafter = ModelShape.of(inputs.target, own), ModelShape.of(inputs.draft, drafts_own, num_kept_ids)
        if report is not None and self.device is None:
            device = measured_by_export(device, report.draft_fingerprint, drafter, report.precision, report.device)
        measured = report is not None and self.acceptance is None
        assumed = survival(self.acceptance or ASSUMED_ACCEPTANCE, NUM_SURVIVAL)
        chances = report.agreement.survival if report is not None and measured else assumed
        draft = Draft(f"{inputs.draft.name} {inputs.precision}", drafter, inputs.precision, tuple(chances), measured)
        surveyed = Losses() if self.damage is None else read_losses(self.damage)
        front = None if report is None else report.front
        own_losses = [] if front is None else losses_of_front(front.cut, front.precision, front.codecs)
        losses = Losses(surveyed.measured, tuple(dict.fromkeys((*own_losses, *tried))))
        fronts = []
        if front is not None and self.device is None:
            fronts.append(FrontTimes.of(front.cut, front.precision, front.device))
        if draft.weights not in device.compute:
            known_formats = ", ".join(device.compute)
            raise ConfigError(f"{device.name} has no figure for {draft.weights}, but for {known_formats}; take another --precision")
        return Scene(target, [draft], device, cloud, self._workload, losses, fronts)

    @property
    def _constraints(self) -> Constraints:
        from edgecloud.edge.link_config import parse_duration_ms
        from edgecloud.partitioner.search import Constraints

        ram = None if self.max_ram is None else parse_bytes("--max-ram", self.max_ram)
        tpot_ms = None if self.tpot is None else parse_duration_ms(self.tpot)
        try:
            return Constraints(ram, self.max_loss, tpot_ms, self.keep_prompt)
        except ValueError as error:
            raise ConfigError(str(error)) from error

    @property
    def _workload(self) -> Workload:
        from edgecloud.partitioner.candidate import Workload

        try:
            return Workload(self.prompt_tokens, self.answer_tokens)
        except ValueError as error:
            raise ConfigError(str(error)) from error


def parse_bytes(option: str, text: str) -> float:
    """`400mb`, `2gb`, `1.5e9` -> bytes. Raises ConfigError."""
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?(?:e[0-9]+)?)\s*([kmg]?)b?\s*", text.lower())
    if found is None:
        raise ConfigError(f"{option} is {text!r}; it takes bytes, such as 400mb or 2gb")
    return float(found[1]) * {"": 1, "k": 1e3, "m": 1e6, "g": 1e9}[found[2]]


def _connection(text: str) -> Connection:
    """`wifi`, `20ms`, `20ms@5mbit`. Raises ConfigError."""
    from edgecloud.edge.link_config import parse_rate_mbps
    from edgecloud.links import parse_link
    from edgecloud.partitioner.candidate import Connection

    word, at, rate = text.partition("@")
    try:
        link = parse_link(word)
    except ConfigError as error:
        raise ConfigError(str(error).replace("--links has", "--link is")) from error
    if link.trace is not None:
        raise ConfigError(f"--link is {text!r}; a plan takes one rate, such as 20ms@5mbit, not a trace")
    up_mbps = parse_rate_mbps(rate) if at else link.up_mbps
    return Connection(text, link.rtt_ms + link.jitter_ms, up_mbps)
