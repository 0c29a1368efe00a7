"""Sampling settings: what they refuse, and that the wire changes nothing."""

from __future__ import annotations

import math
import pickle
from dataclasses import FrozenInstanceError, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgecloud.errors import ConfigError, EdgecloudError
from edgecloud.rpc import edgecloud_pb2 as pb
from edgecloud.rpc.codec import refuse_unknown_fields, sampling_from_wire, sampling_to_wire
from edgecloud.sampling import SamplingSettings

REAL = ["temperature", "top_p", "repetition_penalty"]
WHOLE = ["top_k", "seed"]

temperatures = st.one_of(st.just(0.0), st.floats(1e-6, 100.0))
valid_settings = st.builds(
    SamplingSettings,
    temperature=temperatures,
    top_k=st.integers(0, 2**31 - 1),
    top_p=st.floats(0.0, 1.0, exclude_min=True),
    repetition_penalty=st.floats(0.01, 100.0),
    seed=st.integers(0, 2**64 - 1),
)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[(field, value) for field in REAL for value in (math.nan, math.inf, -math.inf, -1.0, -1e-9, 100.001, 10**400)],
        *[(field, value) for field in REAL for value in ("0.5", None, [0.5], True, 1j)],
        *[(field, value) for field in WHOLE for value in (-1, 1.0, math.nan, math.inf, "1", None, True, 10**400)],
        ("temperature", 5e-324),  # dividing by it would overflow
        ("temperature", 9e-7),
        ("top_k", 2**31),
        ("top_p", 0.0),
        ("top_p", 1.0000001),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", 0.0099),
        ("seed", 2**64),
    ],
    ids=lambda v: repr(v)[:12],
)
def test_a_bad_value_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        SamplingSettings(**{field: value})
    assert field in str(caught.value)
    assert repr(value)[:70] in str(caught.value)
    assert "it takes" in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", 0.0),
        ("temperature", 0),
        ("temperature", -0.0),
        ("temperature", 1e-6),
        ("temperature", 100.0),
        ("temperature", np.float32(0.7)),
        ("top_k", 0),
        ("top_k", 2**31 - 1),
        ("top_p", 5e-324),
        ("top_p", 1.0),
        ("top_p", 1),
        ("repetition_penalty", 0.01),
        ("repetition_penalty", 100.0),
        ("seed", 0),
        ("seed", 2**64 - 1),
    ],
    ids=lambda v: repr(v)[:12],
)
def test_the_bounds_themselves_are_good(field: str, value: Any) -> None:
    settings = SamplingSettings(**{field: value})
    assert getattr(settings, field) == value
    assert sampling_from_wire(pb.Sampling.FromString(sampling_to_wire(settings).SerializeToString())) == settings


def test_a_bad_value_is_both_ours_and_a_value_error() -> None:
    with pytest.raises(EdgecloudError):
        SamplingSettings(temperature=-1)
    with pytest.raises(ValueError, match="temperature is -1; it takes"):
        SamplingSettings(temperature=-1)


@pytest.mark.parametrize("value", ["x" * 100_000, -(10**5000)], ids=["text", "number"])
def test_the_message_stays_short_however_long_the_value(value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        SamplingSettings(top_k=value)
    assert len(str(caught.value)) < 1000


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(TypeError, match="temprature"):
        SamplingSettings(temprature=1.0)  # type: ignore[call-arg]


def test_the_defaults_are_greedy_and_everything_off() -> None:
    settings = SamplingSettings()
    assert settings.greedy
    assert (settings.top_k, settings.top_p, settings.repetition_penalty, settings.seed) == (0, 1.0, 1.0, 0)
    assert not SamplingSettings(temperature=1e-6).greedy


def test_settings_cannot_change_under_a_request() -> None:
    with pytest.raises(FrozenInstanceError):
        SamplingSettings().seed = 3  # type: ignore[misc]


@given(valid_settings)
def test_the_wire_returns_every_bit(settings: SamplingSettings) -> None:
    received = pb.Sampling.FromString(sampling_to_wire(settings).SerializeToString())
    refuse_unknown_fields(received)
    assert sampling_from_wire(received) == settings  # == on float64: to the last bit
    assert pickle.loads(pickle.dumps(settings)) == settings  # between engine and front end


@given(valid_settings)
def test_the_same_settings_are_the_same_bytes(settings: SamplingSettings) -> None:
    assert sampling_to_wire(settings).SerializeToString() == sampling_to_wire(replace(settings)).SerializeToString()


def test_what_is_off_costs_no_bytes() -> None:
    assert sampling_to_wire(SamplingSettings()).SerializeToString() == b""
    assert sampling_from_wire(pb.Sampling()) == SamplingSettings()
    assert len(sampling_to_wire(SamplingSettings(temperature=1.0)).SerializeToString()) == 9


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", math.nan),
        ("temperature", -1.0),
        ("temperature", math.inf),
        ("temperature", 5e-324),
        ("top_p", math.nan),
        ("top_p", -0.5),
        ("top_p", 2.0),
        ("repetition_penalty", math.nan),
        ("repetition_penalty", -1.0),
        ("top_k", 2**32 - 1),
    ],
    ids=lambda v: repr(v)[:12],
)
def test_a_bad_value_from_the_wire_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=field):
        sampling_from_wire(pb.Sampling(**{field: value}))
