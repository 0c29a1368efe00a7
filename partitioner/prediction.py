"""What a plan should take on given machines and link: every figure from the formulas of sdk/cost.py and times layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from edgecloud.cost import (
    MAX_IN_FLIGHT,
    answer_ms,
    drafted_per_token,
    overlapped,
    split_overlapped,
    ttft_ms,
    uplink_ms,
)
from edgecloud.kernels.codec import row_bytes
from edgecloud.partitioner.candidate import (
    FRONT_WEIGHTS,
    REQUEST_BYTES,
    TOKEN_BYTES,
    Candidate,
    Connection,
    Draft,
    FrontWeights,
    Workload,
)
from edgecloud.partitioner.front_times import FrontTimes, nearest
from edgecloud.partitioner.layer_times import LayerTimes, ModelShape
from edgecloud.partitioner.losses import Losses
from edgecloud.partitioner.machine_profile import MachineProfile

RUNTIME_BYTES = 103e6  # of the device's process without a model: benchmarks/results/device_rss.json, mode cloud


@dataclass(frozen=True, slots=True)
class Figures:
    """What a plan comes to. Per token: of the answer, the prompt's share not in it."""

    tpot_ms: float
    ttft_ms: float
    answer_ms: float  # the whole of it
    cloud_ms_per_token: float  # of its passes, alone on the machine
    passes_per_token: float  # of the whole target's weights
    up_bytes_per_token: float
    device_ram_bytes: float
    device_joules_per_token: float
    loss: float | None  # share of tokens that are not the full target's; None: not measured


@dataclass(frozen=True, slots=True)
class Scene:
    """Machines, models and work; not the link."""

    target: ModelShape
    drafts: Sequence[Draft]
    device: MachineProfile
    cloud: MachineProfile
    workload: Workload = field(default_factory=Workload)
    losses: Losses = field(default_factory=Losses)
    fronts: Sequence[FrontTimes] = ()  # exported ones, timed on the device

    @property
    def front_weights(self) -> list[FrontWeights]:
        """Formats in which the device can run a front."""
        return [weights for weights in FRONT_WEIGHTS if weights in self.device.compute]


class Predictor:
    """Figures of plans in a scene; what does not depend on the link is computed once."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self._target, self._workload = scene.target, scene.workload
        self._cloud_times = LayerTimes(scene.target, scene.cloud, scene.cloud.serves)
        self._memory: dict[tuple[object, ...], float] = {}

    def draft(self, candidate: Candidate) -> Draft:
        """That a candidate names."""
        return next(draft for draft in self.scene.drafts if draft.name == candidate.draft)

    def cut_share(self, cut: int) -> float:
        """Of a pass over one row, what the layers before the cut take in the cloud."""
        return 1.0 - self._cloud_ms(cut, 1) / self._cloud_ms(0, 1)

    def predict(self, candidate: Candidate, link: Connection) -> Figures:
        """The figures of a plan over a link."""
        match candidate.mode:
            case "edge":
                return self._edge(candidate)
            case "cloud":
                return self._cloud(link)
            case "speculative":
                return self._speculative(candidate, link)
            case "split":
                return self._split(candidate, link)

    def _edge(self, candidate: Candidate) -> Figures:
        draft = self.draft(candidate)
        step_ms, first_ms = self._step_ms(draft), self._draft_reads_ms(draft)
        joules = self._joules(step_ms, 0.0, 0.0, 0.0)
        loss = 1.0 - draft.survival[0] if draft.survival else None
        return self._figures(step_ms, first_ms, 0.0, 0.0, 0.0, self._draft_bytes(draft), joules, loss)

    def _cloud(self, link: Connection) -> Figures:
        pass_ms = self._cloud_ms(0, 1)
        joules = self._joules(0.0, pass_ms, 0.0, TOKEN_BYTES)
        return self._figures(pass_ms, self._cloud_first_ms(link), pass_ms, 1.0, 0.0, 0.0, joules, 0.0)

    def _speculative(self, candidate: Candidate, link: Connection) -> Figures:
        draft, length = self.draft(candidate), candidate.num_draft_tokens
        step_ms, verify_ms = self._step_ms(draft), self._cloud_ms(0, length + 1)
        request_bytes = REQUEST_BYTES + TOKEN_BYTES * (length + 1)
        trip_ms = link.rtt_ms + uplink_ms(request_bytes, link.up_mbps)
        price = overlapped(draft.survival, length, step_ms, trip_ms, verify_ms, MAX_IN_FLIGHT)
        passes, tpot_ms = price.passes_per_token, price.ms_per_token
        busy_ms = step_ms * drafted_per_token(draft.survival, length, step_ms, tpot_ms)
        joules = self._joules(busy_ms, tpot_ms - busy_ms, request_bytes * passes, TOKEN_BYTES)
        return self._figures(
            tpot_ms, self._cloud_first_ms(link), verify_ms * passes, passes, request_bytes * passes, self._draft_bytes(draft),
            joules, 0.0,
        )  # fmt: skip

    def _split(self, candidate: Candidate, link: Connection) -> Figures:
        length, cut, front, codec = candidate.num_draft_tokens, candidate.cut, candidate.front, candidate.codec
        assert front is not None
        assert codec is not None
        draft, rows = self.draft(candidate), length + 1
        step_ms, survival = self._step_ms(draft), draft.survival
        front_ms, tail_ms = self._front_ms(front, cut, rows), self._cloud_ms(cut, rows)
        boundary_bytes = row_bytes(codec, self._target.hidden_size)
        request_bytes = REQUEST_BYTES + rows * boundary_bytes + length * TOKEN_BYTES
        up_ms, share = uplink_ms(request_bytes, link.up_mbps), self.cut_share(cut)
        price = split_overlapped(
            survival, length, step_ms, front_ms, up_ms, link.rtt_ms, tail_ms, share, MAX_IN_FLIGHT
        )  # fmt: skip
        tpot_ms, passes = price.ms_per_token, price.passes_per_token / (1.0 - share)
        token_ms = step_ms + front_ms / rows
        drafted = drafted_per_token(survival, length, max(token_ms, up_ms / rows), tpot_ms)
        up_bytes = request_bytes * max(passes, drafted / rows)  # what is sent on a wrong guess is refused, and was sent
        joules = self._joules(drafted * token_ms, tpot_ms - drafted * token_ms, up_bytes, TOKEN_BYTES)
        num_tokens = self._workload.prompt_tokens
        first_up_ms = uplink_ms(REQUEST_BYTES + num_tokens * boundary_bytes, link.up_mbps)
        first_ms = ttft_ms(self._front_reads_ms(front, cut) + self._cloud_reads_ms(cut), link.rtt_ms, first_up_ms)
        num_bytes = self._target.weight_bytes(front, cut, head=False)
        num_bytes += self._target.kv_bytes(cut, self._workload.max_context_tokens)
        num_bytes += self._draft_bytes(draft)
        loss = self.scene.losses.loss(cut, front, codec)
        return self._figures(
            tpot_ms, first_ms, tail_ms * passes, price.passes_per_token, up_bytes, num_bytes, joules, loss
        )  # fmt: skip

    def _figures(
        self, tpot_ms: float, first_ms: float, cloud_ms: float, passes: float, up_bytes: float, model_bytes: float,
        joules: float, loss: float | None,
    ) -> Figures:  # fmt: skip
        whole_ms = answer_ms(first_ms, tpot_ms, self._workload.answer_tokens)
        return Figures(tpot_ms, first_ms, whole_ms, cloud_ms, passes, up_bytes, RUNTIME_BYTES + model_bytes, joules, loss)

    def _joules(self, busy_ms: float, waiting_ms: float, up_bytes: float, down_bytes: float) -> float:
        """Of the device, for a token."""
        energy = self.scene.device.energy
        watts_ms = energy.active_watts * busy_ms + energy.waiting_watts * max(0.0, waiting_ms)
        return watts_ms / 1e3 + (energy.joules_per_mb_sent * up_bytes + energy.joules_per_mb_received * down_bytes) / 1e6

    def _cloud_first_ms(self, link: Connection) -> float:
        up_ms = uplink_ms(REQUEST_BYTES + TOKEN_BYTES * self._workload.prompt_tokens, link.up_mbps)
        return ttft_ms(self._cloud_reads_ms(0), link.rtt_ms, up_ms)

    def _draft_bytes(self, draft: Draft) -> float:
        shape = draft.shape
        return shape.weight_bytes(draft.weights) + shape.kv_bytes(shape.num_layers, self._workload.max_context_tokens)

    def _step_ms(self, draft: Draft) -> float:
        return self._once(("step", draft.name), lambda: self._draft_times(draft).draft_ms(1, self._context))

    def _draft_reads_ms(self, draft: Draft) -> float:
        num_tokens = self._workload.prompt_tokens
        return self._once(("draft reads", draft.name), lambda: self._draft_times(draft).draft_ms(num_tokens, num_tokens))

    def _draft_times(self, draft: Draft) -> LayerTimes:
        return LayerTimes(draft.shape, self.scene.device, draft.weights)

    def _front_ms(self, weights: str, cut: int, num_rows: int) -> float:
        return self._once(("front", weights, cut, num_rows), lambda: self._front_run_ms(weights, cut, num_rows, self._context))

    def _front_reads_ms(self, weights: str, cut: int) -> float:
        num_tokens = self._workload.prompt_tokens
        return self._once(("front reads", weights, cut), lambda: self._front_run_ms(weights, cut, num_tokens, num_tokens))

    def _front_run_ms(self, weights: str, cut: int, num_rows: int, context_tokens: float) -> float:
        device = self.scene.device
        if measured := nearest(self.scene.fronts, weights, cut):
            return measured.front_ms(self._target, device.memory_bandwidth, cut, num_rows, context_tokens)
        return LayerTimes(self._target, device, weights).front_ms(cut, num_rows, context_tokens)

    def _cloud_ms(self, cut: int, num_rows: int) -> float:
        """The layers from a cut on, or all of them from 0, and the head over every row."""
        return self._once(("cloud", cut, num_rows), lambda: self._cloud_times.tail_ms(cut, num_rows, self._context))

    def _cloud_reads_ms(self, cut: int) -> float:
        """The prompt; logits of its last row."""
        num_tokens = self._workload.prompt_tokens
        return self._once(("cloud reads", cut), lambda: self._cloud_times.tail_ms(cut, num_tokens, num_tokens, 1))

    @property
    def _context(self) -> float:
        return self._workload.mean_context_tokens

    def _once(self, key: tuple[object, ...], work: Callable[[], float]) -> float:
        found = self._memory.get(key)
        if found is None:
            found = self._memory[key] = work()
        return found
