"""`edgecloud profile`: what this device, this link and that cloud can do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from edgecloud.cli.app import app
from edgecloud.cli.connection import (
    InsecureFlag,
    TlsCaOption,
    TlsCertOption,
    TlsFlag,
    TlsKeyOption,
    TokenFileOption,
    read_token,
    tls_of,
)
from edgecloud.cli.output import JsonFlag, print_json, progress_console, remarks, table_console
from edgecloud.errors import ConfigError

if TYPE_CHECKING:
    from edgecloud.edge.survey import Spread
    from edgecloud.profile import Profile


@app.command()
def profile(
    bundle: Annotated[Path, typer.Argument(help="Folder written by `edgecloud partition`.")],
    cloud: Annotated[str | None, typer.Option(help="HOST:PORT of a verification service; without it, the device alone.")] = None,
    threads: Annotated[int, typer.Option(help="Threads of the device's model. 0: as many as this process may use.")] = 0,
    tls_ca: TlsCaOption = None,
    tls: TlsFlag = False,
    tls_cert: TlsCertOption = None,
    tls_key: TlsKeyOption = None,
    token_file: TokenFileOption = None,
    insecure: InsecureFlag = False,
    save: Annotated[Path | None, typer.Option(help="Time the draft node by node, too, and write this device as JSON.")] = None,
    save_cloud: Annotated[Path | None, typer.Option(help="Write the service as JSON; with --cloud.")] = None,
    device: Annotated[
        str | None, typer.Option(help="Measure nothing: layer by layer what this device takes; a profile's name or file.")
    ] = None,
    cloud_device: Annotated[str, typer.Option(help="The cloud beside it: a profile's name or file.")] = "cpu",
    weights: Annotated[Literal["int4", "int8", "fp16", "fp32"], typer.Option(help="Format on that device.")] = "int4",
    json: JsonFlag = False,
) -> None:
    """Measure device, link and cloud for some seconds, and predict every mode's times and cloud passes.

    Says below which round trip speculation is faster than streaming, and what mode `auto` would pick. What --save writes,
    `edgecloud partition --device` takes; --device tells a known device's times layer by layer.
    """
    from edgecloud.profile import Connection, run_profile

    if device is not None:
        _show_layers(bundle, device, cloud_device, weights, as_json=json)
        return
    at = None
    if cloud is not None:
        at = Connection(cloud, tls_of(tls, tls_ca, tls_cert, tls_key), read_token(token_file), insecure)
    if save_cloud is not None and at is None:
        raise ConfigError("--save-cloud needs --cloud HOST:PORT: without it no service is measured")
    remark = remarks(progress_console())
    found = run_profile(bundle, at, threads, remark=remark)
    if save is not None or save_cloud is not None:
        _save(bundle, found, save, save_cloud, remark)
    if json:
        print_json(found.to_dict())
        return
    output = table_console()
    for table in (measured_table(found), predicted_table(found)):
        output.print(table)
    for line in conclusions(found):
        output.print(line, highlight=False)


def _save(bundle: Path, found: Profile, device: Path | None, cloud: Path | None, remark: Callable[[str], None]) -> None:
    from edgecloud.bundle import Bundle
    from edgecloud.partitioner import extra_installed

    with extra_installed():
        from edgecloud.save_profile import measured_cloud, measured_device, write_profile

    opened = Bundle.open(bundle)
    if device is not None:
        remark("device: the draft, node by node")
        write_profile(measured_device(opened, found.num_threads), device)
    if cloud is not None:
        write_profile(measured_cloud(opened, found), cloud)


def _show_layers(bundle: Path, device: str, cloud_device: str, weights: str, *, as_json: bool) -> None:
    from edgecloud.bundle import Bundle
    from edgecloud.partitioner import extra_installed

    with extra_installed():
        from edgecloud.partitioner.layer_table import layer_table
        from edgecloud.partitioner.layer_times import ModelShape
        from edgecloud.partitioner.machine_profile import load_profile
        from edgecloud.partitioner.model_folder import ModelFolder

    opened = Bundle.open(bundle)
    if opened.target_folder is None or not opened.target_folder.is_dir():
        raise ConfigError(f"{bundle} has only the device's half; give a bundle with the target in it")
    here, there = load_profile(device), load_profile(cloud_device, "--cloud-device")
    shape = ModelShape.of(ModelFolder.open(opened.target_folder), opened.target.fingerprint)
    try:
        table = layer_table(shape, here, there, weights)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if as_json:
        print_json(table.to_dict())
        return
    table_console().print(table.to_table())
    for line in table.lines():
        table_console().print(line, highlight=False)


def measured_table(profile: Profile) -> Table:
    """What was measured."""
    device, link, cloud, acceptance = profile.device, profile.link, profile.cloud, profile.acceptance
    table = Table(title=f"{profile.bundle}: measured", box=SIMPLE_HEAD, padding=(0, 1))
    for heading in ("", "what", "median (quartiles)"):
        table.add_column(heading)
    threads = f"device, {profile.num_threads} thread(s)"
    table.add_row(threads, "a drafted token", f"{_spread(device.step_ms)} ms")
    table.add_row("", f"reading a prompt of {device.prefill_tokens} tokens", f"{_spread(device.prefill_ms_per_token)} ms a token")
    if link is None or cloud is None or acceptance is None:
        table.add_row("link and cloud", "not measured", "give --cloud HOST:PORT")
        return table
    trip = f"{link.rtt_ms:.1f} ms, least {link.least_rtt_ms:.1f}, deviation {link.rtt_deviation_ms:.1f}"
    table.add_row("link", "round trip", trip)
    table.add_row("", "the same around a verification", f"{link.verify_rtt_ms:.1f} ms")
    table.add_row("", "a kilobyte more up, roughly", f"{1000 * link.uplink_ms_per_byte:.2f} ms")
    for seen in cloud.passes:
        place = f"cloud, {profile.address}" if seen is cloud.passes[0] else ""
        table.add_row(place, f"a pass over {seen.num_rows} row(s)", f"{seen.compute_ms:.1f} ms, queue {seen.queue_ms:.1f}")
    table.add_row("", "between tokens of a stream", f"{_spread(cloud.stream_ms)} ms")
    table.add_row("", f"reading a prompt of {cloud.prefill_tokens:g} tokens", f"{_spread(cloud.prefill_ms)} ms")
    if (load := cloud.load) is not None:
        pages = f"{load.num_free_pages} of {load.num_pages} pages free"
        table.add_row("", "load", f"{load.num_sessions} sessions, {load.num_waiting} waiting, {pages}")
    survival = ", ".join(f"{share:.2f}" for share in acceptance.survival)
    table.add_row("acceptance", f"of a token, from {acceptance.num_tokens}", f"{acceptance.rate:.0%}")
    table.add_row("", f"of the first 1 to {len(acceptance.survival)}", survival)
    return table


def predicted_table(profile: Profile) -> Table:
    """What follows for every mode."""
    table = Table(title="predicted", box=SIMPLE_HEAD, padding=(0, 1))
    table.add_column("mode")
    for heading in ("TPOT ms", f"TTFT ms, {profile.prompt_tokens}-token prompt", "cloud passes/token"):
        table.add_column(heading, justify="right")
    for row in profile.predictions:
        mode = f"{row.mode}, K = {row.num_draft_tokens}" if row.num_draft_tokens else row.mode
        mode += " (unverified)" if row.mode == "edge" else ""
        table.add_row(mode, f"{row.tpot_ms:.1f}", f"{row.ttft_ms:.0f}", f"{row.passes_per_token:.2f}")
    for choice in profile.auto:
        what = f"auto, {choice.objective}: {choice.mode}" + (f", K = {choice.num_draft_tokens}" if choice.num_draft_tokens else "")
        table.add_row(what, f"{choice.tpot_ms:.1f}", "", f"{choice.passes_per_token:.2f}")
    return table


def conclusions(profile: Profile) -> list[str]:
    """The same in words."""
    if profile.link is None:
        return ["The device alone was measured; with --cloud HOST:PORT, link and cloud are, too."]
    first = f"Mode auto shows its first token after about {profile.first_visible_ms:.0f} ms."
    if profile.break_even_rtt_ms is None:
        return ["Speculation is slower than streaming at any round trip here; it saves passes of the cloud.", first]
    here = f"this link's is {profile.link.verify_rtt_ms:.0f} ms"
    return [f"Speculation is faster than streaming below a round trip of {profile.break_even_rtt_ms:.0f} ms; {here}.", first]


def _spread(spread: Spread) -> str:
    return f"{spread.median:.2f} ({spread.p25:.2f} to {spread.p75:.2f})"
