"""`edgecloud profile`: the formulas of the break-even, what is measured on a tiny pair, and the command."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pairs import Pair, Server, free_port, until

from edgecloud.cli.app import run
from edgecloud.cost import break_even_rtt_ms, fastest_ms_per_token, survival, ttft_ms
from edgecloud.edge.survey import Spread

pytest_plugins = ["pairs"]

rates = st.floats(0.0, 0.98)
times_ms = st.floats(0.5, 200.0)
passes = st.dictionaries(st.sampled_from([1, 2, 3, 4, 6, 8, 12, 16]), times_ms, min_size=1)
flights = st.integers(1, 4)


# The formulas


@given(rates, passes, times_ms, times_ms, flights)
@settings(max_examples=60)
def test_at_the_break_even_both_ways_take_as_long(
    rate: float, verify_ms: dict[int, float], draft_ms: float, stream_ms: float, max_in_flight: int
) -> None:
    chances = survival(rate, 16)
    even_ms = break_even_rtt_ms(chances, verify_ms, draft_ms, stream_ms, max_in_flight)
    if even_ms is None:
        assert fastest_ms_per_token(chances, verify_ms, draft_ms, 0.0, max_in_flight) >= stream_ms
        return
    assert fastest_ms_per_token(chances, verify_ms, draft_ms, even_ms, max_in_flight) == pytest.approx(stream_ms, rel=1e-4)
    assert fastest_ms_per_token(chances, verify_ms, draft_ms, 0.9 * even_ms, max_in_flight) < stream_ms
    assert fastest_ms_per_token(chances, verify_ms, draft_ms, 1.1 * even_ms + 1e-3, max_in_flight) > stream_ms


@given(rates, passes, times_ms, flights, st.lists(st.floats(0.0, 1000.0), min_size=2, max_size=5))
@settings(max_examples=60)
def test_a_longer_round_trip_never_makes_speculation_faster(
    rate: float, verify_ms: dict[int, float], draft_ms: float, max_in_flight: int, trips_ms: list[float]
) -> None:
    chances = survival(rate, 16)
    taken = [fastest_ms_per_token(chances, verify_ms, draft_ms, rtt_ms, max_in_flight) for rtt_ms in sorted(trips_ms)]
    assert all(later >= sooner for sooner, later in pairwise(taken))


def test_a_slow_device_never_breaks_even() -> None:
    assert break_even_rtt_ms(survival(0.7, 16), {1: 10.0, 4: 12.0}, draft_ms=100.0, stream_ms=10.0, max_in_flight=4) is None


def test_one_draft_at_a_time_without_a_match_can_be_worked_out_by_hand() -> None:
    # One token a round: half a step wasted, one step, the trip, the pass. 1.5 * 2 + rtt + 10 = 43
    assert break_even_rtt_ms([0.0], {1: 10.0}, draft_ms=2.0, stream_ms=43.0, max_in_flight=1) == pytest.approx(30.0, rel=1e-4)


def test_the_first_token_waits_for_all_of_its_way() -> None:
    assert ttft_ms(100.0) == 100.0
    assert ttft_ms(100.0, rtt_ms=20.0, uplink_ms=3.0) == 123.0


def test_a_spread_of_one_is_that_one() -> None:
    assert Spread.of([4.0]) == Spread(4.0, 4.0, 4.0, 1)


# The command


def profile_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert run(["profile", *arguments, "--threads", "1", "--json"]) == 0
    content: dict[str, Any] = json.loads(capsys.readouterr().out)
    return content


def test_with_a_cloud_all_of_it_is_measured(tiny_pair: Pair, tiny_server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    found = profile_of(capsys, str(tiny_pair.bundle), "--cloud", tiny_server.address)
    assert found["device"]["step_ms"]["median"] > 0
    assert found["device"]["prefill_ms_per_token"]["median"] > 0
    assert 0 < found["link"]["least_rtt_ms"] <= found["link"]["rtt_ms"]
    assert found["link"]["uplink_ms_per_byte"] >= 0
    assert [seen["num_rows"] for seen in found["cloud"]["passes"]] == [1, 2, 3, 5, 9]
    assert all(seen["compute_ms"] > 0 for seen in found["cloud"]["passes"])
    assert found["cloud"]["load"]["num_pages"] > 0
    chances = found["acceptance"]["survival"]
    assert 0 < found["acceptance"]["rate"] < 1
    assert all(0 <= later <= sooner <= 1 for sooner, later in pairwise(chances))
    rows = {(row["mode"], row["num_draft_tokens"]): row for row in found["predictions"]}
    assert set(rows) == {("edge", 0), ("cloud", 0), *(("speculative", length) for length in (1, 2, 4, 8))}
    assert len(rows) == len(found["predictions"])
    assert rows["cloud", 0]["tpot_ms"] == pytest.approx(found["cloud"]["stream_ms"]["median"])
    assert (rows["edge", 0]["passes_per_token"], rows["cloud", 0]["passes_per_token"]) == (0, 1)
    assert all(row["tpot_ms"] > 0 and row["ttft_ms"] > 0 for row in rows.values())
    assert {choice["objective"] for choice in found["auto"]} == {"latency", "cost", "balanced", "offline-first"}
    [fastest] = [choice for choice in found["auto"] if choice["objective"] == "latency"]
    assert fastest["tpot_ms"] <= min(row["tpot_ms"] for row in rows.values() if row["mode"] != "edge") * (1 + 1e-9)
    assert found["break_even_rtt_ms"] is None or found["break_even_rtt_ms"] > 0
    until(tiny_server.is_empty)  # it leaves nothing behind


def test_without_a_cloud_it_says_what_is_missing(tiny_pair: Pair, capsys: pytest.CaptureFixture[str]) -> None:
    found = profile_of(capsys, str(tiny_pair.bundle))
    assert (found["link"], found["cloud"], found["acceptance"], found["break_even_rtt_ms"]) == (None, None, None, None)
    assert [row["mode"] for row in found["predictions"]] == ["edge"]
    assert run(["profile", str(tiny_pair.bundle), "--threads", "1"]) == 0
    output = capsys.readouterr().out
    assert "The device alone was measured" in output
    assert "--cloud HOST:PORT" in output


def test_the_tables_for_people(tiny_pair: Pair, tiny_server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["profile", str(tiny_pair.bundle), "--threads", "1", "--cloud", tiny_server.address]) == 0
    said = capsys.readouterr()
    for words in ("a drafted token", "a pass over 9 row(s)", "speculative, K = 4", "auto, latency"):
        assert words in said.out
    assert "Speculation is" in said.out
    assert "acceptance" in said.err  # progress


def test_bad_usage_and_failures(tiny_pair: Pair, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["profile", str(tiny_pair.bundle), "--threads", "-1"]) == 2
    assert "num_threads is -1" in capsys.readouterr().err
    assert run(["profile", str(tiny_pair.bundle), "--cloud", "nowhere"]) == 2
    assert "'nowhere'" in capsys.readouterr().err
    assert run(["profile", str(tiny_pair.target)]) == 1
    assert "is no bundle" in capsys.readouterr().err
    assert run(["profile", str(tiny_pair.bundle), "--cloud", f"127.0.0.1:{free_port()}"]) == 1
    assert "is `edgecloud serve` running?" in capsys.readouterr().err
