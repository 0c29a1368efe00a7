"""How a call ends when it does not end well: a status, words, and the detail that the client acts on."""

from __future__ import annotations

import asyncio
import math
from typing import Any, NoReturn

import grpc
from grpc.aio import ServicerContext

from edgecloud.errors import CloudOverloadedError
from edgecloud.rpc import codec
from edgecloud.rpc import edgecloud_pb2 as pb


async def abort(
    context: ServicerContext[Any, Any], code: grpc.StatusCode, words: str, detail: pb.ErrorDetail | None = None
) -> NoReturn:
    """End the call. Always raises."""
    trailing = () if detail is None else ((codec.ERROR_DETAIL_KEY, detail.SerializeToString()),)
    try:
        await context.abort(code, words, trailing)
    except grpc.aio.InternalError as error:  # it has ended already: gRPC refused its message, or the client has gone
        raise asyncio.CancelledError from error
    raise AssertionError("abort returned")


async def abort_overloaded(context: ServicerContext[Any, Any], error: CloudOverloadedError) -> NoReturn:
    """End the call with a hint when to come again. Always raises."""
    retry_after_ms = max(1, math.ceil(error.retry_after_s * 1e3))
    words = f"{error}; come again in {retry_after_ms} ms"
    await abort(context, grpc.StatusCode.RESOURCE_EXHAUSTED, words, pb.ErrorDetail(retry_after_ms=retry_after_ms))
