"""The draft model on the device: whatever was cached before, the logits are those of the tokens, and no buffer moves."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pairs import Pair

from edgecloud.edge.drafter import ModelDrafter
from edgecloud.edge.model import PREFILL_CHUNK_TOKENS, DraftModel
from edgecloud.errors import BundleError, ContextLengthError
from edgecloud.kernels.choice import choose
from edgecloud.partitioner.export import export_graph
from edgecloud.partitioner.model_folder import ModelFolder
from edgecloud.sampling import SamplingSettings

pytest_plugins = ["pairs"]

WINDOW = 300
VOCAB_SIZE = 260
Row = npt.NDArray[np.float32]


@pytest.fixture(scope="module")
def graph(tiny_pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In fp32.

    Where activations are rounded to int8, the order of a sum decides now and then which whole number one becomes, and logits of the
    same tokens, read in other chunks, are a hundredth apart.
    """
    return export_graph(ModelFolder.open(tiny_pair.target), tmp_path_factory.mktemp("draft"), "fp32")


@pytest.fixture(scope="module")
def fresh(graph: Path) -> Callable[[list[int]], Row]:
    """Logits computed with nothing cached."""
    model = DraftModel(graph, WINDOW, 1)

    def compute(tokens: list[int]) -> Row:
        model.crop_to(0)
        return model.extend_to(tokens).copy()

    return compute


def random_tokens(number: int, seed: int = 0) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(VOCAB_SIZE) for _ in range(number)]


def close(a: Row, b: Row) -> bool:
    """Equal, but for the order of sums in passes of unlike length."""
    return bool(np.abs(a - b).max() <= 1e-5 * np.abs(b).max())


# An edit: keep this share of the tokens, add so many, of a random sequence.
edits = st.lists(st.tuples(st.floats(0, 1), st.integers(1, 150), st.integers(0, 3)), min_size=1, max_size=8)


@settings(max_examples=40)
@given(edits)
def test_after_any_edits_the_logits_are_those_of_the_tokens(
    graph: Path, fresh: Callable[[list[int]], Row], steps: list[tuple[float, int, int]]
) -> None:
    model = DraftModel(graph, WINDOW, 1)
    tokens: list[int] = []
    for share, number, seed in steps:
        tokens = [*tokens[: int(share * len(tokens))], *random_tokens(number, seed)][:WINDOW]
        assert close(model.extend_to(tokens), fresh(tokens))
        assert model.num_cached == len(tokens)


def test_one_by_one_equals_chunks(graph: Path, fresh: Callable[[list[int]], Row]) -> None:
    tokens = random_tokens(2 * PREFILL_CHUNK_TOKENS + 5)
    model = DraftModel(graph, WINDOW, 1)
    for length in range(1, len(tokens) + 1):
        row = model.extend_to(tokens[:length])
        if length % 64 in {0, 1}:
            assert close(row, fresh(tokens[:length]))
    assert close(model.extend_to(tokens), fresh(tokens))


@pytest.mark.parametrize("length", [1, PREFILL_CHUNK_TOKENS - 1, PREFILL_CHUNK_TOKENS, PREFILL_CHUNK_TOKENS + 1, WINDOW])
def test_every_length_of_prompt(graph: Path, fresh: Callable[[list[int]], Row], length: int) -> None:
    tokens = random_tokens(length, seed=length)
    model = DraftModel(graph, WINDOW, 1)
    for part in (tokens[: (length + 1) // 2], tokens):
        row = model.extend_to(part)
    assert close(row, fresh(tokens))


def test_a_crop_forgets(graph: Path, fresh: Callable[[list[int]], Row]) -> None:
    model = DraftModel(graph, WINDOW, 1)
    tokens = random_tokens(40)
    model.extend_to(tokens)
    model.crop_to(10)
    assert model.num_cached == 10
    other = [*tokens[:10], *random_tokens(5, seed=1)]
    assert close(model.extend_to(other), fresh(other))
    model.crop_to(0)
    assert close(model.extend_to(tokens), fresh(tokens))


def test_the_same_tokens_again_give_the_same_logits(graph: Path) -> None:
    model = DraftModel(graph, WINDOW, 1)
    tokens = random_tokens(20)
    model.extend_to(tokens)
    first = model.extend_to(tokens).copy()
    assert (model.extend_to(tokens) == first).all()


def test_the_logits_are_the_targets_in_fewer_bits(tiny_pair: Pair, fresh: Callable[[list[int]], Row]) -> None:
    agreed = 0
    for seed in range(40):
        tokens = random_tokens(12, seed)
        agreed += int(fresh(tokens).argmax()) == tiny_pair.plain.decode(tokens, 1).token_ids[0]
    assert agreed > 8  # a random int4 copy agrees on about a third; another model on none


def test_no_buffer_ever_moves(graph: Path) -> None:
    model = DraftModel(graph, WINDOW, 1)

    def addresses() -> list[int]:
        return [array.ctypes.data for array in (*model._graph.caches.values(), model._logits, model._graph.ids, model._graph.mask)]

    before = addresses()
    for number, seed in ((200, 0), (3, 1), (WINDOW, 2), (50, 3)):
        row = model.extend_to(random_tokens(number, seed))
        assert np.shares_memory(row, model._logits)
        model.crop_to(number // 2)
    assert addresses() == before


def test_the_caches_are_written_in_place(graph: Path) -> None:
    """Past and present are one buffer: what a run appends is found there, and what came before is not touched."""
    model = DraftModel(graph, WINDOW, 1)
    tokens = random_tokens(30)
    model.extend_to(tokens[:20])
    first = {name: cache[:, :, :20].copy() for name, cache in model._graph.caches.items()}
    assert all(np.abs(cache[:, :, :20]).max() > 0 and not cache[:, :, 20:].any() for cache in model._graph.caches.values())
    model.extend_to(tokens)
    for name, cache in model._graph.caches.items():
        assert (cache[:, :, :20] == first[name]).all()
        assert cache[:, :, 20:30].any()


def test_a_full_window_is_typed_and_harms_nothing(graph: Path, fresh: Callable[[list[int]], Row]) -> None:
    model = DraftModel(graph, WINDOW, 1)
    tokens = random_tokens(WINDOW)
    row = model.extend_to(tokens).copy()
    with pytest.raises(ContextLengthError, match=f"{WINDOW + 1} tokens do not fit.*{WINDOW}"):
        model.extend_to([*tokens, 1])
    assert close(model.extend_to(tokens), row)
    assert close(row, fresh(tokens))


def test_ids_that_only_a_padded_target_has_are_read_as_some_other(graph: Path, fresh: Callable[[list[int]], Row]) -> None:
    model = DraftModel(graph, WINDOW, 1)
    assert np.isfinite(model.extend_to([5, VOCAB_SIZE + 40, 6])).all()
    tokens = random_tokens(20)
    assert close(model.extend_to(tokens), fresh(tokens))


def test_who_asks_is_told_what_a_prompt_takes_and_nothing_of_steps(graph: Path) -> None:
    told: list[tuple[int, float]] = []
    model = DraftModel(graph, WINDOW, 1, lambda num_tokens, elapsed_ms: told.append((num_tokens, elapsed_ms)))
    tokens = random_tokens(20)
    model.extend_to(tokens[:12])
    model.extend_to(tokens[:13])
    model.extend_to(tokens[:13])
    model.extend_to(tokens)
    assert [num_tokens for num_tokens, _ in told] == [12, 7]
    assert all(elapsed_ms > 0 for _, elapsed_ms in told)


# The drafter


@pytest.mark.parametrize("sampling", [SamplingSettings(), SamplingSettings(temperature=1.0, seed=3, repetition_penalty=1.2)])
def test_a_draft_is_the_models_own_choices(graph: Path, fresh: Callable[[list[int]], Row], sampling: SamplingSettings) -> None:
    drafter = ModelDrafter(lambda: DraftModel(graph, WINDOW, 1), VOCAB_SIZE)
    log = random_tokens(10)
    draft = drafter.draft(log, 6, sampling, ())
    for number, token in enumerate(draft):
        so_far = [*log, *draft[:number]]
        assert token == choose(fresh(so_far), so_far, sampling)
    assert drafter.draft(log, 6, sampling, ()) == draft  # nothing but the tokens decides
    stop = draft[2]
    assert drafter.draft(log, 6, sampling, {stop}) == draft[: draft.index(stop) + 1]
    assert drafter.draft(log, 0, sampling, ()) == []


def test_a_drafter_loads_its_model_when_it_is_first_needed(graph: Path) -> None:
    loads: list[int] = []

    def load() -> DraftModel:
        loads.append(1)
        return DraftModel(graph, WINDOW, 1)

    drafter = ModelDrafter(load, VOCAB_SIZE)
    assert not loads
    drafter.draft([1, 2], 1, SamplingSettings(), ())
    drafter.draft([1, 2], 2, SamplingSettings(), ())
    assert len(loads) == 1


def test_a_drafter_guesses_no_id_that_the_target_lacks(graph: Path) -> None:
    drafter = ModelDrafter(lambda: DraftModel(graph, WINDOW, 1), 5)
    guesses = {token for seed in range(20) for token in drafter.draft([1, 2], 4, SamplingSettings(temperature=5.0, seed=seed), ())}
    assert max(guesses) < 5


# Files


@pytest.mark.parametrize("damage", ["missing", "empty", "noise", "cut", "no weights", "another graph"])
def test_a_damaged_graph_is_named(graph: Path, tmp_path: Path, damage: str) -> None:
    path = tmp_path / "model.onnx"
    content = graph.read_bytes()
    if damage != "no weights":
        shutil.copyfile(graph.with_name("model.onnx.data"), tmp_path / "model.onnx.data")
    if damage == "another graph":
        value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
        node = onnx.helper.make_node("Identity", ["x"], ["y"])
        other = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
        opset = [onnx.helper.make_opsetid("", 20)]
        content = onnx.helper.make_model(
            onnx.helper.make_graph([node], "g", [value], [other]), opset_imports=opset, ir_version=9
        ).SerializeToString()
    content = {"empty": b"", "noise": bytes(range(256)) * 8, "cut": content[: len(content) // 2]}.get(damage, content)
    if damage != "missing":
        path.write_bytes(content)
    with pytest.raises(BundleError, match=r"model\.onnx is no draft model"):
        DraftModel(path, WINDOW, 1)
