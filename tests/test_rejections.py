"""The log of refused guesses: off unless wanted, whole after a crash, within its cap, and true to what the target said."""

from __future__ import annotations

import json
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pairs import Pair, Server

from edgecloud.answers import AnswerFile
from edgecloud.cli.app import run as run_command
from edgecloud.client import Client
from edgecloud.errors import ConfigError, RejectionLogError
from edgecloud.rejection_watch import MAX_IDS, NUM_KEPT_IDS, RejectionWatch
from edgecloud.rejections import DEFAULT_MAX_BYTES, MIN_BYTES, Passage, RejectionLog, Source
from edgecloud.types import Guess, Round

pytest_plugins = ["pairs"]

SOURCE = Source("t" * 64, "d" * 64, "k" * 64)
PROMPT = "Why is the sky blue?"


def passage(number: int = 0, length: int = 20) -> Passage:
    return Passage(tuple(range(number, number + length)), 5, ((7, 0), (9, 1)) if number > 9 else ((7, 50),), 0.0)


def passages(log: RejectionLog) -> list[Passage]:
    return [found for segment in log.read() for found in segment.passages]


# The file


def test_what_was_added_is_read_again_in_order(tmp_path: Path) -> None:
    log = RejectionLog(tmp_path / "log")
    log.prepare()
    for number in range(30):
        log.add(SOURCE, passage(number))
    [segment] = log.read()
    assert segment.passages == [passage(number) for number in range(30)]
    assert segment.source == SOURCE


def test_a_segment_holds_ids_fingerprints_and_a_day_and_nothing_else(tmp_path: Path) -> None:
    log = RejectionLog(tmp_path)
    log.prepare()
    log.add(SOURCE, passage())
    head, line = map(json.loads, (tmp_path / "00000001.jsonl").read_text().splitlines())
    assert set(head) == {"version", "day", "target", "draft", "tokenizer"}
    assert len(head["day"]) == len("2026-01-31")
    assert set(line) == {"ids", "answer_start", "rejected", "temperature"}


def test_only_the_owner_may_read_it(tmp_path: Path) -> None:
    log = RejectionLog(tmp_path / "log")
    log.prepare()
    log.add(SOURCE, passage())
    assert stat.S_IMODE((tmp_path / "log").stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "log").iterdir()} == {0o600}


def test_the_cap_holds_and_the_oldest_go(tmp_path: Path) -> None:
    log = RejectionLog(tmp_path, max_bytes=MIN_BYTES)
    log.prepare()
    for number in range(1500):
        log.add(SOURCE, passage(number))
        assert log.num_bytes() <= MIN_BYTES
    kept = passages(log)
    assert kept == [passage(number) for number in range(1500 - len(kept), 1500)]
    assert log.num_bytes() > MIN_BYTES * 3 // 4


def test_a_passage_that_would_fill_a_segment_is_left_out(tmp_path: Path) -> None:
    log = RejectionLog(tmp_path, max_bytes=MIN_BYTES)
    log.prepare()
    log.add(SOURCE, passage(length=10_000))
    assert passages(log) == []


@given(cut=st.integers(min_value=0, max_value=400))
@settings(max_examples=40, deadline=None)
def test_a_torn_end_loses_that_line_alone(cut: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("torn")
    log = RejectionLog(folder)
    log.prepare()
    for number in range(6):
        log.add(SOURCE, passage(number))
    path = folder / "00000001.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) - cut])
    num_whole = max(0, path.read_bytes().count(b"\n") - 1)
    log.add(SOURCE, passage(99))  # goes on, in another segment if this one has a torn end
    assert passages(log) == [*map(passage, range(num_whole)), passage(99)]


WRITER = """
import sys
from edgecloud.rejections import Passage, RejectionLog, Source
log = RejectionLog(sys.argv[1], max_bytes=1 << 16)
log.prepare()
for number in range(10**9):
    log.add(Source("t", "d", "k"), Passage(tuple(range(number, number + 100)), 5, ((7, 10**6),), 0.0))
    if number == 50:
        print("writing", flush=True)
"""


def test_it_is_whole_after_kill_9(tmp_path: Path) -> None:
    for _ in range(2):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        assert writer.stdout is not None
        assert writer.stdout.readline()
        writer.send_signal(signal.SIGKILL)
        writer.communicate()
        found = RejectionLog(tmp_path, max_bytes=MIN_BYTES).read()
        assert sum(len(segment.passages) for segment in found) > 20
        assert RejectionLog(tmp_path).num_bytes() <= MIN_BYTES


def test_two_processes_may_write(tmp_path: Path) -> None:
    code = WRITER.replace("10**9", "int(sys.argv[2]), int(sys.argv[2]) + 100").replace("1 << 16", "1 << 20")
    writers = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path), start], stdout=subprocess.DEVNULL) for start in ("0", "100")
    ]
    assert [writer.wait() for writer in writers] == [0, 0]
    assert sorted(found.ids[0] for found in passages(RejectionLog(tmp_path))) == list(range(200))


def test_other_models_begin_another_segment(tmp_path: Path) -> None:
    log = RejectionLog(tmp_path)
    log.prepare()
    other = Source("t" * 64, "e" * 64, "k" * 64)
    for source in (SOURCE, other, other):
        log.add(source, passage())
    assert [(segment.source, len(segment.passages)) for segment in log.read()] == [(SOURCE, 1), (other, 2)]


def test_clearing_leaves_nothing(tmp_path: Path) -> None:
    log = RejectionLog(tmp_path)
    assert RejectionLog(tmp_path / "never").clear() == 0
    log.prepare()
    log.add(SOURCE, passage())
    assert log.clear() == 1
    assert log.read() == []


@pytest.mark.parametrize(
    "content",
    ["hello\n", '{"version":2}\n', "[]\n", '{"version":1,"day":"x","target":"t","draft":"d"}\n', '{"version":1,"day":1}\n'],
)
def test_a_file_that_is_no_segment_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "00000001.jsonl").write_text(content)
    with pytest.raises(RejectionLogError, match="00000001.jsonl"):
        RejectionLog(tmp_path).read()


@pytest.mark.parametrize(
    "change",
    [
        {"ids": [1, 2, -3]}, {"ids": ["a"]}, {"ids": []}, {"answer_start": 0}, {"rejected": []}, {"rejected": [[1, 2]]},
        {"rejected": [[7, 7]]}, {"rejected": [[99, 7]]}, {"rejected": [[8, 0], [7, 0]]}, {"temperature": "hot"}, {"text": "secret"},
    ],
)  # fmt: skip
def test_a_line_that_is_no_passage_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    log = RejectionLog(tmp_path)
    log.prepare()
    log.add(SOURCE, passage())
    path = tmp_path / "00000001.jsonl"
    head, line = path.read_text().splitlines()
    path.write_text(f"{head}\n{json.dumps(json.loads(line) | change)}\n")
    with pytest.raises(RejectionLogError, match="delete it"):
        log.read()


def test_bad_places_and_sizes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="65536"):
        RejectionLog(tmp_path, max_bytes=10)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="another folder"):
        RejectionLog(tmp_path / "file").prepare()
    with pytest.raises(RejectionLogError, match="learn_from"):
        RejectionLog(tmp_path / "never").read()


# Who looks on


def watch_all(steps: list[object], prompt: list[int] | None = None) -> list[Passage]:
    seen: list[Passage] = []
    watch = RejectionWatch(prompt or [1, 2, 3], 0.0, seen.append)
    for step in steps:
        watch.look(step)
    watch.finish()
    return seen


def final(*ids: int) -> Round:
    return Round(list(ids), "speculative", "final")


def test_a_refused_guess_is_noted_with_what_the_target_chose() -> None:
    [seen] = watch_all([Guess([10, 11]), Guess([12]), final(10, 99), Guess([5]), final(5, 6), final(7)])
    assert seen == Passage((1, 2, 3, 10, 99, 5, 6, 7), 3, ((4, 11),), 0.0)


def test_where_every_guess_was_right_nothing_is_kept() -> None:
    assert watch_all([Guess([10, 11, 12]), final(10, 11), final(12, 13), final()]) == []


def test_tokens_that_nobody_verified_are_context_only() -> None:
    skipped = Round([20, 21], "edge", "provisional")
    seen = watch_all([Guess([9]), final(10), Guess([20, 21, 22]), skipped, final(30)])
    assert [(found.ids, found.answer_start, found.rejected) for found in seen] == [
        ((1, 2, 3, 10), 3, ((3, 9),)),
        ((1, 2, 3, 10, 20, 21, 30), 6, ((6, 22),)),
    ]


def test_long_answers_become_passages_that_overlap() -> None:
    prompt = list(range(1000, 2000))
    steps: list[object] = []
    for token in range(600):
        steps += [Guess([7777]), final(token)]
    seen = watch_all(steps, prompt)
    assert [len(found.ids) for found in seen][:-1] == [MAX_IDS] * (len(seen) - 1)
    assert [found.ids[position] for found in seen for position, _ in found.rejected] == list(range(600))
    assert all(found.answer_start >= NUM_KEPT_IDS for found in seen)


# The client


def test_nothing_is_kept_unless_wanted(
    tiny_pair: Pair, tiny_server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("the log was used")

    for name in ("__init__", "prepare", "add"):
        monkeypatch.setattr(RejectionLog, name, never)
    with Client(tiny_pair.bundle, tiny_server.address, num_threads=1) as client:
        client.generate(PROMPT, max_new_tokens=8, mode="speculative")


@pytest.mark.parametrize("mode", ["speculative", "auto"])
def test_the_log_says_what_the_target_says(mode: Any, tiny_pair: Pair, tiny_server: Server, tmp_path: Path) -> None:
    with Client(tiny_pair.bundle, tiny_server.address, num_threads=1) as plain:
        without = plain.generate(PROMPT, max_new_tokens=24, mode=mode)
    with Client(tiny_pair.bundle, tiny_server.address, num_threads=1, learn_from=tmp_path / "log") as client:
        reply = client.generate(PROMPT, max_new_tokens=24, mode=mode)
        assert reply.token_ids == without.token_ids  # looking on changes nothing
        bundle, prompt = client.bundle, client.tokenizer.encode_chat([{"role": "user", "content": PROMPT}])
    [segment] = RejectionLog(tmp_path / "log").read()
    assert segment.source == Source(bundle.target.fingerprint, bundle.draft.fingerprint, bundle.tokenizer.fingerprint)
    [found] = segment.passages
    assert list(found.ids) == prompt + reply.token_ids
    assert found.answer_start == len(prompt)
    rounds = reply.metrics
    if mode == "speculative":
        assert len(found.rejected) >= sum(rounds.acceptance_histogram[:-1]) > 0


@pytest.mark.parametrize("mode", ["edge", "split"])
def test_where_the_target_says_nothing_nothing_is_kept(mode: Any, tiny_pair: Pair, tiny_server: Server, tmp_path: Path) -> None:
    with Client(tiny_pair.bundle, tiny_server.address, num_threads=1, learn_from=tmp_path / "log") as client:
        client.generate(PROMPT, max_new_tokens=8, mode=mode)
    assert not (tmp_path / "log").exists()


def test_a_full_disk_costs_the_log_and_not_the_answer(
    tiny_pair: Pair, tiny_server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Full(RejectionLog):
        def add(self, source: Source, passage: Passage) -> None:
            raise OSError(28, "No space left on device")

    with Client(tiny_pair.bundle, tiny_server.address, num_threads=1, learn_from=Full(tmp_path, DEFAULT_MAX_BYTES)) as client:
        assert len(client.generate(PROMPT, max_new_tokens=16, mode="speculative").token_ids) == 16
    assert "No space left" in caplog.text


def test_the_command_line_logs_counts_hands_on_and_clears(
    tiny_pair: Pair, tiny_server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*words: str) -> dict[str, Any]:
        assert run_command([*words, "--json"]) == 0
        content: dict[str, Any] = json.loads(capsys.readouterr().out)
        return content

    log = str(tmp_path / "log")
    run("generate", str(tiny_pair.bundle), PROMPT, "--cloud", tiny_server.address, "--mode", "speculative",
        "--max-new-tokens", "16", "--threads", "1", "--log-rejections", log)  # fmt: skip
    found = run("rejections", log)
    assert found["num_passages"] == 1
    assert found["num_rejected"] > 0
    answers = tmp_path / "answers.jsonl"
    assert [run("rejections", log, "--answers", str(answers))["num_answers_added"] for _ in range(2)] == [1, 0]
    [answer], [kept] = AnswerFile(answers), passages(RejectionLog(log))
    assert answer.ids == list(kept.ids)
    assert len(answer.prompt_ids) == kept.answer_start
    assert run("rejections", log, "--clear")["num_segments_deleted"] == 1
    assert run("rejections", log)["num_passages"] == 0
