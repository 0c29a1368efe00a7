"""`edgecloud partition`: a model pair as a bundle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from edgecloud.cli.app import app
from edgecloud.cli.output import JsonFlag, print_json, progress_console, remarks, table_console
from edgecloud.cli.plan_options import (
    USUAL_CLOUD,
    USUAL_LINK,
    USUAL_MAX_LOSS,
    AcceptanceOption,
    AnswerTokensOption,
    CloudDeviceOption,
    DamageOption,
    DeviceOption,
    KeepPromptFlag,
    LinkOption,
    MaxLossOption,
    MaxRamOption,
    ObjectiveOption,
    PlanOptions,
    PromptTokensOption,
    ReportOption,
    TpotOption,
)
from edgecloud.errors import EdgecloudError, NoPlanError

if TYPE_CHECKING:
    from edgecloud.partitioner.candidate import Candidate
    from edgecloud.partitioner.inputs import Inputs
    from edgecloud.partitioner.losses import Loss
    from edgecloud.partitioner.plan import Plan
    from edgecloud.partitioner.reference import Reference


@app.command()
def partition(  # typer fills them by name
    model: Annotated[
        str,
        typer.Argument(help="The target: a Hugging Face folder, or the name of a fetched model.", show_default=False),
    ],
    bundle: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.", show_default=False)],
    draft: Annotated[
        str | None, typer.Option(help="Hugging Face folder of the draft model; default: the target itself, quantized.")
    ] = None,
    precision: Annotated[Literal["int4", "fp32"], typer.Option(help="Of the draft's weights.")] = "int4",
    cut: Annotated[
        int | None,
        typer.Option(
            help="Layers of the target that the device runs itself, for mode split; the cloud runs the others.", show_default=False
        ),
    ] = None,
    front_precision: Annotated[
        Literal["int4", "int8", "fp16", "fp32"],
        typer.Option(help="Of the weights before the cut. fp16 is a matter of size: a CPU computes in fp32."),
    ] = "int8",
    boundary: Annotated[
        Literal["float32", "float16", "int8", "int4"], typer.Option(help="How rows travel from the cut to the cloud.")
    ] = "int8",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a bundle that is there.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check the inputs, say what would be done, write nothing.")] = False,
    device: DeviceOption = None,
    cloud_device: CloudDeviceOption = USUAL_CLOUD,
    link: LinkOption = USUAL_LINK,
    objective: ObjectiveOption = "latency",
    keep_prompt: KeepPromptFlag = False,
    max_ram: MaxRamOption = None,
    max_loss: MaxLossOption = USUAL_MAX_LOSS,
    tpot: TpotOption = None,
    acceptance: AcceptanceOption = None,
    prompt_tokens: PromptTokensOption = 128,
    answer_tokens: AnswerTokensOption = 128,
    damage: DamageOption = None,
    report: ReportOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Export the draft for the device, pair it with the target, check both, and plan who should do what.

    The plan is the best of all modes, cuts, bits and draft lengths for the objective; --dry-run makes it without exporting.
    Where an objective or a constraint is given without --cut, and the plan is a split, its cut is taken.

    A file that ends in .onnx is any graph, which is cut in two: `edgecloud partition FILE.onnx --help`.
    """
    from edgecloud.partitioner import extra_installed

    with extra_installed():
        from edgecloud.partitioner.inputs import check_inputs

    options = PlanOptions(
        device,
        cloud_device,
        link,
        objective,
        keep_prompt,
        max_ram,
        max_loss,
        tpot,
        acceptance,
        prompt_tokens,
        answer_tokens,
        damage,
    )
    with extra_installed():
        options.check()
    given: dict[str, Any] = {"draft": draft, "precision": precision, "overwrite": overwrite}
    inputs = check_inputs(model, bundle, **given, cut=cut, front_precision=front_precision, boundary=boundary)
    if report is not None:
        from edgecloud.bench_report import prepare_folder

        prepare_folder(report, "--report")
    console = progress_console()
    if dry_run:
        _write(_plan_dry(options, inputs, as_json), report, remarks(console))
        return

    def remark(text: str) -> None:
        console.print(text, style="dim", highlight=False)

    remark("loading torch and transformers")
    with extra_installed():
        from edgecloud.partitioner.partition import partition as run_partition
        from edgecloud.partitioner.partition import refer_to
        from edgecloud.partitioner.step_cache import usable_cache
    cache = usable_cache(remarks(console))
    tried: list[Loss] = []
    reference = None
    if cut is None and options.asks:
        reference = refer_to(inputs, cache, remark, fp32=True)
        tried = _try_fronts(options, inputs, reference, cache, remark)
        chosen = options.plan(inputs, None, tried).best.candidate
        if chosen.front is not None and chosen.codec is not None:
            remarks(console)(f"the plan takes a cut: {chosen}")
            inputs = check_inputs(model, bundle, **given, cut=chosen.cut, front_precision=chosen.front, boundary=chosen.codec)
    made = run_partition(inputs, cache=cache, remark=remark, reference=reference)
    try:
        found = options.plan(inputs, made, tried)
    except EdgecloudError as error:  # the bundle is written and right, whatever can be planned for it
        found = None
        remarks(console)(f"no plan: {error}")
    if as_json:
        print_json({**made.to_dict(), "plan": None if found is None else found.to_dict()})
    else:
        table_console().print(made.to_table())
    if found is not None:
        if not as_json:
            _show(found)
        _write(found, report, remarks(console))


def _plan_dry(options: PlanOptions, inputs: Inputs, as_json: bool) -> Plan:
    plan = options.plan(inputs, None)
    if as_json:
        print_json({**_inputs(inputs), "plan": plan.to_dict()})
        return plan
    for key, value in _inputs(inputs).items():
        typer.echo(f"{key}: {value}")
    _show(plan)
    return plan


def _try_fronts(
    options: PlanOptions, inputs: Inputs, reference: Reference, cache: Path | None, remark: Callable[[str], None]
) -> list[Loss]:
    """Losses of the few splits that would win if they lost little enough. None where any loss is allowed."""
    if options.max_loss >= 1:
        return []
    from edgecloud.partitioner.front_trial import MAX_FRONTS, measure_candidate, try_fronts
    from edgecloud.partitioner.inputs import require_front_space

    def measure(candidate: Candidate) -> list[Loss]:
        remark(f"the loss of {candidate} is not known: measuring it, {MAX_FRONTS} fronts at most")
        if cache is not None:
            cache.mkdir(parents=True, exist_ok=True)
        require_front_space(cache, inputs.target)
        return measure_candidate(candidate, reference, cache, remark)

    try:
        return try_fronts(lambda tried: options.search_any_loss(options.scene(inputs, None, tried)), measure, options.max_loss)
    except NoPlanError:  # for another reason than a loss; the plan says so
        return []


def _show(plan: Plan) -> None:
    output = table_console()
    output.print(plan.to_table())
    for line in plan.refusals():
        output.print(line, style="dim", highlight=False)
    for line in plan.conclusions():
        output.print(line, highlight=False)
    for line in plan.assumptions:
        output.print(line, style="dim", highlight=False)


def _write(plan: Plan, folder: Path | None, remark: Callable[[str], None]) -> None:
    if folder is None:
        return
    from edgecloud.plan_report import write_plan

    for path in write_plan(plan, folder):
        remark(f"wrote {path}")


def _inputs(inputs: Inputs) -> dict[str, Any]:
    return {
        "dry_run": True,
        "bundle": str(inputs.destination),
        "target": str(inputs.target.path),
        "target_bytes": inputs.target_bytes,
        "draft": str(inputs.draft.path),
        "draft_bytes_estimate": inputs.draft_bytes,
        "precision": inputs.precision,
        "num_tokenizer_tokens": inputs.num_tokens,
        "target_vocab_size": inputs.target.vocab_size,
        "draft_vocab_size": inputs.draft.vocab_size,
        "draft_num_kept_ids": None if inputs.vocab is None else len(inputs.vocab),
        "disk_needed_bytes": inputs.needed_bytes,
        "front": None if inputs.front is None else asdict(inputs.front),
    }
