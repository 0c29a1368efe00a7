"""What a caller sees who follows a stream's events, and the promises that the events keep."""

from __future__ import annotations

from collections.abc import Iterable

from edgecloud.types import CloudBack, CloudLost, Event, ModeChanged, Retract, TokenEvent


class Screen:
    """Text and tokens after every event. Every provisional token is confirmed or taken back once, in order."""

    def __init__(self, events: Iterable[Event] = ()) -> None:
        self.text = ""
        self.final: list[int] = []
        self.statuses: list[str] = []  # of these
        self.provisional: list[int] = []
        self.num_retracted = 0
        self.lost = False
        self.modes: list[str] = []
        for event in events:
            self.show(event)

    @property
    def token_ids(self) -> list[int]:
        """All that is shown."""
        return self.final + self.provisional

    def show(self, event: Event) -> None:
        """Follow one event."""
        match event:
            case TokenEvent(text, token_ids, "provisional"):
                self.text += text
                self.provisional += token_ids
            case TokenEvent(text, token_ids, "final" | "unverified" as status):
                confirmed = min(len(token_ids), len(self.provisional))
                assert self.provisional[:confirmed] == token_ids[:confirmed], "a guess was replaced that was not taken back"
                del self.provisional[:confirmed]
                self.final += token_ids
                self.statuses += [status] * len(token_ids)
                self.text += text
            case Retract(num_tokens, num_characters):
                assert num_tokens <= len(self.provisional)
                assert num_characters <= len(self.text)
                self.num_retracted += num_tokens
                del self.provisional[len(self.provisional) - num_tokens :]
                self.text = self.text[: len(self.text) - num_characters]
            case CloudLost():
                assert not self.lost
                self.lost = True
            case CloudBack():
                assert self.lost
                self.lost = False
            case ModeChanged(mode):
                self.modes.append(mode)
