"""One generation as the caller sees it: tokens become text, the end is found, everything is counted.

The modes yield rounds; `Generation.add` cuts them at a stop token, a stop string or the limit, in whatever part of a draft
these may fall.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Collection, Generator, Sequence

from edgecloud.edge.tokenizer import TextStream
from edgecloud.tokens import common_prefix
from edgecloud.types import (
    Event,
    FinishReason,
    Metrics,
    Mode,
    ModeChanged,
    ModeSpan,
    Reply,
    Retract,
    Round,
    TokenEvent,
    TokenStatus,
    Usage,
)


class Generation:
    """Collects rounds until `finish_reason` is set."""

    def __init__(
        self,
        num_prompt_tokens: int,
        text: TextStream,
        max_new_tokens: int,
        stop_token_ids: Collection[int],
        stop_strings: Sequence[str],
    ) -> None:
        self._started_s = time.perf_counter()
        self._num_prompt_tokens = num_prompt_tokens
        self._text_stream = text
        self._max_new_tokens = max_new_tokens
        self._stop_token_ids = frozenset(stop_token_ids)
        self._stop_strings = tuple(stop_strings)
        self._held = ""  # text that may be the beginning of a stop string
        self._shown: list[str] = []
        self._guessed: list[int] = []  # provisional tokens on the screen, behind the final ones
        self._preview: _Preview | None = None  # of their text; None: to be made anew
        self._ahead = ""  # what is on the screen beyond `_shown`
        self.token_ids: list[int] = []
        self.finish_reason: FinishReason | None = None
        self._token_times_s: list[float] = []
        self._rounds: list[Round] = []
        self._timeline: list[ModeSpan] = []
        self._num_unverified = 0
        self._announced: Mode | None = None
        self._first_shown_s: float | None = None
        self._num_retracted = 0

    def withdraw(self) -> list[Event]:
        """Take back what nobody will confirm any more.  -> what to tell the caller"""
        if not self._guessed:
            return []
        retract = Retract(len(self._guessed), len(self._ahead))
        self._num_retracted += retract.num_tokens
        self._guessed, self._ahead, self._preview = [], "", None
        return [retract]

    def guess(self, token_ids: Sequence[int]) -> list[Event]:
        """Show provisional tokens.  -> what to tell the caller"""
        if self._preview is None:
            self._preview = _Preview(self._text_stream, self._held, self._stop_strings)
            for token in self._guessed:
                self._preview.push(token)
        before = len(self._preview.safe)
        for token in token_ids:
            self._preview.push(token)
        self._guessed += token_ids
        text = self._preview.safe[before:]
        self._ahead += text
        self._first_shown_s = self._first_shown_s or time.perf_counter()
        return [TokenEvent(text, list(token_ids), "provisional")]

    def add(self, round_: Round) -> list[Event]:
        """Take in a round.  -> what to tell the caller"""
        events: list[Event] = []
        span = ModeSpan(len(self.token_ids), round_.mode, round_.num_draft_tokens)
        if not round_.token_ids:
            pass
        elif not self._timeline or self._timeline[-1].mode != round_.mode:
            if self._timeline and self._announced != round_.mode:
                events.append(ModeChanged(round_.mode, f"was {self._timeline[-1].mode}"))
            self._announced = None
            self._timeline.append(span)
        elif self._timeline[-1].num_draft_tokens != round_.num_draft_tokens:
            self._timeline.append(span)
        self._rounds.append(round_)
        now_s = time.perf_counter()
        taken: list[int] = []
        text = ""
        for token in round_.token_ids:
            taken.append(token)
            text += self._append(token)
            self._token_times_s.append(now_s)
            if self.finish_reason is not None:
                break
        if round_.status == "provisional":
            self._num_unverified += len(taken)
        if self.finish_reason is not None:
            text += self._flush()
        self._shown.append(text)
        if taken:
            self._first_shown_s = self._first_shown_s or now_s
        return events + self._told(text, taken, round_.status)

    def _told(self, text: str, taken: list[int], status: TokenStatus) -> list[Event]:
        """Events for a round, given what is on the screen already."""
        same = common_prefix(taken, self._guessed)
        stays = self._guessed[same:] if same == len(taken) and self.finish_reason is None else []
        num_retracted = len(self._guessed) - same - len(stays)
        self._num_retracted += num_retracted
        self._guessed = stays
        if status == "provisional":  # kept as they are: what was announced is not announced again
            taken = taken[same:]
        if not stays or num_retracted:
            self._preview = None
        if self._ahead.startswith(text) and stays:
            self._ahead = self._ahead[len(text) :]
            return [TokenEvent("", taken, status)] if taken else []
        kept = common_prefix(self._ahead, text)
        events: list[Event] = []
        if num_retracted or kept < len(self._ahead):
            events.append(Retract(num_retracted, len(self._ahead) - kept))
        self._ahead = ""
        if taken or text[kept:]:
            events.append(TokenEvent(text[kept:], taken, status))
        return events

    def announce(self, change: ModeChanged) -> ModeChanged:
        """Take in a change of mode ahead of its first round, so that it is told once."""
        self._announced = change.mode
        return change

    def reply(self) -> Reply:
        """All of it so far."""
        text = "".join(self._shown) + self._held
        return Reply(
            text=text,
            token_ids=list(self.token_ids),
            finish_reason=self.finish_reason or "cancelled",
            usage=Usage(self._num_prompt_tokens, len(self.token_ids)),
            metrics=self._metrics(),
            mode_timeline=list(self._timeline),
        )

    def _append(self, token: int) -> str:
        """Add one token; returns the text that is safe to show."""
        self.token_ids.append(token)
        if token in self._stop_token_ids:
            self.finish_reason = "stop"
            return ""
        self._held += self._text_stream.push(token)
        end = min((at for stop in self._stop_strings if (at := self._held.find(stop)) >= 0), default=-1)
        if end >= 0:
            self._held = self._held[:end]
            self.finish_reason = "stop"
            return ""
        if len(self.token_ids) >= self._max_new_tokens:
            self.finish_reason = "length"
        keep = longest_stop_prefix(self._held, self._stop_strings)
        safe = self._held[: len(self._held) - keep]
        self._held = self._held[len(safe) :]
        return safe

    def _flush(self) -> str:
        held, self._held = self._held, ""
        return held

    def _metrics(self) -> Metrics:
        times = self._token_times_s
        costs = [r.cost for r in self._rounds]
        drafted = [r for r in self._rounds if r.num_draft_tokens]
        accepted = sum(r.num_accepted for r in drafted)
        histogram = Counter(r.num_accepted for r in drafted)
        longest = max((r.num_draft_tokens for r in drafted), default=0)
        passes = sum(c.target_passes for c in costs)
        # A streamed token waits for the target, not for the network: only what opens a call tells the round trip.
        trips = [c.elapsed_ms - c.queue_ms - c.compute_ms for c in costs if c.uplink_bytes]
        num_tokens = len(self.token_ids)
        return Metrics(
            ttft_ms=(times[0] - self._started_s) * 1e3 if times else 0.0,
            tpot_ms=(times[-1] - times[0]) * 1e3 / (num_tokens - 1) if num_tokens > 1 else 0.0,
            total_ms=(time.perf_counter() - self._started_s) * 1e3,
            rtt_ms=max(0.0, statistics.median(trips)) if trips else None,
            num_rounds=len(drafted),
            num_draft_tokens=sum(r.num_draft_tokens for r in drafted),
            num_accepted_tokens=accepted,
            mean_acceptance_length=1 + accepted / len(drafted) if drafted else 1.0,
            acceptance_histogram=[histogram[i] for i in range(longest + 1)] if drafted else [],
            target_passes=passes,
            target_passes_per_token=passes / num_tokens if num_tokens else 0.0,
            uplink_bytes=sum(c.uplink_bytes for c in costs),
            downlink_bytes=sum(c.downlink_bytes for c in costs),
            num_unverified_tokens=self._num_unverified,
            first_visible_ms=(self._first_shown_s - self._started_s) * 1e3 if self._first_shown_s else 0.0,
            num_retracted_tokens=self._num_retracted,
        )


class _Preview:
    """Text of guesses, as it will be if they come true."""

    def __init__(self, final: TextStream, held: str, stop_strings: Sequence[str]) -> None:
        self._stream = final.copy()
        self._stop_strings = stop_strings
        self._text = held  # beyond what the final tokens show
        self.safe = ""  # of it, what cannot belong to a stop string
        self._ended = False

    def push(self, token: int) -> None:
        """A further guess."""
        if self._ended:
            return
        self._text += self._stream.push(token)
        end = min((at for stop in self._stop_strings if (at := self._text.find(stop)) >= 0), default=-1)
        if end >= 0:
            self._ended, self.safe = True, self._text[:end]
            return
        self.safe = self._text[: len(self._text) - longest_stop_prefix(self._text, self._stop_strings)]


def longest_stop_prefix(text: str, stop_strings: Sequence[str]) -> int:
    """Length of the longest end of `text` with which a stop string could begin."""
    longest = 0
    for stop in stop_strings:
        for length in range(min(len(stop) - 1, len(text)), longest, -1):
            if text.endswith(stop[:length]):
                longest = length
                break
    return longest


class GenerationStream:
    """Iterate for events; `reply` holds what has come so far, and all of it at the end.

    Leaving it early (`close`, or the end of a `with` block) frees the service's session.
    """

    def __init__(self, generation: Generation, events: Generator[Event]) -> None:
        self._generation = generation
        self._events = events

    def __iter__(self) -> GenerationStream:
        return self

    def __next__(self) -> Event:
        return next(self._events)

    @property
    def reply(self) -> Reply:
        """The generation as far as it has come; `finish_reason` is "cancelled" until it has ended."""
        return self._generation.reply()

    def finish(self) -> Reply:
        """Run to the end. Raises as the stream does."""
        for _ in self._events:
            pass
        return self.reply

    def close(self) -> None:
        """Stop here."""
        self._events.close()

    def __enter__(self) -> GenerationStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
