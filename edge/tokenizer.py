"""Between text and token ids: the bundle's tokenizer and its chat template, without transformers."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from edgecloud.errors import BundleCorruptError, ConfigError

Message = Mapping[str, str]  # role, content


class ChatTokenizer:
    """Encodes prompts and conversations as the target was trained to read them.

    Raises:
        BundleCorruptError: tokenizer or template cannot be read.
    """

    def __init__(self, tokenizer: Path, chat_template: Path | None, special_tokens: Mapping[str, str]) -> None:
        try:
            self._tokenizer = Tokenizer.from_file(str(tokenizer))
        except Exception as error:  # the library raises bare Exception
            raise BundleCorruptError(f"{tokenizer} is no tokenizer: {error}; make the bundle again") from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._special_tokens = dict(special_tokens)
        self._template = None
        if chat_template is not None:
            try:
                self._template = _environment().from_string(chat_template.read_text("utf-8"))
            except (OSError, UnicodeDecodeError, TemplateError) as error:
                raise BundleCorruptError(f"{chat_template} is no chat template: {error}; make the bundle again") from error

    @property
    def vocab_size(self) -> int:
        """Ids that the tokenizer can produce, added tokens included."""
        size: int = self._tokenizer.get_vocab_size(with_added_tokens=True)
        return size

    def encode(self, text: str) -> list[int]:
        """Ids of raw text, with the special tokens that the model expects around it (a leading BOS, say)."""
        return self._ids(text, add_special_tokens=True)

    def encode_rendered(self, text: str) -> list[int]:
        """Ids of text that a chat template rendered: it holds its special tokens already."""
        return self._ids(text, add_special_tokens=False)

    def _ids(self, text: str, *, add_special_tokens: bool) -> list[int]:
        try:
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        except TypeError as error:  # what the library says of a lone surrogate, as broken UTF-8 on a command line gives
            raise ConfigError(f"the prompt is no valid Unicode text: {text[:80]!r}") from error
        return ids

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """Text of a conversation. A bundle without a chat template renders the contents one after another.

        Raises:
            ConfigError: the template refuses these messages.
        """
        if self._template is None:
            return "".join(message["content"] for message in messages)
        try:
            return self._template.render(
                messages=[dict(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                **self._special_tokens,
            )
        except Exception as error:  # a template is foreign code: it may raise anything
            raise ConfigError(f"the chat template refuses these messages: {error}") from error

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Ids of a conversation, up to where the answer begins."""
        text = self.render(messages)
        return self.encode(text) if self._template is None else self.encode_rendered(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens left out."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return text

    def stream(self) -> TextStream:
        """A decoder for ids that come one after another."""
        return TextStream(self._tokenizer)


class TextStream:
    """Turns ids into text piece by piece; a character that needs several ids appears when it is complete."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = DecodeStream(skip_special_tokens=True)

    def copy(self) -> TextStream:
        """Another one that goes on from here."""
        other = TextStream(self._tokenizer)
        other._decoder = copy.copy(self._decoder)
        return other

    def push(self, token_id: int) -> str:
        """Text that this id completes; may be empty."""
        text: str | None = self._decoder.step(self._tokenizer, token_id)
        return text or ""


def _environment() -> ImmutableSandboxedEnvironment:
    """The environment that Hugging Face chat templates are written for."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.filters["tojson"] = _tojson
    return environment


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().astimezone().strftime(pattern)


def _tojson(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)
