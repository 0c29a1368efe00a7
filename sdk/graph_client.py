"""Running a cut graph: which cut, the device's part, the cloud's part, and what to do when the cloud does not answer."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYetError
from dataclasses import dataclass, replace
from threading import RLock

from edgecloud.edge.estimates import FIRST_PACKET_MS, LinkEstimate
from edgecloud.edge.graph_controller import Choice, GraphController
from edgecloud.edge.graph_estimates import CutTimes, GraphEstimates, Trip
from edgecloud.edge.graph_parts import GraphParts
from edgecloud.edge.graph_remote import UnansweredError, infer, infer_request
from edgecloud.edge.replicas import Replicas
from edgecloud.edge.retry import Retry, Timeout
from edgecloud.errors import (
    CloudOverloadedError,
    CloudUnavailableError,
    ConfigError,
    DeadlineExceededError,
    ModelMismatchError,
)
from edgecloud.exit_scores import Leave
from edgecloud.exits import Rule
from edgecloud.graph_bundle import CutInfo, GraphBundle
from edgecloud.graph_options import check_inputs, cuts_of, exits_of
from edgecloud.inference import InferenceMetrics, InferenceReply
from edgecloud.rpc import edgecloud_pb2 as pb
from edgecloud.tensors import Array
from edgecloud.types import Service

MEET_S = 1.0  # how long the first run waits for the cloud to introduce itself, where the device could do without
LEAST_LOST_S, LOST_FACTOR = 1.0, 4.0  # after so many times what was expected, the device computes it all
MARGIN_S = 0.02  # of a deadline
DEVICE_MARGIN = 1.25  # what the device may take longer than expected


@dataclass(frozen=True, slots=True)
class DevicePart:
    """What the device has computed for a cut."""

    cut: CutInfo
    found: Mapping[str, Array]
    edge_ms: float
    is_warm: bool  # not the first run of a graph just loaded


@dataclass(frozen=True, slots=True)
class Attempt:
    """What the device has computed for a cut, and the message that asks for the rest."""

    found: Mapping[str, Array]
    request: pb.InferRequest
    edge_ms: float
    num_bytes: int


class GraphClient:
    """Runs one graph bundle. Threads may share it: runs go on side by side.

    Args:
        connect: gives the services; None: there is none.
        check: raises when a service is not the one that is meant.
        link: what is known of the way to them.
        max_ram_bytes: of loaded graphs, as the bundle estimates them; None: no limit.
    """

    def __init__(
        self,
        bundle: GraphBundle,
        connect: Callable[[], Replicas] | None,
        check: Callable[[Service, str], None],
        *,
        timeout: Timeout,
        link: LinkEstimate,
        num_threads: int,
        max_ram_bytes: int | None,
    ) -> None:
        self._bundle = bundle
        self._connect = connect
        self._check = check
        self._timeout = timeout
        self._parts = GraphParts(bundle, num_threads, max_ram_bytes)
        self._estimates = _estimates(bundle.cuts, link)
        self._controller = GraphController(bundle.cuts, bundle.chosen, self._estimates)
        self._alone = next((cut for cut in bundle.cuts if cut.cloud is None), None)
        self._reference_bytes: int | None = None  # of the first inputs: those of size 1
        self._lock = RLock()  # of what is estimated and decided
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="edgecloud-meet")
        self._meeting: Future[Service] | None = None
        self._loss: str | None = None  # why the cloud counts as lost
        self._latest: CutInfo | None = None

    def run(
        self, inputs: Mapping[str, Array], mode: str, deadline_s: float | None, risk: float | None = None, rule: Rule | None = None
    ) -> InferenceReply:
        """The outputs. Raises as `Client.run`."""
        if deadline_s is not None and not (isinstance(deadline_s, int | float) and deadline_s > 0):
            raise ConfigError(f"deadline_s is {deadline_s!r}; it takes seconds above 0")
        started = time.perf_counter()
        end_s = None if deadline_s is None else time.monotonic() + deadline_s
        arrays = check_inputs(self._bundle.graph, inputs)
        cuts = cuts_of(self._bundle, mode, self._connect is not None)
        size = self._size(arrays)
        stands_in = self._alone if mode == "auto" else None  # who computes it all when the cloud does not answer
        exits = exits_of(self._bundle, cuts, risk, rule)
        if all(cut.cloud is None for cut in cuts):
            return self._run_alone(cuts[0], arrays, size, started)
        choice, cut, part = None, None, None
        if exits:  # what leaves at an exit needs no service, so none is asked for before
            choice, cut = self._choose(cuts, size, exits)
            if cut.name in exits:
                part = self._compute(cut, arrays)
                if (answer := exits[cut.name].answer(part.found)) is not None:
                    return self._leave(exits[cut.name].exit, answer, part, choice, size, started)
        service = self._meet(stands_in, size, end_s)
        if service is None:
            assert stands_in is not None
            return self._run_alone(stands_in, arrays, size, started, self._loss)
        with self._lock:
            allowed = self._allowed(cuts, service, size)
        if choice is None or cut is None or cut not in allowed:
            choice, cut = self._choose(allowed, size, {})
        elif part is not None:  # it did not leave, so all of it is to be paid
            with self._lock:
                choice = replace(choice, price=self._controller.price(cut.name, size, time.monotonic()))
        if cut.cloud is None:
            reply = self._run_alone(cut, arrays, size, started)
        elif stands_in is None:
            reply = self._run_until_answered(cut, part, arrays, size, service, started, end_s)
        else:
            reply = self._run_or_stand_in(cut, part, stands_in, choice, arrays, size, service, started, end_s)
        with self._lock:
            self._controller.tried(choice, (time.perf_counter() - started) * 1e3, size, time.monotonic())
        return reply

    def network_changed(self, link: LinkEstimate) -> None:
        """Forget what the old network was like."""
        with self._lock:
            fresh = _estimates(self._bundle.cuts, link)
            self._estimates.link, self._estimates.up, self._estimates.down = link, fresh.up, fresh.down
            self._meeting = self._loss = None

    def close(self) -> None:
        """Drop the graphs."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._parts = GraphParts(self._bundle, 1)

    # Who may be asked

    def _meet(self, stands_in: CutInfo | None, size: float, end_s: float | None) -> Service | None:
        """The service's introduction; None: it has to be done without. With nobody to stand in it is waited for."""
        assert self._connect is not None
        replicas = self._connect()
        with self._lock:
            if self._meeting is None and (stands_in is None or replicas.working(time.monotonic()) is not None):
                self._meeting = self._thread.submit(self._introduce, replicas, stands_in is None)
            meeting = self._meeting
        if meeting is None:
            return None
        wait_s = None if end_s is None else max(0.0, end_s - time.monotonic())
        if stands_in is not None:
            wait_s = MEET_S if self._loss is None else 0.0
            if end_s is not None:
                wait_s = max(0.0, min(wait_s, self._spare_s(stands_in, size, end_s)))
        try:
            service = meeting.result(wait_s)
        except NotYetError:
            if stands_in is None:
                raise DeadlineExceededError(
                    "the time allowed for this run has passed before the cloud answered; allow more"
                ) from None
            self._loss = self._loss or f"{replicas.address} has not answered yet"
            return None
        except (CloudUnavailableError, CloudOverloadedError) as error:
            self._lost(str(error))
            if stands_in is None:
                raise
            return None
        except BaseException:
            self._meeting = None
            raise
        self._loss = None
        return service

    def _introduce(self, replicas: Replicas, wait: bool) -> Service:
        """The handshake, and once more: over an open connection it is a round trip."""
        service = replicas.describe(self._check, wait=wait)
        cloud = replicas.choose(time.monotonic())
        assert cloud is not None
        started = time.perf_counter()
        cloud.describe(wait=wait)
        with self._lock:
            self._estimates.link.add((time.perf_counter() - started) * 1e3, 0, time.monotonic(), was_idle=False)
        return service

    def _lost(self, reason: str) -> None:
        """The service has to introduce itself again before it is asked."""
        with self._lock:
            self._loss, self._meeting = reason, None

    def _allowed(self, cuts: Sequence[CutInfo], service: Service, size: float) -> list[CutInfo]:
        """Cuts that the service takes, and whose requests it would. Raises ConfigError: there is none."""
        served = [cut for cut in cuts if cut.cloud is None or cut.name in service.graph_cuts]
        if not served:
            wanted = ", ".join(cut.name for cut in cuts)
            raise ConfigError(
                f"the service takes {', '.join(service.graph_cuts) or 'no cut'}, not {wanted}; serve this bundle's cloud/"
            )
        limit = service.max_message_bytes
        small = [cut for cut in served if cut.cloud is None or not limit or self._estimates.uplink_bytes[cut.name] * size <= limit]
        if small:
            return small
        least = min(self._estimates.uplink_bytes[cut.name] * size for cut in served)
        raise _too_large(int(least), limit)

    def _choose(self, allowed: Sequence[CutInfo], size: float, exits: Mapping[str, Leave]) -> tuple[Choice, CutInfo]:
        """What the controller takes, and the cut that is ready for it."""
        leaving = {name: leave.share for name, leave in exits.items()}
        with self._lock:
            choice = self._controller.choose(time.monotonic(), size, [cut.name for cut in allowed], leaving)
            return choice, self._ready(self._bundle.cut(choice.price.cut), allowed)

    def _ready(self, cut: CutInfo, allowed: Sequence[CutInfo]) -> CutInfo:
        """The cut itself, or, while its graph is being loaded beside, the one that was used before."""
        latest = self._latest
        if latest is not None and latest in allowed and not self._parts.has(cut) and self._parts.prepare(cut):
            return latest
        self._latest = cut
        return cut

    # The run itself

    def _run_alone(
        self, cut: CutInfo, arrays: Mapping[str, Array], size: float, started: float, fell_back: str | None = None,
        num_attempts: int = 0, uplink_bytes: int = 0,
    ) -> InferenceReply:  # fmt: skip
        begun = time.perf_counter()
        found, is_warm = self._parts.run(cut, arrays)
        now = time.perf_counter()
        edge_ms = (now - begun) * 1e3
        with self._lock:
            self._estimates.alone_s = time.monotonic()
            if is_warm:
                self._estimates.edge.add(cut.name, edge_ms / size, time.monotonic())
        metrics = InferenceMetrics((now - started) * 1e3, edge_ms=edge_ms, num_attempts=num_attempts, uplink_bytes=uplink_bytes)
        return InferenceReply({name: found[name] for name in self._bundle.own_outputs}, cut.name, metrics, fell_back)

    def _leave(
        self, name: str, answer: Array, part: DevicePart, choice: Choice, size: float, started: float
    ) -> InferenceReply:  # fmt: skip
        """The exit's answer stands for the classifier's."""
        assert self._bundle.exits is not None
        with self._lock:
            if part.is_warm:
                self._estimates.edge.add(part.cut.name, part.edge_ms / size, time.monotonic())
            self._controller.tried(choice, (time.perf_counter() - started) * 1e3, size, time.monotonic())
        metrics = InferenceMetrics((time.perf_counter() - started) * 1e3, edge_ms=part.edge_ms)
        return InferenceReply({self._bundle.exits.output: answer}, part.cut.name, metrics, exit=name)

    def _run_until_answered(
        self, cut: CutInfo, part: DevicePart | None, arrays: Mapping[str, Array], size: float, service: Service, started: float,
        end_s: float | None,
    ) -> InferenceReply:  # fmt: skip
        """Ask until there is an answer, within the bounds of the timeout."""
        assert self._connect is not None
        replicas = self._connect()
        attempt = self._prepare(cut, part, arrays, size)
        _check_size(attempt.num_bytes, service)
        retry, num_attempts = Retry(self._timeout, end_s, replicas.address), 0
        while True:
            timeout_s = self._timeout.request_s if end_s is None else min(self._timeout.request_s, end_s - time.monotonic())
            num_attempts += 1
            try:
                return self._ask(cut, attempt, replicas, max(0.0, timeout_s), size, started, num_attempts)
            except (CloudUnavailableError, CloudOverloadedError) as error:
                retry.again_or_raise(error)

    def _run_or_stand_in(
        self, cut: CutInfo, part: DevicePart | None, stands_in: CutInfo, choice: Choice, arrays: Mapping[str, Array], size: float,
        service: Service, started: float, end_s: float | None,
    ) -> InferenceReply:  # fmt: skip
        """Ask once; when that comes to nothing in time, the device computes it all."""
        assert self._connect is not None
        replicas = self._connect()
        patience_s = max(LEAST_LOST_S, LOST_FACTOR * choice.price.total_ms / 1e3)
        if self._estimates.link.sent_to_idle(time.monotonic()):
            patience_s += FIRST_PACKET_MS / 1e3
        if end_s is not None:
            patience_s = min(patience_s, self._spare_s(stands_in, size, end_s))
            if patience_s < (choice.price.total_ms - choice.price.edge_ms) / 1e3:  # to ask would leave no time to stand in
                return self._run_alone(stands_in, arrays, size, started, f"the deadline is too near to ask {replicas.address}")
        attempt = self._prepare(cut, part, arrays, size)
        try:
            _check_size(attempt.num_bytes, service)
        except ConfigError as error:
            return self._run_alone(stands_in, arrays, size, started, str(error))
        try:
            return self._ask(cut, attempt, replicas, patience_s, size, started, 1)
        except (CloudUnavailableError, CloudOverloadedError) as error:
            self._lost(str(error))
            return self._run_alone(stands_in, arrays, size, started, str(error), 1, attempt.num_bytes)

    def _compute(self, cut: CutInfo, arrays: Mapping[str, Array]) -> DevicePart:
        """The device's part of a cut."""
        begun = time.perf_counter()
        found, is_warm = self._parts.run(cut, arrays)
        return DevicePart(cut, found, (time.perf_counter() - begun) * 1e3, is_warm)

    def _prepare(self, cut: CutInfo, part: DevicePart | None, arrays: Mapping[str, Array], size: float) -> Attempt:
        """The device's part, unless it is there already, and the message for the cloud's."""
        if part is None or part.cut is not cut:
            part = self._compute(cut, arrays)
        begun = time.perf_counter()
        request = infer_request(cut, part.found, self._bundle.graph_hash)
        edge_ms = part.edge_ms + (time.perf_counter() - begun) * 1e3
        if part.is_warm:
            with self._lock:
                self._estimates.edge.add(cut.name, edge_ms / size, time.monotonic())
        return Attempt(part.found, request, edge_ms, request.ByteSize())

    def _ask(
        self, cut: CutInfo, attempt: Attempt, replicas: Replicas, timeout_s: float, size: float, started: float, num_attempts: int
    ) -> InferenceReply:
        """One call of one service. Raises CloudError."""
        cloud = replicas.choose(time.monotonic())
        assert cloud is not None
        begun = time.perf_counter()
        try:
            outputs, trip = infer(cloud, cut, attempt.request, timeout_s)
        except (CloudUnavailableError, CloudOverloadedError) as error:
            elapsed_ms = (time.perf_counter() - begun) * 1e3
            with self._lock:
                replicas.failed(cloud, time.monotonic())
                if isinstance(error, UnansweredError) and not error.received:
                    self._estimates.unanswered(elapsed_ms, attempt.num_bytes, time.monotonic())
                elif isinstance(error, UnansweredError):
                    self._estimates.queue.add(elapsed_ms)
            raise
        except ModelMismatchError:
            self._lost("it serves another graph")  # so that the next call introduces itself, and names both
            raise
        with self._lock:
            replicas.answered(cloud)
            self._estimates.served(cut.name, size, trip, time.monotonic())
        found = {**attempt.found, **outputs}
        metrics = _metrics(trip, attempt, (time.perf_counter() - started) * 1e3, num_attempts)
        return InferenceReply({name: found[name] for name in self._bundle.own_outputs}, cut.name, metrics)

    # Sizes and times

    def _size(self, arrays: Mapping[str, Array]) -> float:
        """Of these inputs, in those of the first call."""
        num_bytes = sum(array.nbytes for array in arrays.values())
        if self._reference_bytes is None:
            self._reference_bytes = num_bytes
        return num_bytes / self._reference_bytes

    def _spare_s(self, stands_in: CutInfo, size: float, end_s: float) -> float:
        """What is left of the time allowed when the device's own run is paid."""
        alone_ms = self._controller.price(stands_in.name, size, time.monotonic()).total_ms
        return end_s - time.monotonic() - DEVICE_MARGIN * alone_ms / 1e3 - MARGIN_S


def _estimates(cuts: Sequence[CutInfo], link: LinkEstimate) -> GraphEstimates:
    """What the bundle says."""
    return GraphEstimates(
        link,
        edge=CutTimes({cut.name: cut.edge_ms + cut.codec_ms / 2 for cut in cuts}),
        cloud=CutTimes({cut.name: cut.cloud_ms + cut.codec_ms / 2 for cut in cuts}),
        uplink_bytes={cut.name: float(cut.boundary_bytes) for cut in cuts},
        downlink_bytes={cut.name: float(cut.output_bytes) for cut in cuts},
    )


def _metrics(trip: Trip, attempt: Attempt, total_ms: float, num_attempts: int) -> InferenceMetrics:
    return InferenceMetrics(
        total_ms=total_ms,
        edge_ms=attempt.edge_ms,
        uplink_ms=trip.uplink_ms,
        queue_ms=trip.queue_ms,
        cloud_ms=trip.cloud_ms,
        downlink_ms=trip.downlink_ms,
        uplink_bytes=num_attempts * trip.uplink_bytes,
        downlink_bytes=trip.downlink_bytes,
        num_attempts=num_attempts,
        num_batched=trip.num_batched,
    )


def _check_size(num_bytes: int, service: Service) -> None:
    """Raises ConfigError: a request is larger than the service takes."""
    if service.max_message_bytes and num_bytes > service.max_message_bytes:
        raise _too_large(num_bytes, service.max_message_bytes)


def _too_large(num_bytes: int, limit: int) -> ConfigError:
    return ConfigError(
        f"a request of {num_bytes} bytes is above the service's limit of {limit}; send less, or serve with --max-message-mb"
    )
