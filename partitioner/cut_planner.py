"""Where to cut and with which bits: minimum cuts, each held against the samples, until the best one loses no more than is allowed.

Codecs are tried hopefully first. A tensor that loses too much with a codec is never offered that codec again, a cut that loses
too much although everything travels raw (the runtime rounds otherwise there) is not offered again, and the search goes on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial

from edgecloud.partitioner.boundary import RAW, Accuracy, CodecSpeed, Damage, encoded_bytes, takes_codec
from edgecloud.partitioner.cut_graph import Halves, cut_model
from edgecloud.partitioner.cut_search import Objective, Problem, Stages, best_cut
from edgecloud.partitioner.dag import Dag, Edge
from edgecloud.partitioner.link_spec import LinkSpec
from edgecloud.partitioner.min_cut import Costs
from edgecloud.partitioner.onnx_dag import Structure
from edgecloud.partitioner.onnx_model import OnnxModel
from edgecloud.partitioner.tensor_facts import TensorFact

NS = 1_000_000  # in a millisecond
MAX_TRIALS = 40  # cuts held against the samples for one link


@dataclass(frozen=True, slots=True)
class Candidate:
    """A cut that loses no more than allowed. Two are the same if they cut at the same place with the same codecs."""

    edge: Edge
    codecs: tuple[tuple[str, str], ...]  # (boundary tensor, codec), raw ones too
    damage: Damage = field(compare=False)
    halves: Halves = field(compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Choice:
    """The best candidate for a link. Times in nanoseconds, predicted from the profiles."""

    candidate: Candidate
    cost: int
    bound: int  # no allowed cut costs less; holds under what docs/partition.md says of losses
    proven: bool  # that cost is the least


@dataclass(slots=True)
class CutPlanner:
    """The model, its costs, and what has been learned of codecs so far."""

    model: OnnxModel
    structure: Structure
    dag: Dag
    facts: Mapping[str, TensorFact]
    device_ns: tuple[int, ...]  # [group]
    cloud_ns: tuple[int, ...]
    speeds: Mapping[str, CodecSpeed]  # of the codecs that may be used
    accuracy: Accuracy
    max_loss: float
    max_ram_bytes: int | None
    objective: Objective
    _banned: set[tuple[str, str]] = field(default_factory=set)
    _forbidden: set[Edge] = field(default_factory=set)
    _known: dict[tuple[Edge, tuple[tuple[str, str], ...]], Candidate] = field(default_factory=dict)

    def choose(self, link: LinkSpec, *, divided: bool = False) -> Choice | None:
        """The best cut for a link; None if memory, pins and tensors that cannot travel leave none.

        `divided`: of those that leave something to both sides.

        Raises:
            ModelError: a half does not run.
        """
        guessed = False
        for _ in range(MAX_TRIALS):
            codecs = self._codecs(link)
            problem = self.problem(link, codecs)
            if divided:
                problem = replace(problem, forbidden=problem.forbidden | {self.dag.whole, frozenset()})
            found = best_cut(problem)
            if found is None:
                return None
            candidate = self.try_cut(found.edge, codecs)
            if candidate.damage.loss <= self.max_loss:
                return Choice(candidate, found.cost, found.bound, found.exact and not guessed)
            guessed |= self._learn(candidate)
        return None if divided else self._fallback(link)

    def problem(self, link: LinkSpec, codecs: Mapping[str, str]) -> Problem:
        """What is minimised for a link, with a codec for every tensor."""
        zeros, none = (0,) * self.dag.num_nodes, (0,) * len(self.dag.flows)
        sent, encoded, decoded, back = [], [], [], []
        for flow in self.dag.flows:
            fact, codec = self.facts[flow.name], codecs.get(flow.name, RAW)
            elements = fact.num_bytes // 4
            sent.append(round(NS * link.up_ms(encoded_bytes(fact, codec))) if flow.can_cross else 0)
            encoded.append(round(elements * self.speeds[codec].encode_ns))
            decoded.append(round(elements * self.speeds[codec].decode_ns))
            back.append(round(NS * link.down_ms(fact.num_bytes)))
        stages = Stages(
            device=Costs(self.device_ns, zeros, tuple(encoded), none),
            up=Costs(zeros, zeros, tuple(sent), none),
            cloud=Costs(zeros, self.cloud_ns, tuple(decoded), none),
            down=Costs(zeros, zeros, none, tuple(back)),
            round_trip=round(NS * link.call_ms),
        )
        return Problem(self.dag, stages, self.objective, self.max_ram_bytes, frozenset(self._forbidden))

    def cost(self, candidate: Candidate, link: LinkSpec) -> int:
        """Predicted nanoseconds of a candidate on another link."""
        return self.problem(link, dict(candidate.codecs)).cost(candidate.edge)

    def good(self) -> list[Candidate]:
        """All cuts met so far that lose no more than allowed and fit the memory."""
        problem = Problem(self.dag, self.problem(LinkSpec(None, None, 0.0), {}).stages, self.objective, self.max_ram_bytes)
        return [c for c in self._known.values() if c.damage.loss <= self.max_loss and problem.allows(c.edge)]

    def try_cut(self, edge: Edge, codecs: Mapping[str, str]) -> Candidate:
        """Carry out a cut and hold it against the samples."""
        halves = cut_model(self.model, self.structure, self.dag, self.facts, edge)
        used = tuple((name, codecs.get(name, RAW)) for name in halves.boundary)
        if (edge, used) not in self._known:
            damage = self.accuracy.measure(halves, dict(used))
            self._known[edge, used] = Candidate(edge, used, damage, halves)
        return self._known[edge, used]

    def at(self, edge: Edge, link: LinkSpec) -> Candidate | None:
        """The cut itself, with the codecs that get it across soonest, or none; None if it is not allowed or loses too much."""
        if not self.problem(link, {}).allows(edge):
            return None
        for codecs in (self._codecs(link), {}):
            candidate = self.try_cut(edge, codecs)
            if candidate.damage.loss <= self.max_loss:
                return candidate
        return None

    def _codecs(self, link: LinkSpec) -> dict[str, str]:
        """For every tensor the codec that gets it across soonest, of those that may still be used."""

        def spent(name: str, codec: str) -> float:
            fact, speed = self.facts[name], self.speeds[codec]
            time_ns = NS * link.up_ms(encoded_bytes(fact, codec))
            return time_ns + fact.num_bytes // 4 * (speed.encode_ns + speed.decode_ns)

        found = {}
        for flow in self.dag.flows:
            name = flow.name
            usable = [
                codec for codec in self.speeds if codec and takes_codec(self.facts[name]) and (name, codec) not in self._banned
            ]
            found[name] = min([RAW, *usable], key=partial(spent, name))
        return found

    def _learn(self, candidate: Candidate) -> bool:
        """Rule something out. -> whether that was a guess, so that nothing is proven any more"""
        coded = [(name, codec) for name, codec in candidate.codecs if codec]
        if not coded:
            self._forbidden.add(candidate.edge)
            return False
        if len(coded) == 1:
            self._banned.add(coded[0])
            return False
        alone = {pair: self.try_cut(candidate.edge, dict([pair])).damage.loss for pair in coded}
        too_much = {pair for pair, loss in alone.items() if loss > self.max_loss}
        self._banned |= too_much or {max(alone, key=lambda pair: alone[pair])}
        return not too_much

    def _fallback(self, link: LinkSpec) -> Choice | None:
        """The best of what was tried and is good enough."""
        costs = [(self.cost(candidate, link), candidate) for candidate in self.good()]
        if not costs:
            return None
        cost, candidate = min(costs, key=lambda pair: pair[0])
        return Choice(candidate, cost, 0, proven=False)
