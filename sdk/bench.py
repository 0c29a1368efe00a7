"""Modes x links x prompts: every combination generates, side by side, and is held against the cloud's own tokens.

Service, links and device are processes of their own; service and device each keep to one core. The device is this process.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

from edgecloud.bundle import Bundle
from edgecloud.client import Client
from edgecloud.errors import ConfigError, EdgecloudError
from edgecloud.links import Link
from edgecloud.machine import machine
from edgecloud.options import check_fits
from edgecloud.processes import listening, pinned, two_cpus
from edgecloud.types import ModeChoice, Objective, Reply

WARM_UP_PROMPT, WARM_UP_TOKENS = "Hello!", 3
# Pages this long are never full, so never shared: every sample's prompt is new to the service, as it is to the device.
PAGE_TOKENS = 512


@dataclass(frozen=True, slots=True)
class Arm:
    """A way of working to measure."""

    name: str
    mode: ModeChoice
    num_draft_tokens: int | None = None  # of mode speculative
    objective: Objective | None = None  # of mode auto

    @property
    def verified(self) -> bool:
        """Whether its text is the target's."""
        return self.mode != "edge"

    @property
    def fixed(self) -> bool:
        """Whether `auto` could have stayed with it and given the same text."""
        return self.mode in {"cloud", "speculative"}

    def options(self) -> dict[str, Any]:
        """Of `Client.generate`."""
        given = {"mode": self.mode, "num_draft_tokens": self.num_draft_tokens, "objective": self.objective}
        return {name: value for name, value in given.items() if value is not None}


@dataclass(frozen=True, slots=True)
class Sample:
    """One generation."""

    link: str
    arm: str
    prompt: int
    repeat: int
    reply: Reply


@dataclass(frozen=True, slots=True)
class Cell:
    """One arm on one link: medians over the generations for times, totals over tokens for the rest."""

    link: str
    arm: str
    rtt_ms: float | None  # as the device measured it, without the service's own time
    ttft_ms: float  # until the first final token; of mode edge, until the first
    first_visible_ms: float
    tpot_ms: float
    tpot_p25_ms: float
    tpot_p75_ms: float
    total_ms: float  # all prompts once: the sum of each one's median
    acceptance_rate: float | None  # accepted / drafted
    mean_acceptance_length: float | None
    survival: list[float]  # [i]: share of the rounds that accepted at least i + 1 draft tokens; the last round's draft may be short
    target_passes_per_token: float
    uplink_bytes_per_token: float
    downlink_bytes_per_token: float
    retracted_per_token: float  # shown as provisional, and taken back
    num_tokens: int
    num_samples: int
    num_identical: int  # of them, with the token ids of the first link's mode cloud
    verified: bool

    @property
    def identical(self) -> bool:
        """Whether every answer is the cloud's, token for token."""
        return self.num_identical == self.num_samples


@dataclass(frozen=True, slots=True)
class Regret:
    """How much longer `auto` took on a link than the fixed arm that turned out best there."""

    link: str
    arm: str  # of mode auto
    total_ms: float
    best: str
    best_ms: float
    ratio: float  # total_ms / best_ms


@dataclass(frozen=True, slots=True)
class Bench:
    """All of it, and the machine it ran on."""

    command: str
    machine: dict[str, Any]
    bundle: str
    exact: str  # as the service says: bitwise, or tolerance
    prompts: list[str]
    max_new_tokens: int
    repeats: int
    cloud_cpu: int | None  # None: not pinned
    device_cpu: int | None
    links: list[Link]
    arms: list[Arm]
    cells: list[Cell]
    regrets: list[Regret]
    samples: list[Sample]

    @property
    def identical(self) -> bool:
        """Whether every verified answer is the cloud's."""
        return all(cell.identical for cell in self.cells if cell.verified)

    def to_dict(self) -> dict[str, Any]:
        """The object that bench.json holds and `edgecloud bench --json` prints."""
        return {**asdict(self), "identical": self.identical}


def parse_arms(text: str) -> list[Arm]:
    """`cloud`, `speculative:K`, `auto`, `auto:OBJECTIVE`, `edge`, between commas. Raises ConfigError."""
    arms = [_parse_arm(word.strip()) for word in text.split(",")]
    _check_distinct("--modes", [arm.name for arm in arms])
    if not any(arm.mode == "cloud" for arm in arms):
        raise ConfigError(f"--modes {text!r} lacks cloud, against which the others are held; add it")
    return arms


def check_links(links: Sequence[Link]) -> None:
    """Raises ConfigError if two have the same name."""
    _check_distinct("--links", [link.name for link in links])


def run_bench(
    bundle: Path,
    arms: Sequence[Arm],
    links: Sequence[Link],
    prompts: Sequence[str],
    max_new_tokens: int,
    repeats: int,
    *,
    command: str,
    remark: Callable[[str], None],
    progress: Callable[[int, int], None],
) -> Bench:
    """Serve, link, generate, and end everything again. `progress` hears how many of how many generations are done.

    Raises:
        ContextLengthError: a prompt and its answer do not fit the models.
        EdgecloudError: the bundle, the service, a link or a generation failed.
    """
    opened = Bundle.open(bundle)
    cpus = two_cpus()
    cloud_cpu, device_cpu = cpus or (None, None)
    if cpus is None:
        remark("only one core: service and device share it, so times tell little")
    with ExitStack() as stack:
        with Client(bundle) as alone:
            _check_prompts(alone, opened, prompts, max_new_tokens)
        serve = ["serve", str(bundle), "--port", "0", "--threads", "1", "--page-size", str(PAGE_TOKENS)]
        remark(f"$ edgecloud {' '.join(['serve', bundle.name, *serve[2:]])}")
        serving = stack.enter_context(listening(serve, cloud_cpu))
        ways: dict[tuple[str, str], Client] = {}
        for link in links:
            remark(f"$ edgecloud {' '.join(link.arguments(serving['address']))}")
            relay = stack.enter_context(listening(link.arguments(serving["address"])))
            fixed = stack.enter_context(Client(bundle, relay["listen"], num_threads=1))
            for arm in arms:  # mode auto shall know nothing but what it has seen itself
                learning = arm.mode == "auto"
                ways[link.name, arm.name] = (
                    stack.enter_context(Client(bundle, relay["listen"], num_threads=1)) if learning else fixed
                )
        stack.enter_context(pinned(device_cpu))
        samples = compare(ways, arms, links, prompts, max_new_tokens, repeats, progress)
        exact = fixed.describe().exact
    cells = summarize(samples, arms)
    return Bench(
        command=command,
        machine=machine(),
        bundle=opened.target.name,
        exact=exact,
        prompts=list(prompts),
        max_new_tokens=max_new_tokens,
        repeats=repeats,
        cloud_cpu=cloud_cpu,
        device_cpu=device_cpu,
        links=list(links),
        arms=list(arms),
        cells=cells,
        regrets=regrets(cells, arms),
        samples=samples,
    )


def compare(
    ways: Mapping[tuple[str, str], Client],
    arms: Sequence[Arm],
    links: Sequence[Link],
    prompts: Sequence[str],
    max_new_tokens: int,
    repeats: int,
    progress: Callable[[int, int], None],
) -> list[Sample]:
    """Every prompt by every arm over every link, greedily; `ways` are the clients by link and arm.

    The arms of a prompt and link run one after another, each time beginning with another one, so that whatever else the
    machine does meets all of them. Before each, the device reads another prompt, so that none finds its own in the cache.
    """
    for (link, name), client in ways.items():  # load the draft, open the connection
        arm = next(arm for arm in arms if arm.name == name)
        _generate(client, arm, link, WARM_UP_PROMPT, min(WARM_UP_TOKENS, max_new_tokens))
    order = list(itertools.product(range(repeats), range(len(prompts)), range(len(links))))
    samples: list[Sample] = []
    for turn, (repeat, prompt, at) in enumerate(order):
        shift = (turn + turn // len(links)) % len(arms)
        for arm in [*arms[shift:], *arms[:shift]]:
            progress(len(samples), len(order) * len(arms))
            link = links[at].name
            client = ways[link, arm.name]
            if arm.mode != "cloud":
                client.generate(WARM_UP_PROMPT, mode="edge", max_new_tokens=1)
            reply = _generate(client, arm, link, prompts[prompt], max_new_tokens)
            samples.append(Sample(link, arm.name, prompt, repeat, reply))
    progress(len(samples), len(samples))
    return samples


def summarize(samples: Sequence[Sample], arms: Sequence[Arm]) -> list[Cell]:
    """One cell a link and arm. Each prompt's first answer in mode cloud is the measure."""
    by_name = {arm.name: arm for arm in arms}
    measure: dict[int, list[int]] = {}
    for sample in samples:
        if by_name[sample.arm].mode == "cloud":
            measure.setdefault(sample.prompt, sample.reply.token_ids)
    kinds = itertools.product(dict.fromkeys(sample.link for sample in samples), arms)
    return [
        _cell(link, arm, [sample for sample in samples if (sample.link, sample.arm) == (link, arm.name)], measure)
        for link, arm in kinds
    ]


def regrets(cells: Sequence[Cell], arms: Sequence[Arm]) -> list[Regret]:
    """For every link and arm of mode auto: its time against that of the best fixed arm, found afterwards."""
    fixed = [arm.name for arm in arms if arm.fixed]
    learning = [arm.name for arm in arms if arm.mode == "auto"]
    found = []
    for link in dict.fromkeys(cell.link for cell in cells):
        here = {cell.arm: cell.total_ms for cell in cells if cell.link == link}
        best = min(fixed, key=here.__getitem__)
        found += [Regret(link, name, here[name], best, here[best], here[name] / here[best]) for name in learning]
    return found


def survival(histograms: Iterable[Sequence[int]]) -> list[float]:
    """S_1, S_2, ... from acceptance histograms: the share of rounds that accepted at least so many draft tokens."""
    counts = [sum(column) for column in itertools.zip_longest(*histograms, fillvalue=0)]
    num_rounds = sum(counts)
    return [sum(counts[i:]) / num_rounds for i in range(1, len(counts))] if num_rounds else []


def _cell(link: str, arm: Arm, samples: Sequence[Sample], measure: Mapping[int, list[int]]) -> Cell:
    metrics = [sample.reply.metrics for sample in samples]
    num_tokens = sum(sample.reply.usage.completion_tokens for sample in samples)
    num_drafted = sum(m.num_draft_tokens for m in metrics)
    num_accepted = sum(m.num_accepted_tokens for m in metrics)
    num_rounds = sum(m.num_rounds for m in metrics)
    trips_ms = [m.rtt_ms for m in metrics if m.rtt_ms is not None]
    tpots_ms = [m.tpot_ms for m in metrics]
    low, _, high = statistics.quantiles(tpots_ms, n=4, method="inclusive") if len(tpots_ms) > 1 else [tpots_ms[0]] * 3
    totals_ms: dict[int, list[float]] = {}
    for sample in samples:
        totals_ms.setdefault(sample.prompt, []).append(sample.reply.metrics.total_ms)
    return Cell(
        link=link,
        arm=arm.name,
        rtt_ms=statistics.median(trips_ms) if trips_ms else None,
        ttft_ms=statistics.median(m.ttft_ms for m in metrics),
        first_visible_ms=statistics.median(m.first_visible_ms for m in metrics),
        tpot_ms=statistics.median(tpots_ms),
        tpot_p25_ms=low,
        tpot_p75_ms=high,
        total_ms=sum(statistics.median(times) for times in totals_ms.values()),
        acceptance_rate=num_accepted / num_drafted if num_drafted else None,
        mean_acceptance_length=1 + num_accepted / num_rounds if num_rounds else None,
        survival=survival(m.acceptance_histogram for m in metrics),
        target_passes_per_token=sum(m.target_passes for m in metrics) / num_tokens,
        uplink_bytes_per_token=sum(m.uplink_bytes for m in metrics) / num_tokens,
        downlink_bytes_per_token=sum(m.downlink_bytes for m in metrics) / num_tokens,
        retracted_per_token=sum(m.num_retracted_tokens for m in metrics) / num_tokens,
        num_tokens=num_tokens,
        num_samples=len(samples),
        num_identical=sum(sample.reply.token_ids == measure[sample.prompt] for sample in samples),
        verified=arm.verified,
    )


def _generate(client: Client, arm: Arm, link: str, prompt: str, max_new_tokens: int) -> Reply:
    try:
        return client.generate(prompt, max_new_tokens=max_new_tokens, **arm.options())
    except EdgecloudError as error:
        raise EdgecloudError(f"{arm.name} over {link}: {error}") from error


def _check_prompts(client: Client, bundle: Bundle, prompts: Sequence[str], max_new_tokens: int) -> None:
    window = min(bundle.target.max_context_tokens, bundle.draft.max_context_tokens)
    for number, prompt in enumerate(prompts, 1):
        num_tokens = len(client.tokenizer.encode_chat([{"role": "user", "content": prompt}]))
        check_fits(num_tokens, max_new_tokens, window, f"window of the models (prompt {number} of {len(prompts)})")


def _parse_arm(word: str) -> Arm:
    mode, colon, detail = word.partition(":")
    match mode:
        case "cloud" | "edge" if not colon:
            return Arm(word, mode)
        case "speculative" if not colon:
            return Arm(word, mode)
        case "speculative" if detail.isdecimal() and 1 <= int(detail) <= 64:
            return Arm(word, mode, num_draft_tokens=int(detail))
        case "auto" if not colon:
            return Arm(word, mode)
        case "auto":
            for objective in get_args(Objective):
                if detail == objective:
                    return Arm(word, mode, objective=objective)
    known = f"cloud, speculative:K (K from 1 to 64), auto, auto:OBJECTIVE ({', '.join(get_args(Objective))}), edge"
    raise ConfigError(f"--modes has {word!r}; it takes {known}")


def _check_distinct(option: str, names: Sequence[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"{option} names {name!r} twice; name it once")
