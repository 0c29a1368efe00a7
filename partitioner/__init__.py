"""Offline: fetch a model, export its draft, write and check a bundle.

This file imports nothing heavy, so that a missing extra can be named in one line.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from edgecloud.errors import EdgecloudError


@contextlib.contextmanager
def extra_installed(extra: str = "partition") -> Iterator[None]:
    """Around the import of a module of this package that needs an extra: a missing third party becomes one sentence."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "edgecloud":
            raise
        raise EdgecloudError(f"this command needs {error.name}; install edgecloud[{extra}]") from None
