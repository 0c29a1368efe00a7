"""What a partition found out, as JSON for scripts and as a table for people."""

from __future__ import annotations

import dataclasses
from typing import Any

from rich.table import Table

from edgecloud.partitioner.check import Agreement, Parity
from edgecloud.partitioner.device import DeviceFigures
from edgecloud.partitioner.model_folder import ModelFolder


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
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """The object that `edgecloud partition --json` prints."""
        return dataclasses.asdict(self)

    def checks(self) -> dict[str, Any]:
        """What bundle.json keeps."""
        kept = ("target_bytes", "draft_bytes", "device_bytes", "parity", "agreement", "device", "notes")
        return {key: value for key, value in self.to_dict().items() if key in kept}

    def to_table(self) -> Table:
        """For a terminal."""
        table = Table(title=f"{self.bundle}", title_justify="left", show_header=False)
        table.add_column(style="bold")
        table.add_column()
        parity, agreement, device = self.parity, self.agreement, self.device
        rows = {
            "pair": self.pair_id,
            "target": f"{self.target_name}, {_mb(self.target_bytes)}, {self.target_fingerprint[:16]}",
            "draft": f"{self.draft_name} {self.precision}, {_mb(self.draft_bytes)}, {self.draft_fingerprint[:16]}",
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
        for name, value in rows.items():
            table.add_row(name, value)
        for note in self.notes:
            table.add_row("note", note)
        return table


def describe_notes(target: ModelFolder, draft: ModelFolder, precision: str) -> list[str]:
    """Cautions that belong beside the figures."""
    notes = [note for note in dict.fromkeys((target.note, draft.note)) if note]
    if target.path == draft.path:
        notes.append(f"the draft is the target itself in {precision}; a smaller model drafts faster and agrees less")
    return notes


def _mb(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.1f} MB"
