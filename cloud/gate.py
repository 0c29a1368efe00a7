"""The gate of a server: every request but a health check comes through here, and is let in, counted and let out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import grpc
from grpc import HandlerCallDetails, RpcMethodHandler
from grpc.aio import ServicerContext
from grpc_health.v1 import health

from edgecloud.cloud.quotas import ACCOUNT, BUSY_RETRY_S, Account
from edgecloud.cloud.status import abort, abort_overloaded
from edgecloud.cloud.tenants import Tenants
from edgecloud.errors import CloudAuthError, CloudOverloadedError
from edgecloud.rpc import codec

Continuation = Callable[[HandlerCallDetails], Awaitable["RpcMethodHandler[Any, Any] | None"]]


class Gate(grpc.aio.ServerInterceptor):
    """Lets in who shows a token of `tenants` (None: anybody), `max_requests` at a time, and nobody any more once it drains."""

    def __init__(self, tenants: Tenants | None = None, max_requests: int = 512) -> None:
        self._tenants = tenants
        self._max_requests = max_requests
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
            return await continuation(handler_call_details)
        if self._draining:
            return _turned_away(grpc.StatusCode.UNAVAILABLE, "this server is stopping; ask another, or again in a while")
        try:
            account = self._account(handler_call_details)
        except CloudAuthError as error:
            return _turned_away(grpc.StatusCode.UNAUTHENTICATED, str(error))
        handler = await continuation(handler_call_details)
        if handler is None or not method.startswith(f"/{codec.SERVICE_NAME}/"):
            return handler
        return self._watched(handler, account)

    def _account(self, details: HandlerCallDetails) -> Account:
        """Raises CloudAuthError: no token, or nobody's."""
        if self._tenants is None:
            return self._everybody
        for key, value in details.invocation_metadata:
            scheme, _, token = value.partition(" ") if key == codec.AUTHORIZATION_KEY and isinstance(value, str) else ("", "", "")
            if scheme.lower() == "bearer":
                return self._tenants.account(token)
        raise CloudAuthError("no token came with the request; send one (Client(token=...), --token-file or EDGECLOUD_TOKEN)")

    def _watched(self, handler: RpcMethodHandler[Any, Any], account: Account) -> RpcMethodHandler[Any, Any]:
        """The same method, which is let in first. Ours take one message, and answer with one or write many."""
        behaviour: Any = handler.unary_stream or handler.unary_unary
        make: Any = grpc.unary_stream_rpc_method_handler if handler.response_streaming else grpc.unary_unary_rpc_method_handler

        async def watched(request: Any, context: ServicerContext[Any, Any]) -> Any:
            async with self._inside(account, context):
                return await behaviour(request, context)

        return make(watched, handler.request_deserializer, handler.response_serializer)  # type: ignore[no-any-return]

    @asynccontextmanager
    async def _inside(self, account: Account, context: ServicerContext[Any, Any]) -> AsyncIterator[None]:
        ACCOUNT.set(account)
        try:
            with self._place():
                yield
        except CloudOverloadedError as error:
            await abort_overloaded(context, error)

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


def _turned_away(code: grpc.StatusCode, words: str) -> RpcMethodHandler[Any, Any]:
    """In place of any method: ends the call before a message of it is read."""

    async def turn_away(_: Any, context: ServicerContext[Any, Any]) -> None:
        await abort(context, code, words)

    make: Any = grpc.stream_stream_rpc_method_handler
    return make(turn_away)  # type: ignore[no-any-return]
