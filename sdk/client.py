"""The face of the SDK: a bundle on this device, a service in the cloud, and text."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgecloud.bundle import Bundle
from edgecloud.edge.remote import TLS, Cloud, RemoteVerifier
from edgecloud.edge.retry import Timeout
from edgecloud.errors import (
    CloudError,
    CloudOverloadedError,
    CloudUnavailableError,
    ConfigError,
    ContextLengthError,
    DeadlineExceededError,
    EdgecloudError,
    ModelMismatchError,
)
from edgecloud.generation import Generation, GenerationStream
from edgecloud.protocols import Drafter, Verifier
from edgecloud.sampling import SamplingSettings
from edgecloud.session import Session
from edgecloud.types import Event, Mode, ModeChanged, ModeChoice, Reply, Round, Service

if TYPE_CHECKING:
    from edgecloud.edge.tokenizer import ChatTokenizer

MODES = ("auto", "edge", "cloud", "speculative")
Prompt = str | Sequence[Mapping[str, str]]


class Client:
    """Generates text with the models of a bundle. A context manager.

    Generations take turns on the device's one cache; in mode `cloud`, which does not use it, they run side by side.

    No file is read and no connection opened before the first use.

    Args:
        bundle: folder written by `edgecloud partition`; the device's part is enough.
        cloud: HOST:PORT of a verification service; None: this device alone.
        tls: encrypt the connection, and check the server.
        timeout: how long to wait for the cloud and how often to ask again.
        num_draft_tokens: tokens drafted a round in mode `speculative`.
        num_threads: of ONNX Runtime; 0: as many as this process may use.
        max_context_tokens: longest sequence the device keeps; 0: as the bundle says.
    """

    def __init__(
        self,
        bundle: str | os.PathLike[str],
        cloud: str | None = None,
        *,
        tls: TLS | None = None,
        timeout: Timeout | None = None,
        num_draft_tokens: int = 4,
        num_threads: int = 0,
        max_context_tokens: int = 0,
    ) -> None:
        self._path = Path(bundle)
        self._cloud_address = cloud
        self._tls = tls
        self._timeout = timeout or Timeout()
        self._num_draft_tokens = _check_num_draft_tokens(num_draft_tokens)
        self._num_threads = _check_count("num_threads", num_threads) or len(os.sched_getaffinity(0))
        self._max_context_tokens = _check_count("max_context_tokens", max_context_tokens)
        self._bundle: Bundle | None = None
        self._tokenizer: ChatTokenizer | None = None
        self._drafter: Drafter | None = None
        self._cloud: Cloud | None = None
        self._service: Service | None = None
        self._loading = threading.RLock()
        self._turn = Turn()
        self._closed = False

    def generate(self, prompt: Prompt, **options: Any) -> Reply:
        """Answer a prompt (a string, or chat messages with `role` and `content`).

        Options, with their defaults (names as in `transformers.GenerationConfig`):
            max_new_tokens=256, temperature=0.0, top_k=0, top_p=1.0, repetition_penalty=1.0, seed=0, stop_strings=(),
            mode="auto" ("edge", "cloud", "speculative"), num_draft_tokens (the client's),
            deadline_s=None: seconds that the whole generation may take,
            raw=False: encode the string as it is, without the chat template.

        Raises:
            ConfigError: an option has a value that cannot work; ContextLengthError: too long for the window.
            BundleError: the bundle cannot be used.
            ModelMismatchError: the service runs another target.
            CloudError: the cloud could not answer; tokens already final are in `error.reply`.
        """
        return self.stream(prompt, **options).finish()

    def stream(self, prompt: Prompt, *, raw: bool = False, **options: Any) -> GenerationStream:
        """The same, event by event. Closing the stream frees the service's session. Raises as `generate`."""
        if isinstance(prompt, str) and raw:
            tokens = self.tokenizer.encode(prompt)
        elif isinstance(prompt, str):
            tokens = self.tokenizer.encode_chat([{"role": "user", "content": prompt}])
        else:
            tokens = self.tokenizer.encode_chat(_check_messages(prompt))
        return self.start(tokens, None, **options)

    def session(self, system: str | None = None) -> Session:
        """A conversation that keeps its tokens and caches between turns."""
        verifier = None if self._cloud_address is None else RemoteVerifier(self._connection())
        return Session(self, verifier, system)

    def describe(self, *, wait: bool = True) -> Service:
        """The handshake: what the service runs. Checked against the bundle, and remembered.

        With `wait`, a refused connection is tried again until `timeout.connect_s`: a starting server is met that way.

        Raises:
            ConfigError: this client has no cloud.
            CloudUnavailableError: nothing answers. ModelMismatchError: it runs another target.
        """
        if self._service is None:
            service = self._connection().describe(wait=wait)
            _check_pair(self.bundle, service, self._cloud_address or "")
            self._service = service
        return self._service

    @property
    def bundle(self) -> Bundle:
        """The bundle's manifest, its device files checked. Raises BundleError."""
        with self._loading:
            if self._bundle is None:
                bundle = Bundle.open(self._path)
                bundle.verify_files("edge")
                self._bundle = bundle
            return self._bundle

    @property
    def tokenizer(self) -> ChatTokenizer:
        """The tokenizer that both models share. Raises BundleError."""
        with self._loading:
            if self._tokenizer is None:
                from edgecloud.edge.tokenizer import ChatTokenizer

                bundle = self.bundle
                template = bundle.tokenizer.chat_template
                self._tokenizer = ChatTokenizer(
                    bundle.file(bundle.tokenizer.path),
                    None if template is None else bundle.file(template),
                    bundle.tokenizer.special_tokens,
                )
            return self._tokenizer

    def close(self) -> None:
        """Close the connection and drop the models."""
        self._closed = True
        if self._cloud is not None:
            self._cloud.close()
        self._cloud = self._drafter = None

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(
        self,
        tokens: list[int],
        verifier: RemoteVerifier | None,
        *,
        mode: ModeChoice = "auto",
        max_new_tokens: int = 256,
        num_draft_tokens: int | None = None,
        stop_strings: Sequence[str] = (),
        deadline_s: float | None = None,
        on_finish: Callable[[Reply], None] | None = None,
        **sampling: Any,
    ) -> GenerationStream:
        """A generation from token ids; `generate`, `stream` and sessions all come through here. Checks every argument.

        A given `verifier` stays open afterwards; without one, a session of the service is made and released.
        """
        if mode not in MODES:
            raise ConfigError(f"mode is {mode!r}; it takes {', '.join(MODES)}")
        if mode in {"cloud", "speculative"} and self._cloud_address is None:
            raise ConfigError(f"mode {mode!r} needs a cloud; give HOST:PORT")
        _check_stop_strings(stop_strings)
        if deadline_s is not None and not (isinstance(deadline_s, int | float) and deadline_s > 0):
            raise ConfigError(f"deadline_s is {deadline_s!r}; it takes seconds above 0")
        settings = _settings(sampling)
        num_draft = self._num_draft_tokens if num_draft_tokens is None else _check_num_draft_tokens(num_draft_tokens)
        _check_max_new_tokens(max_new_tokens)
        _check_fits(len(tokens), max_new_tokens, self._window(), "context window")
        stop_token_ids = self.bundle.tokenizer.eos_token_ids
        generation = Generation(len(tokens), self.tokenizer.stream(), max_new_tokens, stop_token_ids, stop_strings)
        end_s = None if deadline_s is None else time.monotonic() + deadline_s

        def rounds() -> Iterator[Round | ModeChanged]:
            yield from self._rounds(tokens, generation, mode, settings, max_new_tokens, num_draft, verifier, end_s)

        def events() -> Generator[Event]:
            if self._closed:
                raise ConfigError("this client is closed; make another")
            with nullcontext() if mode == "cloud" else self._turn:
                try:
                    with closing(rounds()) as steps:  # type: ignore[type-var]  # a generator
                        for step in steps:
                            if isinstance(step, ModeChanged):
                                yield generation.announce(step)
                                continue
                            yield from generation.add(step)
                            if generation.finish_reason is not None:
                                break
                except EdgecloudError as error:
                    error.reply = generation.reply()
                    raise
                if on_finish is not None:
                    on_finish(generation.reply())

        return GenerationStream(generation, events())

    def _rounds(
        self,
        tokens: list[int],
        generation: Generation,
        mode: ModeChoice,
        settings: SamplingSettings,
        max_new_tokens: int,
        num_draft_tokens: int,
        verifier: RemoteVerifier | None,
        end_s: float | None,
    ) -> Iterator[Round | ModeChanged]:
        """Run the mode asked for; `auto` speculates while the cloud answers and goes on alone, unverified, when it does not."""
        stop_token_ids = self.bundle.tokenizer.eos_token_ids
        if mode == "auto" and (self._cloud_address is None or not self._reachable()):
            mode = "edge"
        if mode != "edge":
            service = self.describe()
            _check_fits(len(tokens), max_new_tokens, service.max_context_tokens, f"window of {self._cloud_address}")
            num_draft_tokens = min(num_draft_tokens, service.max_draft_tokens)
            remote = verifier or RemoteVerifier(self._connection())
            remote.deadline_s = end_s
            try:
                yield from self._remote_rounds(
                    tokens, "cloud" if mode == "cloud" else "speculative", remote, settings, max_new_tokens, num_draft_tokens,
                )  # fmt: skip
            except (CloudUnavailableError, CloudOverloadedError) as error:
                if mode != "auto":
                    raise
                yield ModeChanged("edge", str(error))
            else:
                return
            finally:
                if verifier is None:
                    remote.release()
        from edgecloud.edge.local import decode_locally

        log = tokens + generation.token_ids
        left = max_new_tokens - len(generation.token_ids)
        for round_ in decode_locally(log, self._device(), settings, left, stop_token_ids):
            if end_s is not None and time.monotonic() > end_s:
                raise DeadlineExceededError("the time allowed for this generation has passed; allow more or ask for less")
            yield round_

    def _remote_rounds(
        self, tokens: list[int], mode: Mode, verifier: Verifier, settings: SamplingSettings, max_new_tokens: int,
        num_draft_tokens: int,
    ) -> Iterator[Round]:  # fmt: skip
        stop_token_ids = self.bundle.tokenizer.eos_token_ids
        if mode == "cloud":
            return verifier.decode(tokens, max_new_tokens, settings, stop_token_ids)
        from edgecloud.edge.speculative import speculate

        return speculate(tokens, self._device(), verifier, settings, num_draft_tokens, max_new_tokens, stop_token_ids)

    def _reachable(self) -> bool:
        try:
            self.describe(wait=False)
        except ModelMismatchError:
            raise
        except CloudError:
            return False
        return True

    def _window(self) -> int:
        bundle = self.bundle
        window = min(bundle.target.max_context_tokens, bundle.draft.max_context_tokens)
        return min(window, self._max_context_tokens) if self._max_context_tokens else window

    def _connection(self) -> Cloud:
        with self._loading:
            if self._closed:
                raise ConfigError("this client is closed; make another")
            if self._cloud_address is None:
                raise ConfigError("this client has no cloud; give HOST:PORT")
            if self._cloud is None:
                self._cloud = Cloud(self._cloud_address, self._tls, self._timeout)
            return self._cloud

    def _device(self) -> Drafter:
        with self._loading:
            if self._drafter is None:
                from edgecloud.edge.drafter import ModelDrafter
                from edgecloud.edge.model import DraftModel

                graph = self.bundle.file(self.bundle.draft.model)
                window, num_threads = self._window(), self._num_threads
                vocab_size = min(self.bundle.draft.vocab_size, self.bundle.target.vocab_size)
                self._drafter = ModelDrafter(lambda: DraftModel(graph, window, num_threads), vocab_size)
            return self._drafter


class Turn:
    """One generation at a time on the device's one cache; others wait, unless they would wait for themselves."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._holder: int | None = None

    def __enter__(self) -> None:
        """Raises ConfigError when this thread holds the turn already: it would wait for ever."""
        if self._holder == threading.get_ident():
            raise ConfigError("another stream of this client is open on this thread; finish or close it first")
        self._lock.acquire()
        self._holder = threading.get_ident()

    def __exit__(self, *_: object) -> None:
        self._holder = None
        self._lock.release()


def _check_pair(bundle: Bundle, service: Service, address: str) -> None:
    """Refuse a service whose target or tokenizer is not the bundle's. Raises ModelMismatchError with both fingerprints."""
    for what, ours, theirs in (
        ("target", bundle.target.fingerprint, service.model_fingerprint),
        ("tokenizer", bundle.tokenizer.fingerprint, service.tokenizer_fingerprint),
    ):
        if ours != theirs:
            raise ModelMismatchError(
                f"{address} serves {service.model_name} with {what} fingerprint {theirs}, the bundle {bundle.path} was made for "
                f"{bundle.target.name} with {ours}; serve that bundle, or make one for this target"
            )


def _check_stop_strings(value: Sequence[str]) -> None:
    if not isinstance(value, Sequence) or isinstance(value, str) or not all(isinstance(s, str) and s for s in value):
        raise ConfigError(f"stop_strings is {value!r}; it takes a list of non-empty strings")


def _check_messages(prompt: Sequence[Mapping[str, str]]) -> list[Mapping[str, str]]:
    if not isinstance(prompt, Sequence) or not prompt or not all(_is_message(message) for message in prompt):
        raise ConfigError(f"prompt is {str(prompt)[:80]!r}; it takes a string, or messages with the strings `role` and `content`")
    return list(prompt)


def _is_message(value: object) -> bool:
    return isinstance(value, Mapping) and all(isinstance(value.get(key), str) for key in ("role", "content"))


def _check_count(name: str, value: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ConfigError(f"{name} is {value!r}; it takes a whole number from 1, or 0 for the default")
    return value


def _check_max_new_tokens(value: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"max_new_tokens is {value!r}; it takes a whole number from 1")


def _check_fits(num_prompt_tokens: int, max_new_tokens: int, window: int, whose: str) -> None:
    if not num_prompt_tokens:
        raise ConfigError("the prompt is empty; give at least one token")
    if num_prompt_tokens + max_new_tokens > window:
        raise ContextLengthError(
            f"a prompt of {num_prompt_tokens} tokens and {max_new_tokens} new ones do not fit the {whose} of {window}; "
            f"shorten the prompt or ask for fewer"
        )


def _check_num_draft_tokens(value: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 64:
        raise ConfigError(f"num_draft_tokens is {value!r}; it takes a whole number from 1 to 64")
    return value


def _settings(options: dict[str, Any]) -> SamplingSettings:
    known = SamplingSettings.__dataclass_fields__
    if unknown := sorted(set(options) - set(known)):
        raise ConfigError(f"unknown option {unknown[0]!r}; known are {', '.join(sorted(known))} and those of Client.generate")
    try:
        return SamplingSettings(**options)
    except TypeError as error:
        raise ConfigError(f"a sampling option has the wrong type: {error}") from error
