"""The words both sides share: what a round yields, what a caller sees, what is counted."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

Mode = Literal["edge", "cloud", "speculative", "split", "cascade"]  # how a token came about
ModeChoice = Literal["auto", "edge", "cloud", "speculative", "split", "cascade"]  # what a caller may ask for
Objective = Literal["latency", "cost", "balanced", "offline-first"]  # what mode "auto" makes little of
Preference = Literal["order", "latency"]  # of several services
LossPolicy = Literal["continue", "wait", "fail"]  # what modes "auto" and "cascade" do when the cloud is silent
TokenStatus = Literal["provisional", "final", "unverified"]
ExitScope = Literal[
    "token", "before", "after"
]  # what leaves without the cloud: single tokens, or requests before or after the answer
FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """The target's answer to one draft."""

    num_accepted: int  # length of the draft's prefix that the target would have chosen too
    next_token_id: int  # recovered token at the first mismatch, bonus token after full acceptance
    cost: CallCost


@dataclass(frozen=True, slots=True)
class CallCost:
    """What one call to the target took. Bytes are serialized messages, all attempts together."""

    target_passes: float = 0.0  # a pass shared by n requests counts 1/n
    queue_ms: float = 0.0
    compute_ms: float = 0.0
    elapsed_ms: float = 0.0  # as the device saw it
    uplink_bytes: int = 0
    downlink_bytes: int = 0

    def __add__(self, other: CallCost) -> CallCost:
        """Both, one after the other."""
        return CallCost(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(CallCost)))


@dataclass(frozen=True, slots=True)
class Round:
    """One step of a mode's loop: tokens to append, in order, and what they took."""

    token_ids: list[int]
    mode: Mode
    status: TokenStatus
    num_draft_tokens: int = 0
    num_accepted: int = 0
    cost: CallCost = field(default_factory=CallCost)


@dataclass(frozen=True, slots=True)
class Audit:
    """So many tokens that nobody had verified were compared with the target's choice, and so many of them differ."""

    num_audited: int
    num_diverged: int


@dataclass(frozen=True, slots=True)
class Guess:
    """What a mode's loop hands on ahead of a round: the device's guess of the next tokens."""

    token_ids: list[int]


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """Tokens to show. `text` may be empty while a character is incomplete or a stop string may be forming.

    Provisional tokens are the device's guess: later they are confirmed by final events with the same ids, in order, whose `text` is
    only what was not shown before; or a `Retract` takes them back. Unverified tokens are the device's, too, and stay: nobody waits
    for the target's word on them. They confirm guesses as final tokens do.
    """

    text: str
    token_ids: list[int]
    status: TokenStatus


@dataclass(frozen=True, slots=True)
class Retract:
    """The last `num_tokens` provisional tokens were not the target's: take the last `num_characters` off the screen."""

    num_tokens: int
    num_characters: int


@dataclass(frozen=True, slots=True)
class ModeChanged:
    """From the next token on, another mode is at work."""

    mode: Mode
    reason: str


@dataclass(frozen=True, slots=True)
class CloudLost:
    """The cloud does not answer. What the device shows until `CloudBack` is its guess."""

    reason: str


@dataclass(frozen=True, slots=True)
class CloudBack:
    """The cloud answers again: guesses are being settled."""


@dataclass(frozen=True, slots=True)
class RiskAlarm:
    """What this client skipped differs from the target's choice more often than the risk allows: its prompts are of another kind.

    From the next generation on the threshold is stricter; None: nothing is skipped any more.
    """

    risk: float
    num_audited: int  # since the client was made, or since its last alarm
    num_diverged: int
    threshold: float | None


Step = Round | Guess | ModeChanged | CloudLost | CloudBack | Audit  # what a mode's loop hands on
Event = TokenEvent | Retract | ModeChanged | CloudLost | CloudBack | RiskAlarm


@dataclass(frozen=True, slots=True)
class ModeSpan:
    """From generated token number `token` on: this mode, with this draft length."""

    token: int
    mode: Mode
    num_draft_tokens: int


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of one request."""

    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class Metrics:
    """What one request took, as the device measured it; `target_passes` as the server counts it.

    A round is one draft and its verification; the opening call that prefills the prompt drafts nothing and is no round.
    """

    ttft_ms: float
    tpot_ms: float
    total_ms: float
    rtt_ms: float | None  # median over calls of elapsed minus server time; None without a cloud
    num_rounds: int
    num_draft_tokens: int
    num_accepted_tokens: int
    mean_acceptance_length: float  # 1 + accepted / rounds, as vLLM counts it
    acceptance_histogram: list[int]  # [i]: rounds that accepted exactly i draft tokens
    target_passes: float
    target_passes_per_token: float
    cloud_compute_ms: float  # of the passes that this request had a part in
    uplink_bytes: int
    downlink_bytes: int
    num_unverified_tokens: int
    first_visible_ms: float  # until the first token was shown, provisional or final
    num_retracted_tokens: int  # shown as provisional, and taken back
    num_audited_tokens: int = 0  # kept on the device's word alone, and compared with the target's choice all the same
    num_diverged_tokens: int = 0  # of these, how many are not the target's choice


@dataclass(frozen=True, slots=True)
class Reply:
    """A generation, finished or broken off. `text` excludes special tokens and the stop string; `token_ids` hold them."""

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    usage: Usage
    metrics: Metrics
    mode_timeline: list[ModeSpan]
    unverified_spans: list[tuple[int, int]] = field(default_factory=list)  # of `token_ids`, [start, end): nobody verified these

    def to_dict(self) -> dict[str, Any]:
        """The object that `edgecloud generate --json` prints."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class ServiceLoad:
    """How busy a verification service was when a reply left it, and what its passes take, as fitted to the latest of them."""

    num_sessions: int
    num_waiting: int  # requests that had not had a pass yet
    num_free_pages: int
    num_pages: int
    pass_base_ms: float  # a pass: base + per token * new tokens + per context token * tokens attended to; 0: not known yet
    pass_per_token_ms: float
    pass_per_context_token_ms: float


@dataclass(frozen=True, slots=True)
class Service:
    """What a verification service says of itself in the handshake."""

    protocol_version: int
    server_version: str
    model_name: str
    model_fingerprint: str
    tokenizer_fingerprint: str
    vocab_size: int
    dtype: str
    exact: str  # bitwise: logits depend on nothing but the tokens before; tolerance: to rounding, on what shares a pass
    max_context_tokens: int
    max_draft_tokens: int
    max_message_bytes: int  # of a request
    tail_cuts: tuple[int, ...] = ()  # numbers of layers that a device may run itself, in mode `split`; none: not with this service
    boundary_codecs: tuple[str, ...] = ()  # how rows between front and tail may be encoded
    graph_cuts: tuple[str, ...] = ()  # cuts of an ONNX graph that it takes; none: it serves a language model
