"""Everything about a partition that can be refused before work begins: models, tokenizers, destination, free space."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from edgecloud.bundle import is_bundle
from edgecloud.errors import BundleError, ConfigError
from edgecloud.partitioner.export import Precision
from edgecloud.partitioner.model_folder import ModelFolder
from edgecloud.partitioner.tokenizer_match import require_same_tokenizer

MARGIN_BYTES = 16 << 20
INT4_BYTES = 4 / 8 + 4 / 32  # a weight: four bits and its share of a block's fp32 scale


@dataclass(frozen=True, slots=True)
class Inputs:
    """A partition that may begin."""

    target: ModelFolder
    draft: ModelFolder
    destination: Path
    precision: Precision
    num_tokens: int  # of the shared tokenizer
    draft_bytes: int  # estimate
    target_bytes: int  # 0 new bytes where the target can be hard-linked
    needed_bytes: int  # on the destination's disk, the fp32 export for the parity check included


def check_inputs(model: str, bundle: Path, *, draft: str | None, precision: Precision, overwrite: bool) -> Inputs:
    """Look at everything, write nothing.

    Raises:
        ConfigError: the bundle would replace the model's own folder.
        ModelError: a model folder cannot be used; TokenizerMismatchError: the two do not share a tokenizer.
        BundleError: something else is in the way, or the disk has too little room.
    """
    target = ModelFolder.open(model)
    drafter = target if draft is None else ModelFolder.open(draft)
    destination = check_destination(bundle, overwrite)
    if destination in {target.path, drafter.path}:
        raise ConfigError(f"{bundle} is the model's own folder; choose another one for the bundle")
    num_tokens = require_same_tokenizer(drafter, target)
    parent = next(folder for folder in destination.parents if folder.exists())
    linked = parent.stat().st_dev == target.path.stat().st_dev
    draft_bytes = int(drafter.num_parameters * (INT4_BYTES if precision == "int4" else 4))
    target_bytes = 0 if linked else target.num_bytes
    check_bytes = drafter.num_parameters * 4 if precision == "int4" else 0
    needed = target_bytes + draft_bytes + check_bytes + MARGIN_BYTES
    require_space(parent, needed)
    return Inputs(target, drafter, destination, precision, num_tokens, draft_bytes, target.num_bytes, needed)


def require_space(folder: Path, needed_bytes: int) -> None:
    """Raises BundleError if the disk that holds `folder` has less room."""
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < needed_bytes:
        raise BundleError(
            f"no room in {folder}: the work needs {needed_bytes / 1e6:.0f} MB and {free_bytes / 1e6:.0f} MB are free; "
            "free some space or choose another disk"
        )


def check_destination(bundle: Path, overwrite: bool) -> Path:
    """Where a bundle goes. Raises BundleError if something of the user's is in the way."""
    destination = bundle.resolve()
    if destination.is_dir():
        if is_bundle(destination):
            if not overwrite:
                raise BundleError(f"{bundle} is a bundle already; pass --overwrite to replace it")
        elif any(destination.iterdir()):
            raise BundleError(f"{bundle} exists and is no bundle; it is left alone, choose another path")
    elif destination.exists():
        raise BundleError(f"{bundle} is a file; choose another path")
    if blocked := next((folder for folder in destination.parents if folder.exists() and not folder.is_dir()), None):
        raise BundleError(f"{blocked} is a file; choose another path for the bundle")
    return destination
