"""Profiles of machines: the shipped ones, what a file may say, and what is made of measurements."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from edgecloud.errors import ConfigError
from edgecloud.partitioner.fitted import fitted, spread_over_layers
from edgecloud.partitioner.layer_table import layer_table
from edgecloud.partitioner.layer_times import WEIGHT_BYTES, LayerTimes, ModelShape
from edgecloud.partitioner.machine_profile import PROFILES, MachineProfile, known_profiles, load_profile
from edgecloud.partitioner.node_times import least_by_layer, scaled

SHAPE = ModelShape("model", 12, 256, 8, 2, 32, 1024, 8000, tied=True, fingerprint="abc")
PLAIN: dict[str, Any] = {"name": "m", "compute": {"int4": 100.0, "fp32": 50.0}, "memory_bandwidth": 10.0, "ram": 8.0}


def test_every_shipped_profile_loads_and_names_its_sources() -> None:
    assert {"xeon-core", "raspberry-pi-5", "jetson-orin-nano", "phone", "cpu", "l4", "a100", "h100"} <= set(known_profiles())
    for name in known_profiles():
        profile = load_profile(name)
        assert profile.source
        figures = [line for line in (PROFILES / f"{name}.yaml").read_text().splitlines() if line[:1].islower() or line[:2] == "  "]
        assert any("#" in line for line in figures)


def test_an_a100_does_what_others_measured_on_one() -> None:
    """LMDeploy: 10 ms a token with Llama-2 7B, 139 ms for a prompt of 2,048."""
    llama = ModelShape("llama", 32, 4096, 32, 32, 128, 11008, 32000, tied=False)
    times = LayerTimes(llama, load_profile("a100"), "fp16")
    assert times.tail_ms(0, 1, 128) == pytest.approx(10, rel=0.05)
    assert times.tail_ms(0, 2048, 2048, 1) == pytest.approx(139, rel=0.1)


def test_a_profile_comes_back_from_its_file(tmp_path: Path) -> None:
    measured = spread_over_layers("abc", SHAPE, "int4", 64, (1, 64), (10.0, 100.0))
    profile = fitted("here", SHAPE.num_weights, measured, (10.0, 100.0), ram=4)
    (tmp_path / "here.json").write_text(profile.to_json())
    assert load_profile(tmp_path / "here.json") == profile
    (tmp_path / "here.yaml").write_text(yaml.safe_dump(json.loads(profile.to_json())))
    assert load_profile(tmp_path / "here.yaml") == profile


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"memroy_bandwidth": 1.0}, "unknown key memroy_bandwidth; did you mean memory_bandwidth"),
        ({"energy": {"active_wats": 1.0}}, "unknown key energy.active_wats; did you mean active_watts"),
        ({"compute": {"int3": 1.0}}, "compute names 'int3'"),
        ({"compute": {}}, "compute is {}"),
        ({"compute": [1]}, r"compute is \[1\]"),
        ({"memory_bandwidth": "fast"}, "memory_bandwidth is 'fast'; it takes a number"),
        ({"memory_bandwidth": float("inf")}, "memory_bandwidth is inf"),
        ({"memory_bandwidth": True}, "memory_bandwidth is True"),
        ({"ram": 0.0}, "ram is 0.0; it must be above 0"),
        ({"overheads": {"layer_ms": -1.0}}, "layer_ms is -1.0"),
        ({"energy": {"waiting_watts": float("nan")}}, "waiting_watts is nan"),
        ({"measured": [{"fingerprint": "a"}]}, r"measured\[0\].weights is missing"),
        ({"measured": 3}, "measured is 3; it takes a list"),
        ({"name": 3}, "name is 3; it takes text"),
    ],
)
def test_a_wrong_profile_is_refused_by_the_name_of_what_is_wrong(change: dict[str, Any], complaint: str, tmp_path: Path) -> None:
    (tmp_path / "m.yaml").write_text(yaml.safe_dump(PLAIN | change))
    with pytest.raises(ConfigError, match=complaint):
        load_profile(tmp_path / "m.yaml")


@pytest.mark.parametrize("text", ["- 1", "a: [", "!!python/object/apply:os.system ['true']", "\0"])
def test_a_file_that_is_no_profile_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "m.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"--device .*m\.yaml"):
        load_profile(tmp_path / "m.yaml")
    with pytest.raises(ConfigError, match="neither a file nor a profile; profiles: .*raspberry-pi-5"):
        load_profile("rasberry-pi-5")


@given(rows=st.integers(1, 300), more=st.integers(0, 100), context=st.floats(0, 4000), weights=st.sampled_from(["int4", "fp32"]))
def test_more_work_never_takes_less(rows: int, more: int, context: float, weights: str) -> None:
    measured = spread_over_layers("abc", SHAPE, "fp32", 0, (1, 4, 16), (3.0, 4.0, 9.0))
    for machine in (MachineProfile(**PLAIN), fitted("m", SHAPE.num_weights, measured, (3.0, 9.0), ram=1)):
        if weights not in machine.compute:
            continue
        times = LayerTimes(SHAPE, machine, weights)
        assert times.tail_ms(0, rows + more, context) >= times.tail_ms(0, rows, context) * (1 - 1e-9)
        assert times.draft_ms(rows, context + more) >= times.draft_ms(rows, context) * (1 - 1e-9)


@given(cut=st.integers(0, 12), rows=st.integers(1, 40))
def test_front_and_tail_make_the_whole(cut: int, rows: int) -> None:
    times = LayerTimes(SHAPE, MachineProfile(**PLAIN), "fp32")
    assert times.layers_ms(0, cut, rows, 100) + times.tail_ms(cut, rows, 100) == pytest.approx(times.tail_ms(0, rows, 100))


def test_what_was_measured_beats_what_the_roofline_says() -> None:
    measured = spread_over_layers("abc", SHAPE, "int4", 0, (1, 5), (20.0, 30.0))
    machine = MachineProfile(**PLAIN, measured=(measured,))
    assert LayerTimes(SHAPE, machine, "int4").tail_ms(0, 5, 0) == pytest.approx(30.0, rel=1e-3)
    assert LayerTimes(SHAPE, machine, "int4").tail_ms(0, 3, 0) == pytest.approx(25.0, rel=1e-3)
    assert LayerTimes(SHAPE, machine, "fp32").tail_ms(0, 1, 0) < 6  # of another format nothing was


def test_weights_are_counted_as_the_demo_model_has_them() -> None:
    smol = ModelShape("smol", 30, 576, 9, 3, 64, 1536, 49152, tied=True)
    assert smol.num_weights == 134_479_872
    assert smol.weight_bytes("int4") == pytest.approx(86.5e6, rel=0.05)  # the demo's draft on disk
    assert smol.kv_bytes(30, 1) == 2 * 3 * 64 * 4 * 30


def test_the_profiler_s_nodes_are_summed_by_layer_and_the_warm_up_is_left_out() -> None:
    def node(name: str, ts: int, dur: int) -> dict[str, Any]:
        return {"cat": "Node", "name": f"{name}_kernel_time", "ts": ts, "dur": dur}

    events: list[dict[str, Any]] = []
    for run, slow in enumerate((50, 2, 1)):
        start = 1000 * run
        events += [
            {"cat": "Session", "name": "model_run", "ts": start, "dur": 900},
            node("/model/layers.0/attn/q", start + 1, 1000 * slow),
            node("/model/layers.0/mlp/up", start + 2, 1000),
            node("/model/layers.1/attn/q", start + 3, 3000 * slow),
            node("/model/layers.2/final_norm_layernorm/x", start + 4, 500),  # no layer: the norm before the head
            node("/lm_head/MatMul", start + 5, 4000),
        ]
    assert least_by_layer(events, 2) == ([2.0, 3.0], 4.5)
    assert scaled([2.0, 3.0], 5.0, 5.0) == ([1.0, 1.5], 2.5)
    with pytest.raises(ValueError, match="the profile holds 3 runs, 4 were made"):
        least_by_layer(events, 4)
    with pytest.raises(ValueError, match="not named by layer"):
        least_by_layer([event for event in events if "layers" not in event["name"]], 2)


def test_the_table_of_layers_says_what_crosses_a_boundary() -> None:
    table = layer_table(SHAPE, MachineProfile(**PLAIN), load_profile("a100"), "int4")
    assert len(table.rows) == 12
    row = table.rows[3]
    assert 0 < row.device_decode_ms <= row.device_verify_ms <= row.device_prefill_ms
    assert table.boundary_bytes["float16"] == 512
    assert table.boundary_bytes["int8"] <= 0.6 * 512
    assert table.layer_bytes["int4"] == SHAPE.layer_weights * WEIGHT_BYTES["int4"]
    assert table.to_table().row_count == 1  # they are alike
    with pytest.raises(ValueError, match="no figure for int8"):
        layer_table(SHAPE, MachineProfile(**PLAIN), load_profile("a100"), "int8")
