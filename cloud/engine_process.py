"""The engine's process: owns the accelerator, and knows nothing of the network.

Started by supervisor.py as `python -m edgecloud.cloud.engine_process ENDPOINT`.
"""

from __future__ import annotations

import gc
import signal
import sys
from collections.abc import Callable

import zmq

from edgecloud.cloud.messages import (
    MESSAGES_VERSION,
    EngineConfig,
    GraphConfig,
    GraphReady,
    Ready,
    Start,
    StartFailed,
    decode_to_engine,
    encode,
)
from edgecloud.errors import EdgecloudError, ServerError


def main() -> None:
    """Load what the first message names, then serve."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole terminal; the front end decides when to stop
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    context = zmq.Context()
    socket = context.socket(zmq.PAIR)
    socket.set_hwm(0)
    socket.connect(sys.argv[1])
    start = decode_to_engine(socket.recv())
    assert isinstance(start, Start)
    try:
        if start.version != MESSAGES_VERSION:
            raise ServerError(f"the front end speaks version {start.version}, this engine {MESSAGES_VERSION}; install again")
        if isinstance(start.config, GraphConfig):
            loop = _load_graphs(start.config, start.parent, socket)
        else:
            loop = _load(start.config, start.parent, socket)
    except EdgecloudError as error:
        socket.send(encode(StartFailed(type(error).__name__, str(error))))
    else:
        loop()
    context.destroy(linger=1000)


def _load(config: EngineConfig, parent: int, socket: zmq.Socket[bytes]) -> Callable[[], None]:
    """Load the model and say so.  -> what serves it"""
    import torch

    from edgecloud.cloud.engine import Engine
    from edgecloud.cloud.engine_loop import EngineLoop
    from edgecloud.cloud.model import TargetModel

    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    target = TargetModel(config.folder, config.dtype, config.device, config.exact)
    engine = Engine(
        target,
        cache_bytes=config.cache_bytes,
        page_size=config.page_size,
        max_rows=config.max_rows,
        max_sessions=config.max_sessions,
        idle_s=config.idle_s,
    )
    dtype = str(target.dtype).removeprefix("torch.")
    loop = EngineLoop(engine, socket, parent)
    gc.freeze()  # what torch and transformers left is here to stay: a collection that walks it stops everybody for 100 ms
    what = (target.vocab_size, engine.max_context_tokens, dtype, target.exact, target.width, target.tail_cuts)
    socket.send(encode(Ready(MESSAGES_VERSION, *what, engine.load)))
    return loop.run


def _load_graphs(config: GraphConfig, parent: int, socket: zmq.Socket[bytes]) -> Callable[[], None]:
    """The same with graphs; no torch comes in.  -> what serves them"""
    from edgecloud.cloud.engine_loop import EngineLoop
    from edgecloud.cloud.graph_engine import GraphEngine
    from edgecloud.cloud.graph_runner import GraphRunner
    from edgecloud.graph_bundle import GraphBundle

    runner = GraphRunner(GraphBundle.open(config.folder), config.device, config.num_threads)
    batches = {cut.name: cut.batches for cut in runner.specs.values()}
    engine = GraphEngine(runner.run, batches, config.max_rows, config.window_ms / 1e3)
    loop = EngineLoop(engine, socket, parent)
    gc.freeze()
    socket.send(encode(GraphReady(MESSAGES_VERSION, tuple(runner.specs.values()), engine.load)))
    return loop.run


if __name__ == "__main__":
    main()
