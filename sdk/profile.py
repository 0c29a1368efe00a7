"""What this device, this link and that cloud can do: measured by asking them, and what follows for every mode.

The predictions are those of the controller (edge/controller.py) and of sdk/cost.py, on medians of what was measured. One thing was
measured at a time: where device and cloud share a machine, or its memory, working at once makes both slower than predicted.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args

from edgecloud.client import Client
from edgecloud.cost import MAX_IN_FLIGHT, break_even_rtt_ms, ttft_ms
from edgecloud.edge.controller import DRAFT_LENGTHS, Controller
from edgecloud.edge.estimates import Estimates
from edgecloud.edge.remote import TLS, Cloud
from edgecloud.edge.retry import Timeout
from edgecloud.edge.survey import CloudSurvey, DeviceSurvey, LinkSurvey, survey_cloud, survey_device, survey_link
from edgecloud.machine import machine
from edgecloud.prompts import PROMPTS
from edgecloud.rpc.codec import pair_hash
from edgecloud.types import CallCost, Mode, Objective

ROWS = (1, 2, 3, 5, 9)  # of the passes that are timed
SHOWN_DRAFT_LENGTHS = (1, 2, 4, 8)
NUM_PREFILLS = 4  # prompts that the cloud reads
NUM_ANSWERS, ANSWER_TOKENS, ANSWER_DRAFT_TOKENS = 4, 32, 4  # generations from which the acceptance is estimated
BYTES_PER_ID = 3  # of a prompt on the wire, at most for vocabularies below 2 million


@dataclass(frozen=True, slots=True)
class Connection:
    """How to reach a service."""

    address: str
    tls: TLS | None = None
    token: str | None = None
    insecure: bool = False


@dataclass(frozen=True, slots=True)
class Acceptance:
    """How often the target agrees with the draft model, greedily, on built-in prompts."""

    rate: float  # per token
    survival: list[float]  # [i]: probability that the first i + 1 draft tokens are all accepted
    num_tokens: int  # of the generations


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a way of working should take."""

    mode: Mode
    num_draft_tokens: int  # 0: none are sent
    tpot_ms: float
    ttft_ms: float  # until the first token; of mode edge, a provisional one
    passes_per_token: float  # of the target, the prompt's not counted


@dataclass(frozen=True, slots=True)
class Choice:
    """What mode `auto` picks once it knows all this."""

    objective: Objective
    mode: Mode
    num_draft_tokens: int
    tpot_ms: float
    passes_per_token: float


@dataclass(frozen=True, slots=True)
class Profile:
    """All of it. Without a cloud, `link` and what follows from it are None."""

    bundle: str
    machine: dict[str, Any]
    num_threads: int
    device: DeviceSurvey
    address: str | None
    link: LinkSurvey | None
    cloud: CloudSurvey | None
    acceptance: Acceptance | None
    prompt_tokens: int  # for which times to the first token are predicted
    predictions: list[Prediction]
    first_visible_ms: float  # in mode auto, which shows the first guess of the device at once
    break_even_rtt_ms: float | None  # below it, speculation is faster than the stream; None: nowhere, or no cloud
    auto: list[Choice]

    def to_dict(self) -> dict[str, Any]:
        """The object that `edgecloud profile --json` prints."""
        return asdict(self)


def run_profile(bundle: Path, connection: Connection | None, num_threads: int, *, remark: Callable[[str], None]) -> Profile:
    """Measure for about half a minute, and predict.

    Raises:
        BundleError: the bundle cannot be used.
        ModelMismatchError: the service runs another target.
        CloudError: it does not answer.
        ConfigError: the address or the number of threads cannot be.
    """
    at = connection or Connection("")
    with Client(
        bundle, at.address or None, tls=at.tls, token=at.token, insecure=at.insecure, num_threads=num_threads
    ) as client:  # fmt: skip
        service = None if connection is None else client.describe(wait=False)  # before anything slow
        prompts = [_encoded(client, prompt) for prompt in PROMPTS]
        prompt_tokens = sorted(map(len, prompts))[len(prompts) // 2]
        remark(f"device: {client.num_threads} thread(s)")
        device = _survey_device(client, max(prompts, key=len))
        link = cloud = acceptance = None
        if connection is not None and service is not None:
            remark(f"link and cloud: {connection.address}")
            rows = [count for count in ROWS if count <= service.max_draft_tokens + 1]
            link, cloud = _survey_service(client, connection, prompts, rows, service.max_context_tokens)
            remark("acceptance: a few short generations")
            acceptance = _acceptance(client, service.max_draft_tokens)
        estimates = _estimates(client.estimates, device, link, cloud)
        uplink_ms = 0.0 if link is None else BYTES_PER_ID * prompt_tokens * link.uplink_ms_per_byte
        device_first_ms = ttft_ms(prompt_tokens * device.prefill_ms_per_token.median + device.step_ms.median)
        predictions = [Prediction("edge", 0, device.step_ms.median, device_first_ms, 0.0)]
        choices: list[Choice] = []
        even_ms = None
        if link is not None and cloud is not None and service is not None:
            cloud_first_ms = ttft_ms(cloud.prefill_ms.median, link.verify_rtt_ms, uplink_ms)
            predictions += _predict(estimates, cloud_first_ms, prompt_tokens, service.max_draft_tokens)
            choices = _choices(estimates, prompt_tokens, service.max_draft_tokens)
            even_ms = _break_even_rtt_ms(estimates, prompt_tokens, service.max_draft_tokens)
        return Profile(
            bundle=client.bundle.target.name,
            machine=machine(),
            num_threads=client.num_threads,
            device=device,
            address=None if connection is None else connection.address,
            link=link,
            cloud=cloud,
            acceptance=acceptance,
            prompt_tokens=prompt_tokens,
            predictions=predictions,
            first_visible_ms=min(prediction.ttft_ms for prediction in predictions),
            break_even_rtt_ms=even_ms,
            auto=choices,
        )


def _encoded(client: Client, prompt: str) -> list[int]:
    return client.tokenizer.encode_chat([{"role": "user", "content": prompt}])


def _survey_device(client: Client, tokens: list[int]) -> DeviceSurvey:
    from edgecloud.edge.model import DraftModel

    bundle = client.bundle
    model = DraftModel.of_bundle(bundle, bundle.draft.max_context_tokens, client.num_threads)
    return survey_device(model, min(bundle.draft.vocab_size, bundle.target.vocab_size), tokens)


def _survey_service(
    client: Client, at: Connection, prompts: list[list[int]], rows: list[int], window: int
) -> tuple[LinkSurvey, CloudSurvey]:
    meant = pair_hash(client.bundle.target.fingerprint, client.bundle.tokenizer.fingerprint)
    # A number in front, so that the service meets these prompts for the first time.
    unseen = [_encoded(client, f"{secrets.randbelow(10**6)}. {prompt}") for prompt in PROMPTS[:NUM_PREFILLS]]
    cloud = Cloud(at.address, at.tls, Timeout(), meant, token=at.token, insecure=at.insecure)
    try:
        of_cloud, costs = survey_cloud(cloud, unseen, prompts[-1], rows)
        return survey_link(cloud, prompts[0], window, costs), of_cloud
    finally:
        cloud.close()


def _acceptance(client: Client, max_draft_tokens: int) -> Acceptance:
    """From what a client learns in short generations, so that it counts as the controller does."""
    length = min(ANSWER_DRAFT_TOKENS, max_draft_tokens)
    replies = [
        client.generate(prompt, mode="speculative", num_draft_tokens=length, max_new_tokens=ANSWER_TOKENS)
        for prompt in PROMPTS[:NUM_ANSWERS]
    ]
    learned = client.estimates.acceptance
    num_tokens = sum(reply.usage.completion_tokens for reply in replies)
    return Acceptance(learned.rate, learned.survival(SHOWN_DRAFT_LENGTHS[-1]), num_tokens)


def _estimates(learned: Estimates, device: DeviceSurvey, link: LinkSurvey | None, cloud: CloudSurvey | None) -> Estimates:
    """As if the medians had been seen once each, and the acceptance as learned."""
    estimates = Estimates.unknown()
    estimates.acceptance = learned.acceptance
    estimates.device.drafted(device.step_ms.median)
    if link is not None:
        estimates.link.add(link.verify_rtt_ms, 0, 0.0, was_idle=False)
    if cloud is not None:
        if cloud.load is not None:
            estimates.cloud.tell(cloud.load)
        for seen in cloud.passes:
            cost = CallCost(queue_ms=seen.queue_ms, compute_ms=seen.compute_ms)
            estimates.cloud.verified(seen.num_rows, cost, conditional=False)
        estimates.cloud.streamed(CallCost(compute_ms=cloud.passes[0].compute_ms, elapsed_ms=cloud.stream_ms.median))
    return estimates


def _predict(estimates: Estimates, first_ms: float, context_tokens: int, max_draft_tokens: int) -> list[Prediction]:
    arms = Controller(estimates, "latency", max_draft_tokens).arms(0.0, context_tokens)
    return [
        Prediction(arm.plan.mode, arm.plan.num_draft_tokens, arm.price.ms_per_token, first_ms, arm.price.passes_per_token)
        for arm in arms
        if arm.plan.mode == "cloud" or (arm.plan.first == arm.plan.num_draft_tokens in SHOWN_DRAFT_LENGTHS)  # as users ask for it
    ]


def _choices(estimates: Estimates, context_tokens: int, max_draft_tokens: int) -> list[Choice]:
    choices = []
    for objective in get_args(Objective):
        controller = Controller(estimates, objective, max_draft_tokens)
        plan = controller.plan(0.0, context_tokens)
        arms = controller.arms(0.0, context_tokens)
        price = next(arm.price for arm in arms if replace(arm.plan, max_in_flight=plan.max_in_flight) == plan)
        choices.append(Choice(objective, plan.mode, plan.num_draft_tokens, price.ms_per_token, price.passes_per_token))
    return choices


def _break_even_rtt_ms(estimates: Estimates, context_tokens: int, max_draft_tokens: int) -> float | None:
    lengths = [length for length in DRAFT_LENGTHS if length <= max_draft_tokens]
    return break_even_rtt_ms(
        estimates.acceptance.survival(lengths[-1]),
        {length: estimates.cloud.pass_ms(length + 1, context_tokens) for length in lengths},
        estimates.device.step_ms or 0.0,
        estimates.cloud.stream_ms(context_tokens),
        MAX_IN_FLIGHT,
        estimates.cloud.queue_ms,
    )
