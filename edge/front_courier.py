"""Carries out a pilot's calls in mode `split`: before a draft leaves, the front makes rows of its tokens, on its own thread."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import grpc

from edgecloud.edge.courier import FREE, Courier, Letter, Trip
from edgecloud.edge.estimates import Estimates
from edgecloud.edge.front_rows import FrontRows, Row
from edgecloud.edge.happenings import Cancel, Happening, Verify
from edgecloud.edge.remote import Cloud, cost_of
from edgecloud.edge.replicas import RemoteSession
from edgecloud.edge.tail import TailSession
from edgecloud.sampling import SamplingSettings
from edgecloud.types import CallCost


class FrontCourier(Courier):
    """Verifies by the target's tail.

    Args:
        session, sampling, stop_token_ids, estimates, post: as Courier's.
        front: the target's first layers.
        max_message_bytes: the service's limit.
    """

    def __init__(
        self,
        session: RemoteSession,
        sampling: SamplingSettings,
        stop_token_ids: Collection[int],
        estimates: Estimates,
        post: Callable[[Letter], None],
        front: FrontRows,
        max_message_bytes: int,
    ) -> None:
        super().__init__(session, sampling, stop_token_ids, estimates, post)
        self._front = front
        self._max_message_bytes = max_message_bytes
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="front")
        self._uploaded: dict[int, CallCost] = {}  # what the first parts of a request took

    def close(self) -> None:
        """Cancel what is under way, after the front's run."""
        super().close()
        self._thread.shutdown(cancel_futures=True)

    def cancel(self, order: Cancel) -> None:
        """Nobody waits for this call any more."""
        super().cancel(order)
        self._uploaded.pop(order.call, None)

    def _on(self, cloud: Cloud) -> TailSession:
        return self._session.tail_on(cloud, self._front.cut, self._front.codec, self._max_message_bytes)

    def _send(self, order: Verify, cloud: Cloud, num_assumed: int | None) -> None:
        def made(rows: Future[list[Row]]) -> None:
            self._post(lambda: self._send_rows(order, cloud, rows.result(), num_assumed))

        tokens = [*order.tokens, *order.draft_ids]
        self._thread.submit(self._run_front, order.call, tokens).add_done_callback(made)

    def _run_front(self, call: int, tokens: list[int]) -> list[Row]:
        if call not in self._orders:  # cancelled before its turn
            return []
        started, num_new = time.perf_counter(), self._front.num_missing(tokens)
        rows = self._front.rows(tokens)
        self._estimates.device.fronted(num_new, (time.perf_counter() - started) * 1e3)
        return rows

    def _send_rows(self, order: Verify, cloud: Cloud, rows: list[Row], num_assumed: int | None) -> None:
        """The draft and its rows; first the context's, as often as it takes, where one message cannot hold all."""
        if order.call not in self._orders or not rows:
            return
        session = self._on(cloud)
        request, num_sent = session.tail_request(order.tokens, order.draft_ids, rows, self._wire_sampling, num_assumed)
        num_rows = num_sent - request.context_start
        if num_sent < len(rows):
            then: Callable[[Any, Trip], Happening | None] = partial(self._take_upload, order, cloud, rows, num_sent)
        else:
            before = self._uploaded.pop(order.call, FREE)
            then = partial(self._judge, order, cloud, num_rows=num_rows, conditional=num_assumed is not None, before=before)
        self._launch(order.call, request, session.tail_future, then)

    def _take_upload(self, order: Verify, cloud: Cloud, rows: list[Row], num_sent: int, ended: Any, trip: Trip) -> Happening | None:
        """A part of a context is there: the next one."""
        if ended not in self._calls.get(order.call, []):
            return None
        try:
            reply = ended.result()
        except grpc.RpcError as error:
            return self._fail(order.call, ended, cloud, error)
        self._calls[order.call].remove(ended)
        self._on(cloud).settled(order.tokens[:num_sent], reply)
        cost = cost_of(reply, trip.elapsed_s, trip.uplink_bytes)
        self._uploaded[order.call] = self._uploaded.get(order.call, FREE) + cost
        self._send_rows(order, cloud, rows, None)
        return None
