"""The exit head's part of a partition: answers, rows of the front and states of the target along them, training, figures."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from edgecloud.draft_vocab import DRAFT_VOCAB
from edgecloud.errors import ConfigError, ModelError
from edgecloud.kernels.codec import decode, encode
from edgecloud.partitioner import check, tokenizer_match
from edgecloud.partitioner.exit_answers import MAX_ANSWER_TOKENS, MIN_PROMPTS, ExitSource, divide
from edgecloud.partitioner.exit_graph import guesses, write_exit_head
from edgecloud.partitioner.exit_head import CurvePoint, ExitLessons, ExitSettings, train_exit_head
from edgecloud.partitioner.export import GRAPH_FILES
from edgecloud.partitioner.frequent_tokens import frequent_tokens
from edgecloud.partitioner.front_check import open_front
from edgecloud.partitioner.graph import FrontGraph
from edgecloud.partitioner.inputs import FrontPlan
from edgecloud.partitioner.last_states import last_states, require_plain_head
from edgecloud.partitioner.quantize import quantize_front
from edgecloud.partitioner.reference import Reference
from edgecloud.partitioner.report import ExitHeadReport, Remark
from edgecloud.partitioner.steps import cached_exit_head, cached_samples

EXIT_HEAD, FOUND = "exit_head.onnx", "exit_head.json"
FILES = (EXIT_HEAD, f"{EXIT_HEAD}.data", DRAFT_VOCAB)


class ExitHeadMaker:
    """Makes the exit head of the front in `folder`, and puts it there.

    Args:
        reference: holds the model in fp32.
        plan: of the front.
        source: what to learn from.
        folder: of the front, as it is in the bundle.
        cache, remark: as for the front.
        settings: of the training.
    """

    def __init__(
        self, reference: Reference, plan: FrontPlan, source: ExitSource, folder: Path, cache: Path | None, remark: Remark,
        settings: ExitSettings | None = None,
    ) -> None:  # fmt: skip
        self._reference, self._plan, self._source, self._folder = reference, plan, source, folder
        self._cache, self._remark, self._settings = cache, remark, settings or ExitSettings()

    def make(self) -> ExitHeadReport:
        """Write it, or take it from the cache.

        Raises:
            ModelError: the target's head is more than a product.
            ConfigError: too few answers.
            BundleError: there is no room.
        """
        plan, made = self._plan, self._folder / "exit-head"
        fingerprints = self._reference.fingerprint, self._reference.tokenizer_fingerprint
        self._remark(f"the exit head of the front, from {len(self._source.answers or self._source.prompts)} prompts")
        what: dict[str, object] = {"source": self._source.digest, "settings": asdict(self._settings)}
        if cached_exit_head(self._cache, fingerprints, plan, what, made, self._make):
            self._remark("it was in the cache")
        found = json.loads((made / FOUND).read_text("utf-8"))
        for name in FILES:
            (made / name).rename(self._folder / name)
        shutil.rmtree(made)
        return ExitHeadReport(**found)

    def _make(self, folder: Path) -> None:
        """All of it in one folder, as the cache keeps it."""
        model, settings = self._reference.model, self._settings
        training, held_out = divide(self._answers())
        eos = tokenizer_match.eos_token_ids(self._reference.target)
        sequences = (sample.prompt_ids + sample.continuation_ids for sample in training)
        vocab = frequent_tokens(sequences, settings.num_kept, self._reference.num_tokens, eos)
        kept = torch.tensor(vocab.token_ids)
        require_plain_head(model)
        head = model.get_output_embeddings().weight.detach()[kept].float()
        self._remark("rows of the front and states of the target along the answers")
        graph = open_front(self._folder / GRAPH_FILES[0], [*training, *held_out])
        lessons = lessons_of(model, graph, self._plan.codec, training)
        examined = lessons_of(model, graph, self._plan.codec, held_out)
        trained, curve = train_exit_head(lessons, examined, head, kept, settings, self._tell)
        scratch = folder / "fp32"
        scratch.mkdir(parents=True)
        write_exit_head(trained, head, scratch / EXIT_HEAD)
        path = quantize_front(scratch / EXIT_HEAD, folder, self._plan.precision)
        shutil.rmtree(scratch)
        (folder / DRAFT_VOCAB).write_text(vocab.to_json(), "utf-8")
        wanted = examined.token_ids.numpy()
        report = ExitHeadReport(
            num_kept=len(kept), coverage=float(np.isin(wanted, kept.numpy()).mean()),
            agreement=float((guesses(path, examined.rows.numpy(), kept.numpy()) == wanted).mean()),
            num_positions=len(wanted), num_training_positions=len(lessons.rows),
            num_bytes=sum((folder / name).stat().st_size for name in FILES), curve=[asdict(point) for point in curve],
        )  # fmt: skip
        (folder / FOUND).write_text(json.dumps(asdict(report)), "utf-8")

    def _answers(self) -> list[check.Sample]:
        """Cut off where the target's window ends."""
        reference, source = self._reference, self._source
        window = reference.target.max_context_tokens
        found = [check.Sample(answer.prompt_ids, answer.answer_ids) for answer in source.answers] or self._answered(window)
        samples = [check.Sample(s.prompt_ids[:window], s.continuation_ids[: max(0, window - len(s.prompt_ids))]) for s in found]
        samples = [sample for sample in samples if sample.continuation_ids]
        if len(samples) < MIN_PROMPTS:
            raise ConfigError(
                f"--exit-head {self._plan.exit_head} leaves {len(samples)} answers within the window of {window} tokens"
            )
        return samples

    def _answered(self, window: int) -> list[check.Sample]:
        """By the target."""
        reference, prompts = self._reference, self._source.prompts
        room = window - MAX_ANSWER_TOKENS
        if room < 1:
            raise ModelError(
                f"a context of {window} tokens is too short for answers of {MAX_ANSWER_TOKENS}; leave --exit-head away"
            )
        self._remark(f"the target's answers, {MAX_ANSWER_TOKENS} tokens at most each")

        def answer() -> list[check.Sample]:
            ids = check.encode_prompts(reference.target, room, prompts)
            eos = tokenizer_match.eos_token_ids(reference.target)
            return check.continue_greedily(reference.model, ids, eos, reference.num_tokens, MAX_ANSWER_TOKENS)

        models = reference.fingerprint, reference.tokenizer_fingerprint
        settings: dict[str, object] = {"source": self._source.digest, "max_new_tokens": MAX_ANSWER_TOKENS, "fp32": True}
        with tempfile.TemporaryDirectory() as scratch:
            return cached_samples(self._cache, models, settings, Path(scratch) / "samples", answer)

    def _tell(self, point: CurvePoint) -> None:
        self._remark(
            f"epoch {point.epoch}: KL {point.kl_nats:.3f}, agrees with the target at {point.agreement:.3f} of held-out tokens"
        )


def lessons_of(model: PreTrainedModel, graph: FrontGraph, codec: str, samples: Sequence[check.Sample]) -> ExitLessons:
    """Every position of the answers."""
    rows, states, wanted = [], [], []
    for sample in samples:
        tokens, first = [*sample.prompt_ids, *sample.continuation_ids[:-1]], len(sample.prompt_ids) - 1
        graph.crop_to(0)
        made = graph.extend(tokens)[first:]
        rows.append(torch.from_numpy(decode(encode(made, codec), codec, graph.width)))
        states.append(last_states(model, {0: tokens})[0][first:].float().clone())
        wanted += sample.continuation_ids
    return ExitLessons(torch.cat(rows), torch.cat(states), torch.tensor(wanted))
