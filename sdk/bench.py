"""Modes x links x prompts: every combination generates, side by side, and is held against the cloud's own tokens.

Service, links and device are processes of their own; service and device each keep to one core. The device is this process.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgecloud.arms import Arm
from edgecloud.bundle import Bundle
from edgecloud.cells import Cell, Regret, Sample, regrets, summarize
from edgecloud.client import Client
from edgecloud.errors import EdgecloudError
from edgecloud.links import Link
from edgecloud.machine import machine
from edgecloud.options import check_fits
from edgecloud.processes import listening, pinned, two_cpus
from edgecloud.types import Reply

WARM_UP_PROMPT, WARM_UP_TOKENS = "Hello!", 3
# Pages this long are never full, so never shared: every sample's prompt is new to the service, as it is to the device.
PAGE_TOKENS = 512


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
            for arm in arms:  # those that learn shall know nothing but what they have seen themselves
                learning = arm.mode in {"auto", "cascade"}
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
