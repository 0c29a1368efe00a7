"""The gate of a server: every request but a health check comes through here, and is let in, counted and let out."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import grpc
from grpc import HandlerCallDetails, RpcMethodHandler
from grpc.aio import ServicerContext
from grpc_health.v1 import health

from edgecloud.cloud.metrics import Metrics
from edgecloud.cloud.quotas import ACCOUNT, BUSY_RETRY_S, Account
from edgecloud.cloud.reading import MESSAGE_S, only_message, reading, reading_handler
from edgecloud.cloud.status import abort, abort_overloaded
from edgecloud.cloud.tenants import Tenants
from edgecloud.errors import CloudAuthError, CloudOverloadedError
from edgecloud.rpc import codec
from edgecloud.rpc import edgecloud_pb2 as pb

logger = logging.getLogger(__name__)

METHODS = {f"/{codec.SERVICE_NAME}/{name}": name for name in pb.DESCRIPTOR.services_by_name["Verification"].methods_by_name}
Continuation = Callable[[HandlerCallDetails], Awaitable["RpcMethodHandler[Any, Any] | None"]]


class Gate(grpc.aio.ServerInterceptor):
    """Lets in who shows a token of `tenants` (None: anybody), `max_requests` at a time, and nobody any more once it drains.

    A call has its place from when its message has come, within `message_s`.
    """

    def __init__(
        self,
        tenants: Tenants | None = None,
        max_requests: int = 512,
        metrics: Metrics | None = None,
        *,
        message_s: float = MESSAGE_S,
    ) -> None:
        self._tenants = tenants
        self._metrics = metrics or Metrics()
        self._max_requests = max_requests
        self._message_s = message_s
        self._everybody = Account()
        self._draining = False
        self._num_running = 0
        self._empty = asyncio.Event()
        self._empty.set()

    @property
    def num_running(self) -> int:
        """Requests that have been let in and not out."""
        return self._num_running

    async def drain(self, drain_s: float, hurry: asyncio.Event) -> bool:
        """Let nobody in any more, and wait until the last has left.  -> whether it did, before `drain_s` and `hurry`"""
        self._draining = True
        waits = [asyncio.ensure_future(event.wait()) for event in (self._empty, hurry)]
        await asyncio.wait(waits, timeout=drain_s, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        return not self._num_running

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: HandlerCallDetails
    ) -> RpcMethodHandler[Any, Any] | None:
        """Turn away, or pass on to the method."""
        method = handler_call_details.method
        if method.startswith(f"/{health.SERVICE_NAME}/"):
            handler = await continuation(handler_call_details)
            return handler and reading(handler)
        if self._draining:
            return self._turned_away(
                method, grpc.StatusCode.UNAVAILABLE, "this server is stopping; ask another, or again in a while"
            )
        try:
            account = self._account(handler_call_details)
        except CloudAuthError as error:
            return self._turned_away(method, grpc.StatusCode.UNAUTHENTICATED, str(error))
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        return self._watched(METHODS[method], handler, account) if method in METHODS else reading(handler)

    def _account(self, details: HandlerCallDetails) -> Account:
        """Raises CloudAuthError: no token, or nobody's."""
        if self._tenants is None:
            return self._everybody
        for key, value in details.invocation_metadata:
            scheme, _, token = value.partition(" ") if key == codec.AUTHORIZATION_KEY and isinstance(value, str) else ("", "", "")
            if scheme.lower() == "bearer":
                return self._tenants.account(token)
        raise CloudAuthError("no token came with the request; send one (Client(token=...), --token-file or EDGECLOUD_TOKEN)")

    def _turned_away(self, method: str, code: grpc.StatusCode, words: str) -> RpcMethodHandler[Any, Any]:
        """In place of any method: ends the call before a message of it is read."""

        async def turn_away(_: Any, context: ServicerContext[Any, Any]) -> None:
            self._ended(METHODS.get(method, "other"), code.name, "", context, 0.0)  # a stranger cannot make up a label
            await abort(context, code, words)

        make: Callable[..., RpcMethodHandler[Any, Any]] = grpc.stream_stream_rpc_method_handler
        return make(turn_away)

    def _watched(self, method: str, handler: RpcMethodHandler[Any, Any], account: Account) -> RpcMethodHandler[Any, Any]:
        """The same method, which is let in first. Ours take one message, and answer with one or write many."""
        behaviour: Any = handler.unary_stream or handler.unary_unary

        async def watched(_: object, context: ServicerContext[Any, Any]) -> Any:
            async with self._counted(method, account, context):
                request = await only_message(context, self._message_s)
                with self._place():
                    return await behaviour(request, context)

        return reading_handler(handler, watched)

    @asynccontextmanager
    async def _counted(self, method: str, account: Account, context: ServicerContext[Any, Any]) -> AsyncIterator[None]:
        ACCOUNT.set(account)
        started = time.perf_counter()
        code = "UNKNOWN"
        try:
            try:
                yield
            except CloudOverloadedError as error:
                await abort_overloaded(context, error)
            code = "OK"
        except asyncio.CancelledError:
            code = "CANCELLED"
            raise
        except grpc.aio.AbortError:
            code = context.code().name
            raise
        finally:
            self._ended(method, code, account.tenant, context, (time.perf_counter() - started) * 1e3)

    def _ended(self, method: str, code: str, tenant: str, context: ServicerContext[Any, Any], duration_ms: float) -> None:
        self._metrics.ended(method, code, tenant)
        if logger.isEnabledFor(logging.DEBUG):
            told = {"method": method, "code": code, "tenant": tenant, "peer": context.peer(), "duration_ms": round(duration_ms, 3)}
            logger.debug("%s %s", method, code, extra=told)

    @contextmanager
    def _place(self) -> Iterator[None]:
        """Raises CloudOverloadedError when all are taken."""
        if self._num_running >= self._max_requests:
            raise CloudOverloadedError(f"{self._num_running} requests are under way, as many as this server takes", BUSY_RETRY_S)
        self._num_running += 1
        self._empty.clear()
        try:
            yield
        finally:
            self._num_running -= 1
            if not self._num_running:
                self._empty.set()
