"""Exit heads: what they learn, that their graph says what they learnt, that they keep to their list, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pairs import Pair, copy_of, edit_manifest

from edgecloud.bundle import Bundle
from edgecloud.client import Client
from edgecloud.edge.exit_head import ExitHead
from edgecloud.edge.front import FrontModel
from edgecloud.edge.front_drafter import FrontDrafter
from edgecloud.edge.front_rows import FrontRows
from edgecloud.errors import BundleCorruptError, BundleError, ConfigError
from edgecloud.kernels.codec import decode
from edgecloud.kernels.entries import kept_entries
from edgecloud.partitioner import exit_head
from edgecloud.partitioner.exit_answers import BUILT_IN, divide, read_exit_source
from edgecloud.partitioner.exit_graph import write_exit_head
from edgecloud.partitioner.exit_head import CurvePoint, ExitLessons, ExitSettings, train_exit_head
from edgecloud.partitioner.inputs import check_inputs
from edgecloud.partitioner.quantize import _main as quantize
from edgecloud.sampling import SamplingSettings

pytest_plugins = ["pairs"]

WIDTH, VOCAB_SIZE = 32, 60
KEPT = torch.arange(1, 51)  # of the vocabulary
SMALL = ExitSettings(num_kept=len(KEPT), rank=16, max_epochs=6, rows_a_step=64, rate=3e-3)


def lessons(num: int, seed: int) -> tuple[ExitLessons, torch.Tensor]:
    """Rows that say through a bent map what the target's last state is; and the target's head."""
    fixed, random = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    head = torch.randn(VOCAB_SIZE, WIDTH, generator=fixed)
    straight, bent = (torch.randn(WIDTH, WIDTH, generator=fixed) / WIDTH**0.5 for _ in range(2))
    rows = torch.randn(num, WIDTH, generator=random)
    states = rows @ straight + torch.relu(rows @ bent) * 2
    return ExitLessons(5 * rows, states, (states @ head.T).argmax(-1)), head[KEPT]


def trained(settings: ExitSettings = SMALL) -> tuple[exit_head.ExitHead, list[CurvePoint], torch.Tensor]:
    training, head = lessons(1500, seed=1)
    held_out, _ = lessons(300, seed=2)
    return *train_exit_head(training, held_out, head, KEPT, settings), head


# Training


def test_it_learns_more_than_the_regression_and_is_left_at_its_best() -> None:
    model, curve, head = trained()
    held_out, _ = lessons(300, seed=2)
    assert curve[0].agreement > 0.3  # of 50 tokens
    assert max(point.agreement for point in curve) > curve[0].agreement + 0.05
    assert curve[-1].kl_nats < curve[0].kl_nats
    with torch.no_grad():
        found = KEPT[(model(held_out.rows) @ head.T).argmax(-1)] == held_out.token_ids
    assert float(found.float().mean()) == pytest.approx(max(point.agreement for point in curve))


def test_the_same_arguments_give_the_same_bits() -> None:
    one, other = trained(replace(SMALL, max_epochs=2)), trained(replace(SMALL, max_epochs=2))
    assert one[1] == other[1]
    assert all(torch.equal(a, b) for a, b in zip(one[0].parameters(), other[0].parameters(), strict=True))
    assert trained(replace(SMALL, max_epochs=2, seed=1))[1] != one[1]


def test_it_stops_when_it_gets_no_better() -> None:
    _, curve, _ = trained(replace(SMALL, max_epochs=30, patience=1, rate=0.5))  # far too fast to learn anything
    assert len(curve) < 10


def test_products_may_be_in_fewer_bits() -> None:
    training, head = lessons(300, seed=1)
    model, curve = train_exit_head(training, training, head.bfloat16(), KEPT, replace(SMALL, max_epochs=1))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert curve[-1].agreement > 0.3


@pytest.mark.parametrize(("change", "words"), [({"rank": 0}, "rank is 0"), ({"rate": 0.0}, "rate is 0.0")])
def test_settings_that_cannot_be_are_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        replace(SMALL, **change)


# The graph, and the device


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, exit_head.ExitHead, torch.Tensor]:
    folder = tmp_path_factory.mktemp("head")
    model, _, head = trained(replace(SMALL, max_epochs=1))
    write_exit_head(model, head, folder / "exit_head.onnx")
    (folder / "draft_vocab.json").write_text(json.dumps({"token_ids": KEPT.tolist()}))
    return folder, model, head


@pytest.mark.parametrize(("precision", "error"), [("fp32", 1e-5), ("int8", 0.05), ("int4", 0.4)])
def test_the_graph_says_what_was_learnt(
    precision: str, error: float, written: tuple[Path, exit_head.ExitHead, torch.Tensor], tmp_path: Path
) -> None:
    folder, model, head = written
    path = folder / "exit_head.onnx"
    if precision != "fp32":
        quantize(path, tmp_path / "exit_head.onnx", precision)
        path = tmp_path / "exit_head.onnx"
    on_device = ExitHead(path, folder / "draft_vocab.json", VOCAB_SIZE, 1)
    rows = lessons(20, seed=3)[0].rows
    with torch.no_grad():
        expected = (model(rows) @ head.T).numpy()
    found = np.stack([on_device.logits(row) for row in rows.numpy()])
    assert on_device.entries.tokens(np.arange(len(KEPT))).tolist() == KEPT.tolist()
    assert np.linalg.norm(found - expected) <= error * np.linalg.norm(expected)


@pytest.mark.parametrize(
    "content", ["", "[]", '{"token_ids": [1, 2]}', json.dumps({"token_ids": [*range(11, 60), 60]}), '{"token_ids": ["a"]}']
)
def test_a_list_that_is_not_the_heads_is_refused(
    content: str, written: tuple[Path, exit_head.ExitHead, torch.Tensor], tmp_path: Path
) -> None:
    (tmp_path / "draft_vocab.json").write_text(content)
    with pytest.raises(BundleError, match=r"draft_vocab\.json.*make the bundle again"):
        ExitHead(written[0] / "exit_head.onnx", tmp_path / "draft_vocab.json", VOCAB_SIZE, 1)


def test_another_graph_is_no_exit_head(tiny_pair: Pair) -> None:
    front = Bundle.open(tiny_pair.bundle).front
    assert front is not None
    assert front.exit_head is not None
    with pytest.raises(BundleError, match="is no exit head that this version can run"):
        ExitHead(tiny_pair.bundle / front.model, tiny_pair.bundle / front.exit_head.vocab, 260, 1)


class OneHead:
    """Proposes only two tokens."""

    entries = kept_entries([70, 80])

    def logits(self, row: np.ndarray) -> np.ndarray:
        return row[:2]


samplings = st.builds(
    SamplingSettings, temperature=st.sampled_from([0.0, 0.7, 2.0]), top_k=st.sampled_from([0, 3]),
    top_p=st.sampled_from([1.0, 0.8]), seed=st.integers(0, 99),
)  # fmt: skip


@pytest.fixture(scope="module")
def new_rows(tiny_pair: Pair) -> Callable[[], FrontRows]:
    bundle = Bundle.open(tiny_pair.bundle)
    front = bundle.front
    assert front is not None
    model = FrontModel(bundle.file(front.model), 128, 1)

    def make() -> FrontRows:
        model.crop_to(0)
        return FrontRows(model, front.cut, front.codec)

    return make


@settings(max_examples=25)
@given(st.lists(st.integers(0, 258), min_size=1, max_size=30), samplings)
def test_it_never_proposes_what_is_not_on_its_list(
    new_rows: Callable[[], FrontRows], tokens: list[int], sampling: SamplingSettings
) -> None:
    drafter = FrontDrafter(new_rows(), OneHead)  # type: ignore[arg-type]
    assert set(drafter.draft(tokens, 5, sampling, ())) <= {70, 80}


@settings(max_examples=25)
@given(st.lists(st.integers(0, 258), min_size=1, max_size=40), st.lists(st.integers(1, 8), max_size=6), st.integers(0, 9))
def test_rows_that_were_drafted_on_are_those_of_one_run(
    new_rows: Callable[[], FrontRows], prompt: list[int], drafts: list[int], cropped: int
) -> None:
    """The codec makes much of a last bit, and the service of every byte."""
    rows = new_rows()
    drafter = FrontDrafter(rows, OneHead)  # type: ignore[arg-type]
    tokens = list(prompt)
    for num in drafts:
        tokens += drafter.draft(tokens, num, SamplingSettings(), ())
        tokens[-1:] = [99] if cropped % 2 else []  # the target says otherwise
        tokens = tokens or list(prompt)
    after = rows.rows(tokens)
    assert after == new_rows().rows(tokens)
    assert np.array_equal(rows.last_row(tokens), decode(np.frombuffer(after[-1].data, np.uint8)[None], rows.codec, 64)[0])


# A bundle with one


def test_a_partition_tells_what_its_exit_head_is_worth(tiny_pair: Pair) -> None:
    bundle = Bundle.open(tiny_pair.bundle)
    bundle.verify_files("edge")
    found = bundle.checks["front"]["exit_head"]
    assert found["num_positions"] + found["num_training_positions"] == 12 * 16
    assert 0 <= found["agreement"] <= found["coverage"] <= 1
    assert [point["epoch"] for point in found["curve"]] == list(range(len(found["curve"])))
    with Client(tiny_pair.bundle) as client:
        assert client.bundle.front is not None


def test_a_head_that_nothing_checks_is_refused(tiny_pair: Pair, tmp_path: Path) -> None:
    bundle = copy_of(tiny_pair.bundle, tmp_path / "bundle")
    edit_manifest(bundle, lambda content: content["files"].pop("edge/front/draft_vocab.json"))
    with pytest.raises(BundleCorruptError, match=r"edge/front/draft_vocab\.json"):
        Bundle.open(bundle)
    edit_manifest(bundle, lambda content: content["front"]["exit_head"].update(colour="red"))
    with pytest.raises(BundleCorruptError, match=r"front\.exit_head\.colour"):
        Bundle.open(bundle)


# What it learns from


def answers_file(folder: Path, lines: Sequence[str]) -> str:
    file = folder / "answers.jsonl"
    file.write_text("".join(f"{line}\n" for line in lines))
    return str(file)


def answer(number: int, temperature: float = 0.0, token: int = 5) -> str:
    content = {"key": f"n{number}", "prompt_ids": [1, number], "answer_ids": [token, 2], "temperature": temperature}
    return json.dumps(content)


def test_answers_are_taken_once_a_prompt_and_only_the_greedy_ones(tmp_path: Path) -> None:
    lines = [answer(n % 6) for n in range(9)] + [answer(9, temperature=0.8)]
    assert [found.prompt_ids[1] for found in read_exit_source(answers_file(tmp_path, lines), 50).answers] == list(range(6))


def test_prompts_come_from_a_file_or_are_built_in(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("One\nTwo\nThree\nOne\nFour\n")
    assert read_exit_source(str(tmp_path / "prompts.txt"), 50).prompts == ("One", "Two", "Three", "Four")
    assert len(read_exit_source(BUILT_IN, 50).prompts) > 8


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([], r"--exit-head .*answers\.jsonl is empty"),
        ([answer(1), answer(1), answer(2)], "holds 2 answers at temperature 0 to different prompts; give 4 or more"),
        ([answer(n, temperature=1.0) for n in range(9)], "holds 0 answers at temperature 0"),
        ([answer(n, token=50) for n in range(9)], "holds id 50, the target has 0 to 49"),
        ([answer(1), '{"prompt_ids": [1]}', answer(2)], "line 2 is no answer"),
        (['{"prompt": "Hello"}'], "holds 1 different prompts"),
    ],
)
def test_what_nothing_can_be_learnt_from_is_refused(lines: list[str], words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        read_exit_source(answers_file(tmp_path, lines), 50)


def test_an_exit_head_needs_a_cut(tiny_pair: Pair, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--exit-head is built-in; it is made for the front of a cut model"):
        check_inputs(str(tiny_pair.target), tmp_path / "b", draft=None, precision="int4", overwrite=False, exit_head="built-in")


@given(st.integers(4, 200))
def test_every_answer_is_on_one_side(num: int) -> None:
    training, held_out = divide(range(num))
    assert sorted(training + held_out) == list(range(num))
    assert len(training) > len(held_out) > 0
