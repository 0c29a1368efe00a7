"""`edgecloud generate`: what it prints, where, and with which exit code."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
from typing import Any

import pytest
from pairs import EDGECLOUD, Pair, Server, free_port, until

from edgecloud.cli.app import run
from edgecloud.client import Client

pytest_plugins = ["pairs"]

PROMPT = "Why is the sky blue?"
KEYS = {"text", "token_ids", "finish_reason", "usage", "mode_timeline", "metrics", "unverified_spans"}
METRICS = {
    "ttft_ms", "tpot_ms", "total_ms", "rtt_ms", "num_rounds", "num_draft_tokens", "num_accepted_tokens",
    "mean_acceptance_length", "acceptance_histogram", "target_passes", "target_passes_per_token", "uplink_bytes",
    "downlink_bytes", "num_unverified_tokens",
    "first_visible_ms", "num_retracted_tokens", "cloud_compute_ms", "num_audited_tokens", "num_diverged_tokens",
}  # fmt: skip


def generate(capsys: pytest.CaptureFixture[str], pair: Pair, *arguments: str, prompt: str = PROMPT) -> tuple[int, str, str]:
    """Exit code, stdout, stderr."""
    code = run(["generate", str(pair.bundle), prompt, "--threads", "1", *arguments])
    out, remarks = capsys.readouterr()
    return code, out, remarks


def object_of(result: tuple[int, str, str]) -> dict[str, Any]:
    code, out, remarks = result
    assert (code, remarks) == (0, "")
    assert out.count("\n") == 1
    content: dict[str, Any] = json.loads(out)
    return content


@pytest.mark.parametrize("mode", ["edge", "cloud", "speculative", "auto"])
def test_json_holds_exactly_what_is_promised(
    capsys: pytest.CaptureFixture[str], tiny_pair: Pair, tiny_server: Server, mode: str
) -> None:
    cloud = () if mode == "edge" else ("--cloud", tiny_server.address)
    content = object_of(generate(capsys, tiny_pair, "--json", "--mode", mode, "--max-new-tokens", "9", *cloud))
    assert set(content) == KEYS
    assert set(content["metrics"]) == METRICS
    assert set(content["usage"]) == {"prompt_tokens", "completion_tokens"}
    assert all(set(span) == {"token", "mode", "num_draft_tokens"} for span in content["mode_timeline"])
    assert content["usage"]["completion_tokens"] == len(content["token_ids"]) <= 9
    assert content["finish_reason"] in {"stop", "length"}
    assert (content["metrics"]["rtt_ms"] is None) == (mode == "edge")
    assert content["metrics"]["num_unverified_tokens"] == (len(content["token_ids"]) if mode == "edge" else 0)


def test_every_option_reaches_the_client(capsys: pytest.CaptureFixture[str], tiny_pair: Pair, tiny_server: Server) -> None:
    options: dict[str, Any] = {
        "mode": "speculative", "max_new_tokens": 20, "temperature": 0.9, "top_p": 0.9, "top_k": 40,
        "repetition_penalty": 1.2, "seed": 2**63, "num_draft_tokens": 3, "deadline_s": 60.0,
    }  # fmt: skip
    with Client(tiny_pair.bundle, tiny_server.address, num_threads=1) as client:
        stop = client.generate(PROMPT, **options).text[5:7]
        reply = client.generate(PROMPT, **options, stop_strings=[stop, "never so"])
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    stops = ["--stop", stop, "--stop", "never so"]
    content = object_of(generate(capsys, tiny_pair, "--json", "--cloud", tiny_server.address, *arguments, *stops))
    assert (content["text"], content["token_ids"]) == (reply.text, reply.token_ids)
    assert {(span["mode"], span["num_draft_tokens"]) for span in content["mode_timeline"]} <= {
        ("speculative", 0),
        ("speculative", 3),
    }


def test_text_goes_to_stdout_and_nothing_else(capsys: pytest.CaptureFixture[str], tiny_pair: Pair) -> None:
    with Client(tiny_pair.bundle, num_threads=1) as client:
        text = client.generate(PROMPT, max_new_tokens=12, repetition_penalty=1.2).text
    arguments = ("--max-new-tokens", "12", "--repetition-penalty", "1.2")
    assert generate(capsys, tiny_pair, *arguments) == (0, text + "\n", "")


@pytest.mark.parametrize("raw", [False, True])
def test_a_dash_reads_standard_input(
    capsys: pytest.CaptureFixture[str], tiny_pair: Pair, monkeypatch: pytest.MonkeyPatch, raw: bool
) -> None:
    prompt = "several\nlines, 🦊\n"
    with Client(tiny_pair.bundle, num_threads=1) as client:
        reply = client.generate(prompt, raw=raw, max_new_tokens=6)
    monkeypatch.setattr("sys.stdin", io.StringIO(prompt))
    arguments = ["--json", "--max-new-tokens", "6", *(["--raw"] if raw else [])]
    content = object_of(generate(capsys, tiny_pair, *arguments, prompt="-"))
    assert (content["token_ids"], content["usage"]["prompt_tokens"]) == (reply.token_ids, reply.usage.prompt_tokens)


def test_raw_skips_the_chat_template(capsys: pytest.CaptureFixture[str], tiny_pair: Pair) -> None:
    arguments = ("--json", "--max-new-tokens", "1")
    raw = object_of(generate(capsys, tiny_pair, "--raw", *arguments, prompt="hello"))
    chat = object_of(generate(capsys, tiny_pair, *arguments, prompt="hello"))
    assert raw["usage"]["prompt_tokens"] == len("hello") < chat["usage"]["prompt_tokens"]


# Errors


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--mode", "best"], "'best'"),
        (["--mode", "cloud"], "needs a cloud"),
        (["--cloud", "nowhere", "--mode", "cloud"], "'nowhere'"),
        (["--temperature", "nan"], "temperature is nan"),
        (["--temperature", "warm"], "--temperature"),
        (["--top-p", "0"], "top_p is 0"),
        (["--seed", "-1"], "seed is -1"),
        (["--max-new-tokens", "0"], "max_new_tokens is 0"),
        (["--max-new-tokens", "10000"], "10000 new ones do not fit"),
        (["--num-draft-tokens", "0"], "num_draft_tokens is 0"),
        (["--deadline-s", "-1"], "deadline_s is -1"),
        (["--threads", "-1"], "num_threads is -1"),
        (["--stop", ""], "stop_strings is"),
        (["--tls-ca", "no/such.pem", "--cloud", "127.0.0.1:1", "--mode", "cloud"], "no/such.pem"),
        (["--surprise"], "--surprise"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_usage_exits_2_and_names_the_value(
    capsys: pytest.CaptureFixture[str], tiny_pair: Pair, arguments: list[str], complaint: str
) -> None:
    code, out, remarks = generate(capsys, tiny_pair, *arguments)
    assert (code, out) == (2, "")
    assert remarks.startswith("error: ")
    assert complaint in remarks
    assert len(remarks.splitlines()) == 1


def test_a_failure_exits_1(capsys: pytest.CaptureFixture[str], tiny_pair: Pair) -> None:
    address = f"127.0.0.1:{free_port()}"
    code, out, remarks = generate(capsys, tiny_pair, "--mode", "cloud", "--cloud", address, "--json")
    assert (code, out) == (1, "")
    assert remarks.startswith("error: ")
    assert address in remarks


def test_no_bundle_exits_1(capsys: pytest.CaptureFixture[str]) -> None:
    code = run(["generate", "no/such/bundle", "hi"])
    out, remarks = capsys.readouterr()
    assert (code, out) == (1, "")
    assert remarks.startswith("error: no/such/bundle is no bundle")


def test_a_prompt_that_is_no_unicode_exits_2(tiny_pair: Pair) -> None:
    done = subprocess.run([*EDGECLOUD, "generate", str(tiny_pair.bundle), b"broken \xff"], capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.startswith(b"error: the prompt is no valid Unicode text")
    assert len(done.stderr.splitlines()) == 1


# Ctrl-C

# The command itself, but it tells how far it has come, and waits there for the signal.
WAITING = """
import sys, time
import edgecloud.generation as g
from edgecloud.cli import main
def wait():
    sys.stderr.write("waiting\\n"); sys.stderr.flush()
    time.sleep(60)
class Input:
    def read(self):
        wait()
sys.stdin = Input()
add, count = g.Generation.add, [0]
def add_three(self, round_):
    count[0] += 1
    if count[0] == 4:
        wait()
    return add(self, round_)
g.Generation.add = add_three
main()
"""


def interrupt(*arguments: str) -> tuple[int, str, str]:
    """Run a generate until it waits, and press Ctrl-C."""
    command = [sys.executable, "-c", WAITING, "generate", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == "waiting\n"
        process.send_signal(signal.SIGINT)
        out, remarks = process.communicate(timeout=60)
    return process.returncode, out, remarks


@pytest.mark.parametrize("mode", ["cloud", "speculative", "edge"])
def test_ctrl_c_prints_what_there_is(tiny_pair: Pair, tiny_server: Server, mode: str) -> None:
    before = tiny_server.load().num_sessions
    arguments = ["--cloud", tiny_server.address, "--mode", mode, "--max-new-tokens", "450", "--repetition-penalty", "1.2"]
    code, out, remarks = interrupt(str(tiny_pair.bundle), PROMPT, *arguments, "--json")
    assert (code, remarks) == (130, "")
    content = json.loads(out)
    assert set(content) == KEYS
    assert content["finish_reason"] == "cancelled"
    assert content["usage"]["completion_tokens"] == len(content["token_ids"]) >= 3
    until(lambda: tiny_server.load().num_sessions <= before)
    with Client(tiny_pair.bundle, tiny_server.address, num_threads=1) as client:
        whole = client.generate(PROMPT, mode=mode, max_new_tokens=450, repetition_penalty=1.2)
    assert content["token_ids"] == whole.token_ids[: len(content["token_ids"])]
    assert whole.text.startswith(content["text"])


def test_ctrl_c_ends_streamed_text_with_its_line(tiny_pair: Pair) -> None:
    code, out, remarks = interrupt(str(tiny_pair.bundle), PROMPT, "--max-new-tokens", "450", "--repetition-penalty", "1.2")
    assert (code, remarks) == (130, "")
    assert out.endswith("\n")


def test_ctrl_c_before_anything_has_come_is_quiet(tiny_pair: Pair) -> None:
    assert interrupt(str(tiny_pair.bundle), "-", "--json") == (130, "", "")
