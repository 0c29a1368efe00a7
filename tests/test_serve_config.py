"""`edgecloud serve --config`: every option by its name, no other key, and the command line has the last word."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from loopback import loopback
from pairs import free_port
from tiny import make_tiny_llama

from edgecloud.cli.app import run
from edgecloud.cloud import server as server_module
from edgecloud.cloud.model import TargetModel
from edgecloud.cloud.server import ServerConfig

MODEL = "somewhere"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "serve.yaml"


def effective(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    assert run(["serve", *map(str, arguments), "--print-config"]) == 0, capsys.readouterr().err
    content: dict[str, Any] = yaml.safe_load(capsys.readouterr().out)
    return content


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert run(["serve", *map(str, arguments), "--print-config"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    return error


def test_the_command_line_beats_the_file_and_the_file_the_default(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file.write_text("port: 9000\ncache-mb: 64\ninsecure: true\nhost: 0.0.0.0\ntls-cert:\n")
    found = effective(capsys, MODEL, "--config", file, "--port", 9001)
    assert (found["port"], found["cache-mb"], found["page-size"]) == (9001, 64, 16)
    assert (found["insecure"], found["host"], found["tls-cert"]) == (True, "0.0.0.0", None)


def test_the_model_may_stand_in_the_file(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file.write_text("model: my-bundle\n")
    assert effective(capsys, "--config", file)["model"] == "my-bundle"


def test_what_is_printed_is_a_file_that_says_the_same(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--metrics-port", "9", "--tokens-file", "t", "--idle-s", "7.5", "--log-format", "json", "--insecure"]
    first = effective(capsys, MODEL, *options)
    file.write_text(yaml.safe_dump(first))
    assert effective(capsys, "--config", file) == first


def test_every_option_of_the_command_may_be_configured(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(["serve", "--help"])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    options = {line[0].strip(",").removeprefix("--") for line in lines if line and line[0].startswith("--")}
    assert set(effective(capsys, MODEL)) == options - {"config", "print-config", "json", "help"} | {"model"}


def test_a_configured_server_gets_what_the_file_says(
    file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    served: list[tuple[Path, ServerConfig]] = []
    monkeypatch.setattr(server_module, "serve", lambda model, config, on_serving: served.append((model, config)))
    file.write_text("model: my-bundle\nport: 9000\ncache-mb: 2\nmax-requests: 3\ndrain-s: 1.5\ntokens-file: t\n")
    assert run(["serve", "--config", str(file)]) == 0, capsys.readouterr().err
    expected = ServerConfig(port=9000, cache_bytes=2 << 20, max_requests=3, drain_s=1.5, tokens_file=Path("t"))
    assert served == [(Path("my-bundle"), expected)]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("cache-mib: 3", "unknown key 'cache-mib'; did you mean 'cache-mb'?"),
        ("cache_mb: 3", "unknown key 'cache_mb'; did you mean 'cache-mb'?"),
        ("drain: 3", "unknown key 'drain'; did you mean 'drain-s'?"),
        ("config: x", "unknown key 'config'"),
        ("3: 4", "unknown key 3"),
        ("port: many", "--port"),
        ("port: 7070.5", "--port"),
        ("port: true", "--port"),
        ("insecure: perhaps", "--insecure"),
        ("log-format: xml", "--log-format"),
        ("port: [1, 2]", "port is a list; it takes one value"),
        ("- port", "holds no options"),
        ("port: {", "is no YAML"),
        ("port: 70700", "port is 70700"),
        ("host: 0.0.0.0", "host 0.0.0.0 is not loopback"),
    ],
    ids=lambda value: value[:20],
)
def test_a_file_that_cannot_work_is_refused_by_name(
    file: Path, content: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file.write_text(content)
    assert words in refused(capsys, MODEL, "--config", file)


def test_a_file_that_is_not_there_is_named(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"--config {file} cannot be read: No such file" in refused(capsys, MODEL, "--config", file)


def test_an_empty_file_changes_nothing(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file.write_text("# nothing yet\n")
    assert effective(capsys, MODEL, "--config", file) == effective(capsys, MODEL)


# The probe


def test_the_probe_tells_a_healthy_service_from_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = TargetModel(make_tiny_llama(tmp_path / "tiny", hidden_size=32))
    with loopback(target) as server:
        assert run(["health", server.address, "--json"]) == 0
        assert '"SERVING"' in capsys.readouterr().out
        assert run(["health", server.address, "--tls-ca", str(tmp_path / "none")]) == 2
    address = f"127.0.0.1:{free_port()}"
    assert run(["health", address]) == 1
    assert f"error: {address} does not answer: UNAVAILABLE" in capsys.readouterr().err
