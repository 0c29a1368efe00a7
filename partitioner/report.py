"""What a partition found out, as JSON for scripts and as a table for people."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from rich.table import Table

from edgecloud.partitioner.check import Agreement, Parity
from edgecloud.partitioner.device import DeviceFigures, FrontFigures
from edgecloud.partitioner.front_check import FrontQuality
from edgecloud.partitioner.inputs import Inputs
from edgecloud.partitioner.model_folder import ModelFolder

Remark = Callable[[str], None]  # tells a waiting person what is being done


@dataclasses.dataclass(frozen=True, slots=True)
class FrontReport:
    """What was found out about the front of a split target."""

    cut: int
    num_layers: int
    precision: str
    codec: str
    width: int
    num_bytes: int  # graph and weights
    parity: Parity  # of the fp32 export
    quality: FrontQuality  # of the front and the codec as they are in the bundle
    device: FrontFigures
    codecs: dict[str, FrontQuality]  # the same with every boundary that a plan may take


@dataclasses.dataclass(frozen=True, slots=True)
class PartitionReport:
    """Figures of one partition; times and speeds are this machine's."""

    bundle: str
    pair_id: str
    target_name: str
    draft_name: str
    precision: str
    target_fingerprint: str
    draft_fingerprint: str
    tokenizer_fingerprint: str
    target_bytes: int  # weights
    draft_bytes: int  # graph and weights
    device_bytes: int  # everything below edge/
    parity: Parity
    agreement: Agreement
    device: DeviceFigures
    notes: list[str]
    front: FrontReport | None = None
    num_kept_ids: int | None = None  # tokens that the draft may propose; None: all
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """The object that `edgecloud partition --json` prints."""
        return dataclasses.asdict(self)

    def checks(self) -> dict[str, Any]:
        """What bundle.json keeps."""
        kept = ("target_bytes", "draft_bytes", "device_bytes", "parity", "agreement", "device", "notes", "front", "num_kept_ids")
        return {key: value for key, value in self.to_dict().items() if key in kept and value is not None}

    def to_table(self) -> Table:
        """For a terminal."""
        table = Table(title=f"{self.bundle}", title_justify="left", show_header=False)
        table.add_column(style="bold")
        table.add_column()
        parity, agreement, device = self.parity, self.agreement, self.device
        kept = "" if self.num_kept_ids is None else f", a head for {self.num_kept_ids} tokens"
        rows = {
            "pair": self.pair_id,
            "target": f"{self.target_name}, {_mb(self.target_bytes)}, {self.target_fingerprint[:16]}",
            "draft": f"{self.draft_name} {self.precision}, {_mb(self.draft_bytes)}, {self.draft_fingerprint[:16]}{kept}",
            "tokenizer": self.tokenizer_fingerprint[:16],
            "on the device": f"{_mb(self.device_bytes)} of files, {_mb(device.peak_rss_bytes)} of memory at the peak",
            "logit parity before quantization": (
                f"{parity.max_relative_diff:.1e} of the largest logit (allowed {parity.bound:g}), {parity.num_positions} positions"
            ),
            "agreement with the target, greedy": f"{agreement.acceptance_rate:.2f} of {agreement.num_positions} tokens",
            "first i drafts accepted, i=1..8": " ".join(f"{value:.2f}" for value in agreement.survival),
            f"target passes per token, K={agreement.num_draft_tokens}": (f"{agreement.target_passes_per_token:.2f} (prediction)"),
            "draft speed here, one thread": f"{device.tokens_per_s:.0f} tokens/s, {device.decode_ms:.1f} ms a step",
        }
        for name, value in (rows | _front_rows(self.front)).items():
            table.add_row(name, value)
        for note in self.notes:
            table.add_row("note", note)
        return table


def _front_rows(front: FrontReport | None) -> dict[str, str]:
    if front is None:
        return {}
    quality, device = front.quality, front.device
    times = ", ".join(f"{rows} rows {ms:.1f} ms" for rows, ms in device.rows_ms.items())
    return {
        "front": f"layers 0 to {front.cut - 1} of {front.num_layers}, {front.precision}, {_mb(front.num_bytes)}",
        "front's parity before quantization": (
            f"{front.parity.max_relative_diff:.1e} of a row's largest value (allowed {front.parity.bound:g})"
        ),
        "front's rows, relative error": f"{quality.median_relative_error:.2g} median, {quality.max_relative_error:.2g} at most",
        "boundary": f"{front.codec}, {quality.bytes_per_position} bytes a token",
        "split target agrees with the target": (
            f"{quality.agreement:.3f} of {quality.num_positions} tokens, KL {quality.kl_nats:.1e} nats"
        ),
        "front's speed here, one thread": f"{times}; prompt {device.prefill_ms_per_token:.2f} ms a token",
    }


def describe_notes(target: ModelFolder, draft: ModelFolder, inputs: Inputs) -> list[str]:
    """Cautions that belong beside the figures."""
    notes = [note for note in dict.fromkeys((target.note, draft.note)) if note]
    if target.path == draft.path:
        notes.append(f"the draft is the target itself in {inputs.precision}; a smaller model drafts faster and agrees less")
    if inputs.front is not None:
        notes.append("rows of a front can be turned back into text by who knows the model: data minimisation, not encryption")
        if inputs.front.precision == "fp16":
            notes.append("fp16 halves the front's files; a CPU computes with them in fp32")
    return notes


def _mb(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.1f} MB"
