"""Carries out a pilot's calls over gRPC. What comes of them is put into an inbox, to be read on the pilot's thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from typing import Any

import grpc

from edgecloud.edge.estimates import Estimates
from edgecloud.edge.happenings import Cancel, Decode, Failed, Happening, Judged, Streamed, Verify
from edgecloud.edge.remote import Cloud, RemoteVerifier, TokenStream, cost_of
from edgecloud.edge.replicas import RemoteSession
from edgecloud.edge.tail import TailSession
from edgecloud.errors import CloudError, CloudOverloadedError, CloudUnavailableError, ProtocolError
from edgecloud.rpc import codec
from edgecloud.sampling import SamplingSettings
from edgecloud.types import CallCost

FREE = CallCost()
Letter = Callable[[], Happening | None]  # read on the pilot's thread, so that only that thread knows the session


@dataclass(frozen=True, slots=True)
class Trip:
    """A request and its answer, as the device saw them."""

    elapsed_s: float
    uplink_bytes: int
    was_idle: bool  # the link, before


class Courier:
    """Calls of one generation. `post` takes letters from any thread."""

    def __init__(
        self,
        session: RemoteSession,
        sampling: SamplingSettings,
        stop_token_ids: Collection[int],
        estimates: Estimates,
        post: Callable[[Letter], None],
    ) -> None:
        self._session = session
        self._replicas = session.replicas
        self._sampling = sampling
        self._wire_sampling = codec.sampling_to_wire(sampling)
        self._stop_token_ids = stop_token_ids
        self._estimates = estimates
        self._post = post
        self._calls: dict[int, list[Any]] = {}  # under way; several futures where a second service was asked
        self._orders: dict[int, tuple[Verify | Decode, Cloud]] = {}  # what was asked of whom

    def verify(self, order: Verify) -> None:
        """Send a draft."""
        cloud = self._choose()
        self._orders[order.call] = order, cloud
        self._send(order, cloud, order.num_assumed)

    def hedge(self, call: int) -> None:
        """Ask another service for the same, with all of the context. Without another nothing happens."""
        if call not in self._orders:
            return
        order, asked = self._orders[call]
        other = self._replicas.choose(time.monotonic(), but=asked)
        if other is not None and isinstance(order, Verify):
            self._send(order, other, None)
        elif other is not None and isinstance(order, Decode):  # from its first token on: what has come before is known already
            self._open(order, other)

    def decode(self, order: Decode) -> None:
        """Open a stream."""
        cloud = self._choose()
        self._orders[order.call] = order, cloud
        self._open(order, cloud)

    def _open(self, order: Decode, cloud: Cloud) -> None:
        was_idle = self._estimates.link.sent_to_idle(time.monotonic())
        session = self._session.on(cloud)
        stream = session.stream(order.tokens, order.max_new_tokens, self._sampling, self._stop_token_ids)
        self._calls.setdefault(order.call, []).append(stream.call)

        def read() -> None:
            try:
                for reply in stream.call:
                    self._post(partial(self._take, order.call, stream, cloud, reply, time.perf_counter(), was_idle))
            except grpc.RpcError as error:
                self._post(partial(self._fail, order.call, stream.call, cloud, error))
            else:
                self._post(lambda: self._end(order, stream, cloud))

        threading.Thread(target=read, name="stream", daemon=True).start()

    def cancel(self, order: Cancel) -> None:
        """Nobody waits for this call any more."""
        self._orders.pop(order.call, None)
        for call in self._calls.pop(order.call, []):
            call.cancel()

    def close(self) -> None:
        """Cancel what is under way."""
        while self._calls:
            for call in self._calls.popitem()[1]:
                call.cancel()

    def _on(self, cloud: Cloud) -> RemoteVerifier | TailSession:
        """The session whose calls these are."""
        return self._session.on(cloud)

    def _choose(self) -> Cloud:
        cloud = self._replicas.choose(time.monotonic())
        assert cloud is not None
        return cloud

    def _send(self, order: Verify, cloud: Cloud, num_assumed: int | None) -> None:
        session = self._session.on(cloud)
        request = session.verify_request(order.tokens, order.draft_ids, self._wire_sampling, num_assumed)
        num_rows = len(order.draft_ids) + max(1, len(request.context_ids))
        judge = partial(self._judge, order, cloud, num_rows=num_rows, conditional=num_assumed is not None)
        self._launch(order.call, request, session.verify_future, judge)

    def _launch(self, call: int, request: Any, send: Callable[[Any], Any], then: Callable[[Any, Trip], Happening | None]) -> None:
        """Send a request, and let `then` read what comes of it."""
        uplink_bytes, asked = request.ByteSize(), time.perf_counter()
        was_idle = self._estimates.link.sent_to_idle(time.monotonic())
        future = send(request)
        self._calls.setdefault(call, []).append(future)

        def arrived(ended: Any) -> None:
            trip = Trip(time.perf_counter() - asked, uplink_bytes, was_idle)
            self._post(lambda: then(ended, trip))

        future.add_done_callback(arrived)

    def _judge(
        self, order: Verify, cloud: Cloud, ended: Any, trip: Trip, *, num_rows: int, conditional: bool, before: CallCost = FREE
    ) -> Happening | None:
        """`num_rows`: that the service had to compute. `before`: what earlier parts of the same request took."""
        if ended not in self._calls.get(order.call, []):
            return None
        try:
            reply = ended.result()
        except grpc.RpcError as error:
            return self._fail(order.call, ended, cloud, error, conditional=conditional)
        cost = cost_of(reply, trip.elapsed_s, trip.uplink_bytes)
        try:
            verdict = self._on(cloud).judged(order.tokens, order.draft_ids, reply, before + cost)
        except ProtocolError as error:
            return Failed(order.call, error)
        self._calls[order.call].remove(ended)
        if (asked := self._orders[order.call][1]) is not cloud:  # the other one is still silent
            self._replicas.failed(asked, time.monotonic())
        self.cancel(Cancel(order.call))  # what else was asked for the same
        self._replicas.answered(cloud)
        now_s = time.monotonic()
        self._estimates.judged(num_rows, cost, cloud.load, now_s, was_idle=trip.was_idle, conditional=conditional)
        return Judged(order.call, verdict)

    def _take(self, call: int, stream: TokenStream, cloud: Cloud, reply: Any, came: float, was_idle: bool) -> Happening | None:
        if call not in self._calls:
            return None
        round_ = stream.take(reply, came)
        self._replicas.answered(cloud)
        self._estimates.streamed(round_.cost, cloud.load, time.monotonic(), was_idle=was_idle)
        return Streamed(call, len(stream.tokens) - len(round_.token_ids), round_.token_ids, round_.cost)

    def _end(self, order: Decode, stream: TokenStream, cloud: Cloud) -> Happening | None:
        """A stream that ends has given all that was asked for, or a stop token."""
        if order.call not in self._calls:
            return None
        self.cancel(Cancel(order.call))
        missing = order.max_new_tokens - (len(stream.tokens) - len(order.tokens))
        if missing and stream.tokens[-1] not in self._stop_token_ids:
            return Failed(order.call, ProtocolError(f"{cloud.address} ended a stream {missing} tokens early"))
        return None

    def _fail(self, call: int, ended: Any, cloud: Cloud, error: grpc.RpcError, *, conditional: bool = False) -> Happening | None:
        if ended not in self._calls.get(call, []):
            return None
        failure: CloudError = self._on(cloud).learned(error, conditional=conditional)
        if isinstance(failure, CloudUnavailableError | CloudOverloadedError):
            self._replicas.failed(cloud, time.monotonic())
        self._calls[call].remove(ended)
        if self._calls[call]:  # another service may still answer
            return None
        self.cancel(Cancel(call))
        return Failed(call, failure)
