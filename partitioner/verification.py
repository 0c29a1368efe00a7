"""Measure again what a partition found out, against the target in the bundle: is what is recorded still true here?"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgecloud.bundle import Bundle
from edgecloud.errors import BundleError
from edgecloud.partitioner import check
from edgecloud.partitioner.export import export_graph
from edgecloud.partitioner.findings import ERROR_TOLERANCE, Finding, Verification
from edgecloud.partitioner.front_check import measure_front_quality, open_front
from edgecloud.partitioner.model_folder import ModelFolder
from edgecloud.partitioner.report import Remark
from edgecloud.partitioner.tokenizer_match import require_same_tokenizer

AGREEMENT_TOLERANCE = 0.03  # absolute: kernels of another CPU round otherwise, and a near tie turns the rest of an answer


def verify_bundle(path: Path, *, remark: Remark = lambda _: None) -> Verification:
    """Hash every file, then measure.

    Raises:
        BundleError: it cannot be opened, a file is missing or changed, or it carries no target.
        ModelError: a graph does not run, or its fp32 export is not the model any more.
    """
    bundle = Bundle.open(path)
    if bundle.target_folder is None or not bundle.target_folder.exists():
        raise BundleError(f"{path} carries no target to verify against; verify the bundle where cloud/ is, not a device's copy")
    remark("checksums")
    bundle.verify_files("edge")
    bundle.verify_files("cloud")
    target = ModelFolder.open(bundle.target_folder)
    same = bundle.draft.fingerprint == bundle.target.fingerprint
    num_tokens = require_same_tokenizer(target, target)
    room = min(bundle.target.max_context_tokens, bundle.draft.max_context_tokens) - check.NUM_CONTINUATION_TOKENS
    remark("the target's answers to the built-in prompts")
    model = check.load_torch(target, fp32=same or bundle.front is not None)
    samples = check.continue_greedily(model, check.encode_prompts(target, room), bundle.tokenizer.eos_token_ids, num_tokens)
    remark("agreement of draft and target")
    graph = bundle.file(bundle.draft.model)
    vocab = bundle.draft_vocab()
    agreement = check.measure_agreement(check.open_graph(graph, samples, vocab), samples, num_tokens)
    recorded = bundle.checks
    findings = [
        _at_least("agreement of the draft", _figure(recorded, "agreement", "acceptance_rate"), agreement.acceptance_rate),
    ]
    if bundle.front is not None:
        remark("the front's rows, and agreement of the split target")
        front = open_front(bundle.file(bundle.front.model), samples)
        quality = measure_front_quality(model, bundle.front.cut, front, bundle.front.codec, samples)
        error, agreed = (_figure(recorded, "front", "quality", name) for name in ("median_relative_error", "agreement"))
        findings.append(_at_most("relative error of the front's rows", error, quality.median_relative_error))
        findings.append(_at_least("agreement of the split target", agreed, quality.agreement))
    notes = []
    if same:
        remark("logit parity of an fp32 export with torch")
        with tempfile.TemporaryDirectory() as scratch:
            exported = graph if bundle.draft.quantization == "fp32" else export_graph(target, Path(scratch), "fp32", vocab)
            parity = check.check_parity(model, check.open_graph(exported, samples, vocab), samples)
        was = _figure(recorded, "parity", "max_relative_diff")
        findings.append(Finding("logit parity before quantization", was, parity.max_relative_diff, parity.bound, passed=True))
    else:
        notes.append("parity was not measured: the draft is another model, and the bundle holds only its quantized graph")
    return Verification(str(path), findings, notes)


def _at_least(what: str, recorded: float | None, measured: float) -> Finding:
    limit = None if recorded is None else recorded - AGREEMENT_TOLERANCE
    return Finding(what, recorded, measured, limit, limit is None or measured >= limit)


def _at_most(what: str, recorded: float | None, measured: float) -> Finding:
    limit = None if recorded is None else recorded * ERROR_TOLERANCE + check.MAX_PARITY_DIFF
    return Finding(what, recorded, measured, limit, limit is None or measured <= limit)


def _figure(checks: Mapping[str, Any], *names: str) -> float | None:
    found: Any = checks
    for name in names:
        found = found.get(name) if isinstance(found, Mapping) else None
    return float(found) if isinstance(found, int | float) else None
