"""What calibration knows of each prompt: measured once, appended to a journal, and read from it by the next run.

A record holds counts and scores, no text.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgecloud.calibration import OPENING_TOKENS
from edgecloud.partitioner.atomic import exclusive
from edgecloud.partitioner.rollout import ALWAYS, NEVER, Rollouts
from edgecloud.partitioner.step_cache import step_key

# From the safest down. A fixed list, so that no choice among thresholds was made on the prompts that test them.
THRESHOLDS = (0.999, 0.995, 0.99, 0.98, 0.97, 0.95, 0.925, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5)


@dataclass(frozen=True, slots=True)
class Record:
    """One prompt. Counts are of tokens, of skipped ones, and of diverged ones among these."""

    prompt: str  # hash of its ids
    cascade: list[list[int]]  # [len(THRESHOLDS), 3] in contexts that the cascade itself reaches
    target_scores: list[float]  # of the draft's guesses along the target's own answer
    target_mismatched: list[int]  # 1 where such a guess is not the target's choice
    local_scores: list[float]  # along the draft's own answer
    local_mismatched: list[int]

    @property
    def opening_score(self) -> float:
        """Over the first tokens of the draft's own answer: what is known when a request is routed."""
        opening = self.local_scores[:OPENING_TOKENS]
        return sum(opening) / len(opening)

    @property
    def mean_score(self) -> float:
        """Over the draft's own answer: what is known after it."""
        return sum(self.local_scores) / len(self.local_scores)


def prompt_key(prompt: Sequence[int]) -> str:
    """A prompt's name in the journal; sorting by it is a shuffle that anyone can repeat."""
    return hashlib.sha256(json.dumps(list(prompt)).encode()).hexdigest()[:24]


def record(prompt: Sequence[int], rollouts: Rollouts) -> Record:
    """Roll one prompt out: the target alone, the draft alone, and a cascade for each threshold."""
    plain, local = rollouts.roll(NEVER), rollouts.roll(ALWAYS)
    cascade = [list(rollouts.roll(threshold).counts(threshold)) for threshold in THRESHOLDS]
    return Record(
        prompt_key(prompt), cascade, plain.scores, list(map(int, plain.mismatched)), local.scores, list(map(int, local.mismatched))
    )


def record_all(
    prompts: Iterable[Sequence[int]],
    made_of: Mapping[str, object],
    cache: Path | None,
    measure: Callable[[Sequence[int]], Record],
    progress: Callable[[int], None],
) -> list[Record]:
    """A record for each prompt, in their order; those of an earlier run made of the same are read. Raises OSError."""
    if cache is None:
        return [_counted(measure(prompt), progress, at) for at, prompt in enumerate(prompts, 1)]
    journal = cache / "calibration" / f"{step_key({**made_of, 'thresholds': THRESHOLDS})}.jsonl"
    journal.parent.mkdir(parents=True, exist_ok=True)
    records = []
    with exclusive(cache / "locks" / f"calibration-{journal.stem}.lock"):
        known = _read(journal)
        with journal.open("a", encoding="utf-8") as file:
            for at, prompt in enumerate(prompts, 1):
                if (found := known.get(prompt_key(prompt))) is None:
                    found = known[prompt_key(prompt)] = measure(prompt)
                    file.write(f"\n{json.dumps(asdict(found))}\n")  # a line that a killed run left half-written ends here
                    file.flush()
                records.append(_counted(found, progress, at))
    return records


def _counted(found: Record, progress: Callable[[int], None], at: int) -> Record:
    progress(at)
    return found


def _read(journal: Path) -> dict[str, Record]:
    if not journal.exists():
        return {}
    found = {}
    for line in journal.read_text("utf-8").splitlines():
        try:
            content: Any = json.loads(line)
            entry = Record(**content)
        except (ValueError, TypeError):  # cut off when its run was killed: measured again
            continue
        found[entry.prompt] = entry
    return found
