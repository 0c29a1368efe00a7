"""`edgecloud partition model.onnx`: any ONNX graph, cut between device and cloud. It is a command, and has options, of its own."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from edgecloud.cli.app import app
from edgecloud.cli.output import JsonFlag, print_json, progress_console, remarks, table_console
from edgecloud.errors import ConfigError

if TYPE_CHECKING:
    from edgecloud.partitioner.link_spec import LinkSpec


@app.command("partition-graph", hidden=True)
def partition_graph(
    model: Annotated[Path, typer.Argument(help="The graph, a file that ends in .onnx.", show_default=False)],
    bundle: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.", show_default=False)],
    inputs: Annotated[
        list[Path] | None,
        typer.Option(help="Sample inputs, an .npz with an array for every input. More of them judge accuracy; the first is timed."),
    ] = None,
    objective: Annotated[
        Literal["latency", "throughput"], typer.Option(help="Time of one run, or the slowest stage of a pipeline of runs.")
    ] = "latency",
    link: Annotated[
        str, typer.Option(help="wifi, lte, 5g; or rate and round trip: 20mbit,40ms; or up=5mbit,down=20mbit,rtt=40ms.")
    ] = "20mbit,40ms",
    cloud_speed: Annotated[float, typer.Option(help="The cloud computes so many times as fast as this device.")] = 4.0,
    cloud_profile: Annotated[
        Path | None, typer.Option(help="Times of the nodes in the cloud instead: what --save-profile wrote there.")
    ] = None,
    device_profile: Annotated[
        Path | None, typer.Option(help="The same for a device that is not at hand; default: measured here.")
    ] = None,
    save_profile: Annotated[Path | None, typer.Option(help="Write the times of the nodes to this file.")] = None,
    max_ram: Annotated[
        str | None,
        typer.Option(help="Most memory of the device's weights and activations, such as 64mb."),
    ] = None,
    max_loss: Annotated[
        float, typer.Option(help="Most accuracy that may be lost on the samples. 0 of relative: every bit stays.")
    ] = 0.0,
    loss: Annotated[
        Literal["relative", "argmax"],
        typer.Option(help="What is lost: ||y - y'|| / ||y||, or the share of rows with another argmax."),
    ] = "relative",
    boundary: Annotated[
        str | None,
        typer.Option(help="Codecs that may be used at the cut: float16, int8, int4, or raw. Default: all."),
    ] = None,
    pin: Annotated[
        list[str] | None, typer.Option(help="NAME=edge or NAME=cloud: keep a node, by its name or that of its output, on one side.")
    ] = None,
    threads: Annotated[int, typer.Option(help="Threads of the device. 0: as many as this process may use.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a bundle that is there.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Compute, measure and check everything, write nothing.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Cut an ONNX graph where it is best for a link, check the halves against the whole, and keep cuts for other links."""
    from edgecloud.partitioner import extra_installed

    with extra_installed():
        from edgecloud.partitioner.graph_partition import partition_graph as run_partition
        from edgecloud.partitioner.graph_request import GraphRequest

    request = GraphRequest(
        model=model,
        bundle=bundle,
        inputs=tuple(inputs or ()),
        objective=objective,
        link=parse_link_spec(link),
        cloud_speed=cloud_speed,
        cloud_profile=cloud_profile,
        device_profile=device_profile,
        save_profile=save_profile,
        max_ram_bytes=None if max_ram is None else parse_bytes("--max-ram", max_ram),
        max_loss=max_loss,
        loss_metric=loss,
        codecs=None if boundary is None else tuple(word for word in boundary.split(",") if word != "raw"),
        pins=dict(parse_pin(text) for text in pin or ()),
        num_threads=threads,
        overwrite=overwrite,
    )
    report = run_partition(request, dry_run=dry_run, remark=remarks(progress_console()))
    if as_json:
        print_json(report.to_dict())
    else:
        table_console().print(report.to_table())


def is_for_graph(arguments: Sequence[str]) -> bool:
    """Whether a command line is `partition` of an .onnx file."""
    return list(arguments[:1]) == ["partition"] and any(word.lower().endswith(".onnx") for word in arguments[1:])


def parse_link_spec(text: str) -> LinkSpec:
    """`20mbit,40ms` (both ways), `up=5mbit,down=20mbit,rtt=40ms`, or a named link. Raises ConfigError."""
    from edgecloud.edge.link_config import parse_duration_ms, parse_rate_mbps
    from edgecloud.links import NAMED
    from edgecloud.partitioner.link_spec import LinkSpec

    if (known := NAMED.get(text.strip().lower())) is not None:
        return LinkSpec(known.up_mbps, known.down_mbps, known.rtt_ms + known.jitter_ms)
    rates: dict[str, float] = {}
    rtt_ms: float | None = None
    for word in text.split(","):
        key, equals, value = word.strip().lower().rpartition("=")
        try:
            if key in ("up", "down"):
                rates[key] = parse_rate_mbps(value)
            elif not equals and "bit" in value:
                rates = {"up": parse_rate_mbps(value), "down": parse_rate_mbps(value)}
            else:
                rtt_ms = parse_duration_ms(value if key in ("", "rtt") else word)
        except ConfigError:
            names = ", ".join(NAMED)
            mend = f"write 20mbit,40ms or up=5mbit,down=20mbit,rtt=40ms, or take {names}"
            raise ConfigError(f"--link {text!r} has {word!r}; {mend}") from None
    if rtt_ms is None:
        raise ConfigError(f"--link {text!r} has no round trip; write it as in 20mbit,40ms")
    return LinkSpec(rates.get("up"), rates.get("down"), rtt_ms)


def parse_bytes(option: str, text: str) -> int:
    """`64mb`, `2gb`, `1500000`. Raises ConfigError."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*(b|kb|mb|gb)?", text.strip().lower())
    if match is None:
        raise ConfigError(f"{option} {text!r} is no size; write it as in 64mb")
    return round(float(match[1]) * {"": 1, "b": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9}[match[2] or ""])


def parse_pin(text: str) -> tuple[str, bool]:
    """`NAME=edge` -> (NAME, True). Raises ConfigError."""
    name, _, side = text.rpartition("=")
    if not name or side not in ("edge", "cloud"):
        raise ConfigError(f"--pin {text!r} is not NAME=edge or NAME=cloud")
    return name, side == "edge"
