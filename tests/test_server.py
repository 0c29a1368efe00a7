"""`edgecloud serve`: a process of its own that listens, encrypts and stops as told; and every way in which it cannot start."""

from __future__ import annotations

import json
import shutil
import signal
import socket
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme
from loopback import loopback
from pairs import PATIENCE_S, Server, plain_target
from safetensors.torch import load_file, save_file
from tiny import make_tiny_llama
from transformers import AutoModelForCausalLM

from edgecloud.bundle import MANIFEST, Bundle, DraftInfo, FileInfo, TargetInfo, TokenizerInfo
from edgecloud.cli.app import run
from edgecloud.cloud import server as server_module
from edgecloud.cloud.model import TargetModel, eos_token_ids
from edgecloud.cloud.server import ServerConfig
from edgecloud.edge.remote import TLS, Cloud
from edgecloud.edge.retry import Timeout
from edgecloud.errors import CloudUnavailableError, ConfigError
from edgecloud.fingerprint import model_fingerprint, sha256_file, tokenizer_fingerprint
from edgecloud.rpc import edgecloud_pb2 as pb
from edgecloud.rpc import edgecloud_pb2_grpc as pb_grpc
from edgecloud.types import Service

PROMPT = [5, 6, 7, 8]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("models") / "tiny", hidden_size=32)


def make_bundle(model: Path, path: Path, /, **target_changes: Any) -> Path:
    """The cloud's half of a bundle, as `edgecloud partition` writes it."""
    shutil.copytree(model, path / "cloud")
    digest = "0" * 64
    files = {"edge/draft/model.onnx": FileInfo(digest, 1), "edge/draft/tokenizer.json": FileInfo(digest, 1)}
    for file in sorted((path / "cloud").iterdir()):
        files[f"cloud/{file.name}"] = FileInfo(sha256_file(file), file.stat().st_size)
    target: dict[str, Any] = {
        "name": "tiny-target",
        "fingerprint": model_fingerprint(model),
        "folder": "cloud",
        "hub_id": None,
        "revision": None,
        "vocab_size": 260,
        "max_context_tokens": 512,
        "dtype": "float32",
        "num_parameters": 1,
    }
    tokenizer = TokenizerInfo(tokenizer_fingerprint(model / "tokenizer.json"), "edge/draft/tokenizer.json", None, {}, [2])
    draft = DraftInfo("tiny-draft", digest, "edge/draft/model.onnx", "int4", 260, 512)
    bundle = Bundle(path, "pair", "a test", None, TargetInfo(**{**target, **target_changes}), draft, tokenizer, files)
    (path / MANIFEST).write_text(bundle.to_json())
    return path


def handshake(address: str, tls: TLS | None = None) -> Service:
    """What a device is told by whoever listens there, if anything."""
    cloud = Cloud(address, tls, Timeout(connect_s=PATIENCE_S))
    try:
        return cloud.describe(wait=False)
    finally:
        cloud.close()


# Started, and told to stop


def test_a_bundle_is_served_on_any_free_port_until_sigterm(model: Path, tmp_path: Path) -> None:
    server = Server(make_bundle(model, tmp_path / "bundle"), "--host", "0.0.0.0", "--insecure")
    try:
        assert server.address == f"0.0.0.0:{server.port}"
        assert server.port > 0
        service = handshake(local(server))
        assert (service.model_name, service.dtype, service.max_context_tokens) == ("tiny-target", "float32", 512)
        assert service.model_fingerprint == model_fingerprint(model)
        assert service.tokenizer_fingerprint == tokenizer_fingerprint(model / "tokenizer.json")
        with grpc.insecure_channel(local(server)) as channel:
            request = pb.DecodeRequest(session_id=b"s" * 16, context_ids=PROMPT, max_new_tokens=12)
            stream = pb_grpc.VerificationStub(channel).Decode(request, timeout=PATIENCE_S)
            first = next(stream)
            server.process.send_signal(signal.SIGTERM)
            tokens = [token for reply in [first, *stream] for token in reply.token_ids]
        stdout, _ = server.process.communicate(timeout=PATIENCE_S)
    finally:
        server.close()
    assert server.process.returncode == 0
    assert stdout == "", "--json prints one object"
    assert plain_target(model).decode(PROMPT, 12).agrees_with(tokens), "a stream under way may end"


def local(server: Server) -> str:
    return f"127.0.0.1:{server.port}"


def test_a_port_in_use_is_refused_before_the_model_is_loaded(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "Supervisor", None)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert run(["serve", str(model), "--port", str(port)]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: cannot listen on 127.0.0.1:{port}: Address already in use")
    assert "--port" in error


# Who may connect


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def pem(authority: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Paths of certificates and keys: of the authority, of a server on this machine, of a client, of a stranger."""
    folder = tmp_path_factory.mktemp("pem")
    authority.cert_pem.write_to_path(folder / "ca.pem")
    issued = {
        "server": authority.issue_cert("127.0.0.1"),
        "client": authority.issue_cert("phone"),
        "other": trustme.CA().issue_cert("x"),
    }
    for name, certificate in issued.items():
        certificate.private_key_pem.write_to_path(folder / f"{name}.key")
        certificate.cert_chain_pems[0].write_to_path(folder / f"{name}.pem")
    return lambda name: folder / name


def as_client(pem: Callable[[str], Path], name: str) -> TLS:
    return TLS(ca=pem("ca.pem"), cert=pem(f"{name}.pem"), key=pem(f"{name}.key"))


def test_tls_encrypts_and_shows_who_the_server_is(model: Path, pem: Callable[[str], Path]) -> None:
    config = ServerConfig(tls_cert=pem("server.pem"), tls_key=pem("server.key"))
    with loopback(TargetModel(model), credentials=server_module._credentials(config)) as server:
        assert handshake(server.address, TLS(ca=pem("ca.pem"))).model_name == "tiny"
        for tls in (None, TLS(ca=pem("other.pem"))):  # plaintext; and who does not trust the authority
            with pytest.raises(CloudUnavailableError, match=rf"{server.address} does not answer"):
                handshake(server.address, tls)


def test_mutual_tls_keeps_strangers_out(model: Path, pem: Callable[[str], Path]) -> None:
    """Off loopback, because it is encrypted."""
    options = ["--tls-cert", str(pem("server.pem")), "--tls-key", str(pem("server.key")), "--client-ca", str(pem("ca.pem"))]
    server = Server(model, "--host", "0.0.0.0", *options)
    try:
        assert handshake(local(server), as_client(pem, "client")).model_name == "tiny"
        for tls in (TLS(ca=pem("ca.pem")), as_client(pem, "other"), None):
            with pytest.raises(CloudUnavailableError, match=rf"{local(server)} does not answer"):
                handshake(local(server), tls)
    finally:
        server.close()
    assert server.process.returncode == 0


def test_a_certificate_that_has_expired_is_worth_nothing_on_either_side(
    model: Path, authority: trustme.CA, pem: Callable[[str], Path], tmp_path: Path
) -> None:
    past = datetime.now(UTC) - timedelta(days=1)
    for name in ("127.0.0.1", "phone"):
        expired = authority.issue_cert(name, not_before=past - timedelta(days=1), not_after=past)
        expired.private_key_pem.write_to_path(tmp_path / f"{name}.key")
        expired.cert_chain_pems[0].write_to_path(tmp_path / f"{name}.pem")
    old_server = ServerConfig(tls_cert=tmp_path / "127.0.0.1.pem", tls_key=tmp_path / "127.0.0.1.key")
    server = ServerConfig(tls_cert=pem("server.pem"), tls_key=pem("server.key"), client_ca=pem("ca.pem"))
    old_client = TLS(pem("ca.pem"), tmp_path / "phone.pem", tmp_path / "phone.key")
    for config, tls in ((old_server, TLS(pem("ca.pem"))), (server, old_client)):
        with loopback(TargetModel(model), credentials=server_module._credentials(config)) as listening:
            words = f"{listening.address} does not answer"
            with pytest.raises(CloudUnavailableError, match=words):
                handshake(listening.address, tls)


@pytest.mark.parametrize("host", ["0.0.0.0", "192.0.2.1", "::", "example.org"])
def test_plaintext_off_loopback_takes_a_word_of_consent(host: str, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    error = refused(capsys, 2, model, "--host", host)
    assert error.startswith(f"error: host {host} is not loopback")
    assert "--tls-cert" in error
    assert "--insecure" in error
    assert ServerConfig(host=host, insecure=True).insecure


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "localhost", "::1"])
def test_plaintext_on_loopback_takes_none(host: str) -> None:
    assert ServerConfig(host=host).host == host


# What cannot be served


def refused(capsys: pytest.CaptureFixture[str], code: int, *arguments: object) -> str:
    """Run `edgecloud serve` where it must not start; -> its one line of error."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(server_module, "VerificationService", None)  # else a server that does start would stay
        assert run(["serve", *map(str, arguments), "--port", "0"]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


@pytest.fixture
def copy(model: Path, tmp_path: Path) -> Path:
    """A model folder to break."""
    return Path(shutil.copytree(model, tmp_path / "model"))


def test_a_folder_that_does_not_exist(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"no such model folder: {tmp_path / 'nothing'}" in refused(capsys, 1, tmp_path / "nothing")


@pytest.mark.parametrize(
    ("missing", "words"),
    [
        ("model.safetensors", "holds no *.safetensors"),
        ("config.json", "config.json does not exist"),
        ("tokenizer.json", "tokenizer.json"),
    ],
)
def test_a_folder_that_lacks_a_file(copy: Path, missing: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    (copy / missing).unlink()
    error = refused(capsys, 1, copy)
    assert words in error
    assert str(copy) in error


@pytest.mark.parametrize("num_bytes", [0, 5, 1000, -1])
def test_truncated_safetensors(copy: Path, num_bytes: int, capsys: pytest.CaptureFixture[str]) -> None:
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:num_bytes])
    assert f"{weights} is truncated or damaged" in refused(capsys, 1, copy)


def test_a_shard_that_is_truncated_or_missing(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    AutoModelForCausalLM.from_pretrained(model).save_pretrained(tmp_path / "m", max_shard_size="30KB")
    shutil.copy(model / "tokenizer.json", tmp_path / "m")
    shard = sorted((tmp_path / "m").glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-7])
    assert f"{shard} is truncated or damaged" in refused(capsys, 1, tmp_path / "m")
    shard.unlink()
    assert shard.name in refused(capsys, 1, tmp_path / "m")


def test_weights_that_do_not_fill_the_model(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = load_file(copy / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    error = refused(capsys, 1, copy)
    assert "lacks weights, the first is 'model.layers.1.mlp.up_proj.weight' of 1" in error


def test_weights_of_another_shape(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "vocab_size": 999}))
    assert f"{copy} cannot be loaded" in refused(capsys, 1, copy)


@pytest.mark.parametrize("content", ["{", "[]", "null", '{"model_type": "no_such_type"}', "{}"])
def test_a_config_that_is_none(copy: Path, content: str, capsys: pytest.CaptureFixture[str]) -> None:
    (copy / "config.json").write_text(content)
    assert str(copy) in refused(capsys, 1, copy)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--tls-cert", "c.pem"], "--tls-cert and --tls-key go together"),
        (["--client-ca", "c.pem"], "--client-ca needs --tls-cert"),
        (["--page-size", "0"], "page_size is 0"),
        (["--max-pass-tokens", "-1"], "max_pass_tokens is -1"),
        (["--cache-mb", "0"], "cache_bytes is 0"),
        (["--threads", "-1"], "num_threads is -1"),
        (["--idle-s", "nan"], "idle_s is nan"),
        (["--metrics-port", "70000"], "metrics_port is 70000"),
        (["--tokens-file", "no-such-file"], "no-such-file cannot be read"),
        (["--dtype", "int8"], "dtype is 'int8'"),
        (["--device", "abacus"], "device is 'abacus'"),
        (["--page-size", "10000000", "--cache-mb", "1"], "a cache of 1048576 bytes holds no page"),
        (["--no-such-option"], "--no-such-option"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_option_that_cannot_work_is_bad_usage(
    model: Path, options: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert words in refused(capsys, 2, model, *options)


def test_a_port_that_is_none() -> None:
    with pytest.raises(ConfigError, match="port is 65536"):
        ServerConfig(port=65536)


def test_certificates_that_are_none(model: Path, pem: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    missing = pem("nowhere.pem")
    error = refused(capsys, 1, model, "--tls-cert", missing, "--tls-key", pem("server.key"))
    assert f"{missing} cannot be read: No such file" in error
    for cert, key in ((pem("server.pem"), pem("client.key")), (model / "config.json", pem("server.key"))):
        error = refused(capsys, 1, model, "--tls-cert", cert, "--tls-key", key)
        assert f"{cert} and {key} are no PEM certificate and key that belong together" in error


# Bundles


def test_a_bundle_with_a_changed_byte(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = make_bundle(model, tmp_path / "b")
    weights = bundle / "cloud/model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-3] ^= 1
    weights.write_bytes(content)
    assert f"{weights} has SHA-256" in refused(capsys, 1, bundle)


def test_a_bundle_that_was_made_for_another_target(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = make_bundle(model, tmp_path / "b", fingerprint="f" * 64)
    error = refused(capsys, 1, bundle)
    assert "f" * 64 in error
    assert model_fingerprint(model) in error


def test_the_devices_part_of_a_bundle(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = make_bundle(model, tmp_path / "b")
    shutil.rmtree(bundle / "cloud")
    assert f"{bundle / 'cloud'} does not exist" in refused(capsys, 1, bundle)


def test_a_bundle_whose_target_is_on_the_hub(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = make_bundle(model, tmp_path / "b", hub_id="someone/something", folder=None)
    assert "someone/something" in refused(capsys, 1, bundle)


def test_a_bundle_of_a_newer_schema(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = make_bundle(model, tmp_path / "b")
    manifest = json.loads((bundle / MANIFEST).read_text())
    (bundle / MANIFEST).write_text(json.dumps({**manifest, "schema_version": 99}))
    assert "schema version 99" in refused(capsys, 1, bundle)


def test_the_ids_that_end_a_generation_come_from_the_folder(model: Path, copy: Path) -> None:
    assert eos_token_ids(model) == [2]
    (copy / "generation_config.json").unlink()
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "eos_token_id": [2, 0]}))
    assert eos_token_ids(copy) == [2, 0]
