"""The graph engine: runs the cloud's part of cuts, requests that fit together in one run, never padded.

A lone request never waits. Where the latest requests of a cut came while another one ran, the next waits a moment for company.
Rows of a run must not know each other, and sharing must pay: now and then a shared run is held against lone ones. Where outputs
differ, requests of that cut run alone from then on; where it is not faster (as a rule on few cores), until the next trial.
"""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from edgecloud.cloud.graph_work import GraphAnswer, Inferred, RunCut, TensorData, Unfit
from edgecloud.cloud.work import EngineLoad, Failed
from edgecloud.errors import ConfigError
from edgecloud.tensors import Array, from_bytes, to_bytes

logger = logging.getLogger(__name__)

SAME = 1e-4  # of the largest output: how far rounding may move one in company
MAX_REPLY_BYTES = 1 << 28
PAYS = 0.9  # of what requests take one after another: what a shared run may take to be worth it
NUM_CHECKED = 2  # requests of a shared run that is held against lone ones
LAST_MS = 1.0  # a request is not held back for company in the last of its deadline

Arrays = Mapping[str, Array]
Deliver = Callable[[GraphAnswer], None]


@dataclass(frozen=True, slots=True)
class Job:
    """A request that waits."""

    number: int
    request: RunCut
    deliver: Deliver


@dataclass(slots=True)
class Company:
    """What is known of sharing runs of one cut."""

    allowed: bool  # by the graph, and by what was seen since
    expected: bool = False  # the latest requests overlapped
    num_met: int = 0  # times that more than one request could share a run
    run_s: float = 0.0  # the latest run
    relative: float | None = None  # time of a shared run, over that of lone ones

    @property
    def pays(self) -> bool:
        """Whether to share, as far as is known."""
        return self.allowed and (self.relative is None or self.relative < PAYS)

    @property
    def is_checked(self) -> bool:
        """Whether the next time is one of those to hold against lone runs: the first, second, fourth, eighth, ..."""
        return self.allowed and (self.num_met + 1) & self.num_met == 0

    def tried(self, relative: float) -> None:
        """A shared run took so much of the time of lone ones."""
        self.relative = relative if self.relative is None else (self.relative + relative) / 2


@dataclass(slots=True)
class GraphEngine:
    """Runs on the thread of whoever calls `step`.

    Args:
        run: the graph of a cut; raises ConfigError when it cannot run on the inputs.
        batches: by cut, whether requests may be put together.
        max_rows: of a shared run.
        window_s: how long a request waits for company that is expected.
    """

    run: Callable[[str, Arrays], Mapping[str, Array]]
    batches: Mapping[str, bool]
    max_rows: int = 8
    window_s: float = 0.002
    clock: Callable[[], float] = time.monotonic
    _waiting: list[Job] = field(default_factory=list)
    _companies: dict[str, Company] = field(default_factory=dict)
    _turns: dict[str, int] = field(default_factory=dict)  # by tenant, the run that served it last
    _num_runs: itertools.count[int] = field(default_factory=itertools.count)
    _ended_s: float = -math.inf  # the latest run

    def submit(self, number: int, request: RunCut, deliver: Deliver) -> None:
        """Take a request in. `deliver` is called once, from `step`."""
        company = self._company(request.cut)
        company.expected |= request.sent_s < self._ended_s
        self._waiting.append(Job(number, request, deliver))

    def cancel(self, number: int) -> None:
        """Nobody waits for it any more."""
        self._waiting = [job for job in self._waiting if job.number != number]

    def release(self, session_id: bytes) -> None:
        """Graphs have no sessions."""

    @property
    def load(self) -> EngineLoad:
        """How many wait."""
        return EngineLoad(0, len(self._waiting), 0, 0)

    @property
    def has_work(self) -> bool:
        """Whether `step` would run something now."""
        return self.idle_ms == 0

    @property
    def idle_ms(self) -> float:
        """How long nothing needs to be done unless a request comes."""
        if not self._waiting:
            return math.inf
        batch, request = self._batch(), self._head.request
        company = self._company(request.cut)
        is_full = sum(map(_rows, batch)) >= self.max_rows or (company.is_checked and len(batch) >= NUM_CHECKED)
        if not company.pays or not company.expected or request.num_rows is None or is_full:
            return 0.0
        latest_s = min(request.sent_s + self.window_s, request.deadline_s - company.run_s - LAST_MS / 1e3)
        return max(0.0, (latest_s - self.clock()) * 1e3)

    def step(self) -> None:
        """One run, if it is time for one."""
        if not self.has_work:
            return
        batch = self._batch()
        company = self._company(batch[0].request.cut)
        company.expected = len(batch) > 1
        if company.is_checked:
            batch = batch[:NUM_CHECKED]
        elif not company.pays:
            company.num_met += len(batch) > 1
            batch = batch[:1]
        taken = {job.number for job in batch}
        self._waiting = [job for job in self._waiting if job.number not in taken]
        self._turns[batch[0].request.tenant] = next(self._num_runs)
        now_s = self.clock()
        for job in [job for job in batch if job.request.deadline_s <= now_s]:
            job.deliver(Failed("the deadline passed before there was time for it"))
            batch.remove(job)
        self._run(batch, company)
        self._ended_s = self.clock()
        company.run_s = self._ended_s - now_s

    @property
    def _head(self) -> Job:
        """The oldest request of the tenant that has waited longest for a run."""
        return min(self._waiting, key=lambda job: (self._turns.get(job.request.tenant, -1), job.request.sent_s))

    def _batch(self) -> list[Job]:
        """The head, and those that can share its run, oldest first."""
        head = self._head
        num_rows = head.request.num_rows
        if num_rows is None or not self._company(head.request.cut).allowed:
            return [head]
        batch, form = [head], head.request.form
        for job in self._waiting:
            rows = job.request.num_rows
            if job is not head and rows is not None and num_rows + rows <= self.max_rows and job.request.form == form:
                batch.append(job)
                num_rows += rows
        return batch

    def _company(self, cut: str) -> Company:
        return self._companies.setdefault(cut, Company(self.batches[cut] and self.max_rows > 1))

    def _run(self, batch: list[Job], company: Company) -> None:
        started_s = self.clock()
        inputs: dict[int, Arrays] = {}
        for job in batch:
            try:
                inputs[job.number] = {t.name: from_bytes(t.dtype, t.shape, t.codec, t.data) for t in job.request.inputs}
            except ConfigError as error:
                job.deliver(Unfit(str(error)))
        jobs = [job for job in batch if job.number in inputs]
        if len(jobs) < 2 or not self._run_together(jobs, inputs, company, started_s):
            for job in jobs:
                self._run_alone(job, inputs[job.number])

    def _run_alone(self, job: Job, inputs: Arrays) -> None:
        started_s = self.clock()
        try:
            job.deliver(self._answer(self.run(job.request.cut, inputs), started_s, 1))
        except ConfigError as error:
            job.deliver(Unfit(str(error)))

    def _run_together(self, jobs: Sequence[Job], inputs: Mapping[int, Arrays], company: Company, started_s: float) -> bool:
        """One run for all.  -> whether they are answered"""
        cut, num_rows = jobs[0].request.cut, [_rows(job) for job in jobs]
        begun_s = self.clock()
        joined = {name: np.concatenate([inputs[job.number][name] for job in jobs]) for name in inputs[jobs[0].number]}
        try:
            shares = _split(self.run(cut, joined), num_rows)
        except ConfigError:  # one of them is the reason; each will see for itself
            return False
        is_checked = company.is_checked
        company.num_met += 1
        if shares is None:
            self._forbid(cut, company, "an output does not have a row for every row of the inputs")
            return False
        if is_checked:
            self._check(jobs, inputs, shares, company, self.clock() - begun_s)
            return True
        for job, share in zip(jobs, shares, strict=True):
            job.deliver(self._answer(share, started_s, len(jobs)))
        return True

    def _check(
        self, jobs: Sequence[Job], inputs: Mapping[int, Arrays], shares: Sequence[Arrays], company: Company, shared_s: float
    ) -> None:
        """Answer from lone runs, and see whether the shared one would have given the same, and sooner."""
        alone_s, outputs = 0.0, list[Arrays]()
        for job in jobs:
            started_s = self.clock()
            try:
                alone = self.run(job.request.cut, inputs[job.number])
            except ConfigError as error:
                job.deliver(Unfit(str(error)))
                continue
            alone_s += self.clock() - started_s
            outputs.append(alone)
            job.deliver(self._answer(alone, started_s, 1))
        if len(outputs) < len(jobs):
            return
        company.tried(shared_s / alone_s if alone_s else 1.0)
        same = all(_agree(alone, share) for alone, share in zip(outputs, shares, strict=True))
        if not (same and self._agrees_beside_another(jobs[0], inputs[jobs[0].number], outputs[0])):
            self._forbid(jobs[0].request.cut, company, "outputs depend on what shares a run")

    def _agrees_beside_another(self, job: Job, inputs: Arrays, alone: Arrays) -> bool:
        """Requests that came together may be equal, which would prove nothing: so once more, beside one made of it that is not."""
        joined = {name: np.concatenate([array, _unlike(array)]) for name, array in inputs.items()}
        try:
            shares = _split(self.run(job.request.cut, joined), [_rows(job), _rows(job)])
        except ConfigError:
            return True  # the graph does not take what was made: it proves nothing
        return shares is not None and _agree(alone, shares[0])

    def _forbid(self, cut: str, company: Company, reason: str) -> None:
        company.allowed = False
        logger.warning("requests of %s run alone from now on: %s", cut, reason)

    def _answer(self, outputs: Mapping[str, Array], started_s: float, num_batched: int) -> GraphAnswer:
        total_bytes = sum(output.nbytes for output in outputs.values())
        if total_bytes > MAX_REPLY_BYTES:
            return Unfit(f"the outputs have {total_bytes} bytes, a reply takes at most {MAX_REPLY_BYTES}; send smaller inputs")
        tensors = tuple(TensorData(name, str(a.dtype), a.shape, "", to_bytes(a)) for name, a in outputs.items())
        return Inferred(tensors, (self.clock() - started_s) * 1e3, num_batched)


def _rows(job: Job) -> int:
    return job.request.num_rows or 1


def _split(outputs: Mapping[str, Array], num_rows: Sequence[int]) -> list[Arrays] | None:
    """Everybody's rows of the outputs; None: they have others."""
    if any(not output.ndim or len(output) != sum(num_rows) for output in outputs.values()):
        return None
    ends = list(itertools.accumulate(num_rows))
    return [{name: output[end - n : end] for name, output in outputs.items()} for n, end in zip(num_rows, ends, strict=True)]


def _agree(alone: Arrays, share: Arrays) -> bool:
    """Whether they are equal up to rounding; integers and infinities exactly."""
    for name, want in alone.items():
        got = share[name]
        if want.shape != got.shape:
            return False
        if want.dtype.kind != "f":
            if not np.array_equal(want, got):
                return False
            continue
        finite = np.abs(want[np.isfinite(want)])
        if not np.allclose(want, got, rtol=0.0, atol=SAME * float(finite.max(initial=0.0)), equal_nan=True):
            return False
    return True


def _unlike(array: Array) -> Array:
    """Another array of that form: of twice the range, where values have one, and the other way round."""
    turned = array[..., ::-1] if array.ndim > 1 else array
    return np.add(turned, turned) if array.dtype.kind == "f" else turned
