"""A conversation: keeps token ids and caches between turns, so that each turn sends and computes only what is new."""

from __future__ import annotations

from typing import TYPE_CHECKING, Unpack

from edgecloud.errors import ConfigError
from edgecloud.options import GenerationKeywords
from edgecloud.types import Reply

if TYPE_CHECKING:
    from edgecloud.client import Client
    from edgecloud.edge.replicas import RemoteSession
    from edgecloud.generation import GenerationStream


class Session:
    """Made by `Client.session`. A context manager; not for several threads at once.

    The ids of earlier turns are kept as they were generated, never encoded anew from text.
    """

    def __init__(self, client: Client, remote: RemoteSession | None, system: str | None) -> None:
        self._client = client
        self._remote = remote
        self.messages: list[dict[str, str]] = [] if system is None else [{"role": "system", "content": system}]
        self.token_ids: list[int] = []  # the whole conversation so far, answers included
        self._closed = False

    def generate(self, prompt: str, **options: Unpack[GenerationKeywords]) -> Reply:
        """Take a turn. Options are those of `Client.generate`, without `raw`.

        Raises:
            EdgecloudError: as `Client.generate`; the turn is not added, the conversation stays as it was.
        """
        return self.stream(prompt, **options).finish()

    def stream(self, prompt: str, **options: Unpack[GenerationKeywords]) -> GenerationStream:
        """Take a turn, event by event. A turn left early is not added to the conversation."""
        if self._closed:
            raise ConfigError("this session is closed; open another")
        if not isinstance(prompt, str):
            raise ConfigError(f"prompt is {str(prompt)[:80]!r}; a session takes a string")
        message = {"role": "user", "content": prompt}
        tokens = self._turn_tokens(message)

        def add_turn(reply: Reply) -> None:
            self.messages += [message, {"role": "assistant", "content": reply.text}]
            self.token_ids = tokens + reply.token_ids

        return self._client.start(tokens, self._remote, on_finish=add_turn, **options)

    def close(self) -> None:
        """Let the service forget the session."""
        if not self._closed and self._remote is not None:
            self._remote.release()
        self._closed = True

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _turn_tokens(self, message: dict[str, str]) -> list[int]:
        """Ids of the conversation up to where the next answer begins."""
        tokenizer = self._client.tokenizer
        whole = tokenizer.render([*self.messages, message])
        if self.token_ids:
            *earlier, answer = self.messages
            before = tokenizer.render(earlier) + answer["content"]
            if whole.startswith(before):  # the template renders earlier turns as they were sent
                rest = tokenizer.encode_rendered(whole[len(before) :])
                if rest and rest[0] == self.token_ids[-1]:  # the turn's end token, generated and rendered
                    del rest[0]
                return self.token_ids + rest
        return tokenizer.encode_chat([*self.messages, message])
