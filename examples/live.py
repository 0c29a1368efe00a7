"""Show the device's guesses in grey at once, and let the cloud's answer replace them.

    python examples/live.py build/smol "Why is the sky blue?" --cloud 127.0.0.1:7070

Needs `rich` (in edgecloud[cli]).
"""

from __future__ import annotations

import argparse

from rich.live import Live
from rich.text import Text

import edgecloud


class Answer:
    """What is on the screen: final text, and the guesses behind it, a piece for each token."""

    def __init__(self) -> None:
        self.final = ""
        self.guesses: list[str] = []
        self.note = ""

    def follow(self, event: object) -> None:
        """Take in one event."""
        match event:
            case edgecloud.TokenEvent(text, token_ids, "provisional"):
                self.guesses += [text, *[""] * (len(token_ids) - 1)]
            case edgecloud.TokenEvent(text, token_ids, _):  # confirms so many guesses, and adds the rest
                self.final += "".join(self.guesses[: len(token_ids)]) + text
                del self.guesses[: len(token_ids)]
            case edgecloud.Retract(num_tokens, _):
                del self.guesses[len(self.guesses) - num_tokens :]
            case edgecloud.CloudLost(reason):
                self.note = f"\n[the cloud is away: {reason}]"
            case edgecloud.CloudBack():
                self.note = ""

    def __rich__(self) -> Text:
        """For the terminal."""
        return Text.assemble(self.final, ("".join(self.guesses), "dim"), (self.note, "italic"))


def main() -> None:
    """Ask, and watch."""
    parser = argparse.ArgumentParser(description="Watch device and cloud answer together.")
    parser.add_argument("bundle")
    parser.add_argument("question", nargs="?", default="Why is the sky blue?")
    parser.add_argument("--cloud", help="HOST:PORT of `edgecloud serve`")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    options = parser.parse_args()
    answer = Answer()
    with (
        edgecloud.Client(options.bundle, cloud=options.cloud) as client,
        client.stream(options.question, max_new_tokens=options.max_new_tokens) as stream,
        Live(answer, auto_refresh=False) as live,
    ):
        for event in stream:
            answer.follow(event)
            live.update(answer, refresh=True)


if __name__ == "__main__":
    main()
