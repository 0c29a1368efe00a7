"""`edgecloud health`: exit 0 when a service is serving; for containers and scripts."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from edgecloud.cli.app import app
from edgecloud.cli.output import JsonFlag, print_json


@app.command()
def health(
    address: Annotated[str, typer.Argument(metavar="HOST:PORT", help="Where the service listens.")],
    timeout_s: Annotated[float, typer.Option(help="Seconds until it counts as dead.")] = 3.0,
    tls_ca: Annotated[Path | None, typer.Option(help="Connect by TLS and trust this PEM file.")] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="Own PEM certificate, for mutual TLS.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Own PEM key, for mutual TLS.")] = None,
    tls_name: Annotated[str | None, typer.Option(help="Whom its certificate names, if not HOST.")] = None,
    json: JsonFlag = False,
) -> None:
    """Exit 0 when the service is serving, 1 when it is not or does not answer. Takes no token."""
    from edgecloud.cloud.probe import check_health
    from edgecloud.edge.remote import TLS, channel_credentials

    credentials = channel_credentials(TLS(tls_ca, tls_cert, tls_key)) if tls_ca or tls_cert else None
    check_health(address, credentials, timeout_s, tls_name)
    if json:
        print_json({"address": address, "status": "SERVING"})
    else:
        sys.stderr.write(f"{address} is serving\n")
