"""A conversation in the terminal that goes on when the cloud does not answer.

    python examples/chat.py build/smol --cloud 127.0.0.1:7070

The session keeps its tokens and caches, so that a turn sends and computes only what is new. End with an empty line.
"""

from __future__ import annotations

import argparse
import sys

import edgecloud


def main() -> None:
    """Read a line, stream the answer, again."""
    parser = argparse.ArgumentParser(description="Chat.")
    parser.add_argument("bundle")
    parser.add_argument("--cloud", help="HOST:PORT of `edgecloud serve`")
    parser.add_argument("--system", default="You are a helpful assistant. Answer in one or two sentences.")
    parser.add_argument("--temperature", type=float, default=0.0)
    options = parser.parse_args()
    with edgecloud.Client(options.bundle, cloud=options.cloud) as client, client.session(system=options.system) as chat:
        while question := read_line():
            try:
                answer(chat, question, options.temperature)
            except edgecloud.EdgecloudError as error:  # the conversation stays as it was before this turn
                print(f"\nerror: {error}", file=sys.stderr)


def read_line() -> str:
    """What the user says; empty at the end."""
    try:
        return input("> ").strip()
    except (EOFError, KeyboardInterrupt):
        return ""


def answer(chat: edgecloud.Session, question: str, temperature: float) -> None:
    """Stream one turn. Ctrl-C leaves it, and the turn is not added."""
    with chat.stream(question, max_new_tokens=128, temperature=temperature, provisional=False) as stream:
        try:
            for event in stream:
                if isinstance(event, edgecloud.TokenEvent):
                    print(event.text, end="", flush=True)
                elif isinstance(event, edgecloud.ModeChanged):
                    print(f"\n[{event.mode}: {event.reason}]", file=sys.stderr)
        except KeyboardInterrupt:
            print(" ...", end="")
    print()


if __name__ == "__main__":
    main()
