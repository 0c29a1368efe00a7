"""The whole path on one machine, by the commands a user would type: what each mode costs on each link.

Service, links and device are processes of their own; service and device each keep to one core. The device is this process.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgecloud.bundle import Bundle
from edgecloud.client import Client
from edgecloud.errors import BundleError, ConfigError
from edgecloud.links import LTE, SAME_BUILDING, WIFI, Link
from edgecloud.machine import machine
from edgecloud.processes import listening, pinned, run_command, two_cpus
from edgecloud.prompts import PROMPTS
from edgecloud.tokens import common_prefix
from edgecloud.types import Mode, Reply

MODEL = "smollm2-135m"
WARM_UP_PROMPT, WARM_UP_TOKENS = "Hello!", 3
EVEN = 1.05  # factors below this are noise
REMOTE_MODES: tuple[Mode, ...] = ("cloud", "speculative")

LINKS = (SAME_BUILDING, WIFI, LTE)


@dataclass(frozen=True, slots=True)
class Sample:
    """One generation. `link` is None for mode `edge`, which uses none."""

    link: str | None
    mode: Mode
    prompt: int
    reply: Reply


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table: medians over the prompts for times, totals over tokens for the rest."""

    link: str | None
    mode: Mode
    ttft_ms: float
    tpot_ms: float
    rtt_ms: float | None  # as the device measured it, without the service's own time
    acceptance_rate: float | None  # accepted / drafted
    mean_acceptance_length: float | None
    target_passes_per_token: float
    uplink_bytes_per_token: float
    downlink_bytes_per_token: float
    num_tokens: int
    num_identical: int  # prompts whose token ids are those of the first link's cloud mode
    num_prompts: int
    agreement: float  # share of tokens before the first that differs from the cloud's

    @property
    def verified(self) -> bool:
        """Whether the target decided every token."""
        return self.mode != "edge"

    @property
    def identical(self) -> bool:
        """Whether every answer is the cloud's, token for token."""
        return self.num_identical == self.num_prompts


@dataclass(frozen=True, slots=True)
class DemoReport:
    """All of it, and the machine it ran on."""

    machine: dict[str, Any]
    bundle: str
    num_prompts: int
    max_new_tokens: int
    cloud_cpu: int | None  # None: not pinned
    device_cpu: int | None
    links: list[Link]
    rows: list[Row]

    @property
    def identical(self) -> bool:
        """Whether every verified answer is the cloud's."""
        return all(row.identical for row in self.rows if row.verified)

    def to_dict(self) -> dict[str, Any]:
        """The object that `edgecloud demo --json` prints."""
        return {**asdict(self), "identical": self.identical, "verdict": verdict(self.rows)}


def run_demo(
    bundle: Path,
    num_prompts: int,
    max_new_tokens: int,
    *,
    remark: Callable[[str], None],
    progress: Callable[[int, int], None],
) -> DemoReport:
    """Serve, link, generate, and end everything again. `progress` hears how many of how many generations are done.

    Raises:
        ConfigError: there are not so many prompts.
        EdgecloudError: the bundle, the service or a link failed.
    """
    if not 1 <= num_prompts <= len(PROMPTS):
        raise ConfigError(f"--prompts is {num_prompts}; it takes 1 to {len(PROMPTS)}")
    name = Bundle.open(bundle).target.name
    cpus = two_cpus()
    cloud_cpu, device_cpu = cpus or (None, None)
    if cpus is None:
        remark("only one core: service and device share it, so times tell little")
    with ExitStack() as stack:
        remark(f"$ edgecloud serve {bundle.name} --threads 1" + ("" if cpus is None else f"  (on core {cloud_cpu})"))
        serving = stack.enter_context(listening(["serve", str(bundle), "--port", "0", "--threads", "1"], cloud_cpu))
        clients: dict[str, Client] = {}
        for link in LINKS:
            arguments = link.arguments(serving["address"])
            remark(f"$ edgecloud {' '.join(arguments)}  ({link.name})")
            relay = stack.enter_context(listening(arguments))
            clients[link.name] = stack.enter_context(Client(bundle, relay["listen"], num_threads=1))
        stack.enter_context(pinned(device_cpu))
        device = stack.enter_context(Client(bundle, num_threads=1))
        samples = compare(device, clients, PROMPTS[:num_prompts], max_new_tokens, progress)
    return DemoReport(machine(), name, num_prompts, max_new_tokens, cloud_cpu, device_cpu, list(LINKS), summarize(samples))


def compare(
    device: Client,
    clients: Mapping[str, Client],
    prompts: Sequence[str],
    max_new_tokens: int,
    progress: Callable[[int, int], None],
) -> list[Sample]:
    """Every prompt in mode `edge` on `device` and in the other modes over every client's link, greedily.

    Prompt by prompt, and each begins with another combination, so that none profits from its place. Every device meets
    every prompt once, so that none finds it in its cache.
    """
    combinations: list[tuple[Client, str | None, Mode]] = [(device, None, "edge")]
    combinations += [(client, link, mode) for link, client in clients.items() for mode in REMOTE_MODES]
    for client, _, mode in combinations:  # load the draft, open the connections
        client.generate(WARM_UP_PROMPT, mode=mode, max_new_tokens=min(WARM_UP_TOKENS, max_new_tokens))
    total = len(combinations) * len(prompts)
    samples: list[Sample] = []
    for number, prompt in enumerate(prompts):
        shift = number % len(combinations)
        for client, link, mode in combinations[shift:] + combinations[:shift]:
            progress(len(samples), total)
            reply = client.generate(prompt, mode=mode, max_new_tokens=max_new_tokens)
            samples.append(Sample(link, mode, number, reply))
    progress(total, total)
    return samples


def summarize(samples: Sequence[Sample]) -> list[Row]:
    """One row a link and mode, mode `edge` first. The answers of the first link in mode `cloud` are the measure."""
    links = list(dict.fromkeys(s.link for s in samples if s.link is not None))
    reference = {s.prompt: s.reply.token_ids for s in samples if s.mode == "cloud" and s.link == links[0]}
    kinds: list[tuple[str | None, Mode]] = [(None, "edge")]
    kinds += [(link, mode) for link in links for mode in REMOTE_MODES]
    return [_row(link, mode, [s for s in samples if (s.link, s.mode) == (link, mode)], reference) for link, mode in kinds]


def _row(link: str | None, mode: Mode, samples: Sequence[Sample], reference: Mapping[int, list[int]]) -> Row:
    metrics = [s.reply.metrics for s in samples]
    num_tokens = sum(s.reply.usage.completion_tokens for s in samples)
    num_drafted = sum(m.num_draft_tokens for m in metrics)
    num_accepted = sum(m.num_accepted_tokens for m in metrics)
    num_rounds = sum(m.num_rounds for m in metrics)
    trips_ms = [m.rtt_ms for m in metrics if m.rtt_ms is not None]
    num_agreed = sum(common_prefix(s.reply.token_ids, reference[s.prompt]) for s in samples)
    return Row(
        link=link,
        mode=mode,
        ttft_ms=statistics.median(m.ttft_ms for m in metrics),
        tpot_ms=statistics.median(m.tpot_ms for m in metrics),
        rtt_ms=statistics.median(trips_ms) if trips_ms else None,
        acceptance_rate=num_accepted / num_drafted if num_drafted else None,
        mean_acceptance_length=1 + num_accepted / num_rounds if num_rounds else None,
        target_passes_per_token=sum(m.target_passes for m in metrics) / num_tokens,
        uplink_bytes_per_token=sum(m.uplink_bytes for m in metrics) / num_tokens,
        downlink_bytes_per_token=sum(m.downlink_bytes for m in metrics) / num_tokens,
        num_tokens=num_tokens,
        num_identical=sum(s.reply.token_ids == reference[s.prompt] for s in samples),
        num_prompts=len(samples),
        agreement=num_agreed / num_tokens,
    )


def verdict(rows: Sequence[Row]) -> str:
    """Which of the modes that give the cloud's text had the lower TPOT on which link, and by how much."""
    tpot_ms = {(row.link, row.mode): row.tpot_ms for row in rows}
    words = []
    for link in dict.fromkeys(row.link for row in rows if row.link is not None):
        modes = sorted(REMOTE_MODES, key=lambda mode: tpot_ms[link, mode])
        factor = tpot_ms[link, modes[1]] / tpot_ms[link, modes[0]]
        words.append(f"{link}: " + ("about even" if factor < EVEN else f"{modes[0]}, by {factor:.2f}x"))
    edge_ms = tpot_ms[None, "edge"]
    return f"Lower TPOT: {'; '.join(words)}. Mode edge took {edge_ms:.0f} ms a token, for text that nobody verified."


def prepare_bundle(remark: Callable[[str], None], draft: Path | None = None) -> Path:
    """The demo pair in the cache: fetched and partitioned where it is missing, damaged, or made of other models.

    Args:
        remark: told of every step.
        draft: folder of the draft; None: the target itself, in int4.

    Raises:
        EdgecloudError: a step failed.
    """
    from edgecloud.partitioner import extra_installed

    with extra_installed():
        from edgecloud.partitioner.fetch import cache_folder
        from edgecloud.partitioner.model_folder import ModelFolder
        from edgecloud.partitioner.packed_draft import open_draft

    remark(f"$ edgecloud fetch {MODEL}")
    model = Path(run_command(["fetch", MODEL])["path"])
    target = ModelFolder.open(model)
    drafter = target if draft is None else open_draft(str(draft), target)
    path = cache_folder() / "bundles" / (MODEL if draft is None else f"{MODEL}+{drafter.name}")
    try:
        bundle = Bundle.open(path)
        bundle.verify_files("edge")
        bundle.verify_files("cloud")
        if (bundle.target.fingerprint, bundle.draft.fingerprint) == (target.fingerprint(), drafter.fingerprint()):
            remark("the bundle in the cache is whole")
            return path
    except BundleError:
        pass
    options = [] if draft is None else ["--draft", str(draft)]
    remark(" ".join(["$ edgecloud partition", MODEL, "-o", str(path), *options]))
    run_command(["partition", str(model), "-o", str(path), "--overwrite", *options])
    return path
