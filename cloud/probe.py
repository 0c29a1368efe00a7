"""Ask a service whether it is healthy, as a container's health check does."""

from __future__ import annotations

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from edgecloud.errors import CloudUnavailableError
from edgecloud.rpc import codec


def check_health(
    address: str, credentials: grpc.ChannelCredentials | None, timeout_s: float, server_name: str | None = None
) -> None:
    """Return when the service at HOST:PORT is serving. `server_name`: whom its certificate must name, if not HOST.

    Raises:
        CloudUnavailableError: it is not, or nothing answers in time.
    """
    options = [] if server_name is None else [("grpc.ssl_target_name_override", server_name)]
    channel = grpc.insecure_channel(address, options) if credentials is None else grpc.secure_channel(address, credentials, options)
    with channel:
        try:
            request = health_pb2.HealthCheckRequest(service=codec.SERVICE_NAME)
            reply = health_pb2_grpc.HealthStub(channel).Check(request, timeout=timeout_s)
        except grpc.RpcError as error:
            raise CloudUnavailableError(f"{address} does not answer: {error.code().name}: {error.details()}") from error
    if reply.status != health_pb2.HealthCheckResponse.SERVING:
        name = health_pb2.HealthCheckResponse.ServingStatus.Name(reply.status)
        raise CloudUnavailableError(f"{address} is {name}")
