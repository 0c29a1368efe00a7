"""`edgecloud partition`: a model pair as a bundle, checked before it gets its name."""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
import time
from importlib.metadata import version
from pathlib import Path

from edgecloud.bundle import MANIFEST, Bundle, DraftInfo, FileInfo, FrontInfo, TargetInfo, TokenizerInfo
from edgecloud.draft_vocab import DRAFT_VOCAB
from edgecloud.errors import BundleError, ModelError
from edgecloud.fingerprint import sha256_file, tokenizer_fingerprint
from edgecloud.partitioner import check, tokenizer_match
from edgecloud.partitioner.atomic import atomic_folder, link_or_copy
from edgecloud.partitioner.child import ChildError
from edgecloud.partitioner.device import measure_device
from edgecloud.partitioner.download import NO_SPACE
from edgecloud.partitioner.export import GRAPH_FILES, export_graph
from edgecloud.partitioner.front_maker import FRONT_FOLDER, FrontMaker, graph_bytes
from edgecloud.partitioner.inputs import Inputs
from edgecloud.partitioner.model_folder import CLOUD_FILES, ModelFolder
from edgecloud.partitioner.reference import Reference
from edgecloud.partitioner.report import PartitionReport, Remark, describe_notes
from edgecloud.partitioner.steps import cached_check, cached_export

DRAFT_FOLDER = "edge/draft"


def refer_to(inputs: Inputs, cache: Path | None, remark: Remark, *, fp32: bool = False) -> Reference:
    """What these inputs' exports are held against; `fp32` even where the inputs alone do not need it."""
    target, draft = inputs.target, inputs.draft
    shortest = min(target.max_context_tokens, draft.max_context_tokens)
    fp32 = fp32 or draft.path == target.path or inputs.front is not None
    return Reference(target, inputs.num_tokens, shortest, fp32=fp32, cache=cache, remark=remark)


def partition(
    inputs: Inputs, *, cache: Path | None = None, remark: Remark = lambda _: None, reference: Reference | None = None
) -> PartitionReport:
    """Export, check and write. The bundle appears whole or not at all; one that is there is replaced in the last step.

    Exports and checks that are in `cache` are not made again; None: nothing is kept. A `reference` that was used before
    (`refer_to`) spares its model and its samples.

    Raises:
        ModelError: the export failed or is not the model.
        BundleError: the bundle cannot be written.
    """
    begin = time.monotonic()
    try:
        with atomic_folder(inputs.destination) as folder:
            report = _fill(folder, inputs, cache, remark, reference)
    except OSError as error:
        if error.errno in NO_SPACE:
            raise BundleError(
                f"no room for {inputs.destination}: the work needs {inputs.needed_bytes / 1e6:.0f} MB; "
                "free some space and run it again"
            ) from error
        raise BundleError(f"{inputs.destination} cannot be written: {error}") from error
    return dataclasses.replace(report, seconds=round(time.monotonic() - begin, 1))


def _fill(folder: Path, inputs: Inputs, cache: Path | None, remark: Remark, reference: Reference | None) -> PartitionReport:
    target, draft = inputs.target, inputs.draft
    reference = reference or refer_to(inputs, cache, remark)
    target_fingerprint = reference.fingerprint
    draft_fingerprint = target_fingerprint if draft.path == target.path else draft.fingerprint()
    (folder / DRAFT_FOLDER).mkdir(parents=True)
    graph = _export_draft(folder, inputs, draft_fingerprint, cache, remark)
    if inputs.vocab is not None:
        (folder / DRAFT_FOLDER / DRAFT_VOCAB).write_text(inputs.vocab.to_json(), "utf-8")
    _copy_target(target, folder / "cloud")
    tokenizer = _write_tokenizer(folder, target)
    parity, agreement = cached_check(
        cache,
        (target_fingerprint, draft_fingerprint, tokenizer.fingerprint),
        inputs.precision,
        inputs.vocab,
        folder / "checks",
        lambda: _check(folder, graph, inputs, reference, remark),
    )
    shutil.rmtree(folder / "checks")
    front = None if inputs.front is None else FrontMaker(reference, inputs.front, folder, cache, remark)
    if front is not None:
        front.make_and_check()
    remark("speed and memory of the draft, one thread")
    try:
        device = measure_device(graph)
    except ChildError as error:
        raise ModelError(f"the exported draft does not run: {error}") from error
    front_report = None if front is None else front.report()
    remark("checksums")
    files = {
        path.relative_to(folder).as_posix(): FileInfo(sha256_file(path), path.stat().st_size)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    described = [inputs.precision] + ([] if inputs.vocab is None else [inputs.vocab.fingerprint()])
    report = PartitionReport(
        bundle=str(inputs.destination),
        pair_id=_pair_id(target_fingerprint, draft_fingerprint, tokenizer.fingerprint, *described),
        target_name=target.name,
        draft_name=draft.name,
        precision=inputs.precision,
        target_fingerprint=target_fingerprint,
        draft_fingerprint=draft_fingerprint,
        tokenizer_fingerprint=tokenizer.fingerprint,
        target_bytes=target.num_bytes,
        draft_bytes=graph_bytes(graph),
        device_bytes=sum(info.num_bytes for name, info in files.items() if name.startswith("edge/")),
        parity=parity,
        agreement=agreement,
        device=device,
        notes=describe_notes(target, draft, inputs),
        front=front_report,
        num_kept_ids=None if inputs.vocab is None else len(inputs.vocab),
    )
    bundle = Bundle(
        path=folder,
        pair_id=report.pair_id,
        created_by=f"edgecloud {version('edgecloud')}",
        licence=target.licence,
        target=TargetInfo(
            name=target.name, fingerprint=target_fingerprint, folder="cloud", hub_id=None, revision=None,
            vocab_size=target.vocab_size, max_context_tokens=target.max_context_tokens, dtype=target.dtype,
            num_parameters=target.num_parameters,
        ),
        draft=DraftInfo(
            name=draft.name, fingerprint=draft_fingerprint, model=f"{DRAFT_FOLDER}/{GRAPH_FILES[0]}",
            quantization=inputs.precision, vocab_size=draft.vocab_size, max_context_tokens=draft.max_context_tokens,
            vocab=None if inputs.vocab is None else f"{DRAFT_FOLDER}/{DRAFT_VOCAB}",
        ),
        tokenizer=tokenizer,
        files=files,
        checks=report.checks(),
        cut_points=[] if inputs.front is None else [inputs.front.cut],
        front=None if front_report is None else FrontInfo(
            model=f"{FRONT_FOLDER}/{GRAPH_FILES[0]}", cut=front_report.cut, num_layers=front_report.num_layers,
            width=front_report.width, quantization=front_report.precision, codec=front_report.codec,
            max_context_tokens=target.max_context_tokens,
        ),
    )  # fmt: skip
    (folder / MANIFEST).write_text(bundle.to_json(), "utf-8")
    Bundle.open(folder)  # what cannot be read back gets no name
    return report


def _export_draft(folder: Path, inputs: Inputs, fingerprint: str, cache: Path | None, remark: Remark) -> Path:
    kept = "" if inputs.vocab is None else f", its head for {len(inputs.vocab)} tokens"
    remark(f"exporting the draft as {inputs.precision} ONNX{kept}")
    exported = folder / "export"
    if cached_export(cache, inputs.draft, fingerprint, exported, inputs.precision, inputs.vocab):
        remark("it was in the cache")
    for name in GRAPH_FILES:
        if (exported / name).exists():
            (exported / name).rename(folder / DRAFT_FOLDER / name)
    shutil.rmtree(exported)
    return folder / DRAFT_FOLDER / GRAPH_FILES[0]


def _check(folder: Path, graph: Path, inputs: Inputs, reference: Reference, remark: Remark) -> tuple[check.Parity, check.Agreement]:
    target, draft, samples = inputs.target, inputs.draft, reference.samples
    remark("logit parity of an fp32 export with torch")
    draft_model = reference.model if draft.path == target.path else check.load_torch(draft, fp32=True)
    scratch = folder / "parity"
    unquantized = graph if inputs.precision == "fp32" else export_graph(draft, scratch, "fp32", inputs.vocab)
    parity = check.check_parity(draft_model, check.open_graph(unquantized, samples, inputs.vocab), samples)
    shutil.rmtree(scratch, ignore_errors=True)
    remark("agreement of draft and target")
    return parity, check.measure_agreement(check.open_graph(graph, samples, inputs.vocab), samples, inputs.num_tokens)


def _copy_target(target: ModelFolder, folder: Path) -> None:
    folder.mkdir()
    for weights in target.weights:  # large: a second name for the same bytes; the small files are copied
        link_or_copy(weights, folder / weights.name)
    for name in CLOUD_FILES:
        if (target.path / name).is_file():
            shutil.copyfile(target.path / name, folder / name)


def _write_tokenizer(folder: Path, target: ModelFolder) -> TokenizerInfo:
    path = f"{DRAFT_FOLDER}/tokenizer.json"
    shutil.copyfile(target.path / "tokenizer.json", folder / path)
    template = tokenizer_match.chat_template(target.path)
    template_path = None if template is None else f"{DRAFT_FOLDER}/chat_template.jinja"
    if template is not None and template_path is not None:
        (folder / template_path).write_text(template, "utf-8")
    return TokenizerInfo(
        fingerprint=tokenizer_fingerprint(folder / path),
        path=path,
        chat_template=template_path,
        special_tokens=tokenizer_match.special_tokens(target.path),
        eos_token_ids=tokenizer_match.eos_token_ids(target),
    )


def _pair_id(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
