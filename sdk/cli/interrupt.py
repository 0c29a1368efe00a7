"""How a command that started processes is ended by a signal: like by Ctrl-C, and in any case within a time."""

from __future__ import annotations

import faulthandler
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

GRACE_S = 15.0  # from a signal to the end


@contextmanager
def stopped_like_ctrl_c() -> Iterator[None]:
    """SIGTERM and SIGHUP end what was started, too; all of them within `GRACE_S`.

    An exception raised by a signal may come up where it is dropped, in a destructor or a callback of a library.
    """
    overdue = threading.Timer(GRACE_S, _leave)
    overdue.daemon = True

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        if not overdue.is_alive():
            overdue.start()
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        overdue.cancel()
        for number, handler in before.items():
            signal.signal(number, handler)


def _leave() -> None:
    """End this process where it stands, and say where that was; those it started end with their pipe to it."""
    faulthandler.dump_traceback()
    os._exit(130)
