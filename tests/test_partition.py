"""`edgecloud partition` with the real model builder on tiny models: what it writes, checks, refuses and survives."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from tiny import CHAT_TEMPLATE, SPECIAL_TOKENS, make_tiny_llama

from edgecloud.bundle import Bundle
from edgecloud.errors import BundleError, ConfigError, ModelError, TokenizerMismatchError
from edgecloud.fingerprint import model_fingerprint, tokenizer_fingerprint
from edgecloud.partitioner import check
from edgecloud.partitioner.atomic import atomic_folder, remove_leftovers
from edgecloud.partitioner.child import ChildError, run_module
from edgecloud.partitioner.inputs import Inputs, check_inputs, require_space
from edgecloud.partitioner.model_folder import ModelFolder
from edgecloud.partitioner.partition import partition
from edgecloud.partitioner.report import PartitionReport
from edgecloud.partitioner.tokenizer_match import chat_template, eos_token_ids, special_tokens


@dataclass
class Made:
    """A bundle that the command line wrote, after a first try was killed half-way."""

    path: Path
    report: dict[str, Any]
    after_kill: set[str]  # what lay in the bundle's parent folder then


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("models") / "tiny", tie_word_embeddings=True)


@pytest.fixture(scope="module")
def made(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    path = tmp_path_factory.mktemp("bundles") / "tiny"
    with start(model, path) as first:
        wait_until(lambda: any(path.parent.glob(".tiny.partial-*/edge/draft")), first)
        first.send_signal(signal.SIGKILL)
    after_kill = {entry.name for entry in path.parent.iterdir()}
    with start(model, path) as second:
        output, remarks = second.communicate(timeout=200)
    assert second.returncode == 0, remarks
    return Made(path, json.loads(output), after_kill)


@pytest.fixture(scope="module")
def padded(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[PartitionReport, Path]:
    """A target with other weights and a padded vocabulary; the draft stays fp32."""
    folder = tmp_path_factory.mktemp("padded")
    target = make_tiny_llama(folder / "target", seed=1, vocab_size=320, eos_token_id=[2, 0])
    return partition(inputs(target, folder / "bundle", draft=str(model), precision="fp32")), folder / "bundle"


COMMAND = """
import resource, sys
from edgecloud.cli import main
limit = int(sys.argv.pop(1))
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
main()
"""


def start(model: Path, bundle: Path, max_file_bytes: int = 0) -> subprocess.Popen[str]:
    arguments = [str(max_file_bytes), "partition", str(model), "-o", str(bundle), "--json"]
    home = model.parent / f"home-{max_file_bytes}"  # a cache of its own: what one test has exported, another shall export
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "EDGECLOUD_HOME": str(home)}
    return subprocess.Popen(
        [sys.executable, "-c", COMMAND, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def inputs(model: Path, bundle: Path, **changes: Any) -> Inputs:
    return check_inputs(str(model), bundle, **{"draft": None, "precision": "int4", "overwrite": False, **changes})


def test_a_killed_run_leaves_no_bundle_and_the_next_one_cleans_up(made: Made) -> None:
    assert len(made.after_kill) == 1
    assert all(name.startswith(".tiny.partial-") for name in made.after_kill)
    assert {entry.name for entry in made.path.parent.iterdir()} == {"tiny"}


def test_the_bundle_is_whole(made: Made, model: Path) -> None:
    bundle = Bundle.open(made.path)
    bundle.verify_files("edge")
    bundle.verify_files("cloud")
    on_disk = {path.relative_to(made.path).as_posix() for path in made.path.rglob("*") if path.is_file()}
    assert on_disk == {*bundle.files, "bundle.json"}
    assert {name for name in bundle.files if name.startswith("edge/")} == {
        f"edge/draft/{name}" for name in ("model.onnx", "model.onnx.data", "tokenizer.json", "chat_template.jinja")
    }
    assert bundle.target.fingerprint == model_fingerprint(model) == model_fingerprint(made.path / "cloud")
    assert bundle.tokenizer.fingerprint == tokenizer_fingerprint(model / "tokenizer.json")
    assert bundle.tokenizer.eos_token_ids == [2]
    assert bundle.tokenizer.special_tokens["eos_token"] == "<|im_end|>"
    assert (made.path / "edge/draft/chat_template.jinja").read_text() == CHAT_TEMPLATE
    assert (bundle.draft.quantization, bundle.draft.vocab_size, bundle.target.dtype) == ("int4", 260, "float32")


def test_the_graph_names_the_size_of_its_caches(made: Made) -> None:
    session = onnxruntime.InferenceSession(made.path / "edge/draft/model.onnx")
    shapes = {value.name: value.shape for value in session.get_inputs()}
    assert shapes["past_key_values.0.key"][1::2] == [1, 32]  # heads, head size
    assert session.get_outputs()[0].shape[1:] == [1, 260]  # the last position's logits only


def test_the_report_says_what_the_split_costs(made: Made) -> None:
    report = made.report
    assert report["bundle"] == str(made.path)
    assert report["parity"]["max_relative_diff"] < report["parity"]["bound"]
    assert report["agreement"]["num_positions"] > 100
    survival = report["agreement"]["survival"]
    assert len(survival) == 8
    assert report["agreement"]["target_passes_per_token"] == pytest.approx(1 / (1 + sum(survival[:4])))
    assert report["device"]["tokens_per_s"] > 0
    assert 10e6 < report["device"]["peak_rss_bytes"] < 400e6
    files = Bundle.open(made.path).files
    assert report["device_bytes"] == sum(info.num_bytes for name, info in files.items() if name.startswith("edge/"))
    assert Bundle.open(made.path).checks["agreement"] == report["agreement"]


def test_a_draft_with_another_padding_is_fine_and_the_target_decides(padded: tuple[PartitionReport, Path]) -> None:
    report, path = padded
    bundle = Bundle.open(path)
    assert (bundle.target.vocab_size, bundle.draft.vocab_size) == (320, 260)
    assert bundle.tokenizer.eos_token_ids == [2, 0]
    assert bundle.target.fingerprint != bundle.draft.fingerprint
    assert report.agreement.acceptance_rate < 0.5  # unrelated weights
    assert report.to_table().row_count > 8


def test_an_unquantized_draft_agrees_with_itself(model: Path, padded: tuple[PartitionReport, Path]) -> None:
    folder = ModelFolder.open(model)
    torch_model = check.load_torch(folder, fp32=True)
    samples = check.continue_greedily(torch_model, check.encode_prompts(folder, 400)[:2], [2], 259)
    graph = check.open_graph(padded[1] / "edge/draft/model.onnx", samples)
    agreement = check.measure_agreement(graph, samples, 259)
    assert agreement.acceptance_rate == 1.0
    assert agreement.target_passes_per_token == pytest.approx(1 / 5)


def test_parity_goes_red_on_a_damaged_export(model: Path, padded: tuple[PartitionReport, Path], tmp_path: Path) -> None:
    folder = ModelFolder.open(model)
    torch_model = check.load_torch(folder, fp32=True)
    samples = check.continue_greedily(torch_model, check.encode_prompts(folder, 400)[:1], [2], 259)
    for name in ("model.onnx", "model.onnx.data"):
        shutil.copy(padded[1] / "edge/draft" / name, tmp_path)
    check.check_parity(torch_model, check.open_graph(tmp_path / "model.onnx", samples), samples)
    weights = np.memmap(tmp_path / "model.onnx.data", np.float32, mode="r+")
    weights[: len(weights) // 2] *= 1.01
    weights.flush()
    with pytest.raises(ModelError, match="not the model"):
        check.check_parity(torch_model, check.open_graph(tmp_path / "model.onnx", samples), samples)


def test_survival_counts_runs() -> None:
    runs = [[True, True, False, True], [False, True]]
    assert check.estimate_survival(runs, 3) == [4 / 6, 1 / 4, 0.0]
    assert check.estimate_survival([], 2) == [0.0, 0.0]


# What is refused


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"absent does not exist.*smollm2-135m"):
        inputs(tmp_path / "absent", tmp_path / "bundle")


def test_a_known_model_that_was_not_fetched_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGECLOUD_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match="run `edgecloud fetch smollm2-135m` first"):
        inputs(Path("smollm2-135m"), tmp_path / "bundle")


@pytest.mark.parametrize("keep", [4, 200, -1])
def test_truncated_weights_are_named_before_work_begins(model: Path, tmp_path: Path, keep: int) -> None:
    folder = shutil.copytree(model, tmp_path / "model")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    with pytest.raises(ModelError, match=r"model\.safetensors.*truncated.*fetch or save"):
        inputs(folder, tmp_path / "bundle")


def test_pickles_are_not_read(model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(model, tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin is a pickle"):
        inputs(folder, tmp_path / "bundle")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["BertModel"]}, "BertModel.*causal"),
        ({"architectures": None}, "no architecture"),
        ({"auto_map": {"AutoModelForCausalLM": "modeling.Evil"}}, "auto_map.*never run"),
        ({"vocab_size": -5}, "vocab_size is -5"),
        ({"vocab_size": 200}, "id 258.*vocab_size is 200"),
    ],
)
def test_configs_that_cannot_work(model: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    folder = shutil.copytree(model, tmp_path / "model")
    edit_json(folder / "config.json", **changes)
    with pytest.raises(ModelError, match=message):
        inputs(folder, tmp_path / "bundle")


def test_weights_that_the_config_asks_for_must_be_there(model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(model, tmp_path / "model")
    edit_json(folder / "config.json", num_hidden_layers=3)
    with pytest.raises(ModelError, match=r"lacks weights.*layers\.2"):
        check.load_torch(ModelFolder.open(folder), fp32=True)


def test_another_tokenizer_is_refused_with_the_first_difference(model: Path, tmp_path: Path) -> None:
    other = make_tiny_llama(tmp_path / "other", special_tokens=(*SPECIAL_TOKENS[:2], "<|stop|>"))
    with pytest.raises(TokenizerMismatchError, match=r"id 2: '<\|stop\|>' in the draft.*'<\|im_end\|>' in the target"):
        inputs(model, tmp_path / "bundle", draft=str(other))


def test_a_missing_token_is_a_difference(model: Path, tmp_path: Path) -> None:
    other = shutil.copytree(model, tmp_path / "other")
    content = json.loads((other / "tokenizer.json").read_text())
    content["added_tokens"].append({**content["added_tokens"][0], "id": 259, "content": "<tool>"})
    (other / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(TokenizerMismatchError, match=r"id 259: '<tool>' in the draft.*nothing in the target"):
        inputs(model, tmp_path / "bundle", draft=str(other))


def test_another_way_of_splitting_is_a_difference(model: Path, tmp_path: Path) -> None:
    other = shutil.copytree(model, tmp_path / "other")
    edit_json(other / "tokenizer.json", normalizer={"type": "Lowercase"})
    with pytest.raises(TokenizerMismatchError, match=r"differ at normalizer.*Lowercase"):
        inputs(model, tmp_path / "bundle", draft=str(other))


def test_formatting_of_the_tokenizer_file_is_no_difference(model: Path, tmp_path: Path) -> None:
    other = shutil.copytree(model, tmp_path / "other")
    file = other / "tokenizer.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "truncation": None}, indent=7, sort_keys=True))
    assert inputs(model, tmp_path / "bundle", draft=str(other)).num_tokens == 259


def test_what_lies_at_the_destination_is_safe(model: Path, made: Made, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="--overwrite"):
        inputs(model, made.path)
    assert inputs(model, made.path, overwrite=True).destination == made.path
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").touch()
    with pytest.raises(BundleError, match="no bundle; it is left alone"):
        inputs(model, tmp_path / "photos", overwrite=True)
    with pytest.raises(BundleError, match="is a file"):
        inputs(model, tmp_path / "photos" / "cat.jpg", overwrite=True)
    with pytest.raises(BundleError, match="is a file"):
        inputs(model, tmp_path / "photos" / "cat.jpg" / "deeper")
    with pytest.raises((ConfigError, BundleError)):
        inputs(model, model, overwrite=True)


def test_too_little_room_is_found_up_front(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"no room in .*MB are free"):
        require_space(tmp_path, 1 << 62)


def test_a_disk_that_fills_up_leaves_nothing(model: Path, tmp_path: Path) -> None:
    with start(model, tmp_path / "bundle", max_file_bytes=100_000) as process:
        _, remarks = process.communicate(timeout=200)
    assert process.returncode == 1
    assert "error: no room for" in remarks
    assert "Traceback" not in remarks
    assert list(tmp_path.iterdir()) == []


def test_dry_run_writes_nothing(model: Path, tmp_path: Path) -> None:
    command = ["edgecloud", "partition", str(model), "-o", str(tmp_path / "bundle"), "--dry-run", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    plan = json.loads(done.stdout)
    assert plan["dry_run"] is True
    assert plan["disk_needed_bytes"] > 0
    assert list(tmp_path.iterdir()) == []


# The folder that appears whole


def test_a_failure_or_ctrl_c_leaves_the_old_folder(tmp_path: Path) -> None:
    destination = tmp_path / "bundle"
    with atomic_folder(destination) as folder:
        (folder / "version").write_text("1")
    for error in (RuntimeError, KeyboardInterrupt):
        with contextlib.suppress(error), atomic_folder(destination) as folder:
            (folder / "version").write_text("2")
            raise error
    assert (destination / "version").read_text() == "1"
    with atomic_folder(destination) as folder:
        (folder / "version").write_text("3")
        remove_leftovers(destination)  # another run does not touch what is being filled
    assert (destination / "version").read_text() == "3"
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_killed_between_the_renames_the_old_folder_comes_back(tmp_path: Path) -> None:
    aside = tmp_path / ".bundle.old-x"
    aside.mkdir()
    (aside / "version").write_text("1")
    remove_leftovers(tmp_path / "bundle")
    assert (tmp_path / "bundle" / "version").read_text() == "1"


def test_a_child_that_fails_says_why_and_one_without_a_parent_ends() -> None:
    with pytest.raises(ChildError, match="exit code 1: .*no_such_module"):
        run_module("no_such_module", [])
    script = "from edgecloud.partitioner.child import run_module; run_module('http.server', ['0', '--bind', '127.0.0.1'])"
    with subprocess.Popen([sys.executable, "-c", script]) as parent:
        wait_until(lambda: bool(children(parent.pid)), parent)
        (child,) = children(parent.pid)
        parent.kill()
    wait_until(lambda: not Path(f"/proc/{child}").exists() or "Z" in Path(f"/proc/{child}/stat").read_text().split()[2])


# What the tokenizer's files say


def test_template_tokens_and_eos_from_older_layouts(model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(model, tmp_path / "model")
    (folder / "chat_template.jinja").unlink()
    assert chat_template(folder) is None
    named = [{"name": "tool_use", "template": "a"}, {"name": "default", "template": "b"}]
    edit_json(folder / "tokenizer_config.json", chat_template=named, eos_token={"content": "<|im_end|>", "lstrip": False})
    assert chat_template(folder) == "b"
    edit_json(folder / "tokenizer_config.json", chat_template="c")
    assert chat_template(folder) == "c"
    assert special_tokens(folder)["eos_token"] == "<|im_end|>"
    (folder / "generation_config.json").unlink()
    edit_json(folder / "config.json", eos_token_id=[0, 2])
    assert eos_token_ids(ModelFolder.open(folder)) == [0, 2]
    edit_json(folder / "config.json", eos_token_id=None)
    assert eos_token_ids(ModelFolder.open(folder)) == [2]


@pytest.mark.parametrize(
    ("file", "text", "licence"),
    [
        ("README.md", "---\nlicense: apache-2.0\ntags: [x]\n---\n# A model", "apache-2.0"),
        ("LICENSE", "MIT License\n\nCopyright", "mit"),
        ("LICENSE", "All rights reserved", None),
    ],
)
def test_licence(model: Path, tmp_path: Path, file: str, text: str, licence: str | None) -> None:
    folder = shutil.copytree(model, tmp_path / "model")
    (folder / file).write_text(text)
    assert ModelFolder.open(folder).licence == licence


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def wait_until(condition: Any, process: subprocess.Popen[Any] | None = None, timeout_s: float = 100.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        assert process is None or process.poll() is None, "it ended too early"
        time.sleep(0.01)


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(min(2, before))
    yield
    torch.set_num_threads(before)
