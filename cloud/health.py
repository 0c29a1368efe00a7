"""Whether this server serves, as `grpc.health.v1` asks.

Of our own: in grpcio-health-checking a change waits until every watcher has been told, so one that takes no message would keep an
engine from being started again, and a server from stopping.
"""

from __future__ import annotations

import asyncio

import grpc
from grpc.aio import ServicerContext
from grpc_health.v1 import health_pb2, health_pb2_grpc

from edgecloud.cloud.status import abort
from edgecloud.rpc import codec

State = health_pb2.HealthCheckResponse
HealthContext = ServicerContext[health_pb2.HealthCheckRequest, health_pb2.HealthCheckResponse]


class Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]  # no stubs
    """One state, for the server ("") and for its service. A watcher is told each in its own time, and the latest at last."""

    def __init__(self) -> None:
        self._serving = True
        self._stopping = False
        self._changed = asyncio.Event()

    def set_serving(self, serving: bool) -> None:
        """What is told from now on, unless the server is stopping."""
        self._serving = serving
        self._changed.set()
        self._changed = asyncio.Event()

    def stop(self) -> None:
        """NOT_SERVING, for good."""
        self._stopping = True
        self.set_serving(False)

    async def Check(  # noqa: N802  # gRPC's names
        self, request: health_pb2.HealthCheckRequest, context: HealthContext
    ) -> health_pb2.HealthCheckResponse:
        """The state now; of a service that is not here, NOT_FOUND."""
        state = self._state(request.service)
        if state == State.SERVICE_UNKNOWN:
            await abort(context, grpc.StatusCode.NOT_FOUND, f"no such service here; ask for {codec.SERVICE_NAME}, or for ''")
        return health_pb2.HealthCheckResponse(status=state)

    async def Watch(  # noqa: N802
        self, request: health_pb2.HealthCheckRequest, context: HealthContext
    ) -> None:
        """The state now, and after every change."""
        told = None
        while True:
            changed, state = self._changed, self._state(request.service)
            if state != told:
                await context.write(health_pb2.HealthCheckResponse(status=state))
                told = state
            await changed.wait()

    def _state(self, service: str) -> int:
        if service not in ("", codec.SERVICE_NAME):
            return int(State.SERVICE_UNKNOWN)
        return int(State.SERVING if self._serving and not self._stopping else State.NOT_SERVING)
