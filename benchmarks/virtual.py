"""One generation in virtual time: the pilot of the device over a virtual link, device and cloud. What courier.py does over gRPC."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from simpy import Environment
from virtual_cloud import Answer, Extended, Job, Refused, VirtualCloud
from virtual_device import VirtualDevice
from virtual_link import VirtualLink, later

from edgecloud.edge.estimates import Estimates
from edgecloud.edge.happenings import (
    Action,
    Cancel,
    Decode,
    Draft,
    Failed,
    Happening,
    Hedge,
    Judged,
    Meet,
    Met,
    Streamed,
    Tick,
    Verify,
)
from edgecloud.edge.pilot import Pilot
from edgecloud.errors import CloudUnavailableError, ContextMissingError
from edgecloud.tokens import common_prefix
from edgecloud.types import CallCost, Step, Verdict

MAX_DRAFT_TOKENS = 32
CALL_BYTES, TOKEN_BYTES = 110, 3  # on the line: a message with its frames and headers, and a token id more
REPLY_BYTES, STREAMED_BYTES = 130, 60
CONNECT_S = 5.0  # a handshake may take
TICK_S = 1e-6  # virtual time goes on, however the pilot's times are rounded
REFUSED_S = 1e-3  # until a call without a connection fails


@dataclass(slots=True)
class Call:
    """Under way, as the client knows it."""

    order: Verify | Decode
    asked_s: float
    uplink_bytes: int
    was_idle: bool
    num_rows: int
    tokens: list[int]  # of a stream: with what has come of it


class VirtualGeneration:
    """Flies a pilot to the end; `show` is told every step and when.

    Args:
        request_s: what one call may take, a stream in all.
    """

    def __init__(
        self,
        env: Environment,
        pilot: Pilot,
        device: VirtualDevice,
        link: VirtualLink,
        cloud: VirtualCloud,
        estimates: Estimates,
        show: Callable[[Step, float], None],
        *,
        stop_token_ids: Collection[int] = (),
        request_s: float = 30.0,
    ) -> None:
        self._env = env
        self._pilot = pilot
        self._device = device
        self._link = link
        self._cloud = cloud
        self._session = cloud.session
        self._estimates = estimates
        self._show = show
        self._stop_token_ids = stop_token_ids
        self._request_s = request_s
        self._known: list[int] = []  # what the service has of the session, as far as it has told
        self._calls: dict[int, Call] = {}
        self._alarm_s = float("inf")
        self._num_meetings = 0
        self._meeting = 0  # the handshake under way; 0: none
        self.ended = env.event()
        link.on_break.append(self._broken)
        link.on_break.append(cloud.cancel_all)

    def begin(self) -> None:
        self._pilot.begin(self._env.now)
        self._go_on()

    def _post(self, happening: Happening) -> None:
        if self._pilot.finished:
            return
        self._pilot.take(happening, self._env.now)
        self._go_on()

    def _go_on(self) -> None:
        pilot, now_s = self._pilot, self._env.now
        for action in pilot.actions:
            self._carry_out(action)
        pilot.actions.clear()
        for step in pilot.steps:
            self._show(step, now_s)
        pilot.steps.clear()
        if pilot.finished:
            self._calls.clear()
            self._link.on_break.remove(self._broken)
            self._link.on_break.remove(self._cloud.cancel_all)
            self.ended.succeed()
        elif pilot.wake_s is not None and pilot.wake_s < self._alarm_s:
            self._set_alarm(pilot.wake_s)

    def _set_alarm(self, at_s: float) -> None:
        self._alarm_s = at_s = max(at_s, self._env.now + TICK_S)
        later(self._env, at_s - self._env.now, self._wake, at_s)

    def _wake(self, at_s: float) -> None:
        """The pilot may have put off its time since: then the alarm is set anew, without a word to it."""
        if at_s != self._alarm_s or self._pilot.finished:
            return
        self._alarm_s = float("inf")
        due_s = self._pilot.wake_s
        if due_s is None:
            return
        if due_s > self._env.now + TICK_S:
            self._set_alarm(due_s)
        else:
            self._post(Tick())

    def _carry_out(self, action: Action) -> None:
        match action:
            case Draft():
                self._device.draft(action, self._post)
            case Verify(call, tokens, draft_ids, num_assumed):
                start = common_prefix(self._known, tokens) if num_assumed is None else num_assumed
                self._send(action, Job(call, self._session, start, tokens, draft_ids, 1, lambda answer: self._down(call, answer)))
            case Decode(call, tokens, max_new_tokens):
                start = common_prefix(self._known, tokens)
                self._send(
                    action, Job(call, self._session, start, tokens, [], max_new_tokens, lambda answer: self._down(call, answer))
                )
            case Cancel(call):
                if self._calls.pop(call, None) is not None:
                    self._link.up(TOKEN_BYTES, self._cloud.cancel, self._session, call)
            case Meet():
                self._meet()
            case Hedge():  # there is one service
                pass

    def _meet(self) -> None:
        if not self._link.connected:
            later(self._env, REFUSED_S, self._post, Failed(None, CloudUnavailableError("refused")))
            return
        self._num_meetings += 1
        number = self._meeting = self._num_meetings
        self._link.up(CALL_BYTES, self._link.down, CALL_BYTES, self._met, number, Met(MAX_DRAFT_TOKENS))
        later(self._env, CONNECT_S, self._met, number, Failed(None, CloudUnavailableError("no handshake")))

    def _met(self, number: int, happening: Met | Failed) -> None:
        if number == self._meeting:
            self._meeting = 0
            self._post(happening)

    def _send(self, order: Verify | Decode, job: Job) -> None:
        now_s = self._env.now
        num_bytes = CALL_BYTES + TOKEN_BYTES * (len(order.tokens) - job.start + len(job.draft_ids))
        was_idle = self._estimates.link.sent_to_idle(now_s)
        num_rows = len(job.draft_ids) + max(1, len(order.tokens) - job.start)
        self._calls[order.call] = Call(order, now_s, num_bytes, was_idle, num_rows, order.tokens)
        if not self._link.connected:
            later(self._env, REFUSED_S, self._fail, order.call, "refused")
            return
        self._link.up(num_bytes, self._cloud.submit, job)
        later(self._env, self._request_s, self._time_out, order.call)

    def _down(self, call: int, answer: Answer) -> None:
        order = self._calls.get(call)
        streams = order is not None and isinstance(order.order, Decode)
        self._link.down(STREAMED_BYTES if streams else REPLY_BYTES, self._answered, call, answer)

    def _answered(self, number: int, answer: Answer) -> None:
        call = self._calls.get(number)
        if call is None or self._pilot.finished:
            return
        order, now_s = call.order, self._env.now
        if isinstance(answer, Refused):
            del self._calls[number]
            if isinstance(order, Decode) or order.num_assumed is None:
                del self._known[answer.cached_length :]
            self._post(Failed(number, ContextMissingError("the session lacks the context", answer.cached_length)))
            return
        cost = CallCost(
            answer.target_passes,
            answer.queue_ms,
            answer.compute_ms,
            (now_s - call.asked_s) * 1e3,
            call.uplink_bytes,
            STREAMED_BYTES,
        )
        if isinstance(order, Verify):
            self._judge(number, order, call, answer, cost)
        else:
            self._take(number, order, call, answer, cost)

    def _judge(self, number: int, order: Verify, call: Call, answer: Extended, cost: CallCost) -> None:
        del self._calls[number]
        self._known = [*order.tokens, *order.draft_ids[: answer.num_accepted], answer.next_token_id]
        conditional = order.num_assumed is not None
        self._estimates.judged(call.num_rows, cost, answer.load, self._env.now, was_idle=call.was_idle, conditional=conditional)
        self._post(Judged(number, Verdict(answer.num_accepted, answer.next_token_id, cost)))

    def _take(self, number: int, order: Decode, call: Call, answer: Extended, cost: CallCost) -> None:
        self._known = call.tokens = [*call.tokens, answer.next_token_id]
        load = answer.load if call.uplink_bytes or answer.last else None
        self._estimates.streamed(cost, load, self._env.now, was_idle=call.was_idle)
        call.asked_s, call.uplink_bytes = self._env.now, 0
        if answer.last:
            del self._calls[number]
        self._post(Streamed(number, len(call.tokens) - 1, [answer.next_token_id], cost))

    def _time_out(self, call: int) -> None:
        """The service knows the limit too."""
        if call in self._calls:
            self._cloud.cancel(self._session, call)
            self._fail(call, "too late")

    def _fail(self, call: int, why: str) -> None:
        if self._calls.pop(call, None) is not None and not self._pilot.finished:
            self._post(Failed(call, CloudUnavailableError(why)))

    def _broken(self) -> None:
        for call in list(self._calls):
            later(self._env, REFUSED_S, self._fail, call, "reset")
        if self._meeting:
            later(self._env, REFUSED_S, self._met, self._meeting, Failed(None, CloudUnavailableError("reset")))
