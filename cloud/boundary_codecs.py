"""Names and sizes of encoded rows."""

from __future__ import annotations

from edgecloud.errors import ConfigError

CODECS = ("float32",)


def row_bytes(codec: str, width: int) -> int:
    """Bytes of an encoded row."""
    if codec not in CODECS:
        raise ConfigError(f"codec is {codec!r}; it takes one of {', '.join(CODECS)}")
    return 4 * width
