"""What a log of refused guesses has to teach a draft: checked, and of the one pair of models that it was logged with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edgecloud.draft_vocab import DRAFT_VOCAB, DraftVocab
from edgecloud.errors import ModelError, RejectionLogError
from edgecloud.fingerprint import tokenizer_fingerprint
from edgecloud.partitioner.model_folder import ModelFolder
from edgecloud.rejections import Passage, RejectionLog, Segment

MIN_PASSAGES, MIN_REJECTED = 2, 16
HELD_OUT_EVERY = 8


@dataclass(frozen=True, slots=True)
class Correction:
    """Token ids, where the draft is to say what the target said, and where it is to stay as it is."""

    ids: tuple[int, ...]
    refused: tuple[int, ...]  # positions of tokens that the draft did not guess
    others: tuple[int, ...]  # positions of the answer's other tokens; the target chose these, too
    temperature: float

    @classmethod
    def of(cls, passage: Passage, proposable: Sequence[int] | None) -> Correction | None:
        """A passage's correction; None when the draft could propose none of what the target chose."""
        allowed = None if proposable is None else frozenset(proposable)
        usable = [at for at in range(passage.answer_start, len(passage.ids)) if allowed is None or passage.ids[at] in allowed]
        wrong = {at for at, _ in passage.rejected}
        refused = tuple(at for at in usable if at in wrong)
        others = tuple(at for at in usable if at not in wrong)
        return cls(passage.ids, refused, others, passage.temperature) if refused else None


def read_corrections(folder: Path, draft: ModelFolder, draft_fingerprint: str, *, any_draft: bool = False) -> list[Correction]:
    """What a device's log has for this draft.

    Args:
        folder: the log.
        draft: what is to learn.
        draft_fingerprint: of that folder; the log must have been written with it.
        any_draft: another draft may have made the guesses.

    Raises:
        RejectionLogError: the log is broken, has too little, or is of other models.
        ModelError: the draft has no tokenizer, or a list of ids that it cannot mean.
    """
    segments = [segment for segment in RejectionLog(folder).read() if segment.passages]
    _check_sources(folder, segments, draft, None if any_draft else draft_fingerprint)
    passages = [passage for segment in segments for passage in segment.passages]
    if (highest := max((max(passage.ids) for passage in passages), default=0)) >= draft.vocab_size:
        raise RejectionLogError(
            f"{folder} holds the id {highest}, {draft.name} has {draft.vocab_size}; it was logged with another model"
        )
    proposable = draft_vocab(draft)
    corrections = [correction for passage in passages if (correction := Correction.of(passage, proposable)) is not None]
    num_refused = sum(len(correction.refused) for correction in corrections)
    if len(corrections) < MIN_PASSAGES or num_refused < MIN_REJECTED:
        raise RejectionLogError(
            f"{folder} has {num_refused} refused guesses in {len(corrections)} passages, learning takes {MIN_REJECTED} in "
            f"{MIN_PASSAGES} at least; log more generations with learn_from, or --log-rejections"
        )
    return corrections


def split_corrections(corrections: Sequence[Correction]) -> tuple[list[Correction], list[Correction]]:
    """-> to learn from, and held out: every eighth, of at least one"""
    step = min(HELD_OUT_EVERY, len(corrections))
    held_out = list(corrections[step - 1 :: step])
    return [correction for at, correction in enumerate(corrections) if at % step != step - 1], held_out


def draft_vocab(draft: ModelFolder) -> list[int] | None:
    """The ids that a draft with a trimmed head may propose; None: all. Raises ModelError."""
    path = draft.path / DRAFT_VOCAB
    if not path.is_file():
        return None
    try:
        vocab = DraftVocab.read(path)
        vocab.require(draft.vocab_size, [])
    except ValueError as error:
        raise ModelError(f"{path}: {error}") from error
    return list(vocab.token_ids)


def _check_sources(folder: Path, segments: Sequence[Segment], draft: ModelFolder, draft_fingerprint: str | None) -> None:
    clear = f"clear the log with `edgecloud rejections {folder} --clear`"
    ours = tokenizer_fingerprint(draft.path / "tokenizer.json")
    for segment in segments:
        if segment.source.tokenizer != ours:
            raise RejectionLogError(
                f"{segment.path} was logged with the tokenizer {segment.source.tokenizer}, {draft.name} has {ours}; "
                f"give the draft of that pair, or {clear}"
            )
        if draft_fingerprint is not None and segment.source.draft != draft_fingerprint:
            raise RejectionLogError(
                f"{segment.path} was logged with the draft {segment.source.draft}, {draft.name} is {draft_fingerprint}; "
                f"give that draft, take guesses of other drafts with --any-draft, or {clear}"
            )
    if len(targets := sorted({segment.source.target for segment in segments})) > 1:
        raise RejectionLogError(f"{folder} holds corrections of two targets, {targets[0]} and {targets[1]}; {clear}")
