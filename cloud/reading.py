"""A call's message, which may come late, not at all, or as bytes that are none: each ends the call with a status that says so."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from grpc import RpcMethodHandler
from grpc.aio import ServicerContext

from edgecloud.cloud.status import abort

MESSAGE_S = 60.0  # for a call's one message to come, on however slow a link


async def only_message(context: ServicerContext[Any, Any], patience_s: float | None = MESSAGE_S) -> Any:
    """The message of a call that takes one; a call without ends here."""
    try:
        async with asyncio.timeout(patience_s):
            message = await _next_message(context)
    except TimeoutError:
        await abort(context, grpc.StatusCode.DEADLINE_EXCEEDED, f"no message came within {patience_s:g} s; send it with the call")
    if message is grpc.aio.EOF:
        await abort(context, grpc.StatusCode.INVALID_ARGUMENT, "the call ended without a message; send one")
    return message


def reading(handler: RpcMethodHandler[Any, Any]) -> RpcMethodHandler[Any, Any]:
    """The same method, of any kind, read in our way: gRPC's answers UNKNOWN to bytes that are no message, and nothing to none."""
    behaviour: Any = handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream

    async def read(_: object, context: ServicerContext[Any, Any]) -> Any:
        answer = behaviour(_messages(context) if handler.request_streaming else await only_message(context), context)
        if not isinstance(answer, AsyncIterator):
            return await answer
        async for reply in answer:
            await context.write(reply)
        return None

    return reading_handler(handler, read)


def reading_handler(handler: RpcMethodHandler[Any, Any], read: Any) -> RpcMethodHandler[Any, Any]:
    """`read(_, context)` in place of a method. To gRPC it takes a stream of messages: only of those a method may ask itself."""
    make: Callable[..., RpcMethodHandler[Any, Any]] = (
        grpc.stream_stream_rpc_method_handler if handler.response_streaming else grpc.stream_unary_rpc_method_handler
    )
    return make(read, handler.request_deserializer, handler.response_serializer)


async def _messages(context: ServicerContext[Any, Any]) -> AsyncIterator[Any]:
    while (message := await _next_message(context)) is not grpc.aio.EOF:
        yield message


async def _next_message(context: ServicerContext[Any, Any]) -> Any:
    try:
        return await context.read()
    except DecodeError as error:
        words = f"the bytes are no protobuf message of this method: {error}; send what its .proto file says"
        await abort(context, grpc.StatusCode.INVALID_ARGUMENT, words)
