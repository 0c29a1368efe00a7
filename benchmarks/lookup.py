"""Cloud passes per final token by who drafts: the model, copies of the text, or both; per category of Spec-Bench, greedy.

Counted, not timed: the pilot flies along the target's recorded answers, where the draft's guess at every token is known (behind a
wrong one it does not matter). `--recorded` keeps them, and is made if it is not there: JSON lines of id, category, prompt_ids,
answer_ids and guess_ids. With --served N, N prompts of summarization and RAG are answered by a real service, too.
    python benchmarks/lookup.py --prompts spec_bench_dev.jsonl --recorded answers.jsonl
"""

from __future__ import annotations

import json
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness
from cloud_passes import read, sample
from record_acceptance import AT_A_TIME, Target

from edgecloud.bundle import Bundle
from edgecloud.client import Client
from edgecloud.edge.drafter import ModelDrafter
from edgecloud.edge.lookup import Lookup, Trust
from edgecloud.edge.model import DraftModel
from edgecloud.edge.pilot import Cancel, Draft, Drafted, Failed, Happening, Judged, Pilot, Verify
from edgecloud.edge.plan import Fixed, Plan
from edgecloud.edge.retry import Retry, Timeout
from edgecloud.errors import ContextMissingError
from edgecloud.sampling import SamplingSettings
from edgecloud.types import CallCost, DrafterChoice, Round, Verdict

NUM_DRAFT_TOKENS = 4
STEPS_A_PASS = 5  # of the device, while the service is at work
COPYING = ("summarization", "rag")
DRAFTERS: tuple[DrafterChoice, ...] = ("model", "lookup", "both")
LONGER = 6  # the model's drafts when they are as long as both together make theirs
WRONG = -1


@dataclass(frozen=True)
class Answer:
    """What the target said, and what the draft would have said at every token of it."""

    category: str
    prompt_ids: list[int]
    answer_ids: list[int]
    guess_ids: list[int]

    @property
    def tokens(self) -> list[int]:
        return self.prompt_ids + self.answer_ids


class Unhurried:
    """Nothing is ever late, and nobody counts the guesses."""

    def overdue_s(self, num_new_tokens: int, streaming: bool) -> float:
        return 1e9

    def lost_s(self, num_new_tokens: int, streaming: bool) -> float:
        return 1e9

    def add(self, position: int, accepted: bool) -> None:
        pass


def fly(answer: Answer, lookup: Lookup | None, num_draft_tokens: int) -> Counter[str]:
    """What one generation takes."""
    tokens, start, nobody = answer.tokens, len(answer.prompt_ids), Unhurried()
    planner, retry = Fixed(Plan("speculative", num_draft_tokens)), Retry(Timeout(), None, "the service")
    pilot = Pilot(answer.prompt_ids, planner, retry, nobody, nobody, met=32, on_loss="wait", lookup=lookup,
                  max_new_tokens=len(answer.answer_ids), stop_token_ids=())  # fmt: skip
    taken = Counter(tokens=len(answer.answer_ids))
    drafts: deque[Draft] = deque()
    calls: deque[Verify] = deque()
    num_steps = 0  # since the last answer
    pilot.begin(0.0)
    while not pilot.finished:
        for action in pilot.actions:
            if isinstance(action, Draft):
                drafts.append(action)
            elif isinstance(action, Verify):
                calls.append(action)
            elif isinstance(action, Cancel):
                calls = deque(call for call in calls if call.call != action.call)
        pilot.actions.clear()
        if drafts and (not calls or num_steps < STEPS_A_PASS):
            order, num_steps = drafts.popleft(), num_steps + 1
            right = order.tokens == tokens[: len(order.tokens)]
            pilot.take(Drafted(order.version, answer.guess_ids[len(order.tokens) - start] if right else WRONG), 0.0)
            taken["steps"] += 1
        else:
            num_steps = 0
            pilot.take(judge(calls.popleft(), tokens, len(pilot.tokens)), 0.0)
    for step in pilot.steps:
        if isinstance(step, Round):
            taken.update(passes=1, drafted=step.num_draft_tokens, accepted=step.num_accepted)
    return taken


def judge(call: Verify, tokens: Sequence[int], num_final: int) -> Happening:
    """The service's answer: a context that it does not have is refused without a pass."""
    before = len(call.tokens)
    if before > num_final or call.tokens != tokens[:before]:
        return Failed(call.call, ContextMissingError("it was assumed to have more", 0))
    same = next((at for at, (a, b) in enumerate(zip(call.draft_ids, tokens[before:], strict=False)) if a != b), len(call.draft_ids))
    return Judged(call.call, Verdict(same, tokens[before + same], CallCost()))


def tables(answers: Sequence[Answer]) -> dict[str, dict[str, Counter[str]]]:
    """By drafter and category; `longer` is the model with longer drafts."""
    found: dict[str, dict[str, Counter[str]]] = {}
    for drafter in (*DRAFTERS, "longer"):
        num_draft_tokens = LONGER if drafter == "longer" else NUM_DRAFT_TOKENS
        trust = Trust()  # as one client would have it, from prompt to prompt
        by_category: dict[str, Counter[str]] = {}
        for answer in answers:
            lookup = Lookup(answer.prompt_ids, trust, alone=drafter == "lookup") if drafter in {"lookup", "both"} else None
            by_category.setdefault(answer.category, Counter()).update(fly(answer, lookup, num_draft_tokens))
        found[drafter] = by_category
    return found


def ratios(taken: Counter[str]) -> dict[str, float]:
    """Of sums, per final token and per pass."""
    return {
        "num_tokens": taken["tokens"],
        "passes_per_token": round(taken["passes"] / taken["tokens"], 4),
        "device_steps_per_token": round(taken["steps"] / taken["tokens"], 3),
        "drafted_per_pass": round(taken["drafted"] / taken["passes"], 2),
        "accepted_per_pass": round(taken["accepted"] / taken["passes"], 2),
    }


def record(bundle: Path, client: Client, questions: Sequence[dict[str, Any]], max_new_tokens: int) -> Iterator[dict[str, Any]]:
    """The target's answers, and the draft's guesses along them."""
    opened = Bundle.open(bundle)
    vocab_size = min(opened.draft.vocab_size, opened.target.vocab_size)
    target = Target(bundle / "cloud")
    drafter = ModelDrafter(lambda: DraftModel.of_bundle(opened, opened.draft.max_context_tokens, 1), vocab_size)
    stops, greedy = frozenset(opened.tokenizer.eos_token_ids), SamplingSettings()
    for begin in range(0, len(questions), AT_A_TIME):
        some = questions[begin : begin + AT_A_TIME]
        prompts = [client.tokenizer.encode_chat([{"role": "user", "content": question["prompt"]}]) for question in some]
        texts = target.texts(prompts, max_new_tokens, stops, greedy)
        for question, prompt, text in zip(some, prompts, texts, strict=True):
            guesses = [drafter.draft(prompt + text[:at], 1, greedy, ())[0] for at in range(len(text))]
            yield {**question, "prompt_ids": prompt, "answer_ids": text, "guess_ids": guesses}
        harness.progress(f"recorded {begin + len(some)} of {len(questions)}")


def served(bundle: Path, client: Client, address: str, answers: Sequence[Answer], max_new_tokens: int) -> dict[str, Any]:
    """The same through a real service, and whether the text stays that of mode cloud."""
    sums: dict[str, Counter[str]] = {drafter: Counter() for drafter in DRAFTERS}
    num_same = 0
    for answer in answers:
        texts = []
        for drafter in DRAFTERS:
            reply = client.start(answer.prompt_ids, None, mode="speculative", drafter=drafter, max_new_tokens=max_new_tokens,
                                 num_draft_tokens=NUM_DRAFT_TOKENS).finish()  # fmt: skip
            metrics = reply.metrics
            sums[drafter].update(tokens=len(reply.token_ids), passes=round(metrics.target_passes),
                                 drafted=metrics.num_draft_tokens, accepted=metrics.num_accepted_tokens)  # fmt: skip
            texts.append(reply.token_ids)
        num_same += all(text == answer.answer_ids[: len(text)] for text in texts)
        harness.progress(f"served {dict(sums['both'])}, same text {num_same}")
    rows = {drafter: {key: value for key, value in ratios(taken).items() if "steps" not in key} for drafter, taken in sums.items()}
    return {"num_prompts": len(answers), "num_with_the_targets_text": num_same, **rows}


def main() -> None:
    parser = harness.arguments(__doc__, __file__)
    parser.add_argument("--prompts", type=Path, help="JSON lines with question_id, category, turns; needed to record")
    parser.add_argument("--recorded", type=Path)
    parser.add_argument("--per-category", type=int, default=24)
    parser.add_argument("--max-new-tokens", type=int, default=160)
    parser.add_argument("--max-prompt-tokens", type=int, default=1500)
    parser.add_argument("--served", type=int, default=0, help="prompts to answer through a real service")
    parser.add_argument("--served-tokens", type=int, default=96)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.recorded is not None and options.recorded.exists():
        rows = [json.loads(line) for line in options.recorded.read_text("utf-8").splitlines()]
    else:
        if options.prompts is None:
            parser.error("nothing is recorded there; give --prompts")
        bundle = harness.find_bundle(options.bundle)
        with Client(bundle) as client:
            questions, _ = sample(client, read(options.prompts), options.per_category, options.max_prompt_tokens, options.seed)
            rows = list(record(bundle, client, questions, options.max_new_tokens))
        if options.recorded is not None:
            options.recorded.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    answers = [Answer(row["category"], row["prompt_ids"], row["answer_ids"], row["guess_ids"]) for row in rows]
    found = tables(answers)
    whole = {drafter: sum(by_category.values(), Counter()) for drafter, by_category in found.items()}
    copying = {drafter: sum((by[c] for c in COPYING), Counter()) for drafter, by in found.items()}
    least = {category: found["both"][category]["passes"] / taken["passes"] for category, taken in found["model"].items()}
    through_service = None
    if options.served:
        bundle = harness.find_bundle(options.bundle)
        cloud_cpu, device_cpu = harness.cores()
        some = [answer for answer in answers if answer.category in COPYING][: options.served]
        with (
            harness.serving(bundle, cloud_cpu) as address,
            harness.pinned(device_cpu),
            Client(bundle, address, num_threads=1) as client,
        ):
            through_service = served(bundle, client, address, some, options.served_tokens)
    harness.report(
        options.json_out,
        [
            ("cloud passes with lookup against without, summarization and RAG",
             copying["both"]["passes"] / copying["model"]["passes"], "<=", 0.85),
            ("the same in the category that gains least", max(least.values()), "<=", 1.0),
        ],
        {
            "num_draft_tokens": NUM_DRAFT_TOKENS,
            "longer_num_draft_tokens": LONGER,
            "num_answers": Counter(answer.category for answer in answers),
            "summarization_and_rag": {drafter: ratios(taken) for drafter, taken in copying.items()},
            "overall": {drafter: ratios(taken) for drafter, taken in whole.items()},
            "by_category": {
                category: {drafter: ratios(by[category]) for drafter, by in found.items()} for category in sorted(least)
            },
            "served": through_service,
        },
    )  # fmt: skip


if __name__ == "__main__":
    main()
