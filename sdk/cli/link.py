"""`edgecloud link`: put a simulated network between a device and a service on one machine."""

from __future__ import annotations

import asyncio
import signal
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgecloud.cli.app import app
from edgecloud.cli.output import JsonFlag, print_json

if TYPE_CHECKING:
    from edgecloud.edge.link_config import LinkConfig


class OutageKind(StrEnum):
    """What `--outage` does unless it says so itself."""

    stall = "stall"
    cut = "cut"


@app.command()
def link(
    *,
    listen: Annotated[int, typer.Option(help="Port that the device connects to; 0 picks a free one.", metavar="PORT")],
    to: Annotated[str, typer.Option(help="The service behind the link.", metavar="HOST:PORT")],
    rtt: Annotated[str, typer.Option(help="Round-trip time; half is added to each direction.", metavar="TIME")] = "0ms",
    jitter: Annotated[
        str,
        typer.Option(help="Each chunk waits a further random time, uniform from 0 to this; order is kept.", metavar="TIME"),
    ] = "0ms",
    up: Annotated[str | None, typer.Option(help="Rate from device to service, such as 5mbit.", metavar="RATE")] = None,
    down: Annotated[str | None, typer.Option(help="Rate from service to device; not with --trace.", metavar="RATE")] = None,
    trace: Annotated[
        Path | None,
        typer.Option(help="Lines of `time_s mbit_per_s`, repeated: the rate down, and up unless --up is given.", metavar="FILE"),
    ] = None,
    outage: Annotated[
        list[str] | None,
        typer.Option(
            help="No service for a time, from a start after listening began: 3s@10s. May be repeated.",
            metavar="TIME@TIME",
        ),
    ] = None,
    outage_kind: Annotated[
        OutageKind, typer.Option(help="stall holds bytes back; cut resets connections. 3s@10s:cut sets one outage.")
    ] = OutageKind.stall,
    seed: Annotated[int, typer.Option(help="Of the jitter.")] = 0,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    json: JsonFlag = False,
) -> None:
    """Relay TCP connections over a simulated link, until Ctrl-C."""
    from edgecloud.edge import link_config as parse

    to_host, to_port = parse.parse_address(to)
    config = parse.LinkConfig(
        listen_port=listen,
        to_host=to_host,
        to_port=to_port,
        host=host,
        rtt_ms=parse.parse_duration_ms(rtt),
        jitter_ms=parse.parse_duration_ms(jitter),
        up_mbps=None if up is None else parse.parse_rate_mbps(up),
        down_mbps=None if down is None else parse.parse_rate_mbps(down),
        trace=None if trace is None else parse.read_trace(trace),
        outages=tuple(parse.parse_outage(text, outage_kind.value) for text in outage or ()),
        seed=seed,
    )
    asyncio.run(_run(config, json))


async def _run(config: LinkConfig, json: bool) -> None:
    from edgecloud.edge.relay import Relay

    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    relay = Relay(config)
    await relay.start()
    try:
        content = _content(config, relay.port)
        typer.echo(_sentence(content), err=True)
        if json:
            print_json(content)
        await stop.wait()
    finally:
        await relay.close()


def _content(config: LinkConfig, port: int) -> dict[str, Any]:
    return {
        "listen": _address(config.host, port),
        "to": _address(config.to_host, config.to_port),
        "rtt_ms": config.rtt_ms,
        "jitter_ms": config.jitter_ms,
        "up_mbps": config.up_mbps,  # null: as the trace says, unlimited without one
        "down_mbps": config.down_mbps,
        "trace": str(config.trace.path) if config.trace else None,
        "outages": [{"start_s": o.start_s, "duration_s": o.duration_s, "kind": o.kind} for o in config.outages],
    }


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _sentence(content: dict[str, Any]) -> str:
    otherwise = f"as in {content['trace']}" if content["trace"] else "unlimited"
    rates = [f"{mbps:g} mbit/s" if mbps is not None else otherwise for mbps in (content["up_mbps"], content["down_mbps"])]
    parts = [
        f"rtt {content['rtt_ms']:g} ms",
        f"jitter {content['jitter_ms']:g} ms",
        f"up {rates[0]}",
        f"down {rates[1]}",
        *(f"{o['kind']} of {o['duration_s']:g} s at {o['start_s']:g} s" for o in content["outages"]),
    ]
    return f"link from {content['listen']} to {content['to']}: {', '.join(parts)}; Ctrl-C ends it"
