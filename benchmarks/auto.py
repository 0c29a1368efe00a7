"""Mode `auto` against every fixed mode, over links and loads: what the controller, overlap and guesses bring, and where they lose.

Service and device on a core each, the link beside the service; arms of a prompt one after another, their order rotated.
    python benchmarks/auto.py [--prompts 4] [--max-new-tokens 48] [--links 2ms,lte]
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from typing import Any

import harness

from edgecloud.client import Client
from edgecloud.edge.collaborate import collaborate
from edgecloud.edge.estimates import Estimates
from edgecloud.edge.patience import EstimatedPatience
from edgecloud.edge.pilot import Pilot
from edgecloud.edge.plan import Fixed, Plan
from edgecloud.edge.replicas import RemoteSession
from edgecloud.edge.retry import Retry, Timeout
from edgecloud.links import parse_link
from edgecloud.processes import listening
from edgecloud.prompts import PROMPTS
from edgecloud.sampling import SamplingSettings
from edgecloud.types import Reply, Round, TokenEvent

LINKS = ("2ms", "20ms", "60ms", "120ms", "250ms", "lte", "5g")
FIXED = ("cloud", "speculative:1", "speculative:2", "speculative:4", "speculative:8")
NUM_STREAMS = 8  # of a loaded cloud
OUTAGE_S = 8.0  # until a link falls silent
SYNCHRONOUS, OVERLAPPED = Plan("speculative", 2, max_in_flight=1), Plan("speculative", 4, num_first_tokens=1)


class Device:
    """Clients of one draft model: each arm learns from its own traffic alone."""

    def __init__(self, bundle: Any, max_new_tokens: int) -> None:
        self._bundle = bundle
        self._max_new_tokens = max_new_tokens
        self._clients: dict[tuple[str, str], Client] = {}

    def client(self, address: str, arm: str) -> Client:
        key = (address, arm)
        if key not in self._clients:
            client = Client(self._bundle, address, num_threads=1)
            if self._clients:
                client._on_device = next(iter(self._clients.values()))._on_device
            client.describe()
            self._clients[key] = client
        return self._clients[key]

    def ask(self, address: str, arm: str, prompt: str) -> Reply:
        mode, _, word = arm.partition(":")
        options: dict[str, Any] = {"mode": mode, "max_new_tokens": self._max_new_tokens}
        if mode == "speculative":
            options["num_draft_tokens"] = int(word)
        elif word:
            options["objective"] = word
        return self.client(address, arm).generate(prompt, **options)


@contextmanager
def link(name: str, cloud: str, cpu: int) -> Iterator[str]:
    with listening(parse_link(name).arguments(cloud), cpu) as said:
        yield said["listen"]


@contextmanager
def streams(bundle: Any, cloud: str, number: int) -> Iterator[None]:
    """Other users: so many streams without end."""
    stopping = threading.Event()

    def read(seed: int) -> None:
        with Client(bundle, cloud) as client:
            while not stopping.is_set():
                options: dict[str, Any] = {"mode": "cloud", "max_new_tokens": 400, "temperature": 1.0, "seed": seed}
                with client.stream(PROMPTS[seed % len(PROMPTS)], **options) as stream:
                    for _ in stream:
                        if stopping.is_set():
                            return

    readers = [threading.Thread(target=read, args=(i,)) for i in range(number)]
    for reader in readers:
        reader.start()
    time.sleep(3.0)
    try:
        yield
    finally:
        stopping.set()
        for reader in readers:
            reader.join()


def compare(device: Device, address: str, arms: Sequence[str], prompts: Sequence[str]) -> dict[str, list[Reply]]:
    """Every arm on every prompt, in turn."""
    replies: dict[str, list[Reply]] = {arm: [] for arm in arms}
    for number, prompt in enumerate(prompts):
        for arm in [*arms[number % len(arms) :], *arms[: number % len(arms)]]:
            replies[arm].append(device.ask(address, arm, prompt))
    return replies


def row(replies: Sequence[Reply]) -> dict[str, Any]:
    metrics = [reply.metrics for reply in replies]
    num_tokens = sum(len(reply.token_ids) for reply in replies)
    return {
        "total_ms": [round(m.total_ms, 1) for m in metrics],
        "tpot_ms": [round(m.tpot_ms, 2) for m in metrics],
        "first_visible_ms": [round(m.first_visible_ms, 1) for m in metrics],
        "target_passes_per_token": round(sum(m.target_passes for m in metrics) / num_tokens, 3),
        "mean_acceptance_length": round(statistics.mean(m.mean_acceptance_length for m in metrics), 3),
        "num_retracted_tokens": sum(m.num_retracted_tokens for m in metrics),
        "modes": sorted({f"{span.mode}:{span.num_draft_tokens}" for reply in replies for span in reply.mode_timeline}),
    }


def ratio(of: Sequence[Reply], to: Sequence[Reply], figure: str = "total_ms") -> float:
    """Median over the prompts."""
    pairs = zip(of, to, strict=True)
    return statistics.median(getattr(a.metrics, figure) / getattr(b.metrics, figure) for a, b in pairs)


def planned(client: Client, plan: Plan, prompt: str, max_new_tokens: int) -> float:
    """Milliseconds a token of a plan that no option asks for."""
    tokens, stops = client.tokenizer.encode_chat([{"role": "user", "content": prompt}]), client.bundle.tokenizer.eos_token_ids
    estimates = Estimates.unknown()
    patience, retry = EstimatedPatience(estimates, time.monotonic()), Retry(Timeout(), None, "")
    limits: Any = {"max_new_tokens": max_new_tokens, "stop_token_ids": stops, "on_loss": "wait", "met": 32}
    pilot = Pilot(tokens, Fixed(plan), retry, patience, estimates.acceptance, **limits)
    session = RemoteSession(client._connection())
    steps = collaborate(pilot, client._on_device.drafter, session, SamplingSettings(), stops, estimates, lambda: 32)
    times = [time.perf_counter() for step in steps if isinstance(step, Round) for _ in step.token_ids]
    session.release()
    return (times[-1] - times[0]) * 1e3 / (len(times) - 1)


def first_visible(device: Device, address: str, prompts: Sequence[str]) -> list[float]:
    """Time to the first visible token, `auto` over `edge`, by prompt; the device has read something else before each."""
    ratios = []
    for number, prompt in enumerate(prompts):
        visible_ms = {}
        for mode in ("edge", "auto") if number % 2 else ("auto", "edge"):
            device.ask(address, "edge", "Something else, so that nothing is read yet.")
            visible_ms[mode] = device.ask(address, mode, prompt).metrics.first_visible_ms
        ratios.append(round(visible_ms["auto"] / visible_ms["edge"], 3))
    return ratios


def silence(device: Device, cloud: str, cpu: int) -> tuple[float, float]:
    """The longest time between visible tokens after the link fell silent in mid-answer, and a step of the device; ms."""
    outage = ["--rtt", "20ms", "--outage", f"60s@{OUTAGE_S:g}s"]
    with listening(["link", "--listen", "0", "--to", cloud, *outage], cpu) as said:
        silent_s = time.perf_counter() + OUTAGE_S
        client = device.client(said["listen"], "auto")
        client.generate(PROMPTS[0], max_new_tokens=24)
        time.sleep(max(0.0, silent_s - 2.0 - time.perf_counter()))
        shown: list[float] = []
        with client.stream(PROMPTS[1], max_new_tokens=160) as stream:
            for event in stream:
                if isinstance(event, TokenEvent) and event.text:
                    shown.append(time.perf_counter())
                if shown and shown[-1] > silent_s + 1.5:
                    break
        gaps = [(b - a) * 1e3 for a, b in pairwise(shown) if b > silent_s]
        return max(gaps), client.estimates.device.step_ms or 0.0


def over_links(
    device: Device, ways: dict[str, str], prompts: Sequence[str], figures: list[tuple[str, float, str, float]], raw: dict[str, Any]
) -> bool:
    """`auto` and the fixed arms on every link.  -> whether all texts were the same"""
    regrets, identical = [], True
    for name, address in ways.items():
        replies = compare(device, address, [*FIXED, "auto"], prompts)
        identical &= all(len({tuple(r.token_ids) for r in same}) == 1 for same in zip(*replies.values(), strict=True))
        raw[name] = {arm: row(of) for arm, of in replies.items()}
        totals = {arm: statistics.median(reply.metrics.total_ms for reply in replies[arm]) for arm in FIXED}
        best = min(totals, key=totals.__getitem__)
        regrets.append(ratio(replies["auto"], replies[best]))
        raw[name]["best"], raw[name]["auto_to_best"] = best, round(regrets[-1], 3)
        harness.progress(f"{name}: best {best}, auto / best {regrets[-1]:.3f}")
        if name in {"2ms", "20ms"}:
            required = 0.85 if name == "2ms" else 0.97
            figures.append((f"auto / cloud stream, idle, {name}", ratio(replies["auto"], replies["cloud"]), "<=", required))
    figures += [
        ("auto / best fixed arm, median of links", statistics.median(regrets), "<=", 1.05),
        ("auto / best fixed arm, worst link", max(regrets), "<=", 1.15),
    ]
    return identical


def main() -> None:
    parser = harness.arguments(__doc__, __file__)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--links", default=",".join(LINKS), help="as `edgecloud bench` takes them; default: %(default)s")
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--only-first-visible", action="store_true", help="leave out what takes long")
    options = parser.parse_args()
    bundle, (cloud_cpu, cpu) = harness.find_bundle(options.bundle), harness.cores()
    prompts = PROMPTS[: options.prompts]
    figures: list[tuple[str, float, str, float]] = []
    raw: dict[str, Any] = {}
    with harness.pinned(cpu), ExitStack() as stack:
        cloud = stack.enter_context(harness.serving(bundle, cloud_cpu))
        device = Device(bundle, options.max_new_tokens)
        links = options.links.split(",")
        ways = {name: stack.enter_context(link(name, cloud, cloud_cpu)) for name in {*links, "20ms", "60ms", "120ms"}}
        device.ask(cloud, "auto", "Warm up.")
        raw["first visible, auto / edge"] = visible = {name: first_visible(device, ways[name], prompts) for name in links}
        worst = max(statistics.median(ratios) for ratios in visible.values())
        figures.append(("first visible token, auto / edge, worst link", worst, "<=", 1.15))
        if options.only_first_visible:
            harness.report(options.json_out, figures, {"pinning": {"cloud_cpu": cloud_cpu, "device_cpu": cpu}, **raw})
            return
        identical = over_links(device, {name: ways[name] for name in links}, prompts, figures, raw)
        for name in ("60ms", "120ms"):
            client, pairs = device.client(ways[name], "planned"), []
            for prompt in prompts:
                sync_ms = planned(client, SYNCHRONOUS, prompt, options.max_new_tokens)
                pairs.append((planned(client, OVERLAPPED, prompt, options.max_new_tokens), sync_ms))
            raw[f"overlapped and synchronous, {name}"] = pairs
            figures.append((f"overlapped / synchronous TPOT, {name}", statistics.median(a / b for a, b in pairs), "<=", 0.9))
        replies = compare(device, ways["20ms"], ["cloud", "auto:cost"], prompts)
        raw["cost"] = {arm: row(of) for arm, of in replies.items()}
        figures += [
            ("auto (cost): passes per token", raw["cost"]["auto:cost"]["target_passes_per_token"], "<=", 0.45),
            ("auto (cost) / cloud stream TPOT", ratio(replies["auto:cost"], replies["cloud"], "tpot_ms"), "<=", 1.5),
        ]
        with streams(bundle, cloud, NUM_STREAMS):
            replies = compare(device, ways["20ms"], ["cloud", "auto"], prompts)
        raw["loaded, 20ms"] = {arm: row(of) for arm, of in replies.items()}
        figures.append(("auto / cloud stream, 8 other streams, 20ms", ratio(replies["auto"], replies["cloud"]), "<=", 0.75))
        quiet_ms, step_ms = silence(device, cloud, cloud_cpu)
        raw["silence"] = {"longest_ms": round(quiet_ms, 1), "device_step_ms": round(step_ms, 1)}
        figures.append(("silence after the cloud died, in device steps", quiet_ms / step_ms, "<=", 2.0))
    figures.append(("all texts identical", float(identical), ">=", 1.0))
    harness.report(options.json_out, figures, {"pinning": {"cloud_cpu": cloud_cpu, "device_cpu": cpu}, **raw})


if __name__ == "__main__":
    main()
