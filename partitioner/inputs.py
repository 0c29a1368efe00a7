"""Everything about a partition that can be refused before work begins: models, tokenizers, destination, free space."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from edgecloud.bundle import is_bundle
from edgecloud.draft_vocab import DRAFT_VOCAB, DraftVocab
from edgecloud.errors import BundleError, ConfigError, ModelError
from edgecloud.kernels.codec import require_codec
from edgecloud.partitioner.exit_answers import read_exit_source
from edgecloud.partitioner.export import FrontPrecision, Precision
from edgecloud.partitioner.model_folder import ModelFolder
from edgecloud.partitioner.packed_draft import open_draft
from edgecloud.partitioner.tokenizer_match import eos_token_ids, require_same_tokenizer

MARGIN_BYTES = 16 << 20
INT4_BYTES = 4 / 8 + 4 / 32  # a weight: four bits and its share of a block's fp32 scale


@dataclass(frozen=True, slots=True)
class FrontPlan:
    """The front that a bundle is to have."""

    cut: int
    num_layers: int
    precision: FrontPrecision
    codec: str  # of its rows on the wire
    exit_head: str | None = None  # what an exit head learns from: a file, or exit_answers.BUILT_IN; None: it gets none


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
    needed_bytes: int  # on the destination's disk, the fp32 exports for the parity checks included
    front: FrontPlan | None = None
    vocab: DraftVocab | None = None  # the tokens that the draft may propose; None: all


def check_inputs(
    model: str,
    bundle: Path,
    *,
    draft: str | None,
    precision: Precision,
    overwrite: bool,
    cut: int | None = None,
    front_precision: FrontPrecision = "int8",
    boundary: str = "int8",
    exit_head: str | None = None,
) -> Inputs:
    """Look at everything, write nothing.

    Raises:
        ConfigError: the bundle would replace the model's own folder; a cut out of range, an unknown boundary codec, an
            exit head without a cut or with nothing to learn from.
        ModelError: a model folder or the draft's list of tokens cannot be used;
            TokenizerMismatchError: the two do not share a tokenizer.
        BundleError: something else is in the way, or the disk has too little room.
    """
    target = ModelFolder.open(model)
    drafter = target if draft is None else open_draft(draft, target)
    destination = check_destination(bundle, overwrite)
    if destination in {target.path, drafter.path}:
        raise ConfigError(f"{bundle} is the model's own folder; choose another one for the bundle")
    if cut is None and exit_head is not None:
        raise ConfigError(f"--exit-head is {exit_head}; it is made for the front of a cut model, give --cut K")
    front = None if cut is None else _plan_front(target, cut, front_precision, boundary, exit_head)
    num_tokens = require_same_tokenizer(drafter, target)
    vocab = _read_vocab(drafter, target, num_tokens)
    parent = next(folder for folder in destination.parents if folder.exists())
    linked = parent.stat().st_dev == target.path.stat().st_dev
    draft_bytes = int(drafter.num_parameters * (INT4_BYTES if precision == "int4" else 4))
    target_bytes = 0 if linked else target.num_bytes
    check_bytes = drafter.num_parameters * 4 if precision == "int4" else 0
    front_bytes = 0 if front is None else _front_bytes(target)
    needed = target_bytes + draft_bytes + check_bytes + front_bytes + MARGIN_BYTES
    require_space(parent, needed)
    return Inputs(target, drafter, destination, precision, num_tokens, draft_bytes, target.num_bytes, needed, front, vocab)


def require_space(folder: Path, needed_bytes: int) -> None:
    """Raises BundleError if the disk that holds `folder` has less room."""
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < needed_bytes:
        raise BundleError(
            f"no room in {folder}: the work needs {needed_bytes / 1e6:.0f} MB and {free_bytes / 1e6:.0f} MB are free; "
            "free some space or choose another disk"
        )


def require_front_space(cache: Path | None, target: ModelFolder) -> None:
    """Where a front that is only tried is written. Raises BundleError."""
    folder = Path(tempfile.gettempdir()) if cache is None else cache
    require_space(folder, _front_bytes(target) + MARGIN_BYTES)


def _read_vocab(draft: ModelFolder, target: ModelFolder, num_tokens: int) -> DraftVocab | None:
    path = draft.path / DRAFT_VOCAB
    if not path.exists():
        return None
    try:
        vocab = DraftVocab.read(path)
        vocab.require(num_tokens, eos_token_ids(target))
    except ValueError as error:
        raise ModelError(f"{path}: {error}; without this file the draft keeps its whole head") from error
    return vocab


def _plan_front(target: ModelFolder, cut: int, precision: FrontPrecision, codec: str, exit_head: str | None) -> FrontPlan:
    num_layers = target.num_layers
    if num_layers < 2:
        raise ModelError(f"{target.path} has {num_layers} layer; a model is cut between two")
    if not 1 <= cut < num_layers:
        raise ConfigError(f"--cut is {cut}; {target.name} has {num_layers} layers and can be cut at 1 to {num_layers - 1}")
    require_codec(codec)
    if exit_head is not None:
        read_exit_source(exit_head, target.vocab_size)
    return FrontPlan(cut, num_layers, precision, codec, exit_head)


def _front_bytes(target: ModelFolder) -> int:
    """At most: the layers as exported, the front cut out of them, and the front as it stays, all in fp32."""
    return 3 * 4 * target.num_parameters


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
