"""The far end of the wire: a verification service as a `Verifier`. All of the device's gRPC is here.

Every call is a function of the tokens, so it is retried, within bounds, until it is answered: over broken connections, after
a server restart, and when the service has forgotten the session.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from edgecloud.edge.retry import Retry, Timeout
from edgecloud.errors import (
    CloudAuthError,
    CloudError,
    CloudOverloadedError,
    CloudRefusedError,
    CloudUnavailableError,
    ConfigError,
    ContextMissingError,
    ModelMismatchError,
    ProtocolError,
)
from edgecloud.hosts import is_loopback
from edgecloud.rpc import codec
from edgecloud.rpc import edgecloud_pb2 as pb
from edgecloud.rpc import edgecloud_pb2_grpc as pb_grpc
from edgecloud.sampling import SamplingSettings
from edgecloud.tokens import common_prefix
from edgecloud.types import CallCost, Round, Service, ServiceLoad, Verdict

RELEASE_TIMEOUT_S = 2.0


@dataclass(frozen=True, slots=True)
class TLS:
    """Encrypt, and check the server: `ca` is a PEM file (None: the system's). `cert` and `key`: mutual TLS."""

    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None


class Cloud:
    """A connection to one verification service. Opens nothing until the first call.

    `pair_hash` (codec.pair_hash) says whom every request means; 0: whatever is served. `token` says who asks. With `insecure`
    it may leave this machine unencrypted. No reply above `max_reply_bytes` is taken.

    Raises:
        ConfigError: the address is not HOST:PORT, a certificate cannot be read, or the token could be read on its way.
    """

    def __init__(
        self,
        address: str,
        tls: TLS | None,
        timeout: Timeout,
        pair_hash: int = 0,
        *,
        token: str | None = None,
        insecure: bool = False,
        max_reply_bytes: int = 1 << 22,
    ) -> None:
        host, _, port = address.rpartition(":")
        if not host or not port.isdigit() or not 0 < int(port) < 65536:
            raise ConfigError(f"cloud is {address!r}; it takes HOST:PORT")
        self.address = address
        self.timeout = timeout
        self._max_reply_bytes = max_reply_bytes
        self.pair_hash = pair_hash
        self.metadata = None if token is None else ((codec.AUTHORIZATION_KEY, f"Bearer {_check_token(token)}"),)
        if token is not None and tls is None and not insecure and not is_loopback(host):
            raise ConfigError(
                f"cloud is {address} without TLS: the token could be read on its way; give tls (--tls), or insecure (--insecure)"
            )
        self._credentials = None if tls is None else channel_credentials(tls)
        self._connect()
        self._releases: set[Any] = set()  # under way
        self.load: ServiceLoad | None = None  # the latest that any reply told

    def _connect(self) -> None:
        options = [
            ("grpc.initial_reconnect_backoff_ms", 200),
            ("grpc.min_reconnect_backoff_ms", 200),
            ("grpc.max_reconnect_backoff_ms", 2_000),
            ("grpc.keepalive_time_ms", 10_000),
            ("grpc.keepalive_timeout_ms", 10_000),
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.max_receive_message_length", self._max_reply_bytes),
        ]
        if self._credentials is None:
            self._channel = grpc.insecure_channel(self.address, options)
        else:
            self._channel = grpc.secure_channel(self.address, self._credentials, options)
        self.stub = pb_grpc.VerificationStub(self._channel)
        # On the wire the same as a method with one reply; but so gRPC shows what comes before the reply, when it comes.
        self.infer: Any = self._channel.unary_stream(
            f"/{codec.SERVICE_NAME}/Infer",
            request_serializer=pb.InferRequest.SerializeToString,
            response_deserializer=pb.InferReply.FromString,
        )

    def warm(self) -> None:
        """Connect, or wake the radio, without waiting. Whatever comes of it, the next call will see."""
        self._track(self.stub.Describe.future(pb.DescribeRequest(), timeout=self.timeout.connect_s, metadata=self.metadata))

    def reconnect(self) -> None:
        """Another connection. Calls under way on the old one end as if it had broken."""
        old = self._channel
        self._connect()
        old.close()

    def _track(self, future: Any) -> None:
        """Keep a call that nobody waits for until it has ended."""
        self._releases.add(future)
        future.add_done_callback(self._releases.discard)

    def describe(self, *, wait: bool) -> Service:
        """The handshake. With `wait`, a refused connection is tried again until the connect timeout.

        Raises:
            CloudUnavailableError: nothing answers within the connect timeout.
            CloudAuthError: it does not know the token.
            ProtocolError: it speaks another protocol version.
        """
        try:
            reply: pb.DescribeReply = self.stub.Describe(
                pb.DescribeRequest(), timeout=self.timeout.connect_s, wait_for_ready=wait, metadata=self.metadata
            )
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.DEADLINE_EXCEEDED:
                words = f"nothing answers at {self.address} within {self.timeout.connect_s:g} s; is `edgecloud serve` running?"
                raise CloudUnavailableError(words) from error
            raise map_error(error, self.address) from error
        if reply.protocol_version != codec.PROTOCOL_VERSION:
            raise ProtocolError(
                f"{self.address} speaks protocol version {reply.protocol_version}, this client {codec.PROTOCOL_VERSION}; "
                f"upgrade the older side"
            )
        self.heard(reply)
        return Service(
            protocol_version=reply.protocol_version,
            server_version=reply.server_version,
            model_name=reply.model_name,
            model_fingerprint=reply.model_fingerprint,
            tokenizer_fingerprint=reply.tokenizer_fingerprint,
            vocab_size=reply.vocab_size,
            dtype=reply.dtype,
            exact=reply.exact,
            max_context_tokens=reply.limits.max_context_tokens,
            max_draft_tokens=reply.limits.max_draft_tokens,
            max_message_bytes=reply.limits.max_message_bytes,
            tail_cuts=tuple(reply.tail_cuts),
            boundary_codecs=tuple(reply.boundary_codecs),
            graph_cuts=tuple(reply.graph_cuts),
        )

    def heard(self, reply: pb.DescribeReply | pb.VerifyReply | pb.DecodeReply) -> None:
        """Keep the load, if it came along."""
        if reply.HasField("load"):
            self.load = codec.load_from_wire(reply.load)

    def release(self, session_id: bytes) -> None:
        """Tell the service that a session is over, without waiting for it. Unheard, it only costs the service its idle time."""
        request = pb.ReleaseRequest(session_id=session_id)
        self._track(self.stub.Release.future(request, timeout=RELEASE_TIMEOUT_S, metadata=self.metadata))

    def close(self) -> None:
        """Close the connection, after the releases under way; other calls fail."""
        for future in list(self._releases):
            with suppress(grpc.FutureTimeoutError, grpc.FutureCancelledError):  # however it ended, and whether or not
                future.exception(2 * RELEASE_TIMEOUT_S)
        self._channel.close()


class ServiceSession:
    """A session of a service: who it is, and what the service is known to have of it.

    `deadline_s` is a `time.monotonic()` after which calls raise DeadlineExceededError; None: no limit.
    """

    def __init__(self, cloud: Cloud, deadline_s: float | None = None) -> None:
        self._cloud = cloud
        self.deadline_s = deadline_s
        self._session_id = os.urandom(codec.SESSION_ID_BYTES)
        self._server_tokens: list[int] = []  # what the service has of this session
        self._opened = False
        self._lock = threading.Lock()  # `release` may come from another thread than the calls

    @property
    def address(self) -> str:
        """Of the service."""
        return self._cloud.address

    @property
    def load(self) -> ServiceLoad | None:
        """The service's, as of its latest reply."""
        return self._cloud.load

    def release(self) -> None:
        """Tell the service, without waiting for it."""
        with self._lock:
            if self._opened:
                self._opened = False
                self._cloud.release(self._session_id)

    def attempt_s(self) -> float:
        """How long one attempt may take. A stream cut off by it is simply resumed."""
        if self.deadline_s is None:
            return self._cloud.timeout.request_s
        return max(0.0, min(self._cloud.timeout.request_s, self.deadline_s - time.monotonic()))

    def retry(self) -> Retry:
        """A fresh budget for one call."""
        return Retry(self._cloud.timeout, self.deadline_s, self._cloud.address)

    def settled(self, tokens: list[int], reply: pb.VerifyReply | pb.DecodeReply) -> None:
        """The service has these tokens now."""
        self._server_tokens = tokens
        self._cloud.heard(reply)

    def check(self, draft_ids: list[int], reply: pb.VerifyReply) -> None:
        """Raises ProtocolError: the reply makes no sense."""
        if reply.num_accepted > len(draft_ids):
            raise ProtocolError(f"the service accepted {reply.num_accepted} of {len(draft_ids)} draft tokens")

    def learned(self, error: grpc.RpcError, *, conditional: bool = False) -> CloudError:
        """What a failure says; a refusal also of what the service has, unless it was assumed to have more than it was told."""
        mapped = map_error(error, self._cloud.address)
        if isinstance(mapped, ContextMissingError) and not conditional:
            self._server_tokens = self._server_tokens[: mapped.cached_length]
        return mapped


class RemoteVerifier(ServiceSession):
    """Implements `protocols.Verifier`: only ids travel."""

    def submit(self, tokens: Sequence[int], draft_ids: Sequence[int], sampling: SamplingSettings) -> PendingVerify:
        """Send a draft now; `result()` of what is returned waits for the verdict."""
        return PendingVerify(self, list(tokens), list(draft_ids), codec.sampling_to_wire(sampling))

    def decode(
        self, tokens: Sequence[int], max_new_tokens: int, sampling: SamplingSettings, stop_token_ids: Collection[int]
    ) -> Iterator[Round]:
        """Stream the target's tokens; a broken stream is resumed where it broke."""
        log = list(tokens)
        end = len(log) + max_new_tokens
        retry = self.retry()
        while len(log) < end:
            stream = self.stream(log, end - len(log), sampling, stop_token_ids)
            try:
                for reply in stream.call:
                    retry.succeeded()
                    yield stream.take(reply, time.perf_counter())
                    log = stream.tokens
                    if log[-1] in stop_token_ids and reply.token_ids:
                        return
                if len(log) < end:
                    raise ProtocolError(f"{self._cloud.address} ended a stream {end - len(log)} tokens early")
            except grpc.RpcError as error:
                retry.again_or_raise(self.learned(error))
            finally:
                stream.call.cancel()  # nobody listens any more; harmless after the end

    def stream(
        self, tokens: Sequence[int], max_new_tokens: int, sampling: SamplingSettings, stop_token_ids: Collection[int]
    ) -> TokenStream:
        """Ask for a stream of the target's tokens, once."""
        self._opened = True
        request = pb.DecodeRequest(
            session_id=self._session_id,
            sampling=codec.sampling_to_wire(sampling),
            max_new_tokens=max_new_tokens,
            stop_token_ids=sorted(stop_token_ids),
            **self.context(list(tokens)),
        )
        call = self._cloud.stub.Decode(request, timeout=self.attempt_s(), metadata=self._cloud.metadata)
        return TokenStream(self, call, list(tokens), request.ByteSize())

    def context(self, tokens: list[int], num_assumed: int | None = None) -> dict[str, Any]:
        """Context fields of a request: only what the service may lack, or what it will lack if it has the first `num_assumed`."""
        start = common_prefix(self._server_tokens, tokens) if num_assumed is None else num_assumed
        return {
            "context_start": start,
            "context_ids": tokens[start:],
            "context_hash": codec.context_hash(tokens[:start]),
            "pair_hash": self._cloud.pair_hash,
        }

    def verify_request(
        self, tokens: list[int], draft_ids: list[int], sampling: pb.Sampling, num_assumed: int | None = None
    ) -> pb.VerifyRequest:
        """A request as of what the service is known to have, or is assumed to have by then."""
        self._opened = True
        context = self.context(tokens, num_assumed)
        return pb.VerifyRequest(session_id=self._session_id, draft_ids=draft_ids, sampling=sampling, **context)

    def verify_future(self, request: pb.VerifyRequest) -> Any:
        """Send it."""
        return self._cloud.stub.Verify.future(request, timeout=self.attempt_s(), metadata=self._cloud.metadata)

    def judged(self, tokens: list[int], draft_ids: list[int], reply: pb.VerifyReply, cost: CallCost) -> Verdict:
        """A reply as a verdict. Raises ProtocolError: it makes no sense."""
        self.check(draft_ids, reply)
        self.settled([*tokens, *draft_ids[: reply.num_accepted], reply.next_token_id], reply)
        return Verdict(reply.num_accepted, reply.next_token_id, cost)


class PendingVerify:
    """A Verify under way; `result` sees it through."""

    def __init__(self, verifier: RemoteVerifier, tokens: list[int], draft_ids: list[int], sampling: pb.Sampling) -> None:
        self._verifier = verifier
        self._tokens = tokens
        self._draft_ids = draft_ids
        self._sampling = sampling
        self._started = time.perf_counter()
        self._uplink_bytes = 0
        self._future = self._send()

    def _send(self) -> Any:
        request = self._verifier.verify_request(self._tokens, self._draft_ids, self._sampling)
        self._uplink_bytes += request.ByteSize()
        return self._verifier.verify_future(request)

    def result(self) -> Verdict:
        """The verdict, after as many attempts as it takes.

        Raises:
            CloudUnavailableError, CloudOverloadedError: not within the retry budget.
            DeadlineExceededError: the caller's deadline passed.
            CloudRefusedError: the request is invalid.
            CloudAuthError: the token is not known, or no longer.
            ProtocolError: the answer makes no sense.
        """
        retry = self._verifier.retry()
        while True:
            try:
                reply: pb.VerifyReply = self._future.result()
            except grpc.RpcError as error:
                retry.again_or_raise(self._verifier.learned(error))
            except BaseException:
                self._future.cancel()
                raise
            else:
                break
            self._future = self._send()
        cost = cost_of(reply, time.perf_counter() - self._started, self._uplink_bytes)
        return self._verifier.judged(self._tokens, self._draft_ids, reply, cost)


class TokenStream:
    """A Decode under way: `call` gives replies, `take` reads one of them."""

    def __init__(self, verifier: RemoteVerifier, call: Any, tokens: list[int], uplink_bytes: int) -> None:
        self.call = call
        self.tokens = tokens
        self._verifier = verifier
        self._asked = time.perf_counter()
        self._uplink_bytes = uplink_bytes

    def take(self, reply: pb.DecodeReply, came: float) -> Round:
        """A reply that came at `came` (time.perf_counter)."""
        self.tokens = [*self.tokens, *reply.token_ids]
        self._verifier.settled(self.tokens, reply)
        cost = cost_of(reply, came - self._asked, self._uplink_bytes)
        self._asked, self._uplink_bytes = came, 0
        return Round(list(reply.token_ids), "cloud", "final", cost=cost)


def cost_of(reply: pb.VerifyReply | pb.DecodeReply, elapsed_s: float, uplink_bytes: int) -> CallCost:
    """What a call took, as both sides saw it."""
    return CallCost(
        target_passes=reply.target_passes,
        queue_ms=reply.queue_ms,
        compute_ms=reply.compute_ms,
        elapsed_ms=elapsed_s * 1e3,
        uplink_bytes=uplink_bytes,
        downlink_bytes=reply.ByteSize(),
    )


def map_error(error: grpc.RpcError, address: str) -> CloudError:
    """The one place where gRPC's codes become our errors."""
    code, words = error.code(), _words(error)
    detail = pb.ErrorDetail()
    metadata: Any = error.trailing_metadata() or ()
    for key, value in metadata:
        if key == codec.ERROR_DETAIL_KEY:
            detail.ParseFromString(value)
    match code:
        case grpc.StatusCode.FAILED_PRECONDITION if detail.model_fingerprint:
            return ModelMismatchError(
                f"{address} serves another target now, with fingerprint {detail.model_fingerprint}; serve this bundle's again"
            )
        case grpc.StatusCode.FAILED_PRECONDITION:
            return ContextMissingError(words, detail.cached_length)
        case grpc.StatusCode.RESOURCE_EXHAUSTED if detail.retry_after_ms:
            return CloudOverloadedError(f"{address}: {words}", detail.retry_after_ms / 1e3)
        case grpc.StatusCode.INVALID_ARGUMENT | grpc.StatusCode.RESOURCE_EXHAUSTED | grpc.StatusCode.OUT_OF_RANGE:
            return CloudRefusedError(f"{address} refuses the request: {words}")
        case grpc.StatusCode.UNAUTHENTICATED:
            return CloudAuthError(f"{address}: {words}")
        case grpc.StatusCode.UNIMPLEMENTED:
            return ProtocolError(f"{address} is no edgecloud verification service that does this: {words}")
        case grpc.StatusCode.UNAVAILABLE | grpc.StatusCode.DEADLINE_EXCEEDED | grpc.StatusCode.CANCELLED:
            return CloudUnavailableError(f"{address} does not answer ({words}); is `edgecloud serve` running?")
        case grpc.StatusCode.INTERNAL | grpc.StatusCode.UNKNOWN:
            return CloudUnavailableError(f"{address} broke on the request: {words}")
        case _:
            return CloudError(f"{address}: {code.name}: {words}")


def _words(error: grpc.RpcError) -> str:
    return str(error.details() or error.code().name)


def _check_token(token: str) -> str:
    """A token that can travel in a header. Raises ConfigError, without showing it."""
    if not token or not all("!" <= character <= "~" for character in token):
        raise ConfigError("the token is empty, or has a space or another character that no token has; give it as it was printed")
    return token


def channel_credentials(tls: TLS) -> grpc.ChannelCredentials:
    """Certificates as gRPC takes them. Raises ConfigError: one cannot be read."""
    try:
        ca, key, cert = (None if path is None else path.read_bytes() for path in (tls.ca, tls.key, tls.cert))
    except OSError as error:
        raise ConfigError(f"{error.filename} cannot be read: {error.strerror}") from error
    return grpc.ssl_channel_credentials(ca, key, cert)
