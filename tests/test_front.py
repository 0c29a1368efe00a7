"""The front of a split target: for every cut torch's own stream, the same bits however tokens come in, nothing behind the cut."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pairs import Pair
from test_edge_model import random_tokens
from tiny import make_tiny_llama
from transformers import AutoModelForCausalLM

from edgecloud.bundle import Bundle
from edgecloud.cli.app import run
from edgecloud.edge.front import MAX_RUN_TOKENS, FrontModel
from edgecloud.edge.front_rows import FrontRows, Row
from edgecloud.errors import BundleError, ConfigError, ContextLengthError, ModelError
from edgecloud.kernels.codec import CODECS, encode
from edgecloud.partitioner.export import run_builder
from edgecloud.partitioner.front import cut_graph
from edgecloud.partitioner.front_check import stream_entering
from edgecloud.partitioner.graph import FrontGraph
from edgecloud.partitioner.inputs import check_inputs
from edgecloud.partitioner.model_folder import ModelFolder
from edgecloud.partitioner.quantize import _main as quantize

pytest_plugins = ["pairs"]

NUM_LAYERS = 4
WINDOW = 300
PRECISIONS = ("fp32", "fp16", "int8", "int4")
Rows = npt.NDArray[np.float32]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("front") / "model", num_layers=NUM_LAYERS, seed=5, hidden_size=96, num_heads=3)


@pytest.fixture(scope="module")
def torch_model(model: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All layers, exported once."""
    return run_builder(ModelFolder.open(model), tmp_path_factory.mktemp("whole"), "fp32", ["exclude_lm_head=true"])


@pytest.fixture(scope="module")
def front_of(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, str], Path]:
    """-> the graph of a cut and precision, made once each"""
    folder = tmp_path_factory.mktemp("fronts")

    def make(cut: int, precision: str = "fp32") -> Path:
        path = folder / f"{cut}-{precision}" / "model.onnx"
        if not path.exists():
            path.parent.mkdir()
            if precision == "fp32":
                cut_graph(whole, cut, path)
            else:
                quantize(make(cut), path, precision)
        return path

    return make


def extended(front: FrontModel, tokens: Sequence[int], sizes: Sequence[int]) -> Rows:
    """Rows of `tokens`, taken in pieces of these sizes, and the rest at once."""
    front.crop_to(0)
    pieces, start = [], 0
    for size in [*sizes, len(tokens)]:
        piece = tokens[start : start + size]
        pieces.append(front.extend(piece))
        start += len(piece)
    return np.concatenate(pieces)


# What a front is


@pytest.mark.parametrize("cut", range(1, NUM_LAYERS))
def test_every_cut_gives_torchs_own_stream(cut: int, front_of: Callable[..., Path], torch_model: torch.nn.Module) -> None:
    tokens = random_tokens(150, seed=cut)
    rows = FrontModel(front_of(cut), WINDOW, 1).extend(tokens)
    expected = stream_entering(torch_model, cut, tokens)
    assert rows.shape == expected.shape == (150, 96)
    assert np.abs(rows - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize(("precision", "error"), [("fp16", 0.01), ("int8", 0.3), ("int4", 1.2)])
def test_fewer_bits_are_the_same_stream_roughly(
    precision: str, error: float, front_of: Callable[..., Path], torch_model: torch.nn.Module
) -> None:
    tokens = random_tokens(100)
    rows, expected = FrontModel(front_of(2, precision), WINDOW, 1).extend(tokens), stream_entering(torch_model, 2, tokens)
    assert np.linalg.norm(rows - expected) < error * np.linalg.norm(expected)
    size = front_of(2, precision).with_name("model.onnx.data").stat().st_size
    assert size < 0.6 * front_of(2).with_name("model.onnx.data").stat().st_size


@pytest.mark.parametrize("cut", range(1, NUM_LAYERS))
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_nothing_behind_the_cut_is_in_the_files(cut: int, precision: str, front_of: Callable[..., Path]) -> None:
    path = front_of(cut, precision)
    graph = onnx.load(path, load_external_data=False).graph
    names = [*(i.name for i in graph.initializer), *(i.name for i in graph.input), *(n.name for n in graph.node)]
    behind = [f"layers.{layer}." for layer in range(cut, NUM_LAYERS)] + [f".{layer}.key" for layer in range(cut, NUM_LAYERS)]
    assert not [name for name in names if any(word in name for word in (*behind, "lm_head", "final_norm"))]
    said = sum(int(entry.value) for i in graph.initializer for entry in i.external_data if entry.key == "length")
    assert path.with_name("model.onnx.data").stat().st_size < said + 1e5  # alignment; no bytes that no tensor names


# The same bits


@pytest.fixture(scope="module", params=PRECISIONS)
def front(request: pytest.FixtureRequest, front_of: Callable[..., Path]) -> FrontModel:
    return FrontModel(front_of(3, request.param), WINDOW, 1)


@settings(max_examples=30)
@given(st.lists(st.one_of(st.integers(0, 9), st.integers(1, 150)), max_size=60), st.integers(1, WINDOW))
@example([1] * WINDOW, WINDOW)
@example([5] * 60, WINDOW)
@example([MAX_RUN_TOKENS + 1], MAX_RUN_TOKENS + 1)
@example([], 1)
def test_rows_are_the_same_bits_in_any_chunks(front: FrontModel, sizes: list[int], length: int) -> None:
    tokens = random_tokens(length, seed=7)
    assert (extended(front, tokens, sizes) == extended(front, random_tokens(WINDOW, seed=7), [])[:length]).all()


@pytest.mark.parametrize("num_accepted", range(5))
def test_cropped_to_what_was_accepted_it_is_as_new(front: FrontModel, num_accepted: int) -> None:
    log, draft, recovered = random_tokens(20), random_tokens(4, seed=1), random_tokens(6, seed=2)
    extended(front, [*log, *draft], [20])
    front.crop_to(20 + num_accepted)
    rows = front.extend(recovered)
    assert front.num_cached == 26 + num_accepted
    assert (rows == extended(front, [*log, *draft[:num_accepted], *recovered], [])[-6:]).all()


def test_a_full_window_is_typed_and_harms_nothing(front: FrontModel) -> None:
    tokens = random_tokens(WINDOW)
    expected = extended(front, tokens, [])
    front.crop_to(WINDOW - 1)
    with pytest.raises(ContextLengthError, match=f"{WINDOW + 1} tokens do not fit.*{WINDOW}"):
        front.extend([1, 2])
    assert (front.extend(tokens[-1:]) == expected[-1:]).all()
    assert front.extend([]).shape == (0, 96)


def test_the_caches_never_move(front: FrontModel) -> None:
    before = [cache.ctypes.data for cache in front._graph.caches.values()]
    for seed in range(3):
        extended(front, random_tokens(200, seed), [1, 9, 100])
    assert [cache.ctypes.data for cache in front._graph.caches.values()] == before


def test_the_smallest_window(front_of: Callable[..., Path]) -> None:
    tiny = FrontModel(front_of(1), 1, 1)
    assert (tiny.extend([9]) == FrontModel(front_of(1), 10, 1).extend([9, 4])[:1]).all()


# Rows as they travel


class CountingFront:
    """Rows that tell every token before them; counts what it computes."""

    def __init__(self, max_tokens: int = 100) -> None:
        self.max_tokens, self.width = max_tokens, 2
        self.tokens: list[int] = []
        self.num_computed = 0

    def extend(self, token_ids: Sequence[int]) -> Rows:
        self.num_computed += len(token_ids)
        first = len(self.tokens)
        self.tokens += token_ids
        return np.array([row_of(self.tokens[: first + i + 1]) for i in range(len(token_ids))], np.float32).reshape(-1, 2)

    def crop_to(self, length: int) -> None:
        del self.tokens[length:]


def row_of(tokens: Sequence[int]) -> tuple[float, float]:
    return (float(hash(tuple(tokens)) % 10_007), float(len(tokens)))


def plain_rows(tokens: Sequence[int]) -> bytes:
    return encode(np.array([row_of(tokens[: i + 1]) for i in range(len(tokens))], np.float32).reshape(-1, 2), "float32").tobytes()


def bytes_of(rows: Sequence[Row]) -> bytes:
    return b"".join(row.data for row in rows)


@given(st.lists(st.lists(st.integers(0, 1), max_size=20), max_size=12))
def test_rows_are_those_of_the_tokens_whatever_came_before(asked: list[list[int]]) -> None:
    rows = FrontRows(CountingFront(), 1, "float32")
    for tokens in asked:
        assert bytes_of(rows.rows(tokens)) == plain_rows(tokens)


def test_only_what_is_new_is_computed_and_all_can_be_sent_again() -> None:
    front = CountingFront()
    rows = FrontRows(front, 1, "float32")
    assert rows.row_bytes == 8
    prompt = [3] * 10
    first = rows.rows(prompt)
    rows.rows([*prompt, 4, 5, 6])
    assert front.num_computed == 13
    rows.rows([*prompt, 4])  # the guess was right so far: what follows it stays
    rows.rows([*prompt, 4, 5, 6])
    assert front.num_computed == 13
    rows.rows([*prompt, 4, 7])  # it was wrong
    assert front.num_computed == 14
    with pytest.raises(ContextLengthError, match="101 tokens do not fit"):
        rows.rows([0] * 101)
    assert rows.rows(prompt) == first
    assert front.num_computed == 14


@pytest.mark.parametrize("codec", CODECS)
def test_rows_of_a_real_front_are_the_same_bytes_on_every_way(codec: str, front_of: Callable[..., Path]) -> None:
    path, tokens = front_of(2, "int8"), random_tokens(150)
    once, again = (FrontRows(FrontModel(path, WINDOW, 1), 2, codec) for _ in range(2))
    for length in (1, 2, 7, 100, 99, 140, 150):
        again.rows([*tokens[:length], 1])
    assert once.rows(tokens) == again.rows(tokens)


# What is refused


@pytest.mark.parametrize("cut", [-1, 0, 2, 99])
def test_a_cut_out_of_range_names_the_range_and_writes_nothing(
    cut: int, tiny_pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match=f"--cut is {cut}; target has 2 layers and can be cut at 1 to 1"):
        check_inputs(str(tiny_pair.target), tmp_path / "b", draft=None, precision="int4", overwrite=False, cut=cut)
    assert run(["partition", str(tiny_pair.target), "-o", str(tmp_path / "b"), "--cut", str(cut)]) == 2
    assert "can be cut at 1 to 1" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_boundary_and_a_model_of_one_layer(tiny_pair: Pair, tmp_path: Path) -> None:
    wanted: dict[str, Any] = {"draft": None, "precision": "int4", "overwrite": False, "cut": 1}
    with pytest.raises(ConfigError, match="codec is 'int5'"):
        check_inputs(str(tiny_pair.target), tmp_path / "b", **wanted, boundary="int5")
    single = make_tiny_llama(tmp_path / "single", num_layers=1)
    with pytest.raises(ModelError, match="1 layer; a model is cut between two"):
        check_inputs(str(single), tmp_path / "b", **wanted)


def test_a_graph_without_the_stream_or_the_caches_is_no_front(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=f"no residual stream that enters layer {NUM_LAYERS}"):
        cut_graph(whole, NUM_LAYERS, tmp_path / "model.onnx")
    content = onnx.load(whole, load_external_data=False)
    for node in content.graph.node:  # rotary positions that come from outside, as some models have them
        if node.op_type == "GroupQueryAttention":
            node.input[5] = "position_ids"
    content.graph.input.append(onnx.helper.make_tensor_value_info("position_ids", onnx.TensorProto.INT32, [1]))
    shutil.copy(whole.with_name("model.onnx.data"), tmp_path)
    onnx.save(content, tmp_path / "other.onnx")
    with pytest.raises(ModelError, match=r"no front: .*position_ids"):
        cut_graph(tmp_path / "other.onnx", 2, tmp_path / "model.onnx")
    assert not (tmp_path / "model.onnx").exists()


@pytest.mark.parametrize("damage", ["missing", "noise", "no weights", "a draft"])
def test_a_file_that_is_no_front_is_named(damage: str, front_of: Callable[..., Path], tiny_pair: Pair, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    if damage == "a draft":
        path = tiny_pair.bundle / "edge/draft/model.onnx"
    elif damage != "missing":
        path.write_bytes(b"noise" * 99 if damage == "noise" else front_of(1).read_bytes())
    with pytest.raises(BundleError, match=r"model\.onnx is no front"):
        FrontModel(path, WINDOW, 1)


# In a bundle


def test_a_bundle_with_a_front_says_so_and_its_front_is_the_targets(tiny_pair: Pair) -> None:
    bundle = Bundle.open(tiny_pair.bundle)
    bundle.verify_files("edge")
    info = bundle.front
    assert info is not None
    assert (info.cut, info.num_layers, info.width, info.quantization, info.codec) == (1, 2, 64, "int8", "int8")
    assert bundle.cut_points == [1]
    assert {name for name in bundle.files if name.startswith("edge/front/")} == {
        f"edge/front/{name}"
        for name in ("model.onnx", "model.onnx.data", "exit_head.onnx", "exit_head.onnx.data", "draft_vocab.json")
    }
    found = bundle.checks["front"]
    assert found["parity"]["max_relative_diff"] < found["parity"]["bound"]
    assert 0 < found["quality"]["median_relative_error"] < 0.1
    assert found["quality"]["agreement"] > 0.5
    assert found["device"]["rows_ms"].keys() == {"2", "5", "9"}


def test_the_partitioners_own_runner_sees_the_same_rows(tiny_pair: Pair) -> None:
    path, tokens = tiny_pair.bundle / "edge/front/model.onnx", random_tokens(50)
    assert (FrontGraph(path, WINDOW, 1).extend(tokens) == FrontModel(path, WINDOW, 1).extend(tokens)).all()


def test_the_real_models_rows_are_the_same_bits_in_any_chunks(smol_pair: Pair) -> None:
    bundle = Bundle.open(smol_pair.bundle)
    if bundle.front is None:
        pytest.skip("the bundle that was given has no front")
    front = FrontModel(bundle.file(bundle.front.model), 200, 1)
    tokens = random_tokens(200)
    expected = extended(front, tokens, [])
    for sizes in ([1] * 20, [5] * 40, [65, 65], [2, 3, 1, 9, 100]):
        assert (extended(front, tokens, sizes) == expected).all()
