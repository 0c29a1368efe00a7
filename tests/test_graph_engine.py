"""The graph engine: who shares a run with whom, and that nobody notices."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from edgecloud.cloud.graph_engine import GraphEngine
from edgecloud.cloud.graph_work import GraphAnswer, Inferred, RunCut, TensorData, Unfit
from edgecloud.cloud.work import Failed
from edgecloud.errors import ConfigError
from edgecloud.tensors import from_bytes, to_bytes

Arrays = Mapping[str, np.ndarray]


def double(arrays: Arrays) -> Arrays:
    return {"out": 2 * arrays["x"]}


def mean_over_rows(arrays: Arrays) -> Arrays:
    return {"out": arrays["x"] - arrays["x"].mean(axis=0, keepdims=True)}


def one_row_for_all(arrays: Arrays) -> Arrays:
    return {"out": arrays["x"].sum(axis=0, keepdims=True)}


class Bench:
    """An engine whose time stands still unless told, and what it has answered."""

    def __init__(self, graph: Any = double, *, row_s: float = 0.0, **options: Any) -> None:
        self.now_s = 100.0
        self.row_s = row_s
        self.graph = graph
        self.runs: list[int] = []  # rows of each
        self.answers: dict[int, GraphAnswer] = {}
        self.engine = GraphEngine(self.run, {"cut-1": True, "cut-2": True, "lone": False}, clock=lambda: self.now_s, **options)
        self.number = 0

    def run(self, cut: str, arrays: Arrays) -> Arrays:
        self.runs.append(len(arrays["x"]))
        self.now_s += 0.010 + self.row_s * len(arrays["x"])
        if not np.isfinite(arrays["x"]).all():
            raise ConfigError("not on such inputs")
        outputs: Arrays = self.graph(arrays)
        return outputs

    def submit(self, value: float, *, rows: int = 1, width: int = 4, cut: str = "cut-1", **fields: Any) -> int:
        self.number += 1
        number, x = self.number, np.arange(rows * width, dtype=np.float32).reshape(rows, width) + np.float32(value)
        data = TensorData("x", "float32", x.shape, "", to_bytes(x))
        request = RunCut(cut, (data,), fields.pop("sent_s", self.now_s), **fields)
        self.engine.submit(number, request, lambda answer: self.answers.update({number: answer}))
        return number

    def drain(self) -> None:
        for _ in range(1000):
            if self.engine.idle_ms == float("inf"):
                return
            self.now_s += self.engine.idle_ms / 1e3
            self.engine.step()
        raise AssertionError("it does not come to an end")

    def output(self, number: int) -> np.ndarray:
        answer = self.answers[number]
        assert isinstance(answer, Inferred), answer
        [tensor] = answer.outputs
        return from_bytes(tensor.dtype, tensor.shape, tensor.codec, tensor.data)

    def expected(self, value: float, rows: int = 1, width: int = 4) -> np.ndarray:
        return np.asarray(
            self.graph({"x": np.arange(rows * width, dtype=np.float32).reshape(rows, width) + np.float32(value)})["out"]
        )


def test_a_lone_request_never_waits() -> None:
    bench = Bench()
    for value in range(5):
        bench.submit(value)
        assert bench.engine.idle_ms == 0
        bench.engine.step()
        bench.now_s += 0.001  # the answer's way, and the next request's
    assert bench.runs == [1] * 5


def test_what_waits_together_runs_together_and_each_gets_its_own() -> None:
    bench = Bench()
    for _ in range(2):  # the first times it is only tried
        bench.submit(1.0), bench.submit(2.0)
        bench.drain()
    sent = {
        bench.submit(value, rows=rows): (value, rows)
        for value, rows in [(1.0, 1), (2.0, 3), (3.0, 2), (4.0, 1), (5.0, 4), (6.0, 1)]
    }
    bench.drain()
    for number, (value, rows) in sent.items():
        assert np.array_equal(bench.output(number), bench.expected(value, rows))
    assert max(bench.runs) == 8  # 1 + 3 + 2 + 1 + 1; 4 more rows would have been too many


def test_shared_runs_are_held_against_lone_ones_at_first_and_then_seldom() -> None:
    bench = Bench()
    for round_ in range(16):
        for value in (1.0, 2.0):
            bench.submit(round_ + value)
        bench.drain()
    shared = [rows for rows in bench.runs if rows == 2]
    assert len(shared) == 16 + 5  # and one beside what was made of it
    assert bench.runs.count(1) == 2 * 5  # for runs 1, 2, 4, 8 and 16
    assert [a.num_batched for a in list(bench.answers.values())[-6:-2] if isinstance(a, Inferred)] == [2, 2, 2, 2]


def test_where_sharing_is_not_faster_nobody_shares() -> None:
    """As on few cores: a shared run takes as long as those it stands for, and its first answer comes with its last."""
    bench = Bench(row_s=0.2)
    for _ in range(40):
        for value in range(4):
            bench.submit(value)
        bench.drain()
    assert len(bench.answers) == 160
    shared = [rows for rows in bench.runs if rows > 1]
    assert len(shared) < 20  # trials, ever more seldom
    assert set(shared) == {2}
    bench.row_s = 0.0  # another load, and it pays
    for _ in range(600):
        for value in range(4):
            bench.submit(value)
        bench.drain()
    assert bench.runs[-1] == 4


@pytest.mark.parametrize("graph", [mean_over_rows, one_row_for_all])
def test_a_graph_whose_rows_know_each_other_is_found_out_before_anybody_gets_a_wrong_answer(graph: Any) -> None:
    bench = Bench(graph)
    for round_ in range(6):
        numbers = {bench.submit(value, rows=2): value for value in (1.0 + round_, 50.0, -3.0)}
        bench.drain()
        for number, value in numbers.items():
            assert np.array_equal(bench.output(number), bench.expected(value, 2))
    assert sum(rows > 2 for rows in bench.runs) <= 2


def test_equal_requests_prove_nothing() -> None:
    bench = Bench(mean_over_rows)
    for _ in range(4):
        bench.submit(1.0), bench.submit(1.0)
        bench.drain()
    numbers = {bench.submit(value, rows=2): value for value in (1.0, 7.0)}
    bench.drain()
    assert all(np.array_equal(bench.output(number), bench.expected(value, 2)) for number, value in numbers.items())


def test_one_that_cannot_run_takes_nobody_with_it() -> None:
    bench = Bench()
    good, bad, other = bench.submit(1.0), bench.submit(np.nan), bench.submit(2.0)
    bench.drain()
    assert np.array_equal(bench.output(good), bench.expected(1.0))
    assert np.array_equal(bench.output(other), bench.expected(2.0))
    assert isinstance(bench.answers[bad], Unfit)


def test_only_what_fits_together_is_put_together() -> None:
    bench = Bench()
    bench.submit(1.0)
    bench.submit(2.0, width=5)
    bench.submit(3.0, cut="cut-2")
    bench.submit(4.0, cut="lone")
    bench.submit(5.0, cut="lone")
    bench.drain()
    assert bench.runs == [1] * 5


def test_without_sharing_every_one_runs_alone() -> None:
    bench = Bench(max_rows=1)
    for value in range(4):
        bench.submit(value)
    bench.drain()
    assert bench.runs == [1] * 4


def test_company_is_waited_for_where_requests_overlap_but_not_past_a_deadline() -> None:
    bench = Bench(window_s=0.005)
    bench.submit(1.0)
    bench.engine.step()
    began_s = bench.now_s - 0.005
    bench.submit(2.0, sent_s=began_s)  # it came while the first one ran
    assert bench.engine.idle_ms == 0  # and has waited long enough
    bench.engine.step()
    bench.submit(3.0, sent_s=bench.now_s - 0.001)
    assert bench.engine.idle_ms == pytest.approx(4.0)
    bench.submit(4.0)
    bench.now_s += 0.004
    bench.engine.step()
    assert bench.runs[2] == 2
    bench.drain()
    bench.submit(5.0, sent_s=bench.now_s - 0.001, deadline_s=bench.now_s + 0.042)  # the latest took forty of these
    assert 0 < bench.engine.idle_ms < 2


def test_a_deadline_that_has_passed_is_not_worked_for() -> None:
    bench = Bench()
    late = bench.submit(1.0, deadline_s=bench.now_s - 1)
    bench.drain()
    assert isinstance(bench.answers[late], Failed)
    assert bench.runs == []


def test_a_cancelled_request_is_not_run() -> None:
    bench = Bench()
    number = bench.submit(1.0)
    bench.engine.cancel(number)
    bench.drain()
    assert bench.runs == []
    assert bench.engine.load.num_waiting == 0


def test_tenants_take_turns() -> None:
    bench = Bench(max_rows=1)
    flood = [bench.submit(value, tenant="flood") for value in range(20)]
    other = bench.submit(99.0, tenant="other")
    bench.engine.step()
    bench.engine.step()
    assert other in bench.answers
    assert sum(number in bench.answers for number in flood) == 1
