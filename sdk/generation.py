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
    Audit,
    Event,
    FinishReason,
    Guess,
    Metrics,
    Mode,
    ModeChanged,
    ModeSpan,
    Reply,
    Retract,
    Round,
    Step,
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
        self._guessed_texts: list[str] = []  # what each of them added
        self._preview: _Preview | None = None  # of their text; None: there is none of them
        self.token_ids: list[int] = []
        self.finish_reason: FinishReason | None = None
        self._token_times_s: list[float] = []
        self._rounds: list[Round] = []
        self._timeline: list[ModeSpan] = []
        self._unverified: list[tuple[int, int]] = []  # spans of `token_ids`
        self._announced: Mode | None = None
        self._first_shown_s: float | None = None
        self._num_retracted = 0
        self.num_audited = 0  # of the unverified tokens
        self.num_diverged = 0

    def take(self, step: Step, shows_guesses: bool) -> list[Event]:
        """Take in what a mode's loop hands on.  -> what to tell the caller"""
        match step:
            case Round():
                return self.add(step)
            case Guess(token_ids):
                return self.guess(token_ids) if shows_guesses else []
            case ModeChanged():
                self._announced = step.mode
                return [step]
            case Audit():
                self.num_audited += step.num_audited
                self.num_diverged += step.num_diverged
                return []
            case _:
                return [step]

    def guess(self, token_ids: Sequence[int]) -> list[Event]:
        """Show provisional tokens.  -> what to tell the caller"""
        if self._preview is None:
            self._preview = _Preview(self._text_stream, self._held, self._stop_strings)
        texts = ["" if token in self._stop_token_ids else self._preview.push(token) for token in token_ids]
        self._guessed += token_ids
        self._guessed_texts += texts
        self._first_shown_s = self._first_shown_s or time.perf_counter()
        return [TokenEvent("".join(texts), list(token_ids), "provisional")]

    def withdraw(self) -> list[Event]:
        """Take back what nobody will confirm any more.  -> what to tell the caller"""
        return self._retract_from(0)

    def _retract_from(self, number: int) -> list[Event]:
        """Take back the guesses from this one on."""
        num_tokens, text = len(self._guessed) - number, "".join(self._guessed_texts[number:])
        del self._guessed[number:], self._guessed_texts[number:]
        self._preview = None
        self._num_retracted += num_tokens
        return [Retract(num_tokens, len(text))] if num_tokens else []

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
        elif self._timeline[-1].num_draft_tokens != round_.num_draft_tokens and round_.mode != "cascade":
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
        if round_.status != "final" and taken:
            self._mark_unverified(len(taken))
        if self.finish_reason is not None:
            text += self._flush()
        self._shown.append(text)
        if taken:
            self._first_shown_s = self._first_shown_s or now_s
        return events + self._told(text, taken, round_.status)

    def _told(self, text: str, taken: list[int], status: TokenStatus) -> list[Event]:
        """Events for a round, given the guesses that are on the screen already."""
        same = common_prefix(taken, self._guessed)
        events: list[Event] = []
        if same < len(taken) or self.finish_reason is not None:
            events += self._retract_from(same)
        shown = sum(map(len, self._guessed_texts[:same]))
        del self._guessed[:same], self._guessed_texts[:same]
        if not self._guessed:
            self._preview = None
        if status == "provisional":  # kept as they are: what was announced is not announced again
            taken = taken[same:]
        if taken or text[shown:]:
            events.append(TokenEvent(text[shown:], taken, status))
        return events

    @property
    def stopped_by_text(self) -> bool:
        """Whether a stop string has ended it, of which the modes know nothing."""
        return self.finish_reason == "stop" and self.token_ids[-1] not in self._stop_token_ids

    def _mark_unverified(self, number: int) -> None:
        """The last tokens, so many of them."""
        end = len(self.token_ids)
        start = self._unverified.pop()[0] if self._unverified and self._unverified[-1][1] == end - number else end - number
        self._unverified.append((start, end))

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
            unverified_spans=list(self._unverified),
        )

    def _append(self, token: int) -> str:
        """Add one token; returns the text that is safe to show."""
        self.token_ids.append(token)
        if token in self._stop_token_ids:
            self.finish_reason = "stop"
            return ""
        self._held += self._text_stream.push(token)
        safe, stopped = safe_text(self._held, self._stop_strings)
        self._held = "" if stopped else self._held[len(safe) :]
        if stopped:
            self.finish_reason = "stop"
        elif len(self.token_ids) >= self._max_new_tokens:
            self.finish_reason = "length"
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
            cloud_compute_ms=sum(c.compute_ms for c in costs),
            uplink_bytes=sum(c.uplink_bytes for c in costs),
            downlink_bytes=sum(c.downlink_bytes for c in costs),
            num_unverified_tokens=sum(end - start for start, end in self._unverified),
            first_visible_ms=(self._first_shown_s - self._started_s) * 1e3 if self._first_shown_s else 0.0,
            num_retracted_tokens=self._num_retracted,
            num_audited_tokens=self.num_audited,
            num_diverged_tokens=self.num_diverged,
        )


class _Preview:
    """Text of guesses, as it will be if they come true."""

    def __init__(self, final: TextStream, held: str, stop_strings: Sequence[str]) -> None:
        self._stream = final.copy()
        self._stop_strings = stop_strings
        self._held = held
        self._ended = False

    def push(self, token: int) -> str:
        """Text that a further guess makes safe to show."""
        if self._ended:
            return ""
        self._held += self._stream.push(token)
        safe, self._ended = safe_text(self._held, self._stop_strings)
        self._held = self._held[len(safe) :]
        return safe


def safe_text(held: str, stop_strings: Sequence[str]) -> tuple[str, bool]:
    """What of `held` may be shown, and whether a stop string ends it there."""
    end = min((at for stop in stop_strings if (at := held.find(stop)) >= 0), default=-1)
    if end >= 0:
        return held[:end], True
    return held[: len(held) - longest_stop_prefix(held, stop_strings)], False


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
