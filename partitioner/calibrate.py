"""`edgecloud calibrate`: at which score a device may answer alone so that a stated risk holds; the rules go into bundle.json."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from edgecloud.bundle import MANIFEST, Bundle
from edgecloud.calibration import Calibration, ExitRule, Scope, ShareRule
from edgecloud.errors import BundleError, ConfigError
from edgecloud.partitioner import check
from edgecloud.partitioner.choosers import GraphGuesser, TorchChooser
from edgecloud.partitioner.download import fsync_folder
from edgecloud.partitioner.exit_rules import MIN_PROMPTS, exit_rule, exits_by_threshold, share_rule
from edgecloud.partitioner.graph import DraftGraph
from edgecloud.partitioner.model_folder import ModelFolder
from edgecloud.partitioner.recording import Record, prompt_key, record, record_all
from edgecloud.partitioner.report import Remark
from edgecloud.partitioner.rollout import Rollouts
from edgecloud.partitioner.step_cache import usable_cache
from edgecloud.partitioner.tokenizer_match import require_same_tokenizer
from edgecloud.sampling import SamplingSettings

METHOD = "learn-then-test, fixed sequence; betting test over answers and t-test over tokens"
SCOPES: tuple[Scope, ...] = ("token", "before", "after")
MAX_NEW_TOKENS = 48

Progress = Callable[[int, int], None]
Answers = Mapping[tuple[int, ...], list[int]]  # of prompts' ids


@dataclass(frozen=True, slots=True)
class Wanted:
    """What to calibrate for. Raises ConfigError."""

    risks: tuple[float, ...]
    delta: float = 0.05
    cloud_shares: tuple[float, ...] = ()
    temperatures: tuple[float, ...] = (0.0,)
    max_new_tokens: int = MAX_NEW_TOKENS

    def __post_init__(self) -> None:
        if not self.risks and not self.cloud_shares:
            raise ConfigError("there is nothing to calibrate for; give --risk or --cloud-share")
        for risk in self.risks:
            _require(0 < risk < 1, "--risk", risk, "above 0 and below 1, for example 0.05")
        _require(0 < self.delta < 1, "--delta", self.delta, "above 0 and below 1, for example 0.05")
        for share in self.cloud_shares:
            _require(0 <= share < 1, "--cloud-share", share, "at least 0 and below 1, for example 0.3")
        _require(1 <= self.max_new_tokens <= 4096, "--max-new-tokens", self.max_new_tokens, "1 to 4096")
        if not self.temperatures:
            raise ConfigError("there is no temperature to calibrate for; give --temperature 0")
        for temperature in self.temperatures:
            SamplingSettings(temperature=temperature)


def _require(holds: bool, option: str, value: float, allowed: str) -> None:
    if not holds:
        raise ConfigError(f"{option} is {value}; it is {allowed}")


def calibrate(
    path: Path,
    prompts: Sequence[str],
    wanted: Wanted,
    *,
    answers: Path | None = None,
    remark: Remark = lambda _: None,
    progress: Progress = lambda done, total: None,
) -> Calibration:
    """Measure, fit, and write the rules into the bundle's manifest, which replaces older ones.

    Raises:
        ConfigError: a value cannot work, or there are too few prompts.
        BundleError: it cannot be opened, a file is missing or changed, or it carries no target.
        ModelError: a model of it cannot be used.
    """
    bundle = Bundle.open(path)
    if bundle.target_folder is None or not bundle.target_folder.exists():
        raise BundleError(
            f"{path} carries no target to calibrate against; calibrate the bundle where cloud/ is, then copy {MANIFEST}"
        )
    if len(set(prompts)) < MIN_PROMPTS:
        raise ConfigError(
            f"{len(set(prompts))} different prompts are too few to calibrate with; give at least {MIN_PROMPTS}, better 200 or more"
        )
    known = {} if answers is None else read_answers(answers)
    remark("checksums")
    bundle.verify_files("edge")
    bundle.verify_files("cloud")
    target = ModelFolder.open(bundle.target_folder)
    context = min(bundle.target.max_context_tokens, bundle.draft.max_context_tokens)
    if (room := context - wanted.max_new_tokens) < 1:
        raise ConfigError(f"--max-new-tokens {wanted.max_new_tokens} leaves no room for a prompt in a context of {context} tokens")
    different = {prompt_key(ids): ids for ids in check.encode_prompts(target, room, sorted(set(prompts)))}
    shuffled = [different[key] for key in sorted(different)]
    remark("loading the target")
    model = check.load_torch(target, fp32=False)
    pair = Pair(bundle, model, require_same_tokenizer(target, target), known)
    records = {
        temperature: pair.record(shuffled, temperature, wanted.max_new_tokens, remark, progress)
        for temperature in wanted.temperatures
    }
    found = fit(bundle, records, wanted)
    write_calibration(bundle.path, found)
    return found


class Pair:
    """Both models of a bundle, to record prompts with."""

    def __init__(self, bundle: Bundle, model: torch.nn.Module, num_tokens: int, answers: Answers) -> None:
        """`num_tokens` are the tokenizer's. `answers` are the target's, greedy: they save it from speaking token by token."""
        self._bundle = bundle
        self._model = model
        self._num_tokens = num_tokens
        self._answers = answers

    def record(
        self, prompts: Sequence[Sequence[int]], temperature: float, max_new_tokens: int, remark: Remark, progress: Progress
    ) -> list[Record]:
        """Roll every prompt out. What was recorded before, by the same models under the same settings, is read."""
        longest = max(len(prompt) for prompt in prompts) + max_new_tokens + 1
        model = self._bundle.file(self._bundle.draft.model)
        graph = DraftGraph(model, longest, num_threads=2, vocab=self._bundle.draft_vocab())

        def measure(prompt: Sequence[int]) -> Record:
            # Noise is shared by draft and target, and is another for each prompt.
            sampling = SamplingSettings(temperature=temperature, seed=int(prompt_key(prompt)[:8], 16))
            guesser = GraphGuesser(graph, self._num_tokens, sampling)
            chooser = TorchChooser(self._model, self._num_tokens, sampling)
            rollouts = Rollouts(prompt, guesser, chooser, max_new_tokens, self._bundle.tokenizer.eos_token_ids)
            if sampling.greedy and (answer := self._answers.get(tuple(prompt))):
                rollouts.expect(answer)
            return record(prompt, rollouts)

        remark(f"rolling {len(prompts)} prompts out at temperature {temperature:g}")
        return record_all(
            prompts,
            {**self._made_of(), "temperature": temperature, "max_new_tokens": max_new_tokens},
            usable_cache(remark),
            measure,
            lambda done: progress(done, len(prompts)),
        )

    def _made_of(self) -> dict[str, object]:
        files = self._bundle.names_below("edge")
        return {
            "step": "calibration",
            "target": self._bundle.target.fingerprint,
            "device": {name: self._bundle.files[name].sha256 for name in files if name.startswith("edge/draft/")},
            "torch": version("torch"),
            "onnxruntime": version("onnxruntime"),
        }


def fit(bundle: Bundle, records: Mapping[float, Sequence[Record]], wanted: Wanted) -> Calibration:
    """The rules that follow from records, by temperature."""
    rules: list[ExitRule] = []
    shares: list[ShareRule] = []
    for temperature, of_prompts in records.items():
        for scope in SCOPES:
            table = exits_by_threshold(of_prompts, scope)
            rules += [exit_rule(scope, risk, temperature, wanted.delta, table) for risk in wanted.risks]
            if scope != "token":
                shares += [share_rule(scope, share, temperature, of_prompts) for share in wanted.cloud_shares]
    return Calibration(
        bundle.pair_id, bundle.draft.fingerprint, bundle.target.fingerprint, METHOD, wanted.delta, rules, shares
    )  # fmt: skip


def write_calibration(folder: Path, found: Calibration) -> None:
    """Replace `calibration` in bundle.json, whole or not at all; everything else stays as it is. Raises OSError."""
    manifest = folder / MANIFEST
    content: dict[str, Any] = json.loads(manifest.read_text("utf-8"))
    content["calibration"] = found.to_dict()
    handle, partial = tempfile.mkstemp(prefix=f".{MANIFEST}-", dir=folder)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(json.dumps(content, indent=2) + "\n")
            file.flush()
            os.fsync(file.fileno())
        Path(partial).chmod(manifest.stat().st_mode & 0o777)
        Path(partial).replace(manifest)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise
    fsync_folder(folder)


def read_answers(file: Path) -> dict[tuple[int, ...], list[int]]:
    """A line of JSON each, with `prompt_ids` and `answer_ids`; those of a `temperature` other than 0 are left out.

    Raises:
        ConfigError: the file cannot be read, or a line is something else; names the line.
    """
    try:
        lines = file.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--answers {file} cannot be read: {error}; give a .jsonl with prompt_ids and answer_ids") from error
    found: dict[tuple[int, ...], list[int]] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            prompt, answer = tuple(map(int, entry["prompt_ids"])), list(map(int, entry["answer_ids"]))
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"--answers {file}, line {number} is no object with prompt_ids and answer_ids: {error!r}") from error
        if entry.get("temperature", 0) == 0:
            found[prompt] = answer
    return found
