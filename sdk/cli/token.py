"""`edgecloud token`: a new bearer token for a tenant of a service."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from edgecloud.cli.app import app
from edgecloud.cli.output import JsonFlag, print_json


@app.command()
def token(
    tenant: Annotated[str, typer.Argument(help="Who will use it: letters, digits, '.', '_' and '-'.")],
    json: JsonFlag = False,
) -> None:
    """Make a token: give it to the tenant, and add the line to the service's --tokens-file. It is shown once and kept nowhere."""
    from edgecloud.cloud.tenants import new_token, token_line

    made = new_token()
    line = token_line(tenant, made)
    if json:
        print_json({"tenant": tenant, "token": made, "line": line})
        return
    sys.stderr.write("for the tenant, and for the service's --tokens-file:\n")
    sys.stdout.write(f"{made}\n{line}\n")
