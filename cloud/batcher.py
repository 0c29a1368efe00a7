"""What goes into the next pass: short requests first, long prompts in chunks beside them, one job a session."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from edgecloud.cloud.attention import KVPool, PagedBatch, tensor_ids
from edgecloud.cloud.pages import OutOfPagesError
from edgecloud.cloud.sessions import Session, SessionStore
from edgecloud.cloud.work import Answer, Extend
from edgecloud.kernels.attention import Segment

SHORT_ROWS = 64  # a request of at most this many rows goes before longer ones


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
    def num_choices(self) -> int:
        """Rows whose logits are wanted."""
        return max(0, self.stop - self.choices_from)


def plan(jobs: list[Job], sessions: SessionStore, max_rows: int) -> tuple[list[Share], list[Job]]:
    """Pick shares of at most `max_rows` rows in all.  -> (shares, jobs that found no pages)"""
    shares: list[Share] = []
    starved: list[Job] = []
    busy: set[bytes] = set()
    room = max_rows
    for job in sorted(jobs, key=lambda j: j.num_rows > SHORT_ROWS):  # stable: in order of arrival within each kind
        session = job.open_session
        if room == 0 or session.session_id in busy:
            continue
        start = session.table.length
        stop = min(len(session.tokens), start + room)
        try:
            sessions.reserve(session, stop)
        except OutOfPagesError:
            starved.append(job)
            continue
        busy.add(session.session_id)
        room -= stop - start
        shares.append(Share(job, start, stop, max(start, job.context_length - 1)))
    return shares, starved


def pack(shares: list[Share], pool: KVPool, device: torch.device) -> PagedBatch:
    """One packed batch, without padding."""
    input_ids: list[int] = []
    position_ids: list[int] = []
    slots: list[int] = []
    segments: list[Segment] = []
    logits_rows: list[int] = []
    for share in shares:
        session = share.job.open_session
        first = len(input_ids)
        input_ids += session.tokens[share.start : share.stop]
        position_ids += range(share.start, share.stop)
        slots += session.table.slots(share.start, share.stop)
        segments.append(Segment(first, len(input_ids), share.stop, session.table.runs(share.stop)))
        logits_rows += range(len(input_ids) - share.num_choices, len(input_ids))
    return PagedBatch(
        input_ids=tensor_ids(input_ids, device)[None],
        position_ids=tensor_ids(position_ids, device)[None],
        slots=tensor_ids(slots, device),
        segments=segments,
        logits_rows=tensor_ids(logits_rows, device),
        pool=pool,
    )
