"""The cloud's part of a cut, over the wire: one call of `Infer`, and what it took on its way there, in the cloud and back."""

from __future__ import annotations

import time
from collections.abc import Mapping

import grpc

from edgecloud.edge.graph_estimates import Trip
from edgecloud.edge.remote import Cloud, map_error
from edgecloud.errors import CloudError, CloudUnavailableError, ConfigError, ProtocolError
from edgecloud.graph_bundle import CutInfo
from edgecloud.rpc import edgecloud_pb2 as pb
from edgecloud.tensors import Array, from_bytes, num_bytes, to_bytes

MAX_REPLY_BYTES = (1 << 28) + (1 << 16)  # a service's largest, and its frame


class UnansweredError(CloudUnavailableError):
    """No answer came in the time given. `received`: whether the service was heard to have the request."""

    def __init__(self, message: str, received: bool) -> None:
        super().__init__(message)
        self.received = received


def infer_request(cut: CutInfo, crossing: Mapping[str, Array], graph_hash: int) -> pb.InferRequest:
    """What crosses the cut as a message. Rows that a codec cannot hold (infinities, huge values) go as they are."""
    request = pb.InferRequest(cut=cut.name, graph_hash=graph_hash)
    for tensor in cut.boundary:
        array, codec = crossing[tensor.name], tensor.codec
        try:
            data = to_bytes(array, codec)
        except ConfigError:
            data, codec = to_bytes(array), ""
        request.inputs.append(pb.Tensor(name=tensor.name, dtype=str(array.dtype), shape=array.shape, codec=codec, data=data))
    return request


def infer(cloud: Cloud, cut: CutInfo, request: pb.InferRequest, timeout_s: float) -> tuple[dict[str, Array], Trip]:
    """Ask once.

    Raises:
        UnansweredError: not within `timeout_s`.
        CloudError: the service cannot be reached, is full, or refuses; the other classes say which.
        ProtocolError: the answer makes no sense.
    """
    started = time.perf_counter()
    call = cloud.infer(request, timeout=timeout_s, metadata=cloud.metadata)
    has_it = False  # the service, the request
    try:
        call.initial_metadata()  # comes when it has; or, empty, with the end of a call that failed
        received, has_it = time.perf_counter(), call.is_active()
        reply = next(call)
    except StopIteration:
        raise ProtocolError(f"{cloud.address} ended a call of Infer without an answer") from None
    except grpc.RpcError as error:
        raise _failure(error, cloud.address, timeout_s, has_it) from error
    finally:
        call.cancel()  # harmless after the end
    elapsed_ms, uplink_ms = (time.perf_counter() - started) * 1e3, (received - started) * 1e3
    downlink_ms = max(0.0, elapsed_ms - uplink_ms - reply.queue_ms - reply.compute_ms)
    trip = Trip(
        uplink_ms, reply.queue_ms, reply.compute_ms, downlink_ms, request.ByteSize(), reply.ByteSize(), max(1, reply.num_batched)
    )
    return _outputs(reply, cut, cloud.address), trip


def _failure(error: grpc.RpcError, address: str, timeout_s: float, received: bool) -> CloudError:
    if error.code() == grpc.StatusCode.DEADLINE_EXCEEDED:
        return UnansweredError(f"{address} did not answer within {timeout_s:.1f} s", received)
    return map_error(error, address)


def _outputs(reply: pb.InferReply, cut: CutInfo, address: str) -> dict[str, Array]:
    """Raises ProtocolError: they are not the cut's."""
    names = [tensor.name for tensor in reply.outputs]
    if sorted(names) != sorted(cut.cloud_outputs):
        raise ProtocolError(f"{address} gives {sorted(names)} for {cut.name}, not {sorted(cut.cloud_outputs)}")
    return {tensor.name: _output(tensor, address) for tensor in reply.outputs}


def _output(tensor: pb.Tensor, address: str) -> Array:
    """Raises ProtocolError: the message is no tensor."""
    try:
        wanted = num_bytes(tensor.dtype, tensor.shape, tensor.codec)
        if len(tensor.data) == wanted:
            return from_bytes(tensor.dtype, tensor.shape, tensor.codec, tensor.data)
    except ConfigError as error:
        raise ProtocolError(f"{address} gives an output {tensor.name!r} that is none: {error}") from error
    raise ProtocolError(f"{address} gives {len(tensor.data)} bytes for output {tensor.name!r}, which takes {wanted}")
