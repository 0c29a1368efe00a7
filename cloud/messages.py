"""What the front end and the engine's process say to each other: msgpack over one ZeroMQ pair socket.

- `Start` goes to the engine once and first; it answers `Ready`, `GraphReady` or `StartFailed`.
- `Submit`, `Cancel`, `Release` and `Stop` go to the engine at any time.
- `Answers` come back after a pass, and whenever something was answered without one.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from edgecloud.cloud.graph_work import CutSpec, GraphAnswer, RunCut
from edgecloud.cloud.work import Answer, EngineLoad, Extend

MESSAGES_VERSION = 4  # both sides come from one installation; a stale process of another one is found by this


class EngineConfig(msgspec.Struct, frozen=True, tag=True):
    """What an engine's process loads, and the room it gets."""

    folder: Path
    dtype: str = "auto"
    exact: str = "auto"
    device: str = "cpu"
    num_threads: int = 0  # of torch; 0: as many as the process may use
    cache_bytes: int = 1 << 30
    page_size: int = 16  # tokens
    max_rows: int = 512  # of a pass
    max_sessions: int = 1024
    idle_s: float = 300.0


class GraphConfig(msgspec.Struct, frozen=True, tag=True):
    """The same for a graph bundle."""

    folder: Path
    device: str = "cpu"
    num_threads: int = 0
    max_rows: int = 8  # of a run that requests share
    window_ms: float = 2.0  # that a request waits for company


class Start(msgspec.Struct, frozen=True, tag=True):
    """Load the model, or the graphs."""

    version: int
    parent: int  # process id of the front end; the engine ends when it is gone
    config: EngineConfig | GraphConfig


class Submit(msgspec.Struct, frozen=True, tag=True):
    """A request. Its number is the front end's, and comes back with every answer."""

    number: int
    request: Extend | RunCut


class Cancel(msgspec.Struct, frozen=True, tag=True):
    """Nobody waits for this request any more."""

    number: int


class Release(msgspec.Struct, frozen=True, tag=True):
    """Forget a session, after the requests sent before."""

    session_id: bytes


class Stop(msgspec.Struct, frozen=True, tag=True):
    """End the process."""


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The model is loaded and checked."""

    version: int
    vocab_size: int
    max_context_tokens: int
    dtype: str
    exact: str  # bitwise or tolerance, as model.TargetModel says
    width: int  # of the residual stream
    tail_cuts: tuple[int, ...]  # layers that rows may enter at
    load: EngineLoad


class GraphReady(msgspec.Struct, frozen=True, tag=True):
    """The graphs are loaded."""

    version: int
    cuts: tuple[CutSpec, ...]
    load: EngineLoad


class StartFailed(msgspec.Struct, frozen=True, tag=True):
    """The model cannot be served; the process ends."""

    error: str  # name of a class of edgecloud.errors
    reason: str


class Answers(msgspec.Struct, frozen=True, tag=True):
    """What was answered since the last message, in order, and how busy the engine is now."""

    answers: list[tuple[int, Answer | GraphAnswer]]
    load: EngineLoad


ToEngine = Start | Submit | Cancel | Release | Stop
FromEngine = Ready | GraphReady | StartFailed | Answers

encode = msgspec.msgpack.Encoder(enc_hook=str).encode  # paths travel as text
decode_to_engine = msgspec.msgpack.Decoder(ToEngine, dec_hook=lambda kind, value: kind(value)).decode
decode_from_engine = msgspec.msgpack.Decoder(FromEngine).decode
