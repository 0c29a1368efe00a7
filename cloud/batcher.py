"""What goes into the next pass, and how it is packed."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from edgecloud.cloud.attention import Rows
from edgecloud.cloud.pages import OutOfPagesError
from edgecloud.cloud.pass_cost import PassCostFit
from edgecloud.cloud.prompt_room import STRETCH, PromptRoom
from edgecloud.cloud.sessions import Kind, OverQuotaError, Session, SessionStore
from edgecloud.cloud.work import Answer, Extend

SHORT_ROWS = 48  # a request of at most this many rows goes before longer ones


@dataclass(slots=True, eq=False)
class Job:
    """An Extend under way."""

    number: int
    request: Extend
    answer: Callable[[Answer], None]
    arrived_s: float
    session: Session | None = None  # set on admission
    draft_ids: tuple[int, ...] = ()
    context_length: int = 0
    choices: list[int] = field(default_factory=list)  # after the context, after every draft token
    num_emitted: int = 0  # tokens of a decode
    cancelled: bool = False
    is_prompt: bool = False  # set while planning, until the first choice: a prompt's last chunk is no short request
    starved: bool = False  # found no pages when it was last planned
    compute_ms: float = 0.0
    target_passes: float = 0.0

    @property
    def open_session(self) -> Session:
        """The session of an admitted job."""
        assert self.session is not None
        return self.session

    @property
    def num_rows(self) -> int:
        """Tokens that still need a pass."""
        return len(self.open_session.tokens) - self.open_session.table.length


@dataclass(frozen=True, slots=True)
class Share:
    """A job's part in a pass: tokens start..stop of its session, choices wanted from position `choices_from` on."""

    job: Job
    start: int
    stop: int
    choices_from: int

    @property
    def num_rows(self) -> int:
        """Rows in the pass."""
        return self.stop - self.start

    @property
    def num_choices(self) -> int:
        """Rows whose logits are wanted."""
        return max(0, self.stop - self.choices_from)

    @property
    def kind(self) -> Kind:
        """What its tokens are told by."""
        return self.job.open_session.kind

    @property
    def rows(self) -> Rows:
        """What the pass computes; what rows that enter later hold is still to be decoded."""
        session = self.job.open_session
        ids = [0] * self.num_rows if self.kind.cut else session.tokens[self.start : self.stop]
        return Rows(session.table, self.start, ids, self.num_choices, self.kind.cut)


@dataclass(frozen=True, slots=True)
class Plan:
    """A pass."""

    shares: list[Share] = field(default_factory=list)
    starved: list[Job] = field(default_factory=list)  # found no pages
    over_quota: list[Job] = field(default_factory=list)  # their tenants' busy sessions hold all that those may


class Batcher:
    """Decides who goes into the next pass.

    Short requests (a draft, the next token of a decode) go before prompts. Among either kind the tenant that has had the fewest
    rows comes first, then who has the least slack before the deadline, then who has waited longest. Prompts take the rows that
    are left, as many as keep the pass within a bound of what it would have taken without them (prompt_room.py).

    A job that has nothing cached yet takes the pages of what its tenant's others have read. While one of those is still reading
    what it could take, it waits.
    """

    def __init__(
        self, sessions: SessionStore, max_rows: int, fit: PassCostFit, fewest_shared: int = 0, stretch: float = STRETCH
    ) -> None:
        self._sessions = sessions
        self._max_rows = max_rows
        self._fewest_shared = fewest_shared  # tokens
        self._fit = fit
        self._prompt_room = PromptRoom(fit, stretch)
        self._rows_had: dict[str, float] = {}  # by tenant, since it last was idle

    def plan(self, jobs: Sequence[Job], now_s: float) -> Plan:
        """Pick shares of at most `max_rows` rows in all."""
        plan = Plan()
        self._welcome({job.request.tenant for job in jobs})
        ready = [job for job in jobs if job.open_session.table.num_pages or not self._waits_for_others(job, jobs)]
        for job in ready:
            job.is_prompt |= job.num_rows > SHORT_ROWS
        self._share_out([job for job in ready if not job.is_prompt], self._max_rows, now_s, plan)
        prompts = [job for job in ready if job.is_prompt]
        self._share_out(prompts, self._rows_for_prompts(prompts, plan.shares), now_s, plan)
        for job in jobs:
            job.starved = job in plan.starved or job in plan.over_quota
        return plan

    def observe(self, shares: Sequence[Share], took_ms: float) -> None:
        """Learn from a pass, before its jobs go on."""
        num_rows = sum(share.num_rows for share in shares)
        num_context = sum(share.stop for share in shares)
        num_prompt = sum(share.num_rows for share in shares if share.job.is_prompt)
        self._fit.observe(num_rows, num_context, took_ms)
        self._prompt_room.observe(num_rows - num_prompt, num_prompt, num_context, took_ms)

    def _waits_for_others(self, job: Job, jobs: Sequence[Job]) -> bool:
        """Take what others have read, or wait: whether one of its tenant is about to have read enough more to be worth it.

        Only for one that is as urgent and came first: so nobody waits in a circle, nor for who comes after. Whoever is waited for
        either reads on or is not waited for in the next pass, so the wait ends.
        """
        session = job.open_session
        context = session.tokens[: job.context_length - 1]
        found = self._sessions.adopt(session, context, self._fewest_shared, job.request.max_cache_tokens)
        length = session.table.whole_pages(found + max(1, self._fewest_shared))
        if length > len(context):
            return False
        for other in jobs:
            theirs = other.open_session
            if (
                _turn(other) < _turn(job)
                and other.request.tenant == job.request.tenant
                and not other.starved
                and theirs.table.length < length
                and theirs.tokens[:length] == context[:length]
            ):
                session.table.release()  # what is held while waiting would be missing elsewhere
                return True
        return False

    def _share_out(self, jobs: list[Job], room: int, now_s: float, plan: Plan) -> None:
        """Give rows to jobs, one tenant after another, until there is no room or no job."""
        queues: dict[str, deque[Job]] = {}
        for job in sorted(jobs, key=lambda job: (self._slack_ms(job, now_s), job.arrived_s)):
            queues.setdefault(job.request.tenant, deque()).append(job)
        while queues and room > 0:
            tenant = min(queues, key=self._rows_had.__getitem__)
            job = queues[tenant].popleft()
            if not queues[tenant]:
                del queues[tenant]
            session = job.open_session
            start = session.table.length
            stop = min(len(session.tokens), start + room)
            try:
                self._sessions.reserve(session, stop, job.request.max_cache_tokens)
            except OutOfPagesError:
                plan.starved.append(job)
                continue
            except OverQuotaError:
                plan.over_quota.append(job)
                continue
            room -= stop - start
            self._rows_had[tenant] += stop - start
            plan.shares.append(Share(job, start, stop, max(start, job.context_length - 1)))

    def _slack_ms(self, job: Job, now_s: float) -> float:
        """What is left before the deadline once its own pass is paid."""
        return (job.request.deadline_s - now_s) * 1e3 - self._fit.predict_ms(job.num_rows, len(job.open_session.tokens))

    def _rows_for_prompts(self, prompts: list[Job], shares: list[Share]) -> int:
        """Rows beside those already planned."""
        num_rows = sum(share.num_rows for share in shares)
        room = self._max_rows - num_rows
        if not shares or not prompts:
            return room
        num_read = max(job.open_session.table.length for job in prompts)
        return min(room, self._prompt_room.rows(num_rows, sum(share.stop for share in shares), num_read))

    def _welcome(self, tenants: set[str]) -> None:
        """A tenant that comes back starts level with the one that had least: idleness earns no credit."""
        present = {tenant: had for tenant, had in self._rows_had.items() if tenant in tenants}
        level = min(present.values(), default=0.0)
        self._rows_had = {tenant: present.get(tenant, level) - level for tenant in tenants}


def _turn(job: Job) -> tuple[float, float, int]:
    return job.request.deadline_s, job.arrived_s, job.number
