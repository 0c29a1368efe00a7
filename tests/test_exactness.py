"""The whole promise, from outside: real processes, a real link, and the text of plain decoding in every mode.

On the tiny pair always; on the real pair by the independent check where that lies beside the repository.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from pairs import EDGECLOUD, ROOT, TIE, Pair, Server, serving, until
from transformers import AutoTokenizer

from edgecloud.client import Client
from edgecloud.sampling import SamplingSettings
from edgecloud.types import Mode

pytest_plugins = ["pairs"]

PROMPT = "Why is the sky blue?"
MODES = [
    ["--mode", "cloud"],
    ["--mode", "speculative", "--num-draft-tokens", "1"],
    ["--mode", "speculative", "--num-draft-tokens", "4"],
    ["--mode", "speculative", "--num-draft-tokens", "8"],
    ["--mode", "auto"],
]
CHECK = Path(os.environ.get("EDGECLOUD_CHECK") or ROOT.parent / "shared" / "check") / "exactness.py"


@contextmanager
def linked(to: str, *options: str) -> Iterator[str]:
    """A real `edgecloud link` to an address; gives the address that the device connects to."""
    command = [*EDGECLOUD, "link", "--listen", "0", "--to", to, "--json", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stdout is not None
            yield str(json.loads(process.stdout.readline())["listen"])
        finally:
            process.terminate()


def start(pair: Pair, address: str, *options: str) -> subprocess.Popen[str]:
    command = [*EDGECLOUD, "generate", str(pair.bundle), PROMPT, "--cloud", address, "--threads", "1", "--json", *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def reply_of(process: subprocess.Popen[str]) -> dict[str, Any]:
    out, remarks = process.communicate(timeout=200)
    assert process.returncode == 0, remarks
    reply: dict[str, Any] = json.loads(out)
    return reply


def prompt_ids(pair: Pair) -> list[int]:
    """As transformers encodes it."""
    tokenizer = AutoTokenizer.from_pretrained(pair.target)
    chat = [{"role": "user", "content": PROMPT}]
    ids: list[int] = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    return ids


def options_of(sampling: SamplingSettings, max_new_tokens: int) -> list[str]:
    named = {"temperature": sampling.temperature, "seed": sampling.seed, "repetition-penalty": sampling.repetition_penalty}
    return [f"--max-new-tokens={max_new_tokens}", *(f"--{name}={value}" for name, value in named.items())]


@pytest.mark.parametrize("sampling", [SamplingSettings(), SamplingSettings(temperature=1.0, seed=7)], ids=["greedy", "sampled"])
def test_every_mode_through_real_processes_gives_the_plain_text(
    tiny_pair: Pair, tiny_server: Server, sampling: SamplingSettings
) -> None:
    expected = tiny_pair.plain.decode(prompt_ids(tiny_pair), 24, sampling, {2})
    with linked(tiny_server.address, "--rtt", "10ms", "--jitter", "2ms", "--up", "5mbit") as address:
        replies = [reply_of(start(tiny_pair, address, *options_of(sampling, 24), *mode)) for mode in MODES]
    for mode, reply in zip(MODES, replies, strict=True):
        assert expected.agrees_with(reply["token_ids"]), mode
        assert reply["text"] == replies[0]["text"], mode
        assert reply["metrics"]["num_unverified_tokens"] == 0
        assert reply["metrics"]["rtt_ms"] >= 10


def test_a_server_killed_under_real_processes_changes_nothing(tiny_pair: Pair) -> None:
    sampling = SamplingSettings(temperature=1.0, seed=5, repetition_penalty=1.1)
    options = options_of(sampling, 60)
    expected = tiny_pair.plain.decode(prompt_ids(tiny_pair), 60, sampling, {2})
    assert min(expected.margins) > TIE
    with serving(tiny_pair.bundle) as server, linked(server.address, "--rtt", "40ms") as address:
        calm = reply_of(start(tiny_pair, address, *options, "--mode", "speculative"))
        assert calm["token_ids"] == expected.token_ids
        for mode in ("speculative", "cloud"):
            process = start(tiny_pair, address, *options, "--mode", mode)
            until(lambda: server.load().num_sessions > 0 or process.poll() is not None)  # noqa: B023  # called at once
            server.kill()
            restart = threading.Thread(target=server.restart)
            restart.start()
            reply = reply_of(process)
            restart.join()
            assert (reply["token_ids"], reply["text"]) == (calm["token_ids"], calm["text"])
            if mode == "speculative":  # forty round trips of 40 ms: it cannot have been over
                assert reply["metrics"]["uplink_bytes"] > calm["metrics"]["uplink_bytes"]


@contextmanager
def company(pair: Pair, address: str, num_sessions: int) -> Iterator[None]:
    """So many other clients, decoding and verifying, as long as it lasts."""
    done = threading.Event()
    failed: list[BaseException] = []

    def keep_busy(number: int) -> None:
        try:
            with Client(pair.bundle, cloud=address, num_threads=1) as client:
                for turn in itertools.count():
                    if done.is_set():
                        return
                    mode: Mode = "cloud" if number % 2 else "speculative"
                    prompt = f"{number}.{turn} " + "busy " * ((7 * number + turn) % 40)
                    client.generate(prompt, mode=mode, max_new_tokens=20, temperature=0.7, seed=number)
        except BaseException as error:  # for the test's own thread to raise
            failed.append(error)

    threads = [threading.Thread(target=keep_busy, args=(number,)) for number in range(num_sessions)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert not failed, failed


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_twelve_other_sessions_change_no_token_in_any_mode(tiny_pair: Pair, dtype: str) -> None:
    """Bit for bit, so without an excuse for near ties, which rounding to 16 bits makes many of."""
    settings = [{"temperature": 0.0}, {"temperature": 1.0, "seed": 3}]
    modes: list[dict[str, Any]] = [{"mode": "cloud"}, *({"mode": "speculative", "num_draft_tokens": n} for n in (1, 4, 9))]

    def texts(client: Client) -> list[list[list[int]]]:
        return [[client.generate(PROMPT, max_new_tokens=32, **s, **mode).token_ids for mode in modes] for s in settings]

    with (
        serving(tiny_pair.bundle, "--dtype", dtype, "--exact", "bitwise") as server,
        Client(tiny_pair.bundle, cloud=server.address) as client,
    ):
        assert client.describe().exact == "bitwise"
        alone = texts(client)
        for of_setting in alone:
            assert all(ids == of_setting[0] for ids in of_setting)
        with company(tiny_pair, server.address, 12):
            until(lambda: server.load().num_sessions >= 10)
            assert texts(client) == alone


# The check's own main, in two settings and four modes; or with faults in one setting and two modes, since every generation then
# waits for a new server. The whole of it takes a quarter of an hour, and is run by hand.
CALM = "import exactness as e; e.SETTINGS, e.MODES = e.SETTINGS[::2], [*e.MODES[:1], *e.MODES[2:]]; raise SystemExit(e.main())"
FAULTS = "import exactness as e; e.SETTINGS, e.MODES = e.SETTINGS[1:2], e.MODES[0:3:2]; raise SystemExit(e.main())"


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("code", "options", "num_compared"), [(CALM, [], 8), (FAULTS, ["--faults"], 2)], ids=["calm", "faults"])
def test_the_independent_check_passes_on_the_real_pair(
    request: pytest.FixtureRequest, code: str, options: list[str], num_compared: int
) -> None:
    if options and "EDGECLOUD_TEST_FAULTS" not in os.environ:
        pytest.skip("takes a minute and a half; EDGECLOUD_TEST_FAULTS=1 runs it")
    if not CHECK.is_file():
        pytest.skip(f"would run {CHECK.name} on the real pair: put it and reference.py into {CHECK.parent}, or name their "
                    "folder in EDGECLOUD_CHECK")  # fmt: skip
    pair: Pair = request.getfixturevalue("smol_pair")
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    arguments = [str(pair.bundle), "--model", str(pair.target), "--limit", "1", "--max-new-tokens", "16", *options]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=CHECK.parent, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{num_compared} generations compared, 0 failed" in done.stdout
