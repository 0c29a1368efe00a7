"""A draft that learns from its device's log: it agrees better with the target, and with bad data nothing is written."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pairs import EDGECLOUD, ROOT
from safetensors.torch import load_file
from tiny import TOKENIZER_SIZE, make_tiny_llama
from torch import Tensor
from transformers import AutoModelForCausalLM

from edgecloud.cli.app import run as run_command
from edgecloud.errors import ConfigError, ModelError, RejectionLogError
from edgecloud.fingerprint import model_fingerprint, tokenizer_fingerprint
from edgecloud.partitioner.adapter import load_draft, read_info, save_merged, with_adapter
from edgecloud.partitioner.corrections import Correction, read_corrections, split_corrections
from edgecloud.partitioner.learn import Learned, begin_adapter, learn, merge_adapter, train_adapter
from edgecloud.partitioner.learning import LearningSettings, agreement
from edgecloud.partitioner.model_folder import ModelFolder
from edgecloud.rejections import Passage, RejectionLog, Source

SETTINGS = LearningSettings(num_epochs=4, learning_rate=1e-2, anchor=0.1)
NUM_PASSAGES = 16


@dataclass(frozen=True)
class Device:
    """A draft, and the log of the device that runs it."""

    draft: Path
    log: Path

    @property
    def folder(self) -> ModelFolder:
        return ModelFolder.open(self.draft)

    @property
    def corrections(self) -> list[Correction]:
        return read_corrections(self.log, self.folder, self.folder.fingerprint())


def passage_of(draft: torch.nn.Module, seed: int, first: int = 3, num_ids: int = 251, length: int = 40) -> Passage:
    """A text that always goes on in the same way, which the draft does not know: token, token + 3, token + 6, ..."""
    ids = [first + (seed * 11 + 3 * at) % num_ids for at in range(length)]
    with torch.inference_mode():
        guesses = draft(torch.tensor([ids])).logits[0].argmax(dim=1).tolist()
    wrong = tuple((at, guesses[at - 1]) for at in range(5, length) if guesses[at - 1] != ids[at])
    return Passage(tuple(ids), 5, wrong, 0.0)


def write_log(folder: Path, draft: Path, passages: list[Passage], **changed: str) -> Path:
    source = Source("t" * 64, model_fingerprint(draft), tokenizer_fingerprint(draft / "tokenizer.json"))
    changed = {name.removeprefix("of_"): fingerprint for name, fingerprint in changed.items()}
    log = RejectionLog(folder)
    log.prepare()
    for passage in passages:
        log.add(replace(source, **changed), passage)
    return folder


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> Device:
    root = tmp_path_factory.mktemp("device")
    draft = make_tiny_llama(root / "draft", scale=0.1)
    model = AutoModelForCausalLM.from_pretrained(draft, dtype=torch.float32).eval()
    log = write_log(root / "log", draft, [passage_of(model, seed) for seed in range(NUM_PASSAGES)])
    return Device(draft, log)


@pytest.fixture(scope="module")
def learned(device: Device, tmp_path_factory: pytest.TempPathFactory) -> tuple[Learned, Path]:
    out = tmp_path_factory.mktemp("learned") / "draft"
    return learn(device.draft, device.log, out, SETTINGS), out


# Learning


def test_it_agrees_better_on_what_was_held_out(learned: tuple[Learned, Path]) -> None:
    report, _ = learned
    assert report.num_held_out == 2
    assert report.num_passages == NUM_PASSAGES - 2
    before, best = report.epochs[0].agreement, report.best.agreement
    assert before is not None
    assert best is not None
    assert best > before + 0.1


def test_the_new_draft_is_an_ordinary_folder_that_agrees_as_reported(device: Device, learned: tuple[Learned, Path]) -> None:
    report, out = learned
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    _, held_out = split_corrections(device.corrections)
    assert agreement(model, held_out) == pytest.approx(report.best.agreement, abs=0.03)
    assert tokenizer_fingerprint(out / "tokenizer.json") == tokenizer_fingerprint(device.draft / "tokenizer.json")
    assert ModelFolder.open(out).num_parameters == device.folder.num_parameters
    assert (out / "chat_template.jinja").is_file()


def test_it_is_the_same_draft_every_time(device: Device, learned: tuple[Learned, Path], tmp_path: Path) -> None:
    learn(device.draft, device.log, tmp_path / "again", SETTINGS)
    assert (tmp_path / "again/model.safetensors").read_bytes() == (learned[1] / "model.safetensors").read_bytes()


def test_a_draft_that_gains_nothing_is_not_written(device: Device, tmp_path: Path) -> None:
    with pytest.raises(RejectionLogError, match="nothing was gained"):
        learn(device.draft, device.log, tmp_path / "out", LearningSettings(num_epochs=1, learning_rate=1e-9))
    assert list(tmp_path.iterdir()) == []


# Adapters


def test_an_adapter_changes_nothing_until_it_is_trained(device: Device, tmp_path: Path) -> None:
    file = tmp_path / "begin.safetensors"
    info = begin_adapter(device.draft, file, rank=4, seed=0)
    assert read_info(file, device.folder.fingerprint()) == info
    plain, ids = load_draft(device.folder), torch.tensor([[5, 6, 7, 8]])
    with torch.inference_mode():
        wanted = plain(ids).logits
        assert torch.equal(with_adapter(load_draft(device.folder), file, info)(ids).logits, wanted)


def test_merged_equals_applied(device: Device, tmp_path: Path) -> None:
    begin_adapter(device.draft, tmp_path / "begin.safetensors", rank=4, seed=0)
    trained = tmp_path / "trained.safetensors"
    train_adapter(device.draft, tmp_path / "begin.safetensors", device.log, trained, SETTINGS)
    merge_adapter(device.draft, trained, tmp_path / "merged")
    applied = with_adapter(load_draft(device.folder), trained, read_info(trained, device.folder.fingerprint()))
    merged = load_draft(ModelFolder.open(tmp_path / "merged"))
    ids = torch.tensor([device.corrections[0].ids])
    with torch.inference_mode():
        got, wanted, plain = merged(ids).logits, applied(ids).logits, load_draft(device.folder)(ids).logits
    assert torch.allclose(got, wanted, atol=1e-5)
    assert not torch.allclose(got, plain, atol=1e-1)


def test_the_mean_of_two_devices_adapters_does_what_both_do_on_average(device: Device, tmp_path: Path) -> None:
    """Only B is trained, so that it is no matter whether adapters are averaged or the weights that they are merged into."""
    begin = tmp_path / "begin.safetensors"
    info = begin_adapter(device.draft, begin, rank=4, seed=0)
    files = [tmp_path / name for name in ("one.safetensors", "two.safetensors")]
    for seed, file in enumerate(files):
        train_adapter(device.draft, begin, device.log, file, replace(SETTINGS, seed=seed, num_epochs=1))
        merge_adapter(device.draft, file, tmp_path / file.stem)
    start, one, two = map(load_file, (begin, *files))
    assert all(torch.equal(one[name], start[name]) == ("lora_A" in name) for name in start)
    mean = with_adapter(load_draft(device.folder), begin, info)
    with torch.no_grad():
        for name, parameter in mean.named_parameters():
            if "lora_" in name:
                key = name.replace(".default", "")
                parameter.copy_((one[key] + two[key]) / 2)
    save_merged(mean, device.folder, tmp_path / "mean")
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("one", "two", "mean")]
    for name, weight in weights[2].items():
        assert torch.allclose(weight, (weights[0][name] + weights[1][name]) / 2, atol=1e-6)


def test_what_leaves_a_device_are_tensors_of_known_size(device: Device, tmp_path: Path) -> None:
    """Nothing in the file depends on the log but the values of B: no count, no id, no text."""
    begin, out = tmp_path / "begin.safetensors", tmp_path / "out.safetensors"
    begin_adapter(device.draft, begin, rank=4, seed=0)
    train_adapter(device.draft, begin, device.log, out, SETTINGS)

    def header(file: Path) -> bytes:
        content = file.read_bytes()
        return content[8 : 8 + int.from_bytes(content[:8], "little")]

    assert json.loads(header(begin)) == json.loads(header(out))
    assert begin.stat().st_size == out.stat().st_size


# A trimmed head


def test_a_trimmed_draft_is_not_taught_what_it_cannot_say(device: Device) -> None:
    ids = (10, 11, 12, 13, 14, 15)
    passage = Passage(ids, 2, ((3, 50), (4, 51)), 0.0)
    assert Correction.of(passage, [12, 14, 15]) == Correction(ids, (4,), (2, 5), 0.0)
    assert Correction.of(passage, [12, 15]) is None
    assert Correction.of(passage, None) == Correction(ids, (3, 4), (2, 5), 0.0)


def test_a_trimmed_draft_learns_within_its_list(device: Device, tmp_path: Path) -> None:
    draft = tmp_path / "trimmed"
    folder = make_tiny_llama(draft, scale=0.1)
    even = list(range(0, TOKENIZER_SIZE, 2))
    (folder / "draft_vocab.json").write_text(json.dumps({"token_ids": even}))
    report = learn(folder, device.log, tmp_path / "out", SETTINGS)  # the same weights: the same fingerprint
    assert (report.best.agreement or 0) > (report.epochs[0].agreement or 0)
    assert json.loads((tmp_path / "out/draft_vocab.json").read_text()) == {"token_ids": even}


# What is refused


Damage = Callable[[Device, Path], Path]


def empty(device: Device, folder: Path) -> Path:
    return write_log(folder, device.draft, [])


def one_record(device: Device, folder: Path) -> Path:
    return write_log(folder, device.draft, [Passage((5, 6, 7), 1, ((2, 9),), 0.0)])


def another_tokenizer(device: Device, folder: Path) -> Path:
    return write_log(
        folder, device.draft, [Passage(tuple(range(40)), 1, tuple((at, 0) for at in range(1, 40)), 0.0)] * 3, tokenizer="x"
    )


def another_draft(device: Device, folder: Path) -> Path:
    return write_log(
        folder, device.draft, [Passage(tuple(range(40)), 1, tuple((at, 0) for at in range(1, 40)), 0.0)] * 3, of_draft="x"
    )


def two_targets(device: Device, folder: Path) -> Path:
    passages = [Passage(tuple(range(40)), 1, tuple((at, 0) for at in range(1, 40)), 0.0)] * 3
    write_log(folder, device.draft, passages)
    return write_log(folder, device.draft, passages, of_target="u" * 64)


def large_ids(device: Device, folder: Path) -> Path:
    return write_log(folder, device.draft, [Passage((5, 6, 40_000), 1, ((2, 9),), 0.0)] * 20)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (empty, "0 refused guesses in 0 passages.*log more"), (one_record, "1 refused guesses in 1 passages.*log more"),
        (another_tokenizer, "tokenizer x.*give the draft of that pair"), (another_draft, "draft x.*--any-draft"),
        (two_targets, "two targets.*clear"), (large_ids, "id 40000"),
    ],
)  # fmt: skip
def test_a_log_that_cannot_teach_is_refused(damage: Damage, words: str, device: Device, tmp_path: Path) -> None:
    log = damage(device, tmp_path / "log")
    with pytest.raises(RejectionLogError, match=words):
        learn(device.draft, log, tmp_path / "out", SETTINGS)
    assert not (tmp_path / "out").exists()


def test_guesses_of_another_draft_are_taken_when_asked_for(device: Device, tmp_path: Path) -> None:
    log = another_draft(device, tmp_path / "log")
    assert len(read_corrections(log, device.folder, device.folder.fingerprint(), any_draft=True)) == 3


def test_an_adapter_of_another_draft_is_refused(device: Device, tmp_path: Path) -> None:
    other = make_tiny_llama(tmp_path / "other", seed=1)
    begin_adapter(other, tmp_path / "a.safetensors", rank=4, seed=0)
    with pytest.raises(ModelError, match="the one it was begun for"):
        merge_adapter(device.draft, tmp_path / "a.safetensors", tmp_path / "out")
    with pytest.raises(ModelError, match="no adapter of edgecloud"):
        merge_adapter(device.draft, device.draft / "model.safetensors", tmp_path / "out")
    (tmp_path / "b.safetensors").write_text("hello")
    with pytest.raises(ModelError, match="safetensors"):
        merge_adapter(device.draft, tmp_path / "b.safetensors", tmp_path / "out")


def test_bad_settings_and_places_are_refused(device: Device, tmp_path: Path) -> None:
    for bad in ({"num_epochs": 0}, {"learning_rate": 0.0}, {"anchor": -1.0}):
        with pytest.raises(ConfigError):
            replace(SETTINGS, **bad)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="rank"):
        begin_adapter(device.draft, tmp_path / "a.safetensors", rank=0, seed=0)
    with pytest.raises(ConfigError, match="--overwrite"):
        learn(device.draft, device.log, tmp_path, SETTINGS)
    with pytest.raises(ConfigError, match="abacus"):
        learn(device.draft, device.log, tmp_path / "out", SETTINGS, device="abacus")


# The command line


def test_a_round_is_three_commands_that_exchange_files(device: Device, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*words: object) -> dict[str, Any]:
        assert run_command([*map(str, words), "--json"]) == 0
        content: dict[str, Any] = json.loads(capsys.readouterr().out)
        return content

    begin, trained = tmp_path / "begin.safetensors", tmp_path / "trained.safetensors"
    run("adapter", "begin", device.draft, "-o", begin, "--rank", 4)
    found = run("adapter", "train", device.draft, begin, "--log", device.log, "-o", trained)
    assert found["num_passages"] == NUM_PASSAGES
    run("adapter", "merge", device.draft, trained, "-o", tmp_path / "merged")
    assert ModelFolder.open(tmp_path / "merged").fingerprint() != device.folder.fingerprint()
    report = run("learn", device.draft, "--log", device.log, "-o", tmp_path / "learned", "--learning-rate", "5e-3")
    assert report["epochs"][-1]["agreement"] > report["epochs"][0]["agreement"]


# Flower. It pins other versions than we test with, so it has an environment of its own, and CI has none.

FLOWER = os.environ.get("EDGECLOUD_TEST_FLOWER")


needs_flower = pytest.mark.skipif(FLOWER is None, reason="EDGECLOUD_TEST_FLOWER names no python that has edgecloud[federated]")


def flower(draft: Path, begin: Path, averaged: Path, logs: list[Path], *options: str) -> dict[str, Any]:
    command = [str(FLOWER), str(ROOT / "examples/federated/run.py"), str(draft), str(begin), "-o", str(averaged),
               "--edgecloud", shlex.join(EDGECLOUD), *options]  # fmt: skip
    for log in logs:
        command += ["--log", str(log)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return report


@needs_flower
def test_a_round_of_flower_averages_what_two_devices_learned(device: Device, tmp_path: Path) -> None:
    begin, averaged = tmp_path / "begin.safetensors", tmp_path / "averaged.safetensors"
    begin_adapter(device.draft, begin, rank=4, seed=0)
    model = load_draft(device.folder)
    logs = [write_log(tmp_path / name, device.draft, [passage_of(model, seed) for seed in range(start, start + 4)])
            for name, start in (("phone", 0), ("tablet", 50))]  # fmt: skip

    def learned(log: Path) -> dict[str, Tensor]:
        train_adapter(device.draft, begin, log, tmp_path / "own.safetensors", LearningSettings(num_epochs=1, seed=1))
        return load_file(tmp_path / "own.safetensors")

    one, two = map(learned, logs)
    report = flower(device.draft, begin, averaged, logs, "--rounds", "1", "--clip", "1000")
    assert all(torch.allclose(tensor, (one[name] + two[name]) / 2, atol=1e-6) for name, tensor in load_file(averaged).items())
    size = sum(tensor.numel() * 4 for name, tensor in one.items() if "lora_B" in name)
    assert size <= report["bytes_up_per_device_and_round"] < size + 10_000  # tensors and their headers, nothing else
    merge_adapter(device.draft, averaged, tmp_path / "merged")
    flower(device.draft, begin, averaged, logs, "--rounds", "1", "--clip", "0.01")
    assert 0 < sum(float(tensor.square().sum()) for name, tensor in load_file(averaged).items() if "lora_B" in name) <= 0.010001**2


@needs_flower
def test_three_devices_each_agree_better_on_their_own_domain(device: Device, tmp_path: Path) -> None:
    """A domain: 80 ids that no other domain has, each followed by the one three further on."""
    begin, averaged = tmp_path / "begin.safetensors", tmp_path / "averaged.safetensors"
    begin_adapter(device.draft, begin, rank=8, seed=0)
    model = load_draft(device.folder)
    logs, held_out = [], []
    for domain in range(3):
        passages = [passage_of(model, seed, first=3 + 80 * domain, num_ids=80) for seed in range(16)]
        logs.append(write_log(tmp_path / str(domain), device.draft, passages[:12]))
        held_out.append([correction for passage in passages[12:] if (correction := Correction.of(passage, None)) is not None])
    report = flower(device.draft, begin, averaged, logs, "--rounds", "2", "--epochs", "10", "--learning-rate", "0.01",
                    "--clip", "1000")  # fmt: skip
    learned = with_adapter(load_draft(device.folder), averaged, read_info(averaged, device.folder.fingerprint()))
    figures = [(agreement(model, domain), agreement(learned, domain)) for domain in held_out]
    print(figures, report)
    assert all(after > before + 0.05 for before, after in figures)
