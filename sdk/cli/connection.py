"""Options of every command that calls a service: how to reach it, and who asks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgecloud.errors import ConfigError

if TYPE_CHECKING:
    from edgecloud.edge.remote import TLS

TlsCaOption = Annotated[Path | None, typer.Option(help="Connect by TLS and trust this PEM file.")]
TlsFlag = Annotated[bool, typer.Option("--tls", help="Connect by TLS and trust the system's certificates.")]
TlsCertOption = Annotated[Path | None, typer.Option(help="Own PEM certificate, for mutual TLS.")]
TlsKeyOption = Annotated[Path | None, typer.Option(help="Own PEM key, for mutual TLS.")]
TokenFileOption = Annotated[
    Path | None,
    typer.Option(help="File that holds the service's token; without it, EDGECLOUD_TOKEN. Others see command lines."),
]
InsecureFlag = Annotated[bool, typer.Option("--insecure", help="Let the token travel in plaintext off this machine.")]


def tls_of(tls: bool, ca: Path | None, cert: Path | None, key: Path | None) -> TLS | None:
    """What the options ask for; None: plaintext."""
    from edgecloud.edge.remote import TLS

    return TLS(ca, cert, key) if tls or ca or cert else None


def read_token(file: Path | None) -> str | None:
    """The token of a file, or of the environment; None: neither is given. Raises ConfigError."""
    if file is None:
        return os.environ.get("EDGECLOUD_TOKEN") or None
    try:
        return file.read_text(encoding="ascii").strip()
    except OSError as error:
        raise ConfigError(f"--token-file {file} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"--token-file {file} holds no token; put there what `edgecloud token` printed") from error
