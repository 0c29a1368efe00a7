"""A draft made for its target: learns from the target's own answers, goes on where it was killed, and refuses what is no lesson."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pairs import PATIENCE_S, plain_target, until
from tiny import END_OF_TURN_ID, TOKENIZER_SIZE, make_tiny_llama
from transformers import AutoModelForCausalLM, AutoTokenizer

from edgecloud.answers import Answer, AnswerFile, Question
from edgecloud.cli.app import run
from edgecloud.cloud.answering import Answerer
from edgecloud.cloud.engine import Engine
from edgecloud.cloud.model import TargetModel
from edgecloud.errors import ConfigError, ModelError
from edgecloud.partitioner.batches import by_length
from edgecloud.partitioner.distill import CurvePoint, DistillSettings
from edgecloud.partitioner.draft_maker import DraftReport, make_draft
from edgecloud.partitioner.frequent_tokens import frequent_tokens
from edgecloud.partitioner.kl import mean_kl
from edgecloud.partitioner.last_states import require_plain_head
from edgecloud.partitioner.lessons import Lessons
from edgecloud.partitioner.model_folder import ModelFolder
from edgecloud.partitioner.questions import questions
from edgecloud.partitioner.rounding import rounded
from edgecloud.partitioner.student import default_layers

NUM_ANSWERS = 120
TRAINING = ("--layers", "0,3", "--draft-vocab", "200", "--steps", "40", "--tokens-a-step", "1024", "--evaluate-every", "10")


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """More would only wait for each other over models this small."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("target"), num_layers=4, tie_word_embeddings=True, scale=0.1)


@pytest.fixture(scope="module")
def answers(target: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the target says after prompts of a few tokens."""
    file = AnswerFile(tmp_path_factory.mktemp("answers") / "answers.jsonl")
    asked = [Question(f"prompt{n}", [1, 3 + n % 250, 3 + n * 7 % 250]) for n in range(NUM_ANSWERS)]
    answerer = Answerer(Engine(TargetModel(target, "float32"), cache_bytes=16 << 20), [END_OF_TURN_ID], 24)
    with file.append_to() as appender:
        for answer in answerer.answers(asked):
            appender.add(answer)
    return file.path


def distil(target: Path, answers: Path, draft: Path, *options: str) -> int:
    return run(["distill", str(target), "-o", str(draft), "--answers", str(answers), *TRAINING, *options])


def record(draft: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((draft / "distillation.json").read_text("utf-8"))
    return content


def test_answers_are_the_targets_own(target: Path, answers: Path) -> None:
    found = list(AnswerFile(answers))
    assert {answer.key for answer in found} == {f"prompt{n}" for n in range(NUM_ANSWERS)}
    plain = plain_target(target)
    for answer in found[::20]:
        assert plain.decode(answer.prompt_ids, 24).agrees_with(answer.answer_ids)


def test_a_draft_learns_to_agree_and_is_an_ordinary_folder(target: Path, answers: Path, tmp_path: Path) -> None:
    draft = tmp_path / "draft"
    assert distil(target, answers, draft, "--own-share", "0.3") == 0
    curve = record(draft)["curve"]
    assert record(draft)["agreement"] == max(point["agreement"] for point in curve)
    assert distil(target, answers, tmp_path / "unlearnt", "--steps", "1") == 0
    assert record(draft)["agreement"] > record(tmp_path / "unlearnt")["agreement"] + 0.05
    model = AutoModelForCausalLM.from_pretrained(draft)
    assert model.config.num_hidden_layers == 2
    whole = AutoModelForCausalLM.from_pretrained(target)
    assert torch.equal(model.get_input_embeddings().weight, rounded(whole.get_input_embeddings().weight))
    assert AutoTokenizer.from_pretrained(draft).chat_template
    ids = json.loads((draft / "draft_vocab.json").read_text("utf-8"))["token_ids"]
    assert ids == sorted(ids)
    assert len(ids) == 200
    assert END_OF_TURN_ID in ids


def test_a_run_that_was_killed_goes_on_to_the_same_curve(target: Path, answers: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert distil(target, answers, whole) == 0
    words = ["distill", str(target), "-o", str(killed), "--answers", str(answers), *TRAINING]
    command = f"import torch; torch.set_num_threads(1); from edgecloud.cli.app import run; raise SystemExit(run({words}))"
    child = subprocess.Popen([sys.executable, "-c", command], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    notes = tmp_path / "killed.work" / "latest" / "notes.json"
    until(lambda: notes.exists() or child.poll() is not None)
    os.kill(child.pid, signal.SIGKILL)
    child.wait(PATIENCE_S)
    assert not killed.exists()
    assert json.loads(notes.read_text("utf-8"))["step"] > 0
    assert distil(target, answers, killed) == 0
    assert record(killed)["curve"] == record(whole)["curve"]


def test_other_settings_do_not_go_on_with_a_run(
    target: Path, answers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draft = tmp_path / "draft"
    assert distil(target, answers, draft) == 0
    assert distil(target, answers, draft, "--overwrite", "--seed", "1") == 2
    assert "other settings" in capsys.readouterr().err


class Stopped(Exception):
    """As a user would, at a point of the curve."""


def test_a_run_is_prolonged_while_its_rates_are_steady_and_not_later(target: Path, answers: Path, tmp_path: Path) -> None:
    def stopped_at(step: int, num_steps: int) -> DraftReport:
        def learnt(point: CurvePoint) -> None:
            if point.step == step:
                raise Stopped

        settings = DistillSettings((0, 3), 200, num_steps, tokens_a_step=1024, evaluate_every=10)
        return make_draft(
            ModelFolder.open(str(target)), list(AnswerFile(answers)), settings, tmp_path / "a", tmp_path / "a.work", learnt=learnt
        )

    with pytest.raises(Stopped):
        stopped_at(10, 20)
    with pytest.raises(Stopped):
        stopped_at(30, 40)  # step 10 is before the last third of either
    with pytest.raises(ConfigError, match="step 30 of 40"):
        stopped_at(50, 50)
    assert distil(target, answers, tmp_path / "a") == 0
    assert distil(target, answers, tmp_path / "at_once") == 0
    assert record(tmp_path / "a")["curve"] == record(tmp_path / "at_once")["curve"]


def test_a_target_that_does_more_than_multiply_by_its_head_is_refused(target: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    require_plain_head(model)
    model.lm_head.bias = torch.nn.Parameter(torch.linspace(0, 1, model.config.vocab_size))
    with pytest.raises(ModelError, match="does more with its last states"):
        require_plain_head(model)


Spoiler = Callable[[list[Answer]], list[Answer]]


def one_prompt(answers: list[Answer]) -> list[Answer]:
    return [answers[0]]


def of_another_model(answers: list[Answer]) -> list[Answer]:
    return [Answer(answers[0].key, answers[0].prompt_ids, [9999], 0.0), *answers[1:]]


@pytest.mark.parametrize(("spoil", "says"), [(lambda _: [], "no answer"), (one_prompt, "more prompts"), (of_another_model, "9999")])
def test_what_is_no_lesson_is_refused(
    target: Path,
    answers: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    spoil: Callable[[list[Answer]], list[Answer]],
    says: str,
) -> None:
    file = AnswerFile(tmp_path / "answers.jsonl")
    with file.append_to() as appender:
        for answer in spoil(list(AnswerFile(answers))):
            appender.add(answer)
    assert distil(target, file.path, tmp_path / "draft") == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "draft").exists()


def test_nothing_to_ask_is_refused(target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = tmp_path / "prompts.txt"
    empty.write_text("\n", "utf-8")
    words = ["distill", str(target), "-o", str(tmp_path / "draft"), "--num-layers", "2"]
    assert run([*words, "--prompts", str(empty)]) == 2
    assert "is empty" in capsys.readouterr().err
    assert run(words) == 2
    assert "--prompts" in capsys.readouterr().err


def test_a_torn_line_is_cut_off(tmp_path: Path) -> None:
    file = AnswerFile(tmp_path / "answers.jsonl")
    first, second = Answer("a", [1, 2], [3], 0.0), Answer("b", [1], [2, 3], 0.8)
    with file.append_to() as appender:
        appender.add(first)
    with file.path.open("ab") as torn:
        torn.write(b'{"key":"b","prom')
    assert list(file) == [first]
    with file.append_to() as appender:
        appender.add(second)
    assert list(file) == [first, second]
    file.path.write_text('{"key": "a"}\n', "utf-8")
    with pytest.raises(ConfigError, match="line 1"):
        list(file)


def test_states_that_were_computed_are_kept_and_others_are_not(target: Path, answers: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(target).eval()
    found = list(AnswerFile(answers))
    passes = []
    counted = model.base_model.register_forward_hook(lambda *_: passes.append(1))

    def num_passes(lessons: Lessons) -> int:
        passes.clear()
        lessons.prepare(model, lambda _, __: None)
        return len(passes) - 2  # two look at the head

    assert num_passes(Lessons(found[:100], tmp_path, "x")) > 0
    assert num_passes(Lessons(found[:100], tmp_path, "x")) == 0
    more = Lessons(found, tmp_path, "x")
    assert num_passes(more) == 1
    assert num_passes(Lessons(found[:100], tmp_path / "other", "another model")) > 0
    assert num_passes(Lessons(found[:100], tmp_path / "other", "x")) > 0
    counted.remove()
    with torch.inference_mode():
        ids = torch.tensor([found[-1].ids[:-1]])
        states = model.base_model(ids).last_hidden_state[0]
    positions = torch.arange(len(states)).numpy()
    assert torch.allclose(torch.from_numpy(more.states(len(found) - 1, positions)).float(), states, atol=2e-3)


@pytest.mark.parametrize("num_rows", [1, 3, 600])
def test_kl_and_its_gradients_are_those_of_float64(num_rows: int) -> None:
    generator = torch.Generator().manual_seed(num_rows)
    shapes = (num_rows, 8), (50, 8), (num_rows, 12), (50, 12)
    hidden, head, states, rows = (torch.randn(*shape, generator=generator) for shape in shapes)
    got = [hidden.clone().requires_grad_(), head.clone().requires_grad_()]
    mean_kl(*got, states, rows).backward()
    want = [hidden.double().requires_grad_(), head.double().requires_grad_()]
    log_q, log_p = (want[0] @ want[1].T).log_softmax(-1), (states.double() @ rows.double().T).log_softmax(-1)
    expected = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    expected.backward()
    assert mean_kl(*got, states, rows).item() == pytest.approx(expected.item(), rel=1e-5)
    for a, b in zip(got, want, strict=True):
        assert a.grad is not None
        assert b.grad is not None
        assert torch.allclose(a.grad.double(), b.grad, atol=1e-6)


def test_frequent_tokens_come_first_and_ends_always() -> None:
    assert frequent_tokens([[7, 7, 5], [5, 7]], 3, 10, [9]).token_ids == (5, 7, 9)
    assert frequent_tokens([[7]], 4, 10, [2]).token_ids == (0, 1, 2, 7)  # the rest by number
    assert frequent_tokens([[7]], 1, 10, [2, 3]).token_ids == (2, 3)


def test_layers_come_from_both_ends() -> None:
    assert default_layers(30, 6) == [0, 1, 2, 3, 28, 29]
    assert default_layers(4, 4) == [0, 1, 2, 3]
    assert default_layers(30, 1) == [0]
    with pytest.raises(ConfigError, match="cut out of 4"):
        default_layers(4, 5)


def test_groups_of_like_length_hold_everything_once() -> None:
    sequences = {n: [0] * (1 + n * 37 % 50) for n in range(40)}
    groups = by_length(sequences, 128)
    assert sorted(n for group in groups for n in group) == list(range(40))
    assert all(len(group) * max(len(sequences[n]) for n in group) <= 128 for group in groups)


def test_a_target_asks_itself_in_its_own_template(target: Path) -> None:
    asked = list(questions(target, ["Hi"], num_samples=1, num_own=2, max_prompt_tokens=100, seed=5))
    assert [question.key for question in asked] == ["prompt0/greedy", "prompt0/sample0", "own0", "own1"]
    tokenizer = AutoTokenizer.from_pretrained(target)
    assert tokenizer.decode(asked[0].prompt_ids) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(asked[2].prompt_ids) == "<|im_start|>user\n"
    assert tokenizer.decode(asked[2].closing_ids) == "\n<|im_start|>assistant\n"
    with pytest.raises(ConfigError, match="give shorter ones"):
        questions(target, ["a" * 200], num_samples=0, num_own=0, max_prompt_tokens=100, seed=0)


def test_a_question_without_an_end_is_dropped(target: Path) -> None:
    answerer = Answerer(Engine(TargetModel(target, "float32"), cache_bytes=16 << 20), [TOKENIZER_SIZE], 4)  # never chosen
    own = Question("own", [1, 5], 0.0, 3, closing_ids=[1])
    assert [answer.key for answer in answerer.answers([own, Question("prompt", [1, 5])])] == ["prompt"]
