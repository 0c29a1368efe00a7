"""The services that may be asked: every one gives the same answer to the same request, so any will do."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from edgecloud.edge.remote import Cloud, RemoteVerifier
from edgecloud.edge.tail import TailSession
from edgecloud.errors import CloudError, CloudOverloadedError, CloudUnavailableError
from edgecloud.types import Preference, Service, ServiceLoad

FIRST_OPEN_S, LONGEST_OPEN_S = 1.0, 30.0  # how long a service that failed is passed over, doubled at every further failure


@dataclass(slots=True)
class _Replica:
    cloud: Cloud
    num_failures: int = 0
    passed_over_until_s: float = 0.0  # a circuit breaker
    handshake_ms: float | None = None


class Replicas:
    """Services in the user's order, or the nearest first.

    Args:
        clouds: at least one.
        preference: `order`: the first that works. `latency`: the one whose handshake took least.
    """

    def __init__(self, clouds: Sequence[Cloud], preference: Preference = "order") -> None:
        self._replicas = [_Replica(cloud) for cloud in clouds]
        self._preference = preference

    def choose(self, now_s: float, but: Cloud | None = None) -> Cloud | None:
        """The one to ask; None: there is no other than `but`. When all have failed lately: the one whose time comes first."""
        candidates = [replica for replica in self._replicas if replica.cloud is not but]
        if but is not None:  # a second opinion is asked only where it promises something
            candidates = [replica for replica in candidates if replica.passed_over_until_s <= now_s]
        closed = [replica for replica in candidates if replica.passed_over_until_s <= now_s]
        if not closed:
            return min(candidates, key=lambda replica: replica.passed_over_until_s).cloud if candidates else None
        if self._preference == "latency":
            return min(closed, key=lambda replica: (replica.handshake_ms is None, replica.handshake_ms)).cloud
        return closed[0].cloud

    def working(self, now_s: float) -> Cloud | None:
        """The one to ask, unless all have failed lately."""
        cloud = self.choose(now_s)
        return cloud if cloud is not None and self._of(cloud).passed_over_until_s <= now_s else None

    def failed(self, cloud: Cloud, now_s: float) -> None:
        """A call has come to nothing: others are preferred for a while."""
        replica = self._of(cloud)
        open_s = min(LONGEST_OPEN_S, FIRST_OPEN_S * 2 ** min(replica.num_failures, 10))
        replica.num_failures += 1
        replica.passed_over_until_s = now_s + open_s

    def answered(self, cloud: Cloud) -> None:
        """It works."""
        replica = self._of(cloud)
        replica.num_failures, replica.passed_over_until_s = 0, 0.0

    def describe(self, check: Callable[[Service, str], None], *, wait: bool) -> Service:
        """The handshake with the first that answers; with every one when the nearest is preferred.

        Args:
            check: raises when a service is not the one that is meant.
            wait: a refused connection is tried again until the connect timeout.

        Raises:
            CloudError: none answers, or one is not what `check` wants; the first one's error.
        """
        failure: CloudError | None = None
        found: Service | None = None
        now_s = time.monotonic()
        for replica in sorted(self._replicas, key=lambda replica: replica.passed_over_until_s > now_s):
            started = time.perf_counter()
            try:
                service = replica.cloud.describe(wait=wait and len(self._replicas) == 1)
            except (CloudUnavailableError, CloudOverloadedError) as error:
                self.failed(replica.cloud, time.monotonic())
                failure = failure or error
                continue
            check(service, replica.cloud.address)
            replica.handshake_ms = (time.perf_counter() - started) * 1e3
            self.answered(replica.cloud)
            found = found or service
            if self._preference == "order":
                break
        if found is None:
            assert failure is not None
            raise failure
        return found

    @property
    def load(self) -> ServiceLoad | None:
        """Of the one that would be asked now."""
        cloud = self.choose(time.monotonic())
        return None if cloud is None else cloud.load

    @property
    def address(self) -> str:
        """All of them, for messages."""
        return ", ".join(replica.cloud.address for replica in self._replicas)

    def warm(self) -> None:
        """Connect, or wake the radio, while the device does something else."""
        cloud = self.choose(time.monotonic())
        if cloud is not None:
            cloud.warm()

    def reconnect(self) -> None:
        """The network is another one: connections are made anew, and no failure counts any more."""
        for replica in self._replicas:
            replica.cloud.reconnect()
            self.answered(replica.cloud)

    def close(self) -> None:
        """Close every connection."""
        for replica in self._replicas:
            replica.cloud.close()

    def _of(self, cloud: Cloud) -> _Replica:
        return next(replica for replica in self._replicas if replica.cloud is cloud)


class RemoteSession:
    """One conversation, wherever it is answered: a session of each service that was asked.

    `deadline_s` is a `time.monotonic()` after which calls end; None: no limit.
    """

    def __init__(self, replicas: Replicas) -> None:
        self.replicas = replicas
        self.deadline_s: float | None = None
        self._sessions: dict[Cloud, RemoteVerifier] = {}
        self._tails: dict[Cloud, TailSession] = {}  # of mode `split`

    def on(self, cloud: Cloud) -> RemoteVerifier:
        """The session of this service."""
        if cloud not in self._sessions:
            self._sessions[cloud] = RemoteVerifier(cloud)
        session = self._sessions[cloud]
        session.deadline_s = self.deadline_s
        return session

    def tail_on(self, cloud: Cloud, cut: int, codec_name: str, max_message_bytes: int) -> TailSession:
        """The session of this service that holds rows instead of ids."""
        if cloud not in self._tails:
            self._tails[cloud] = TailSession(cloud, cut, codec_name, max_message_bytes)
        session = self._tails[cloud]
        session.deadline_s = self.deadline_s
        return session

    def release(self) -> None:
        """Tell the services, without waiting for them."""
        for session in [*self._sessions.values(), *self._tails.values()]:
            session.release()
