"""The face of the SDK: a bundle on this device, a service in the cloud, and text."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Unpack, get_args

from edgecloud.bundle import Bundle
from edgecloud.edge.cascade import CascadePilot
from edgecloud.edge.collaborate import collaborate
from edgecloud.edge.controller import Controller
from edgecloud.edge.estimates import DeviceEstimate, Estimates, LinkEstimate
from edgecloud.edge.local import decode_locally
from edgecloud.edge.lookup import Lookup, Trust
from edgecloud.edge.pilot import Pilot
from edgecloud.edge.plan import Fixed, Plan, Planner
from edgecloud.edge.remote import TLS, Cloud
from edgecloud.edge.replicas import RemoteSession, Replicas
from edgecloud.edge.retry import Retry, Timeout
from edgecloud.errors import (
    ConfigError,
    DeadlineExceededError,
    EdgecloudError,
    ModelMismatchError,
)
from edgecloud.generation import Generation, GenerationStream
from edgecloud.manifest import bundle_kind
from edgecloud.on_device import OnDevice
from edgecloud.options import GenerationKeywords, GenerationOptions, Prompt, check_fits, check_messages, check_whole
from edgecloud.rejection_watch import RejectionWatch
from edgecloud.rejections import RejectionLog, Source
from edgecloud.routes import Route, Routes
from edgecloud.rpc.codec import pair_hash
from edgecloud.session import Session
from edgecloud.turn import Turn
from edgecloud.types import Event, LossPolicy, Preference, Reply, Round, Service, Step
from edgecloud.way import Way, check_split, check_tail, split_way, whole_way

if TYPE_CHECKING:
    from edgecloud.edge.tokenizer import ChatTokenizer
    from edgecloud.exits import Rule
    from edgecloud.graph_bundle import GraphBundle
    from edgecloud.graph_client import GraphClient
    from edgecloud.inference import InferenceReply
    from edgecloud.tensors import Array


class Client:
    """Generates text with the models of a bundle, or runs its cut graph. A context manager.

    Generations take turns on the device's one cache; in mode `cloud`, which does not use it, they run side by side.

    No file is read and no connection opened before the first use.

    Args:
        bundle: folder written by `edgecloud partition`; the device's part is enough.
        cloud: HOST:PORT of a verification service, or several of them; None: this device alone.
        prefer: of several: "order", the first that works, or "latency", the nearest.
        tls: encrypt the connection, and check the server.
        token: says to the service who asks; off this machine it takes `tls`, or `insecure`.
        insecure: let the token travel in plaintext.
        timeout: how long to wait for the cloud and how often to ask again.
        num_draft_tokens: tokens drafted a round in mode `speculative`.
        num_threads: of ONNX Runtime; 0: as many as this process may use.
        max_context_tokens: longest sequence the device keeps; 0: as the bundle says.
        max_ram_mb: MiB that loaded parts of a graph may take, as the bundle estimates them; 0: no limit.
        learn_from: keep in this folder, or log, what the target corrected, token ids with their context, for `edgecloud learn`;
            None: keep nothing.
    """

    def __init__(
        self,
        bundle: str | os.PathLike[str],
        cloud: str | Sequence[str] | None = None,
        *,
        prefer: Preference = "order",
        tls: TLS | None = None,
        token: str | None = None,
        insecure: bool = False,
        timeout: Timeout | None = None,
        num_draft_tokens: int = 4,
        num_threads: int = 0,
        max_context_tokens: int = 0,
        max_ram_mb: int = 0,
        learn_from: str | os.PathLike[str] | RejectionLog | None = None,
    ) -> None:
        self._path = Path(bundle)
        self._addresses = [] if cloud is None else [cloud] if isinstance(cloud, str) else list(cloud)
        if prefer not in get_args(Preference):
            raise ConfigError(f"prefer is {prefer!r}; it takes {', '.join(get_args(Preference))}")
        self._prefer: Preference = prefer
        self._tls = tls
        self._token = token
        self._insecure = insecure
        self._timeout = timeout or Timeout()
        self._num_draft_tokens = check_whole("num_draft_tokens", num_draft_tokens, 1, 64)
        self._num_threads = check_whole("num_threads", num_threads, 0) or len(os.sched_getaffinity(0))
        max_context_tokens = check_whole("max_context_tokens", max_context_tokens, 0)
        self._max_ram_bytes = check_whole("max_ram_mb", max_ram_mb, 0) << 20
        self._rejections = learn_from if isinstance(learn_from, RejectionLog | None) else RejectionLog(learn_from)
        self._graph_bundle: GraphBundle | None = None
        self._graph_client: GraphClient | None = None
        self._trust = {greedy: Trust() for greedy in (True, False)}
        self._replicas: Replicas | None = None
        self._service: Service | None = None
        self._routes = Routes()
        self._estimates = Estimates.unknown()
        self._split_estimates = self._estimates.of_another_target()
        self._on_device = OnDevice(self._path, self._num_threads, max_context_tokens, self._estimates.device.prefilled)
        self._loading = threading.RLock()
        self._turn = Turn()
        self._closed = False

    def generate(self, prompt: Prompt, *, raw: bool = False, **options: Unpack[GenerationKeywords]) -> Reply:
        """Answer a prompt (a string, or chat messages with `role` and `content`).

        Options, with their defaults (names as in `transformers.GenerationConfig`):
            max_new_tokens=256, temperature=0.0, top_k=0, top_p=1.0, repetition_penalty=1.0, seed=0, stop_strings=(),
            mode="auto" ("edge", "cloud", "speculative", "split", "cascade"), num_draft_tokens (the client's),
            quality=None: the cloud's own text; Risk(0.05), CloudShare(0.3), "offline": docs/cascade.md,
            drafter="both": what is drafted comes from the draft model or, where the text repeats itself, is copied; "model" or
                "lookup": only so. With "lookup" the model is never loaded, so the device does not go on without the cloud.
            deadline_s=None: seconds that the whole generation may take,
            raw=False: encode the string as it is, without the chat template.

        Raises:
            ConfigError: an option has a value that cannot work; ContextLengthError: too long for the window.
            BundleError: the bundle cannot be used.
            ModelMismatchError: the service runs another target.
            CloudError: the cloud could not answer; tokens already final are in `error.reply`.
        """
        return self.stream(prompt, raw=raw, **options).finish()

    def stream(self, prompt: Prompt, *, raw: bool = False, **options: Unpack[GenerationKeywords]) -> GenerationStream:
        """The same, event by event. Closing the stream frees the service's session. Raises as `generate`."""
        idle = self._estimates.link.sent_to_idle(time.monotonic())
        alone = options.get("mode") == "edge" or options.get("quality") == "offline"
        if idle and not alone and self._replicas is not None:
            self._replicas.warm()  # while the prompt becomes tokens
        if isinstance(prompt, str) and raw:
            tokens = self.tokenizer.encode(prompt)
        elif isinstance(prompt, str):
            tokens = self.tokenizer.encode_chat([{"role": "user", "content": prompt}])
        else:
            tokens = self.tokenizer.encode_chat(check_messages(prompt))
        return self.start(tokens, None, **options)

    def run(
        self, inputs: Mapping[str, Array], *, mode: str = "auto", deadline_s: float | None = None, risk: float | None = None,
        exit_rule: Rule | None = None,
    ) -> InferenceReply:  # fmt: skip
        """Run a cut graph: `client.run({"input": array})["output"]`. Runs of several threads go on side by side.

        Args:
            inputs: an array for every input of the graph, of its dtype and shape.
            mode: `auto`: at every call the cut that promises to be fastest; without an answer from the cloud the device computes it
                all, if the bundle has the whole graph for it, and `reply.fell_back` says why. `edge`, `cloud`, or the name of a
                cut: that one. `split`: the best of the cuts that both have a part in.
            deadline_s: seconds that the run may take. What the device computes itself is not cut short.
            risk: share of early answers of a classifier that may be wrong (`edgecloud exits`). Where an exit is sure enough for it,
                the reply is that exit's, which nobody verified, and `reply.exit` names it. None: nothing leaves early.
            exit_rule: what makes an exit sure: `confidence`, `entropy`, `margin`, `feature_delta`. None: the bundle's.

        Raises:
            ConfigError: inputs, mode or risk cannot work. BundleError: the bundle cannot be used (BundleKindError: it is for text).
            ModelMismatchError: the service runs another graph, or other cuts of it.
            CloudError: the cloud could not answer, and nobody could stand in.
        """
        return self._graph().run(inputs, mode, deadline_s, risk, exit_rule)

    def session(self, system: str | None = None) -> Session:
        """A conversation that keeps its tokens and caches between turns."""
        remote = RemoteSession(self._connection()) if self._addresses else None
        return Session(self, remote, system)

    def describe(self, *, wait: bool = True) -> Service:
        """The handshake: what the service runs. Checked against the bundle, and remembered.

        With `wait`, a refused connection is tried again until `timeout.connect_s`: a starting server is met that way.

        Raises:
            ConfigError: this client has no cloud.
            CloudUnavailableError: nothing answers. ModelMismatchError: it runs another target.
            CloudAuthError: it does not know the token.
        """
        if self._service is None:
            self._service = self._connection().describe(self._check_service, wait=wait)
        return self._service

    def notify_network_changed(self) -> None:
        """The device has another network, as the operating system told the app: connect anew, and forget what the old one was like.

        A generation under way goes on by itself, wherever it was.
        """
        self._estimates.link = self._split_estimates.link = LinkEstimate()
        if self._replicas is not None:
            self._replicas.reconnect()
        if self._graph_client is not None:
            self._graph_client.network_changed(self._estimates.link)

    @property
    def bundle(self) -> Bundle:
        """The bundle's manifest, its device files checked. Raises BundleError."""
        return self._on_device.bundle

    @property
    def graph_bundle(self) -> GraphBundle:
        """The manifest of a graph bundle, its device files checked. Raises BundleError."""
        with self._loading:
            if self._graph_bundle is None:
                from edgecloud.graph_bundle import GraphBundle

                bundle = GraphBundle.open(self._path)
                bundle.verify_files("edge")
                self._graph_bundle = bundle
            return self._graph_bundle

    @property
    def tokenizer(self) -> ChatTokenizer:
        """The tokenizer that both models share. Raises BundleError."""
        return self._on_device.tokenizer

    @property
    def num_threads(self) -> int:
        """Of the device's model."""
        return self._num_threads

    @property
    def estimates(self) -> Estimates:
        """What this client has learned of device, link and cloud from its own traffic."""
        return self._estimates

    def close(self) -> None:
        """Close the connection and drop the models."""
        self._closed = True
        if self._replicas is not None:
            self._replicas.close()
        if self._graph_client is not None:
            self._graph_client.close()
        self._on_device.drop()
        self._replicas = self._graph_client = None

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(
        self,
        tokens: list[int],
        remote: RemoteSession | None,
        *,
        on_finish: Callable[[Reply], None] | None = None,
        **keywords: Unpack[GenerationKeywords],
    ) -> GenerationStream:
        """A generation from token ids; `generate`, `stream` and sessions all come through here. Checks every argument.

        A given `remote` session stays open afterwards; without one, one is made and released.
        """
        options = GenerationOptions.from_keywords(keywords, self._num_draft_tokens)
        if not self._addresses and not options.offline and (options.mode != "auto" or options.quality is not None):
            asked = f"mode {options.mode!r}" if options.quality is None else f"quality {options.quality!r}"
            raise ConfigError(f"{asked} needs a cloud; give HOST:PORT")
        if options.drafter == "lookup" and not self._addresses:
            raise ConfigError("drafter 'lookup' needs a cloud; give HOST:PORT, or take 'both' or 'model'")
        route = self._routes.route(options, self.bundle)
        if options.mode == "split":
            check_split(options, self.bundle)  # before anything is started
        check_fits(len(tokens), options.max_new_tokens, self._on_device.window, "context window")
        generation = Generation(
            len(tokens),
            self.tokenizer.stream(),
            options.max_new_tokens,
            self.bundle.tokenizer.eos_token_ids,
            options.stop_strings,
        )
        watch = self._watch(tokens, options)
        end_s = None if options.deadline_s is None else time.monotonic() + options.deadline_s

        def events() -> Generator[Event]:
            if self._closed:
                raise ConfigError("this client is closed; make another")
            with nullcontext() if options.mode == "cloud" else self._turn:
                try:
                    with closing(self._steps(tokens, options, route, remote, end_s)) as steps:
                        for step in steps:
                            if watch is not None:
                                watch.look(step)
                            yield from generation.take(step, options.shows_guesses)
                            if generation.finish_reason is not None and (route.exits is None or generation.stopped_by_text):
                                break
                except EdgecloudError as error:
                    error.reply = generation.reply()
                    yield from generation.withdraw()
                    raise
                finally:
                    if watch is not None:
                        watch.finish()
                if route.watch is not None and (alarm := route.watch.add(generation.num_audited, generation.num_diverged)):
                    yield alarm
                if on_finish is not None:
                    on_finish(generation.reply())

        return GenerationStream(generation, events())

    def _watch(self, tokens: list[int], options: GenerationOptions) -> RejectionWatch | None:
        """Who notes what the target corrects, if the user wants that. The target that is cut for `split` is another one."""
        log = self._rejections
        if log is None or options.mode in {"edge", "split"}:
            return None
        log.prepare()
        bundle = self.bundle
        source = Source(bundle.target.fingerprint, bundle.draft.fingerprint, bundle.tokenizer.fingerprint)
        return RejectionWatch(tokens, options.sampling.temperature, lambda passage: log.add(source, passage))

    def _steps(
        self, tokens: list[int], options: GenerationOptions, route: Route, given: RemoteSession | None, end_s: float | None
    ) -> Generator[Step]:
        """Run the mode asked for."""
        if options.offline or not self._addresses:
            yield from self._local_rounds(tokens, options, options.max_new_tokens, end_s)
            return
        if options.mode not in {"auto", "cascade"}:
            self._check_window(tokens, options)
        remote = given or RemoteSession(self._connection())
        remote.deadline_s = end_s
        stop_token_ids = self.bundle.tokenizer.eos_token_ids
        try:
            way = self._way(options)
            pilot, meet = self._pilot(tokens, options, route, end_s, way)
            device, sampling = way.drafter or self._on_device.drafter, options.sampling
            scorer = None if route.exits is None else self._on_device.drafter
            yield from collaborate(pilot, device, remote, sampling, stop_token_ids, way.estimates, meet, way.new_courier, scorer)
        except ModelMismatchError:  # another model was started at that address since the handshake
            self._service = None
            self.describe()  # names both fingerprints
            raise
        finally:
            if given is None:
                remote.release()

    def _way(self, options: GenerationOptions) -> Way:
        if options.mode != "split":
            return whole_way(self._estimates, time.monotonic())
        front, service = check_split(options, self.bundle), self.describe()
        check_tail(front, service, self._connection().address)
        rows, head = self._on_device.front_rows(front), self._on_device.front_drafter(front)
        if head is not None and self._split_estimates.device is self._estimates.device:
            self._split_estimates.device = DeviceEstimate()  # its steps are not the draft model's
        return split_way(rows, head, self._split_estimates, service, time.monotonic())

    def _pilot(
        self, tokens: list[int], options: GenerationOptions, route: Route, end_s: float | None, way: Way
    ) -> tuple[Pilot, Callable[[], int]]:
        """Who decides in a generation that both machines work on, and how the handshake is made."""
        service, estimates = self._service, way.estimates
        planner: Planner
        if options.mode == "auto":
            planner = Controller(estimates, options.objective, exited=route.exited)
        elif options.mode == "cloud":
            planner = Fixed(Plan("cloud", 0, num_shadow_tokens=0))
        else:
            asks_for_all = options.mode == "cascade" and (route.exits is None or route.exits.scope != "token")
            planner = Fixed(Plan("speculative" if asks_for_all else options.mode, options.num_draft_tokens))

        def meet() -> int:
            met = self._check_window(tokens, options, wait=False)
            if isinstance(planner, Controller):
                planner.max_draft_tokens = met.max_draft_tokens
            return met.max_draft_tokens

        if service is not None:
            meet()
        load = self._connection().load
        if load is not None:
            estimates.cloud.tell(load)
        new_pilot = Pilot if route.exits is None else partial(CascadePilot, exits=route.exits)
        pilot = new_pilot(
            tokens,
            planner,
            Retry(self._timeout, end_s, self._connection().address),
            way.patience,
            estimates.acceptance,
            max_new_tokens=options.max_new_tokens,
            stop_token_ids=self.bundle.tokenizer.eos_token_ids,
            on_loss=_on_loss(options),
            max_provisional_tokens=options.max_provisional_tokens,
            met=None if service is None else service.max_draft_tokens,
            lookup=None if route.exits is not None else self._lookup(tokens, options),  # a copy has no score
        )
        return pilot, meet

    def _lookup(self, tokens: list[int], options: GenerationOptions) -> Lookup | None:
        if options.mode not in {"auto", "speculative", "split"} or options.drafter == "model":
            return None  # copies are for where the target verifies
        return Lookup(tokens, self._trust[options.sampling.greedy], alone=options.drafter == "lookup")

    def _check_window(self, tokens: list[int], options: GenerationOptions, *, wait: bool = True) -> Service:
        """Whether prompt and answer fit the service."""
        service = self.describe(wait=wait)
        check_fits(len(tokens), options.max_new_tokens, service.max_context_tokens, f"window of {self._connection().address}")
        return service

    def _local_rounds(
        self, tokens: list[int], options: GenerationOptions, max_new_tokens: int, end_s: float | None
    ) -> Iterator[Round]:
        stop_token_ids = self.bundle.tokenizer.eos_token_ids
        for round_ in decode_locally(tokens, self._on_device.drafter, options.sampling, max_new_tokens, stop_token_ids):
            if end_s is not None and time.monotonic() > end_s:
                raise DeadlineExceededError("the time allowed for this generation has passed; allow more or ask for less")
            yield round_

    def _connection(self) -> Replicas:
        with self._loading:
            if self._closed:
                raise ConfigError("this client is closed; make another")
            if not self._addresses:
                raise ConfigError("this client has no cloud; give HOST:PORT")
            if self._replicas is None:
                self._replicas = Replicas([self._cloud(address) for address in self._addresses], self._prefer)
            return self._replicas

    def _cloud(self, address: str) -> Cloud:
        if bundle_kind(self._path) == "text":
            meant = pair_hash(self.bundle.target.fingerprint, self.bundle.tokenizer.fingerprint)
            return Cloud(address, self._tls, self._timeout, meant, token=self._token, insecure=self._insecure)
        from edgecloud.edge.graph_remote import MAX_REPLY_BYTES

        secret, insecure = self._token, self._insecure
        return Cloud(address, self._tls, self._timeout, token=secret, insecure=insecure, max_reply_bytes=MAX_REPLY_BYTES)

    def _check_service(self, service: Service, address: str) -> None:
        """Refuse one that does not run what the bundle was made for. Raises ModelMismatchError."""
        if bundle_kind(self._path) == "text":
            _check_pair(self.bundle, service, address)
        else:
            _check_graph(self.graph_bundle, service, address)

    def _graph(self) -> GraphClient:
        with self._loading:
            if self._closed:
                raise ConfigError("this client is closed; make another")
            if self._graph_client is None:
                from edgecloud.graph_client import GraphClient

                self._graph_client = GraphClient(
                    self.graph_bundle,
                    self._connection if self._addresses else None,
                    self._check_service,
                    timeout=self._timeout,
                    link=self._estimates.link,
                    num_threads=self._num_threads,
                    max_ram_bytes=self._max_ram_bytes or None,
                )
            return self._graph_client


def _on_loss(options: GenerationOptions) -> LossPolicy:
    if options.mode not in {"auto", "cascade"}:
        return "wait"
    goes_on_alone = options.on_cloud_loss == "continue"
    return "wait" if goes_on_alone and options.drafter == "lookup" else options.on_cloud_loss  # copies alone are no answer


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


def _check_graph(bundle: GraphBundle, service: Service, address: str) -> None:
    """The same for a graph. Raises ModelMismatchError."""
    if service.model_fingerprint != bundle.graph.fingerprint:
        raise ModelMismatchError(
            f"{address} serves {service.model_name} with fingerprint {service.model_fingerprint}, the bundle {bundle.path} was "
            f"made of {bundle.graph.name} with {bundle.graph.fingerprint}; serve that bundle, or make one of this graph"
        )
