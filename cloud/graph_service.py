"""The gRPC service of a graph bundle: checks what comes over the wire, asks the engine, and maps its answers to replies."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import grpc
from grpc.aio import ServicerContext

from edgecloud.cloud.engine_client import AsyncGraphEngine
from edgecloud.cloud.graph_work import CutSpec, GraphAnswer, Inferred, RunCut, TensorData, TensorSpec, Unfit
from edgecloud.cloud.metrics import Metrics
from edgecloud.cloud.quotas import ACCOUNT, BUSY_RETRY_S
from edgecloud.cloud.spans import infer_span
from edgecloud.cloud.status import abort
from edgecloud.cloud.work import Failed, Gone, Overloaded
from edgecloud.errors import CloudOverloadedError, ConfigError, ModelMismatchError
from edgecloud.kernels.codec import CODECS
from edgecloud.rpc import codec
from edgecloud.rpc import edgecloud_pb2 as pb
from edgecloud.rpc import edgecloud_pb2_grpc as pb_grpc
from edgecloud.tensors import num_bytes

NO_TEXT = "this service runs an ONNX graph and no language model; ask it for Infer (Client.run), or serve a text bundle"


@dataclass(frozen=True, slots=True)
class GraphIdentity:
    """What is served; told by Describe."""

    server_version: str
    name: str
    fingerprint: str
    graph_hash: int
    exact: str  # bitwise: no run is shared; tolerance: answers are to rounding what lone runs give


@dataclass(frozen=True, slots=True)
class GraphLimits:
    """What requests may take."""

    max_message_bytes: int
    max_underway_bytes: int = 1 << 29  # of the data of all requests under way


class GraphService(pb_grpc.VerificationServicer):
    """Stateless, and so is its engine."""

    def __init__(
        self,
        engine: AsyncGraphEngine,
        identity: GraphIdentity,
        cuts: Mapping[str, CutSpec],
        limits: GraphLimits,
        metrics: Metrics | None = None,
    ) -> None:
        self._engine = engine
        self._identity = identity
        self._cuts = cuts
        self._limits = limits
        self._metrics = metrics or Metrics()
        self._underway_bytes = 0

    async def Describe(  # noqa: N802  # gRPC's names
        self, request: pb.DescribeRequest, context: ServicerContext[pb.DescribeRequest, pb.DescribeReply]
    ) -> pb.DescribeReply:
        """Protocol, fingerprint, cuts, limits, load."""
        try:
            codec.refuse_unknown_fields(request)
        except ConfigError as error:
            await abort(context, grpc.StatusCode.INVALID_ARGUMENT, str(error))
        identity = self._identity
        return pb.DescribeReply(
            protocol_version=codec.PROTOCOL_VERSION,
            server_version=identity.server_version,
            model_name=identity.name,
            model_fingerprint=identity.fingerprint,
            exact=identity.exact,
            limits=pb.Limits(max_message_bytes=self._limits.max_message_bytes),
            load=pb.Load(num_waiting=self._engine.load.num_waiting),
            boundary_codecs=CODECS,
            graph_cuts=sorted(self._cuts),
        )

    async def Infer(  # noqa: N802
        self, request: pb.InferRequest, context: ServicerContext[pb.InferRequest, pb.InferReply]
    ) -> pb.InferReply:
        """The cloud's part of a cut. Metadata leaves as soon as the request has come: so the device knows what its link takes."""
        infer = await self._accept(request, context)
        with self._place(infer) as inferred:
            await context.send_initial_metadata(())
            answer = await self._engine.infer(infer)
            if not isinstance(answer, Inferred):
                await _abort(context, answer)
            queue_ms = max(0.0, (time.monotonic() - infer.sent_s) * 1e3 - answer.compute_ms)
            inferred(answer, queue_ms)
        outputs = [pb.Tensor(name=t.name, dtype=t.dtype, shape=t.shape, data=t.data) for t in answer.outputs]
        return pb.InferReply(outputs=outputs, queue_ms=queue_ms, compute_ms=answer.compute_ms, num_batched=answer.num_batched)

    async def Verify(  # noqa: N802
        self, request: pb.VerifyRequest, context: ServicerContext[pb.VerifyRequest, pb.VerifyReply]
    ) -> pb.VerifyReply:
        """Not here."""
        await abort(context, grpc.StatusCode.UNIMPLEMENTED, NO_TEXT)

    async def Decode(  # noqa: N802
        self, request: pb.DecodeRequest, context: ServicerContext[pb.DecodeRequest, pb.DecodeReply]
    ) -> None:
        """Not here."""
        await abort(context, grpc.StatusCode.UNIMPLEMENTED, NO_TEXT)

    async def Tail(  # noqa: N802
        self, request: pb.TailRequest, context: ServicerContext[pb.TailRequest, pb.VerifyReply]
    ) -> pb.VerifyReply:
        """Not here."""
        await abort(context, grpc.StatusCode.UNIMPLEMENTED, NO_TEXT)

    async def Release(  # noqa: N802
        self, request: pb.ReleaseRequest, context: ServicerContext[pb.ReleaseRequest, pb.ReleaseReply]
    ) -> pb.ReleaseReply:
        """Not here."""
        await abort(context, grpc.StatusCode.UNIMPLEMENTED, NO_TEXT)

    async def _accept(self, request: pb.InferRequest, context: ServicerContext[Any, Any]) -> RunCut:
        """The checked request; one that is refused ends the call."""
        try:
            return self._infer(request, context)
        except ConfigError as error:
            await abort(context, grpc.StatusCode.INVALID_ARGUMENT, str(error))
        except ModelMismatchError as error:
            detail = pb.ErrorDetail(model_fingerprint=self._identity.fingerprint)
            await abort(context, grpc.StatusCode.FAILED_PRECONDITION, str(error), detail)
        raise AssertionError("abort returned")

    def _infer(self, request: pb.InferRequest, context: ServicerContext[Any, Any]) -> RunCut:
        """Check a request against the cut's graph.

        Raises:
            ConfigError: names the value.
            ModelMismatchError: it was meant for another graph, or for other cuts of it.
        """
        sent_s = time.monotonic()
        codec.refuse_unknown_fields(request)
        if request.graph_hash not in (0, self._identity.graph_hash):
            raise ModelMismatchError(f"this service runs {self._identity.name}, not the graph and cuts that the request means")
        if request.cut not in self._cuts:
            raise ConfigError(f"cut is {request.cut[:40]!r}; this service takes {', '.join(sorted(self._cuts))}")
        specs = {spec.name: spec for spec in self._cuts[request.cut].inputs}
        names = [tensor.name for tensor in request.inputs]
        if sorted(names) != sorted(specs):
            shown = ", ".join(repr(name[:40]) for name in sorted(names)[: len(specs) + 1])
            raise ConfigError(f"inputs are {shown or 'none'}; {request.cut} takes {', '.join(map(repr, sorted(specs)))}, each once")
        for tensor in request.inputs:
            _check_tensor(tensor, specs[tensor.name])
        remaining_s = context.time_remaining()
        return RunCut(
            cut=request.cut,
            inputs=tuple(TensorData(t.name, t.dtype, tuple(t.shape), t.codec, t.data) for t in request.inputs),
            sent_s=sent_s,
            tenant=ACCOUNT.get().tenant,
            deadline_s=math.inf if remaining_s is None else sent_s + remaining_s,
        )

    @contextmanager
    def _place(self, infer: RunCut) -> Iterator[Callable[[Inferred, float], None]]:
        """A request's place while it runs; gives whom to tell of the answer.

        Raises:
            CloudOverloadedError: a quota is used up, or requests under way hold too many bytes. The gate answers it.
        """
        account, size = ACCOUNT.get(), sum(len(tensor.data) for tensor in infer.inputs)
        if self._underway_bytes + size > self._limits.max_underway_bytes:
            held = f"requests under way hold {self._underway_bytes} bytes, as many as this server takes"
            raise CloudOverloadedError(held, BUSY_RETRY_S)
        num_rows = infer.num_rows or 1
        with account.request(time.monotonic()), infer_span(infer, size) as span:
            account.take_tokens(num_rows)
            self._underway_bytes += size
            try:

                def inferred(answer: Inferred, queue_ms: float) -> None:
                    self._metrics.inferred(answer, queue_ms, num_rows, account.tenant)
                    span.inferred(answer, queue_ms)

                yield inferred
            finally:
                self._underway_bytes -= size


def _check_tensor(tensor: pb.Tensor, spec: TensorSpec) -> None:
    """Raises ConfigError that names the tensor."""
    try:
        wanted = num_bytes(tensor.dtype, tensor.shape, tensor.codec)
    except ConfigError as error:
        raise ConfigError(f"{spec.name!r}: {error}") from error
    sizes = ["any" if size is None else size for size in spec.shape]
    if tensor.dtype != spec.dtype:
        raise ConfigError(f"{spec.name!r} is {tensor.dtype}; this graph takes {spec.dtype}")
    if len(tensor.shape) != len(spec.shape) or any(w not in (None, n) for n, w in zip(tensor.shape, spec.shape, strict=True)):
        raise ConfigError(f"{spec.name!r} has shape {list(tensor.shape)}; this graph takes {sizes}")
    if tensor.codec not in ("", spec.codec):
        raise ConfigError(f"{spec.name!r} comes as {tensor.codec[:40]!r}; it takes {spec.codec or 'no codec'!r}, or none")
    if len(tensor.data) != wanted:
        raise ConfigError(f"{spec.name!r} has {len(tensor.data)} bytes of data; {tensor.dtype} {list(tensor.shape)} takes {wanted}")


async def _abort(context: ServicerContext[Any, Any], answer: GraphAnswer) -> NoReturn:
    """Turn an engine's refusal into a status. Always raises."""
    detail = pb.ErrorDetail()
    match answer:
        case Unfit(reason):
            code, message = grpc.StatusCode.INVALID_ARGUMENT, reason
        case Overloaded(reason, retry_after_ms):
            code, message = grpc.StatusCode.RESOURCE_EXHAUSTED, f"{reason}; come again in {retry_after_ms} ms"
            detail.retry_after_ms = retry_after_ms
        case Failed(reason):
            code, message = grpc.StatusCode.INTERNAL, f"the run failed: {reason}"
        case Gone(reason):
            code, message = grpc.StatusCode.UNAVAILABLE, reason
        case Inferred():
            raise AssertionError(answer)
    await abort(context, code, message, detail)
