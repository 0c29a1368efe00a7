"""`edgecloud run`: a cut graph on the arrays of a file."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

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
from edgecloud.cli.output import JsonFlag, print_json, table_console
from edgecloud.errors import ConfigError
from edgecloud.types import Preference

if TYPE_CHECKING:
    from edgecloud.inference import InferenceReply
    from edgecloud.tensors import Array


@app.command()
def run(
    bundle: Annotated[Path, typer.Argument(help="Folder written by `edgecloud partition MODEL.onnx`.")],
    inputs: Annotated[Path, typer.Option(help="NumPy .npz file: an array for every input of the graph.")],
    cloud: Annotated[
        str | None, typer.Option(help="HOST:PORT of a service that serves the bundle; several, separated by commas.")
    ] = None,
    prefer: Annotated[Preference, typer.Option(help="Of several services: the first that works, or the nearest.")] = "order",
    mode: Annotated[str, typer.Option(help="auto, edge, cloud, split, or the name of a cut.")] = "auto",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the outputs there, as .npz.")] = None,
    repeat: Annotated[int, typer.Option(help="Run as often; the last run is shown. The first few teach what is fastest.")] = 1,
    deadline_s: Annotated[float | None, typer.Option(help="Seconds that a run may take.")] = None,
    risk: Annotated[
        float | None,
        typer.Option(help="Of a classifier with exits: share of early answers that may be wrong. Default: none leaves early."),
    ] = None,
    exit_rule: Annotated[
        Literal["confidence", "entropy", "margin", "feature_delta"] | None,
        typer.Option(help="What makes an exit sure; default: the bundle's rule."),
    ] = None,
    threads: Annotated[int, typer.Option(help="Threads of the device's graph. 0: as many as this process may use.")] = 0,
    max_ram_mb: Annotated[int, typer.Option(help="MiB that loaded parts of the graph may take. 0: no limit.")] = 0,
    tls_ca: TlsCaOption = None,
    tls: TlsFlag = False,
    tls_cert: TlsCertOption = None,
    tls_key: TlsKeyOption = None,
    token_file: TokenFileOption = None,
    insecure: InsecureFlag = False,
    json: JsonFlag = False,
) -> None:
    """Run a cut ONNX graph: on the device, in the cloud, or divided between them."""
    from edgecloud.client import Client

    if repeat < 1:
        raise ConfigError(f"--repeat is {repeat}; it takes at least 1")
    arrays = read_arrays(inputs)
    secure = tls_of(tls, tls_ca, tls_cert, tls_key)
    with Client(
        bundle, cloud.split(",") if cloud else None, prefer=prefer, tls=secure, token=read_token(token_file), insecure=insecure,
        num_threads=threads, max_ram_mb=max_ram_mb,
    ) as client:  # fmt: skip
        for _ in range(repeat):
            reply = client.run(arrays, mode=mode, deadline_s=deadline_s, risk=risk, exit_rule=exit_rule)
    if output is not None:
        write_arrays(output, reply)
    if json:
        print_json(reply.to_dict())
    else:
        _show(reply)


def read_arrays(path: Path) -> dict[str, Array]:
    """The arrays of an .npz file; nothing in it is executed. Raises ConfigError."""
    import numpy as np

    try:
        with path.open("rb") as file:
            content = np.load(file, allow_pickle=False)
            if isinstance(content, np.lib.npyio.NpzFile):
                return {name: content[name] for name in content.files}
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ConfigError(f"{path} is no .npz file of plain arrays ({error}); save it with numpy.savez") from error
    raise ConfigError(f"{path} holds a single array without a name; save it with numpy.savez")


def write_arrays(path: Path, arrays: InferenceReply) -> None:
    """An .npz file at exactly that path. Raises ConfigError."""
    import numpy as np

    try:
        with path.open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays)
    except OSError as error:
        raise ConfigError(f"-o {path} cannot be written: {error.strerror}") from error


def _show(reply: InferenceReply) -> None:
    from rich.table import Table

    metrics = reply.metrics
    table = Table(title=f"{reply.cut}: {metrics.total_ms:.1f} ms" + (f" ({reply.fell_back})" if reply.fell_back else ""))
    table.add_column("output")
    table.add_column("type")
    table.add_column("shape")
    for name, array in reply.outputs.items():
        table.add_row(name, str(array.dtype), " x ".join(map(str, array.shape)))
    console = table_console()
    console.print(table)
    if reply.exit:
        console.print(f"left at {reply.exit}, not verified", highlight=False)
    if metrics.num_attempts:
        link_ms = metrics.uplink_ms + metrics.downlink_ms
        console.print(
            f"device {metrics.edge_ms:.1f} ms, link {link_ms:.1f} ms for {metrics.uplink_bytes} bytes up and "
            f"{metrics.downlink_bytes} down, queue {metrics.queue_ms:.1f} ms, cloud {metrics.cloud_ms:.1f} ms",
            highlight=False,
            soft_wrap=True,
        )
