"""`edgecloud exits`: heads for a classifier in ONNX, trained and calibrated on the user's samples; a bundle's calibrated anew."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from edgecloud.errors import BundleError, ConfigError, ModelError
from edgecloud.exit_scores import softmax
from edgecloud.exits import RULES, Answers, Exits, Judge, Rule
from edgecloud.graph_bundle import GraphBundle
from edgecloud.manifest import MANIFEST, is_bundle
from edgecloud.partitioner import classifier_calibration as calibration
from edgecloud.partitioner.classifier_graph import with_heads, with_pooled
from edgecloud.partitioner.classifier_heads import Floats, train_heads
from edgecloud.partitioner.classifier_metadata import read_exits, set_exits
from edgecloud.partitioner.classifier_places import Places
from edgecloud.partitioner.classifier_report import ExitReport, exit_lines
from edgecloud.partitioner.classifier_samples import Labels, Stack, load_labels, load_stack
from edgecloud.partitioner.onnx_model import OnnxModel, load_model
from edgecloud.partitioner.ort_session import Session
from edgecloud.partitioner.samples import Array

SHARES = (0.4, 0.2)  # of the samples: for training, and for planning; the rest is counted
AGAIN_SHARES = (0.0, 0.3)  # nothing is trained
SAME = 1e-4  # of the largest answer: how far the heads may move the classifier's own
Remark = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class ExitRequest:
    """What a user asks for."""

    model: Path  # an .onnx file, or a bundle whose exits are to be calibrated anew
    inputs: Path
    labels: Path | None = None  # None: the classifier's own answers are right
    output: Path | None = None  # where the model with exits goes
    at: tuple[str, ...] = ()  # nodes or tensors; none: `num_exits` of them are chosen
    num_exits: int = 2
    risks: tuple[float, ...] = (0.05,)
    delta: float = 0.05
    rule: Rule | None = None  # confidence, or that of the bundle
    width: int = 32  # of a head
    seed: int = 0
    num_threads: int = 0
    overwrite: bool = False

    def __post_init__(self) -> None:
        """Check the values."""
        for risk in self.risks:
            if not 0 < risk < 1:
                raise ConfigError(f"--risk {risk:g} cannot be; it is the share of early answers that may be wrong, such as 0.05")
        if not self.risks:
            raise ConfigError("no --risk is given; say how many early answers may be wrong, such as 0.05")
        if not 0 < self.delta < 1:
            raise ConfigError(f"--delta {self.delta:g} cannot be; it is the chance that a risk is not kept, such as 0.05")
        if self.rule is not None and self.rule not in RULES:
            raise ConfigError(f"--rule {self.rule!r} is unknown; it takes {', '.join(RULES)}")
        for name, value in (("--num-exits", self.num_exits), ("--width", self.width)):
            if value < 1:
                raise ConfigError(f"{name} {value} cannot be; give 1 or more")
        if self.num_threads < 0:
            raise ConfigError(f"--threads {self.num_threads} cannot be; give 0 for as many as there are, or more")


def make_exits(request: ExitRequest, remark: Remark = lambda _: None) -> ExitReport:
    """Train heads, put them into the graph, calibrate, and write the model; of a bundle only the calibration is made anew.

    Raises:
        ConfigError: options, samples or labels that cannot work; too few samples for a risk (names how many are needed).
        ModelError: the file is no classifier that can be run, or its own answers would change.
        BundleError: the bundle has no exits or cannot be written.
    """
    num_threads = request.num_threads or len(os.sched_getaffinity(0))
    if is_bundle(request.model):
        return _calibrate_bundle(request, num_threads, remark)
    if request.output is None:
        raise ConfigError("no --output is given; say where the model with exits goes, such as -o model-exits.onnx")
    if request.output.exists() and not request.overwrite:
        raise ConfigError(f"{request.output} exists; give another --output, or --overwrite")
    model = load_model(request.model)
    _require_classifier(model)
    stack = load_stack(request.inputs, model.inputs)
    calibration.require_samples(stack.num_samples, SHARES, min(request.risks), request.delta)
    output = model.outputs[0].name
    plain = Session(model.proto, num_threads, name=str(model.path))
    labels = _labels(request, stack, plain, output)
    remark("places for exits")
    places = Places(model, stack.one(0), num_threads)
    chosen = places.named(request.at) if request.at else places.spread(request.num_exits)
    remark(f"{stack.num_samples} samples through the graph, exits after {', '.join(place.tensor for place in chosen)}")
    widened, names = with_pooled(model, chosen)
    found = stack.run(plain, [output]) | stack.run(Session(widened, num_threads, name="the model with pooling"), names)
    right = _right(found[output], labels)
    answers = _answers(found[output])
    remark(f"training {len(chosen)} heads")
    parts = calibration.split(stack.num_samples, SHARES, request.seed)
    targets = _targets(found[output], labels, answers)
    pooled = [found[name].astype(np.float32) for name in names]
    heads = train_heads(pooled, targets, parts.train, parts.plan, request.width, request.seed)
    proto, infos = with_heads(model, chosen, heads, answers)
    remark("calibrating")
    judge: Judge = "model" if labels is None else "labels"
    exits = Exits(output, answers, request.rule or "confidence", judge, request.delta, len(parts.plan), len(parts.count), 0, infos)
    finished = stack.run(Session(proto, num_threads, name="the model with exits"), [output, *sorted(exits.outputs)])
    max_change = _max_change(request.model, found[output], finished[output])
    exits = calibration.with_counts(exits, finished, right, parts)
    set_exits(proto, exits)
    _write(request.output, proto.SerializeToString())
    return _report(str(request.output), request, exits, finished, right, parts, max_change)


def _calibrate_bundle(request: ExitRequest, num_threads: int, remark: Remark) -> ExitReport:
    if request.at or request.output is not None:
        raise ConfigError(
            f"{request.model} is a bundle: its exits stay where they are and are calibrated in place; drop --at and --output"
        )
    bundle = GraphBundle.open(request.model)
    if bundle.exits is None:
        raise BundleError(f"{request.model} has no exits; make them with `edgecloud exits MODEL.onnx`, then partition that")
    whole = next((name for cut in bundle.cuts for name in (cut.edge, cut.cloud) if name and name.endswith("/whole.onnx")), None)
    if whole is None or not bundle.file(whole).is_file():
        raise BundleError(
            f"{request.model} lacks the graph as a whole, which says what is right; calibrate where the bundle was made"
        )
    model = load_model(bundle.file(whole))
    stack = load_stack(request.inputs, bundle.graph.inputs)
    calibration.require_samples(stack.num_samples, AGAIN_SHARES, min(request.risks), request.delta)
    session = Session(model.proto, num_threads, name=whole)
    labels = _labels(request, stack, session, bundle.exits.output)
    remark(f"{stack.num_samples} samples through the graph")
    found = stack.run(session, [bundle.exits.output, *sorted(bundle.exits.outputs)])
    right = _right(found[bundle.exits.output], labels)
    parts = calibration.split(stack.num_samples, AGAIN_SHARES, request.seed)
    judged = replace(
        bundle.exits, judge="model" if labels is None else "labels", delta=request.delta, rule=request.rule or bundle.exits.rule
    )
    exits = calibration.with_counts(judged, found, right, parts)
    _write(request.model / MANIFEST, replace(bundle, exits=exits).to_json().encode())
    return _report(str(request.model), request, exits, found, right, parts, 0.0)


def _labels(request: ExitRequest, stack: Stack, session: Session, output: str) -> Labels | None:
    """Those that were given, checked against what the classifier gives for one sample."""
    if request.labels is None:
        return None
    return load_labels(request.labels, stack.num_samples, session.run(stack.one(0), [output])[output].shape[-1])


def _require_classifier(model: OnnxModel) -> None:
    if read_exits(model) is not None:
        raise ConfigError(f"{model.path} has exits; make others from the model that it was made from")
    if len(model.outputs) != 1:
        names = ", ".join(tensor.name for tensor in model.outputs)
        raise ModelError(f"{model.path} has the outputs {names}; a classifier with exits has one, a score for every class")
    output = model.outputs[0]
    if output.dtype != "float32" or len(output.shape) != 2:
        raise ModelError(
            f"{model.path} gives {output.name!r}, {output.dtype} {output.shape}; a classifier gives float32 [batch, classes]"
        )


def _right(answer: Array, labels: Labels | None) -> Labels:
    """The class of every sample."""
    if answer.ndim != 2 or answer.shape[1] < 2 or not np.isfinite(answer).all():
        raise ModelError(f"the classifier gives {list(answer.shape)} scores; it has to give finite ones for two classes at least")
    right = answer.argmax(axis=1).astype(np.int64) if labels is None else labels
    calibration.require_two_classes(right, "the classifier" if labels is None else "--labels")
    return right


def _answers(answer: Array) -> Answers:
    sums = answer.astype(np.float64).sum(axis=1)
    return "probabilities" if (answer.min() >= 0 and np.allclose(sums, 1.0, atol=1e-3)) else "scores"


def _targets(answer: Array, labels: Labels | None, answers: Answers) -> Floats:
    if labels is not None:
        return np.eye(answer.shape[1], dtype=np.float32)[labels]
    said = answer.astype(np.float64)
    return (said if answers == "probabilities" else softmax(said)).astype(np.float32)


def _max_change(model: Path, before: Array, after: Array) -> float:
    change = float(np.abs(before.astype(np.float64) - after.astype(np.float64)).max())
    if change > SAME * float(np.abs(before).max()):
        raise ModelError(
            f"the heads would move {model}'s own answers by {change:.1e}: the runtime computes it otherwise; take other places"
        )
    return change


def _write(path: Path, content: bytes) -> None:
    """Whole or not at all."""
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content)
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise BundleError(f"{path} cannot be written: {error.strerror or error}") from error


def _report(
    path: str, request: ExitRequest, exits: Exits, found: dict[str, Array], right: Labels, parts: calibration.Split, change: float
) -> ExitReport:
    counted = right[parts.count]
    return ExitReport(
        path=path,
        judge=exits.judge,
        delta=exits.delta,
        num_samples=exits.num_samples,
        model_accuracy=1.0 - exits.num_model_wrong / exits.num_samples,
        head_accuracy={h.name: float((found[h.answer][parts.count].argmax(axis=1) == counted).mean()) for h in exits.heads},
        num_parameters=sum(head.num_parameters for head in exits.heads),
        max_change=change,
        lines=exit_lines(exits, request.risks),
        notes=_notes(exits, request.risks),
    )


def _notes(exits: Exits, risks: tuple[float, ...]) -> list[str]:
    notes = []
    for risk in risks:
        try:
            exits.points(risk)
        except ConfigError as error:
            notes.append(str(error))
    return notes
