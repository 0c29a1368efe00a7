"""What a boundary codec does to a target's answers: nothing if it is lossless, more with fewer bits, at the cut asked for."""

from __future__ import annotations

import pytest
import torch
from pairs import Pair
from tiny import make_tiny_llama
from torch import Tensor

from edgecloud.errors import ConfigError, ModelError
from edgecloud.kernels.codec import CODECS, row_bytes
from edgecloud.partitioner.check import Sample, continue_greedily, encode_prompts, load_torch
from edgecloud.partitioner.damage import Damage, answer_log_probs, decoder_layers, measure_damage, stream_changed
from edgecloud.partitioner.model_folder import ModelFolder

pytest_plugins = ["pairs"]

PROMPTS = [[1, 70, 80, 90], [1, 100, 7], [1, 5, 6, 200, 31]]
PROMPTS_OF_USERS = ["Why is the sky blue?"]


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> torch.nn.Module:
    folder = make_tiny_llama(tmp_path_factory.mktemp("models") / "tiny", num_layers=4)
    return load_torch(ModelFolder.open(folder), fp32=True)


@pytest.fixture(scope="module")
def samples(target: torch.nn.Module) -> list[Sample]:
    return continue_greedily(target, PROMPTS, [], 259, max_new_tokens=12)


@pytest.fixture(scope="module")
def measured(target: torch.nn.Module, samples: list[Sample]) -> dict[tuple[int, str], Damage]:
    return {(damage.cut, damage.codec): damage for damage in measure_damage(target, samples, [1, 3], CODECS)}


def test_there_is_a_row_for_every_cut_and_codec(measured: dict[tuple[int, str], Damage], samples: list[Sample]) -> None:
    assert list(measured) == [(cut, codec) for cut in (1, 3) for codec in CODECS]
    for (_, codec), damage in measured.items():
        assert damage.num_positions == sum(len(sample.continuation_ids) for sample in samples)
        assert damage.bytes_per_position == row_bytes(codec, 64)


def test_a_lossless_codec_does_nothing_and_fewer_bits_do_more(measured: dict[tuple[int, str], Damage]) -> None:
    for cut in (1, 3):
        by_codec = [measured[cut, codec] for codec in CODECS]
        assert by_codec[0].agreement == 1.0
        assert by_codec[0].max_kl_nats < 1e-6
        kl = [damage.kl_nats for damage in by_codec]
        assert kl == sorted(kl)
        assert kl[2] > 1e-7
        assert all(damage.max_kl_nats >= damage.kl_nats for damage in by_codec)


def test_the_answers_are_read_as_they_were_given(target: torch.nn.Module, samples: list[Sample]) -> None:
    for sample in samples:
        assert answer_log_probs(target, sample).argmax(dim=1).tolist() == sample.continuation_ids


def test_only_what_enters_the_layer_is_changed_and_only_for_a_while(target: torch.nn.Module, samples: list[Sample]) -> None:
    layers = decoder_layers(target)
    before = answer_log_probs(target, samples[0])
    seen: dict[str, Tensor] = {}

    def remember(rows: Tensor) -> Tensor:
        seen["before"] = rows.clone()
        return rows

    with stream_changed(layers[1], remember), stream_changed(layers[2], lambda rows: rows * 0) as widths:
        changed = answer_log_probs(target, samples[0])
    assert widths == [64]
    assert seen["before"].any()
    assert seen["before"].shape == (len(samples[0].prompt_ids) + len(samples[0].continuation_ids) - 1, 64)
    assert not torch.equal(before, changed)
    with stream_changed(layers[1], lambda rows: rows * 0), stream_changed(layers[1], remember):
        answer_log_probs(target, samples[0])
    assert not seen["before"].any()  # what the first left
    assert torch.equal(before, answer_log_probs(target, samples[0]))


@pytest.mark.parametrize("cut", [-1, 0, 4, 99])
def test_a_cut_out_of_range_is_refused(target: torch.nn.Module, samples: list[Sample], cut: int) -> None:
    with pytest.raises(ConfigError, match=f"cut {cut} is out of range; a model of 4 layers can be cut at 1 to 3"):
        measure_damage(target, samples, [2, cut], ["int8"])


def test_an_unknown_codec_and_samples_without_answers_are_refused(target: torch.nn.Module, samples: list[Sample]) -> None:
    with pytest.raises(ConfigError, match="codec is 'int2'"):
        measure_damage(target, samples, [2], ["int2"])
    with pytest.raises(ConfigError, match="no sample has an answer"):
        measure_damage(target, [Sample([1, 2], [])], [2], ["int8"])


def test_a_model_without_a_list_of_layers_is_refused() -> None:
    with pytest.raises(ModelError, match="Linear has no list of decoder layers"):
        decoder_layers(torch.nn.Linear(2, 2))


def test_damage_checks_itself() -> None:
    with pytest.raises(ValueError, match=r"1\.5"):
        Damage(1, "int8", 608, 1.5, 0.0, 0.0, 3)


@pytest.mark.timeout(1200)
def test_the_real_targets_huge_channels_cost_int8_next_to_nothing(smol_pair: Pair) -> None:
    """From layer 15 on, its first position holds a channel of 24,000 where most hold 2."""
    folder = ModelFolder.open(smol_pair.bundle / "cloud")
    target = load_torch(folder, fp32=True)
    samples = continue_greedily(target, encode_prompts(folder, 100, PROMPTS_OF_USERS), [2], folder.vocab_size, max_new_tokens=16)
    by_codec = {damage.codec: damage for damage in measure_damage(target, samples, [15], ["float16", "int8", "int4"])}
    assert by_codec["int8"].agreement >= 0.93  # of 16 tokens, one may hang on a hair
    assert by_codec["float16"].kl_nats <= by_codec["int8"].kl_nats < 1e-3
    assert by_codec["int4"].kl_nats > 10 * by_codec["int8"].kl_nats


@pytest.fixture(scope="module")
def bfloat16(tmp_path_factory: pytest.TempPathFactory) -> torch.nn.Module:
    folder = make_tiny_llama(tmp_path_factory.mktemp("models") / "tiny", num_layers=3)
    return load_torch(ModelFolder.open(folder), fp32=True).to(torch.bfloat16)


def test_a_bfloat16_stream_survives_float32(bfloat16: torch.nn.Module) -> None:
    samples = continue_greedily(bfloat16, PROMPTS[:1], [], 259, max_new_tokens=5)
    [damage] = measure_damage(bfloat16, samples, [1], ["float32"])
    assert damage.agreement == 1.0
