"""What a draft learns from: the target's answers, and at each of their positions the target's last hidden state.

Its head turns that into all of its logits, so fp16 states keep the full distribution in a kilobyte a position. The file grows with
the answers, in their order: what was broken off, or got more answers, is gone on with.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedModel

from edgecloud.answers import Answer
from edgecloud.partitioner.last_states import last_states, require_plain_head

WINDOW = 64  # answers that are sorted by length together
KEY_BYTES = 16


class Lessons:
    """States of a fixed list of answers.

    Args:
        answers: in the order of their file.
        folder: where states are kept.
        fingerprint: the target's; states of another are made anew.
    """

    def __init__(self, answers: Sequence[Answer], folder: Path, fingerprint: str) -> None:
        self.answers = list(answers)
        self._folder = folder
        self._keys = [_key(fingerprint, answer) for answer in self.answers]
        lengths = np.array([len(answer.ids) - 1 for answer in self.answers])
        self._ends = np.cumsum(lengths)
        self._starts = self._ends - lengths
        self._states: npt.NDArray[np.float16] | None = None

    @property
    def num_positions(self) -> int:
        """Of all answers and their prompts."""
        return int(self._ends[-1])

    def prepare(self, target: PreTrainedModel, progress: Callable[[int, int], None]) -> None:
        """Compute what is missing. Raises ModelError: the target's head is more than a product."""
        width = target.get_output_embeddings().weight.shape[1]
        require_plain_head(target)
        self._folder.mkdir(parents=True, exist_ok=True)
        path, keys = self._folder / "states.f16", self._folder / "states.keys"
        with path.open("ab") as states_file, keys.open("ab") as keys_file:
            done = self._num_done(path, keys, width)
            states_file.truncate(int(self._ends[done - 1]) * width * 2 if done else 0)
            keys_file.truncate(done * KEY_BYTES)
            for start in range(done, len(self.answers), WINDOW):
                window = range(start, min(start + WINDOW, len(self.answers)))
                for number, states in sorted(last_states(target, {n: self.answers[n].ids[:-1] for n in window}).items()):
                    states_file.write(states.to(torch.float16).cpu().numpy().tobytes())
                    states_file.flush()
                    keys_file.write(self._keys[number])
                keys_file.flush()
                progress(window.stop, len(self.answers))
        self._states = np.memmap(path, np.float16, "r", shape=(self.num_positions, width))

    def states(self, number: int, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.float16]:
        """Of one answer, after the tokens at `positions`, counted from the prompt's first.  -> [n, width]"""
        assert self._states is not None, "prepare comes first"
        states: npt.NDArray[np.float16] = self._states[self._starts[number] + positions]
        return states

    def _num_done(self, path: Path, keys: Path, width: int) -> int:
        known = keys.read_bytes()
        there = [known[at : at + KEY_BYTES] for at in range(0, len(known), KEY_BYTES)]
        same = 0
        while same < min(len(there), len(self._keys)) and there[same] == self._keys[same]:
            same += 1
        return int(np.searchsorted(self._ends[:same], path.stat().st_size // (2 * width), "right"))


def _key(fingerprint: str, answer: Answer) -> bytes:
    return hashlib.sha256(fingerprint.encode() + np.array(answer.ids, np.int64).tobytes()).digest()[:KEY_BYTES]
