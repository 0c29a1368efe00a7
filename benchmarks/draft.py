"""A draft against another one of the same target: the time of a step, and how often each is the target's greedy choice.

Steps: one thread, one core, after the same contexts, in changing order; the median over repetitions of the ratio. Agreement is
counted along answers that were recorded before (`edgecloud distill` keeps them; those at temperature 0 are taken), in each of
whose positions the draft has the target's own text before it. Give answers to prompts that neither draft has learnt from.
    python benchmarks/draft.py --bundle build/distilled --against build/smol --answers held_out.jsonl
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import harness

from edgecloud.answers import Answer, AnswerFile
from edgecloud.bundle import Bundle
from edgecloud.edge.model import DraftModel
from edgecloud.kernels.choice_numpy import choose
from edgecloud.sampling import SamplingSettings

CONTEXTS = (128, 480)
STEPS = 8  # timed together
GREEDY = SamplingSettings()


def load(path: Path) -> DraftModel:
    return DraftModel.of_bundle(Bundle.open(path), 2048, num_threads=1)


def step_ms(model: DraftModel, context: Sequence[int]) -> float:
    """A step's time, choice included."""
    tokens = list(context)
    model.extend_to(tokens)
    start = time.perf_counter()
    for _ in range(STEPS):
        tokens.append(17)  # the same for both
        choose(model.extend_to(tokens), tokens, GREEDY, model.entries)
    return (time.perf_counter() - start) * 1e3 / STEPS


def num_right(model: DraftModel, answer: Answer) -> int:
    """Positions of the answer at which the draft's greedy choice is the target's token."""
    tokens, right = list(answer.prompt_ids), 0
    for token in answer.answer_ids:
        right += choose(model.extend_to(tokens), tokens, GREEDY, model.entries) == token
        tokens.append(token)
    return right


def main() -> None:
    parser = harness.arguments(__doc__, __file__)
    parser.add_argument("--against", type=Path, required=True, help="bundle of the other draft")
    parser.add_argument("--answers", type=Path, help="default: no agreement")
    parser.add_argument("--num-answers", type=int, default=100)
    parser.add_argument("--repetitions", type=int, default=30)
    options = parser.parse_args()
    paths = {"draft": harness.find_bundle(options.bundle), "against": options.against}
    models = {name: load(path) for name, path in paths.items()}
    _, cpu = harness.cores()
    milliseconds: dict[str, dict[int, list[float]]] = {name: {length: [] for length in CONTEXTS} for name in models}
    with harness.pinned(cpu):
        for number in range(options.repetitions + 1):
            for length in CONTEXTS:
                for name in list(models) if number % 2 else list(reversed(models)):
                    took = step_ms(models[name], [100 + (7 * at) % 1000 for at in range(length)])
                    if number:  # the first warms
                        milliseconds[name][length].append(took)
        answers = [] if options.answers is None else [a for a in AnswerFile(options.answers) if a.temperature == 0]
        answers = answers[: options.num_answers]
        right = {name: [num_right(model, answer) for answer in answers] for name, model in models.items()}
    ratios = {
        length: harness.spread([a / b for a, b in zip(milliseconds["draft"][length], milliseconds["against"][length], strict=True)])
        for length in CONTEXTS
    }
    num_tokens = sum(len(answer.answer_ids) for answer in answers)
    agreement = {name: sum(counts) / max(1, num_tokens) for name, counts in right.items()}
    figures = [
        (f"device step, draft / against, {length} tokens of context", ratios[length]["median"], "<=", 0.25) for length in CONTEXTS
    ]
    if answers:
        figures.append(("greedy agreement with the target", agreement["draft"], ">=", 0.55))
    harness.report(
        options.json_out,
        figures,
        {
            "pinning": {"device_cpu": cpu},
            "draft_bytes": {
                name: sum(f.stat().st_size for f in (path / "edge" / "draft").glob("model.onnx*")) for name, path in paths.items()
            },
            "ratios": ratios,
            "agreement": agreement,
            "num_answers": len(answers),
            "num_answer_tokens": num_tokens,
            "right": {name: dict(zip((a.key for a in answers), counts, strict=True)) for name, counts in right.items()},
            "raw_ms": {name: {str(length): values for length, values in of.items()} for name, of in milliseconds.items()},
        },
    )


if __name__ == "__main__":
    main()
