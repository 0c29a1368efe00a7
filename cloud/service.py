"""The gRPC service: checks what comes over the wire, asks the engine, and maps its answers to replies and status codes."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Iterator
from contextlib import aclosing, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, NoReturn

import grpc
from grpc.aio import ServicerContext

from edgecloud.cloud.asked import Request, asked
from edgecloud.cloud.engine_client import AsyncEngine
from edgecloud.cloud.metrics import Metrics
from edgecloud.cloud.quotas import ACCOUNT, Account
from edgecloud.cloud.spans import call_span
from edgecloud.cloud.status import abort
from edgecloud.cloud.work import Answer, Extend, Extended, Failed, Gone, Invalid, Overloaded, Refused
from edgecloud.errors import ConfigError, ModelMismatchError
from edgecloud.kernels.codec import CODECS
from edgecloud.rpc import codec
from edgecloud.rpc import edgecloud_pb2 as pb
from edgecloud.rpc import edgecloud_pb2_grpc as pb_grpc

MAX_STOP_TOKEN_IDS = 1024  # they are kept as long as the stream lasts: a message full of them would take a hundred times its size
LAST_WORD_S = 1.0  # for a status to be taken by who takes no messages


@dataclass(frozen=True, slots=True)
class Limits:
    """What a request may ask for; told by Describe."""

    max_context_tokens: int
    max_draft_tokens: int = 32
    max_message_bytes: int = 1 << 20
    max_sessions: int = 1024


@dataclass(frozen=True, slots=True)
class Identity:
    """What is served; told by Describe."""

    server_version: str
    model_name: str
    model_fingerprint: str
    tokenizer_fingerprint: str
    vocab_size: int
    dtype: str
    exact: str
    width: int  # of the residual stream
    tail_cuts: tuple[int, ...]  # layers that Tail may enter at


class VerificationService(pb_grpc.VerificationServicer):
    """Stateless: sessions live in the engine."""

    def __init__(
        self,
        engine: AsyncEngine,
        identity: Identity,
        limits: Limits,
        *,
        slow_reader_s: float = 60.0,
        metrics: Metrics | None = None,
    ) -> None:
        self._engine = engine
        self._identity = identity
        self._limits = limits
        self._slow_reader_s = slow_reader_s
        self._metrics = metrics or Metrics()
        self._pair_hash = codec.pair_hash(identity.model_fingerprint, identity.tokenizer_fingerprint)

    async def Describe(  # noqa: N802  # gRPC's names
        self, request: pb.DescribeRequest, context: ServicerContext[pb.DescribeRequest, pb.DescribeReply]
    ) -> pb.DescribeReply:
        """Protocol, fingerprints, limits, load."""
        try:
            codec.refuse_unknown_fields(request)
        except ConfigError as error:
            await abort(context, grpc.StatusCode.INVALID_ARGUMENT, str(error))
        identity, limits = self._identity, self._limits
        return pb.DescribeReply(
            protocol_version=codec.PROTOCOL_VERSION,
            server_version=identity.server_version,
            model_name=identity.model_name,
            model_fingerprint=identity.model_fingerprint,
            tokenizer_fingerprint=identity.tokenizer_fingerprint,
            vocab_size=identity.vocab_size,
            dtype=identity.dtype,
            exact=identity.exact,
            limits=pb.Limits(
                max_context_tokens=self._window(ACCOUNT.get()),
                max_draft_tokens=limits.max_draft_tokens,
                max_message_bytes=limits.max_message_bytes,
                max_sessions=limits.max_sessions,
            ),
            load=self._load(),
            tail_cuts=identity.tail_cuts,
            boundary_codecs=CODECS if identity.tail_cuts else (),
        )

    async def Verify(  # noqa: N802
        self, request: pb.VerifyRequest, context: ServicerContext[pb.VerifyRequest, pb.VerifyReply]
    ) -> pb.VerifyReply:
        """One draft, one verdict."""
        return await self._verdict("Verify", request, context)

    async def Tail(  # noqa: N802
        self, request: pb.TailRequest, context: ServicerContext[pb.TailRequest, pb.VerifyReply]
    ) -> pb.VerifyReply:
        """The same, of a target whose first layers the device has run."""
        return await self._verdict("Tail", request, context)

    async def _verdict(
        self, method: str, request: pb.VerifyRequest | pb.TailRequest, context: ServicerContext[Any, pb.VerifyReply]
    ) -> pb.VerifyReply:
        extend = await self._accept(request, context)
        with self._place(method, extend) as extended:
            async with aclosing(self._engine.extend(extend)) as answers:
                async for answer in answers:
                    if not isinstance(answer, Extended):
                        await _abort(context, answer)
                    extended(answer)
                    return pb.VerifyReply(
                        num_accepted=answer.num_accepted,
                        next_token_id=answer.next_token_id,
                        cached_length=answer.cached_length,
                        queue_ms=answer.queue_ms,
                        compute_ms=answer.compute_ms,
                        target_passes=answer.target_passes,
                        load=self._load(),
                    )
        raise AssertionError("the engine gave no answer")

    async def Decode(  # noqa: N802
        self, request: pb.DecodeRequest, context: ServicerContext[pb.DecodeRequest, pb.DecodeReply]
    ) -> None:
        """The target's own tokens, one a message. A reader that takes none for too long is left, and its session freed.

        The load goes with the first and the last: with every one it would double what a token costs.
        """
        extend = await self._accept(request, context)
        first = True
        try:
            with self._place("Decode", extend) as extended:
                async with aclosing(self._engine.extend(extend)) as answers:
                    async for answer in answers:
                        if not isinstance(answer, Extended):
                            await _abort(context, answer)
                        extended(answer)
                        reply = pb.DecodeReply(
                            token_ids=[answer.next_token_id],
                            queue_ms=answer.queue_ms,
                            compute_ms=answer.compute_ms,
                            target_passes=answer.target_passes,
                            load=self._load() if first or answer.last else None,
                        )
                        first = False
                        async with asyncio.timeout(self._slow_reader_s):
                            await context.write(reply)
        except grpc.aio.InternalError as error:  # gRPC's word for a write to who has gone
            raise asyncio.CancelledError from error
        except TimeoutError:
            words = f"no message was taken for {self._slow_reader_s:g} s"
            with suppress(TimeoutError):
                async with asyncio.timeout(LAST_WORD_S):
                    await abort(context, grpc.StatusCode.CANCELLED, words)
            raise asyncio.CancelledError(words) from None  # the status waits behind the messages; nobody here waits for it

    async def Release(  # noqa: N802
        self, request: pb.ReleaseRequest, context: ServicerContext[pb.ReleaseRequest, pb.ReleaseReply]
    ) -> pb.ReleaseReply:
        """Forget a session; an unknown one is fine."""
        try:
            codec.refuse_unknown_fields(request)
            _check_session_id(request.session_id)
        except ConfigError as error:
            await abort(context, grpc.StatusCode.INVALID_ARGUMENT, str(error))
        account = ACCOUNT.get()
        session_id = account.session_id(request.session_id)
        account.forget_session(session_id)
        self._engine.release(session_id)
        return pb.ReleaseReply()

    async def Infer(  # noqa: N802
        self, request: pb.InferRequest, context: ServicerContext[pb.InferRequest, pb.InferReply]
    ) -> pb.InferReply:
        """Not here."""
        words = "this service runs a language model and no ONNX graph; ask it for Verify or Decode, or serve a graph bundle"
        await abort(context, grpc.StatusCode.UNIMPLEMENTED, words)

    def _load(self) -> pb.Load:
        load = self._engine.load
        return pb.Load(
            num_sessions=load.num_sessions,
            num_waiting=load.num_waiting,
            num_free_pages=load.num_free_pages,
            num_pages=load.num_pages,
            pass_base_ms=load.cost.base_ms,
            pass_per_token_ms=load.cost.per_token_ms,
            pass_per_context_token_ms=load.cost.per_context_token_ms,
        )

    def _window(self, account: Account) -> int:
        """Tokens that a context may have: what a tenant's whole quota could not hold would never be answered."""
        return min(self._limits.max_context_tokens, account.quota.max_cache_tokens or self._limits.max_context_tokens)

    async def _accept(self, request: Request, context: ServicerContext[Any, Any]) -> Extend:
        """The checked request; one that is refused ends the call."""
        try:
            return self._extend(request, context)
        except ConfigError as error:
            await abort(context, grpc.StatusCode.INVALID_ARGUMENT, str(error))
        except ModelMismatchError as error:
            detail = pb.ErrorDetail(model_fingerprint=self._identity.model_fingerprint)
            await abort(context, grpc.StatusCode.FAILED_PRECONDITION, str(error), detail)
        raise AssertionError("abort returned")

    @contextmanager
    def _place(self, method: str, extend: Extend) -> Iterator[Callable[[Extended], None]]:
        """A request's place while it runs; gives whom to tell of each answer.

        Raises:
            CloudOverloadedError: the tenant has used up a quota. The gate answers it.
        """
        account, num_draft_tokens = ACCOUNT.get(), len(extend.draft_ids)
        places = account.request(time.monotonic()), account.session(extend.session_id)
        with places[0], places[1] as evicted, call_span(method, extend, account.tenant) as span:
            if evicted is not None:
                self._engine.release(evicted)
            account.take_tokens(extend.num_new_context + num_draft_tokens)
            self._metrics.accepted(extend, account.tenant)

            def extended(answer: Extended) -> None:
                account.take_tokens(1)
                self._metrics.extended(answer, num_draft_tokens, account.tenant)
                span.extended(answer)

            yield extended

    def _extend(self, request: Request, context: ServicerContext[Any, Any]) -> Extend:
        """Check a request against limits and vocabulary.

        Raises:
            ConfigError: names the value.
            ModelMismatchError: it was meant for another target.
        """
        codec.refuse_unknown_fields(request)
        if request.pair_hash not in (0, self._pair_hash):
            raise ModelMismatchError(f"this service runs {self._identity.model_name}, not the target that the request means")
        _check_session_id(request.session_id)
        what = asked(request, self._identity.tail_cuts, self._identity.width)
        context_ids, draft_ids, stop_ids, max_new_tokens, boundary, assumed_id = what
        if request.context_start < 0:
            raise ConfigError(f"context_start is {request.context_start}; it takes a position from 0")
        if request.context_start == 0 and request.context_hash != 0:
            raise ConfigError(f"context_hash is {request.context_hash:#x}; before context_start 0 there is nothing to hash: send 0")
        length = request.context_start + what.num_new_context
        if length < 1:
            raise ConfigError("the context is empty; send at least one token")
        if max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens is {max_new_tokens}; it takes at least 1")
        if len(stop_ids) > MAX_STOP_TOKEN_IDS:
            raise ConfigError(f"stop_token_ids has {len(stop_ids)} ids; it takes at most {MAX_STOP_TOKEN_IDS}")
        if len(draft_ids) > self._limits.max_draft_tokens:
            raise ConfigError(f"the draft has {len(draft_ids)} tokens; this service takes at most {self._limits.max_draft_tokens}")
        account = ACCOUNT.get()
        window = self._window(account)
        if length + len(draft_ids) > window:
            whose = "this service's window" if window == self._limits.max_context_tokens else "this tenant's max_cache_tokens"
            raise ConfigError(f"context and draft have {length + len(draft_ids)} tokens; {whose} is {window}")
        context_ids, draft_ids = tuple(context_ids), tuple(draft_ids)  # not before: a message holds a million
        highest = max(max(context_ids, default=0), max(draft_ids, default=0), assumed_id or 0)
        if highest >= self._identity.vocab_size:
            raise ConfigError(f"token id {highest} is outside the vocabulary of {self._identity.vocab_size}")
        return Extend(
            session_id=account.session_id(request.session_id),
            context_start=request.context_start,
            context_ids=context_ids,
            context_hash=request.context_hash,
            sampling=codec.sampling_from_wire(request.sampling),
            draft_ids=draft_ids,
            max_new_tokens=min(max_new_tokens, window - length + 1),
            stop_token_ids=frozenset(stop_ids),
            tenant=account.tenant,
            max_cache_tokens=account.quota.max_cache_tokens,
            deadline_s=_deadline_s(context),
            boundary=boundary,
            assumed_id=assumed_id,
        )


def _deadline_s(context: ServicerContext[Any, Any]) -> float:
    """When the client stops waiting, by time.monotonic()."""
    remaining_s = context.time_remaining()
    return math.inf if remaining_s is None else time.monotonic() + remaining_s


def _check_session_id(session_id: bytes) -> None:
    if len(session_id) != codec.SESSION_ID_BYTES:
        raise ConfigError(f"session_id has {len(session_id)} bytes; it takes {codec.SESSION_ID_BYTES} random ones")


async def _abort(context: ServicerContext[Any, Any], answer: Answer) -> NoReturn:
    """Turn an engine's refusal into a status. Always raises."""
    detail = pb.ErrorDetail()
    match answer:
        case Refused(cached_length):
            code = grpc.StatusCode.FAILED_PRECONDITION
            message = f"the session's first {cached_length} tokens are known here; send the rest"
            detail.cached_length = cached_length
        case Invalid(reason):
            code, message = grpc.StatusCode.INVALID_ARGUMENT, reason
        case Overloaded(reason, retry_after_ms):
            code, message = grpc.StatusCode.RESOURCE_EXHAUSTED, f"{reason}; come again in {retry_after_ms} ms"
            detail.retry_after_ms = retry_after_ms
        case Failed(reason):
            code, message = grpc.StatusCode.INTERNAL, f"the pass failed: {reason}"
        case Gone(reason):
            code, message = grpc.StatusCode.UNAVAILABLE, reason
        case Extended():
            raise AssertionError(answer)
    await abort(context, code, message, detail)
