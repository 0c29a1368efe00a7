"""The graph controller in virtual time: it follows the link, the device and the cloud, and tries again what has aged."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgecloud.edge.estimates import LinkEstimate
from edgecloud.edge.graph_controller import AGED_S, LONGEST_AGED_S, GraphController
from edgecloud.edge.graph_estimates import CutTimes, GraphEstimates, Trip
from edgecloud.graph_bundle import BoundaryTensor, CutInfo

STATED = {  # edge_ms, cloud_ms, bytes up, bytes down
    "edge": (100.0, 0.0, 0, 0),
    "cut-1": (30.0, 15.0, 60_000, 4_000),
    "cut-2": (60.0, 8.0, 20_000, 4_000),
    "cloud": (0.0, 20.0, 200_000, 4_000),
}


def cuts() -> list[CutInfo]:
    return [
        CutInfo(
            name, None if name == "cloud" else "edge/e.onnx", None if name == "edge" else "cloud/c.onnx",
            [] if name == "edge" else [BoundaryTensor("x", "float32", [1], "")],
            ["y"] if name == "edge" else [], [] if name == "edge" else ["y"],
            edge_ms, cloud_ms, 0.0, up, down, 0, 0.0, 0.0,
        )
        for name, (edge_ms, cloud_ms, up, down) in STATED.items()
    ]  # fmt: skip


@dataclass
class World:
    """What is really the case, and a device in it that calls again and again."""

    rtt_ms: float = 20.0
    up_mbit: float = 50.0
    down_mbit: float = 50.0
    queue_ms: float = 0.0
    device: float = 1.0  # times what is stated
    cloud: float = 1.0
    pause_s: float = 0.5
    chosen: str = "edge"
    now_s: float = 1000.0
    taken: list[str] = field(default_factory=list)
    spent_ms: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        times = [CutTimes({name: stated[side] for name, stated in STATED.items()}) for side in (0, 1)]
        sizes = [{name: float(stated[side]) for name, stated in STATED.items()} for side in (2, 3)]
        self.known = GraphEstimates(LinkEstimate(), *times, *sizes)
        self.known.link.add(self.rtt_ms, 0, self.now_s, was_idle=False)
        self.controller = GraphController(cuts(), self.chosen, self.known)

    def total_ms(self, name: str, size: float = 1.0) -> float:
        edge_ms, cloud_ms, up, down = STATED[name]
        if name == "edge":
            return edge_ms * self.device * size
        return (
            edge_ms * self.device * size + self.rtt_ms + self._line_ms(up * size, self.up_mbit)
            + self._line_ms(down * size, self.down_mbit) + self.queue_ms + cloud_ms * self.cloud * size
        )  # fmt: skip

    def best_ms(self) -> float:
        return min(self.total_ms(name) for name in STATED)

    def call(self, size: float = 1.0) -> str:
        """One run, as graph_client reports it."""
        choice = self.controller.choose(self.now_s, size, list(STATED))
        name = choice.price.cut
        edge_ms, cloud_ms, up, down = STATED[name]
        self.now_s += self.total_ms(name, size) / 1e3
        if name != "cloud":
            self.known.edge.add(name, edge_ms * self.device, self.now_s)
        if name == "edge":
            self.known.alone_s = self.now_s
        else:
            trip = Trip(
                self.rtt_ms + self._line_ms(up * size, self.up_mbit), self.queue_ms, cloud_ms * self.cloud * size,
                self._line_ms(down * size, self.down_mbit), int(up * size), int(down * size), 1,
            )  # fmt: skip
            self.known.served(name, size, trip, self.now_s)
        self.controller.tried(choice, self.total_ms(name, size), size, self.now_s)
        self.taken.append(name)
        self.spent_ms.append(self.total_ms(name, size))
        self.now_s += self.pause_s
        return name

    def calls(self, number: int) -> str:
        for _ in range(number):
            self.call()
        return self.taken[-1]

    @staticmethod
    def _line_ms(num_bytes: float, mbit: float) -> float:
        return num_bytes * 8 / mbit / 1e3


def test_a_link_that_gets_slow_moves_the_cut_towards_the_device_and_back() -> None:
    world = World(up_mbit=200, rtt_ms=5)
    assert world.calls(10) == "cloud"
    world.up_mbit = 12
    assert world.calls(10) in {"cut-1", "cut-2"}
    world.up_mbit = 0.5
    assert world.calls(10) == "edge"
    world.up_mbit = 200
    world.calls(int(2 * AGED_S / world.pause_s))  # in its own time: nothing tells a device that sends nothing
    assert world.calls(10) == "cloud"


def test_a_cloud_that_is_crowded_is_left_and_found_again() -> None:
    world = World(up_mbit=200, rtt_ms=5)
    assert world.calls(10) == "cloud"
    world.queue_ms = 500
    assert world.calls(20) == "edge"
    world.queue_ms = 0
    world.calls(int(2 * AGED_S / world.pause_s))
    assert world.calls(10) != "edge"


def test_a_device_that_throttles_hands_over_and_takes_back() -> None:
    world = World(up_mbit=4, rtt_ms=40)
    assert world.calls(10) == "edge"
    world.device = 4
    assert world.calls(10) == "cloud" or world.taken[-1] == "cut-1"
    world.device = 1
    world.calls(int(3 * AGED_S / world.pause_s))
    assert world.calls(10) == "edge"


def test_a_cloud_that_stays_bad_is_tried_ever_more_seldom() -> None:
    world = World(up_mbit=200, rtt_ms=5)
    world.calls(10)
    world.up_mbit = 0.5
    world.calls(10)
    world.taken.clear()
    world.calls(int(2000 / (world.pause_s + 0.1)))
    num_trials = sum(name != "edge" for name in world.taken)
    assert 2000 / LONGEST_AGED_S / 2 < num_trials < 2000 / AGED_S / 4


def test_two_cuts_that_are_as_good_do_not_take_turns() -> None:
    world = World(up_mbit=24.4)
    world.calls(20)
    world.taken.clear()
    for number in range(60):
        world.up_mbit = 24.4 * (1.03 if number % 2 else 0.97)
        world.call()
    assert sum(a != b for a, b in zip(world.taken, world.taken[1:], strict=False)) <= 1


def test_it_begins_with_what_the_bundle_was_planned_for_unless_that_is_clearly_wrong() -> None:
    for chosen in ("cut-2", "edge"):  # 99 and 100 ms, by what is stated
        assert World(chosen=chosen, rtt_ms=12).call() == chosen
    assert World(chosen="cloud", rtt_ms=900).call() == "edge"


def test_times_grow_with_the_inputs() -> None:
    world = World(up_mbit=30, rtt_ms=60)
    world.calls(5)
    small = world.controller.choose(world.now_s, 0.1, list(STATED)).price
    large = world.controller.choose(world.now_s, 10.0, list(STATED)).price
    assert small.cut == "edge"  # a round trip is more than it takes alone
    assert large.cut != "edge"
    assert large.edge_ms + large.cloud_ms > small.edge_ms


def test_what_one_cut_takes_tells_of_the_others() -> None:
    world = World(device=3.0)
    world.known.edge.add("cut-2", 180.0, 0.0)
    assert world.known.edge.ms("edge") == pytest.approx(300.0)
    assert world.known.edge.ms("cloud") == 0.0


@given(
    st.floats(1, 200), st.floats(0.3, 300), st.floats(0.3, 300), st.floats(0, 200), st.floats(0.3, 5), st.floats(0.3, 5),
    st.sampled_from(sorted(STATED)),
)  # fmt: skip
def test_in_a_world_that_stays_it_comes_to_the_best(
    rtt_ms: float, up_mbit: float, down_mbit: float, queue_ms: float, device: float, cloud: float, chosen: str
) -> None:
    """Within its hysteresis, after a few calls and the trials of a minute."""
    world = World(rtt_ms, up_mbit, down_mbit, queue_ms, device, cloud, chosen=chosen)
    world.calls(120)
    usual = sorted(world.spent_ms[-20:])[10]
    assert usual <= 1.12 * world.best_ms()
