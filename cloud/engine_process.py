"""The engine's process: owns the accelerator, and knows nothing of the network.

Started by supervisor.py as `python -m edgecloud.cloud.engine_process ENDPOINT`.
"""

from __future__ import annotations

import gc
import signal
import sys
from collections.abc import Callable

import zmq

from edgecloud.cloud.messages import MESSAGES_VERSION, Ready, Start, StartFailed, decode_to_engine, encode
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
        loop = _load(start, socket)
    except EdgecloudError as error:
        socket.send(encode(StartFailed(type(error).__name__, str(error))))
    else:
        loop()
    context.destroy(linger=1000)


def _load(start: Start, socket: zmq.Socket[bytes]) -> Callable[[], None]:
    """Load the model and say so.  -> what serves it"""
    import torch

    from edgecloud.cloud.engine import Engine
    from edgecloud.cloud.engine_loop import EngineLoop
    from edgecloud.cloud.model import TargetModel

    config = start.config
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
    loop = EngineLoop(engine, socket, start.parent)
    gc.freeze()  # what torch and transformers left is here to stay: a collection that walks it stops everybody for 100 ms
    what = (target.vocab_size, engine.max_context_tokens, dtype, target.exact, target.width, target.tail_cuts)
    socket.send(encode(Ready(MESSAGES_VERSION, *what, engine.load)))
    return loop.run


if __name__ == "__main__":
    main()
