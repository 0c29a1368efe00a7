"""Carries out a pilot's calls over gRPC. What comes of them is put into an inbox, to be read on the pilot's thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection
from typing import Any

import grpc

from edgecloud.edge.estimates import Estimates
from edgecloud.edge.pilot import Cancel, Decode, Failed, Happening, Judged, Streamed, Verify
from edgecloud.edge.remote import RemoteVerifier, TokenStream, cost_of
from edgecloud.errors import CloudError, ProtocolError
from edgecloud.rpc import codec
from edgecloud.sampling import SamplingSettings

Letter = Callable[[], Happening | None]  # read on the pilot's thread, so that only that thread knows the session


class Courier:
    """Calls of one generation. `post` takes letters from any thread."""

    def __init__(
        self,
        session: RemoteVerifier,
        sampling: SamplingSettings,
        stop_token_ids: Collection[int],
        estimates: Estimates,
        post: Callable[[Letter], None],
    ) -> None:
        self._session = session
        self._sampling = sampling
        self._wire_sampling = codec.sampling_to_wire(sampling)
        self._stop_token_ids = stop_token_ids
        self._estimates = estimates
        self._post = post
        self._calls: dict[int, Any] = {}  # under way

    def verify(self, order: Verify) -> None:
        """Send a draft."""
        request = self._session.verify_request(order.tokens, order.draft_ids, self._wire_sampling, order.num_assumed)
        uplink_bytes, asked = request.ByteSize(), time.perf_counter()
        num_rows = len(order.draft_ids) + max(1, len(request.context_ids))
        was_idle = self._estimates.link.sent_to_idle(time.monotonic())
        future = self._session.verify_future(request)
        self._calls[order.call] = future

        def arrived(ended: Any) -> None:
            elapsed_s = time.perf_counter() - asked
            self._post(lambda: self._judge(order, ended, elapsed_s, uplink_bytes, num_rows, was_idle))

        future.add_done_callback(arrived)

    def decode(self, order: Decode) -> None:
        """Open a stream."""
        was_idle = self._estimates.link.sent_to_idle(time.monotonic())
        stream = self._session.stream(order.tokens, order.max_new_tokens, self._sampling, self._stop_token_ids)
        self._calls[order.call] = stream.call

        def read() -> None:
            try:
                for reply in stream.call:
                    came = time.perf_counter()
                    self._post(lambda reply=reply, came=came: self._take(order.call, stream, reply, came, was_idle))  # type: ignore[misc]
            except grpc.RpcError as error:
                self._post(lambda error=error: self._fail(order.call, error, conditional=False))  # type: ignore[misc]
            else:
                self._post(lambda: self._end(order, stream))

        threading.Thread(target=read, name="stream", daemon=True).start()

    def cancel(self, order: Cancel) -> None:
        """Nobody waits for this call any more."""
        if (call := self._calls.pop(order.call, None)) is not None:
            call.cancel()

    def close(self) -> None:
        """Cancel what is under way."""
        while self._calls:
            self._calls.popitem()[1].cancel()

    def _judge(
        self, order: Verify, ended: Any, elapsed_s: float, uplink_bytes: int, num_rows: int, was_idle: bool
    ) -> Happening | None:
        if order.call not in self._calls:
            return None
        conditional = order.num_assumed is not None
        try:
            reply = ended.result()
        except grpc.RpcError as error:
            return self._fail(order.call, error, conditional=conditional)
        del self._calls[order.call]
        cost = cost_of(reply, elapsed_s, uplink_bytes)
        try:
            verdict = self._session.judged(order.tokens, order.draft_ids, reply, cost)
        except ProtocolError as error:
            return Failed(order.call, error)
        now_s, load = time.monotonic(), self._session.load
        self._estimates.judged(num_rows, cost, load, now_s, was_idle=was_idle, conditional=conditional)
        return Judged(order.call, verdict)

    def _take(self, call: int, stream: TokenStream, reply: Any, came: float, was_idle: bool) -> Happening | None:
        if call not in self._calls:
            return None
        round_ = stream.take(reply, came)
        self._estimates.streamed(round_.cost, self._session.load, time.monotonic(), was_idle=was_idle)
        return Streamed(call, round_.token_ids, round_.cost)

    def _end(self, order: Decode, stream: TokenStream) -> Happening | None:
        """A stream that ends has given all that was asked for, or a stop token."""
        if self._calls.pop(order.call, None) is None:
            return None
        missing = order.max_new_tokens - (len(stream.tokens) - len(order.tokens))
        if missing and stream.tokens[-1] not in self._stop_token_ids:
            return Failed(order.call, ProtocolError(f"{self._session.address} ended a stream {missing} tokens early"))
        return None

    def _fail(self, call: int, error: grpc.RpcError, *, conditional: bool) -> Happening | None:
        if self._calls.pop(call, None) is None:
            return None
        failure: CloudError = self._session.learned(error, conditional=conditional)
        return Failed(call, failure)
