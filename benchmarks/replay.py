"""Ways of working compared in virtual time: recorded acceptance, measured or published pass times, links by trace or profile.

Every arm flies the same answers again and again for as long as the link's trace lasts. `regret` is auto's time a token over the
best fixed arm's. `hindsight`: of a window of 5 s, the tokens of the fixed arm that does best in it from where auto stands in the
text, over auto's; a sum over windows. The arms fly the same text at the same time, or chance would make the best of many look good.
    python benchmarks/replay.py --traces TRACES      or replay_compiled.py, twice as fast
    python benchmarks/replay.py --gpu                on paper: pass times that others published, none of them measured here
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from multiprocessing import Pool
from pathlib import Path
from random import Random
from resource import RUSAGE_CHILDREN, RUSAGE_SELF, getrusage
from typing import Any

from harness import RESULTS, report
from simpy import Environment
from virtual import VirtualGeneration
from virtual_cloud import Company, PassTimes, VirtualCloud
from virtual_device import VirtualDevice
from virtual_link import VirtualLink
from virtual_text import Text

from edgecloud.edge import pilot
from edgecloud.edge.controller import Controller
from edgecloud.edge.estimates import Estimates
from edgecloud.edge.link_config import RateFunction, Trace, read_trace
from edgecloud.edge.patience import EstimatedPatience
from edgecloud.edge.pilot import Pilot
from edgecloud.edge.plan import Fixed, Plan, Planner
from edgecloud.edge.retry import Retry, Timeout
from edgecloud.types import Round, Step

WINDOW_S = 5.0
WINDOW_STRIDE = 3  # every third is looked at
RUN_IN_S = 1.0  # before a window, for an arm to fill the link
RTT_HOLDS_S = 1.0  # a drawn round trip
OVERHEAD_MS = 2.4  # of the service around the engine, front_end.py
NOISE = 0.04  # of a pass
PROMPT_TOKENS, ANSWER_TOKENS = 64, 640
LENGTHS = (1, 2, 4, 8)
FIXED: dict[str, Plan] = {"cloud": Plan("cloud", 0), **{f"K={k}": Plan("speculative", k) for k in LENGTHS}}
ARMS = [*FIXED, "auto"]
# Quantiles of round trips as their publishers measured them (ms): share, value
PROFILES: dict[str, list[tuple[float, float]]] = {
    "5G static": [(0.0, 64), (0.1, 66), (0.5, 69), (0.9, 76), (0.99, 220), (1.0, 300)],
    "5G driving": [(0.0, 64), (0.1, 67), (0.5, 75), (0.9, 85), (0.99, 186), (1.0, 300)],
    "LTE driving": [(0.0, 70), (0.1, 74), (0.5, 84), (0.9, 101), (0.99, 330), (1.0, 400)],
    "HSPA+ driving": [(0.0, 85), (0.1, 92), (0.5, 123), (0.9, 295), (0.99, 535), (1.0, 600)],
}
# Round trips that go with the traces, which hold rates only: of Wi-Fi to a near region, and about those of a US speed test.
TRACE_RTT: dict[str, list[tuple[float, float]]] = {
    "hsdpa_3g": PROFILES["HSPA+ driving"],
    "fcc": [(0.0, 15), (0.5, 20), (1.0, 25)],
    "oboe": [(0.0, 30), (0.1, 41), (0.5, 75), (0.9, 96), (1.0, 120)],
}

# InternLM/lmdeploy, docs/en/benchmark/a100_fp16.md (v0.1.0a1, A100-80G, float16, static batches): to 64 rows the median time of a
# token at that batch size, prompts and answers of 128 tokens; from 128 rows the first token of one prompt of so many. Straight
# lines between them.
GPUS: dict[str, dict[int, float]] = {
    "7B, 1 A100": {1: 10, 16: 11, 32: 12, 64: 14, 128: 22, 2048: 139},  # llama2-7b
    "70B, 4 A100": {1: 29, 16: 30, 32: 32, 64: 37, 128: 74, 2048: 402},  # llama2-70b
}
GPU_USERS, GPU_RTT_MS, GPU_STEP_MS = (1, 16, 64, 256), (5, 30, 75), (5.0, 15.0)  # the others' streams have a row each in every pass


@dataclass(frozen=True)
class Scene:
    """What an arm flies through."""

    name: str
    duration_s: float
    rtt: list[tuple[float, float]]  # quantiles, ms
    ms_by_rows: dict[int, float]
    per_context_token_ms: float
    rows_context: int
    step_ms: float
    read_ms: float
    trace: Path | None = None
    company: list[int] = field(default_factory=lambda: [0])  # other sessions, changing every `company_s`
    company_s: float = 20.0
    rows_each: int = 1
    seed: int = 0
    overhead_ms: float = OVERHEAD_MS


@dataclass
class Flown:
    """What came of it."""

    finals: list[tuple[float, int]]  # when, how many
    pauses_s: float  # until the first token, all answers
    num_firsts: int
    num_passes: float
    num_steps: int
    num_drafted: int
    starts: list[float] = field(default_factory=list)  # of answers

    @property
    def num_tokens(self) -> int:
        return sum(number for _, number in self.finals)

    def tpot_ms(self, duration_s: float) -> float:
        return (duration_s - self.pauses_s) * 1e3 / max(1, self.num_tokens - self.num_firsts)


def fly(scene: Scene, arm: str, bits: str) -> Flown:
    """Answers one after another, until the time is up."""
    estimates, flown = Estimates.unknown(), Flown([], 0.0, 0, 0.0, 0, 0)
    env, link, cloud = _world(scene, 0.0)
    while env.now < scene.duration_s:
        begun_s, begin = env.now, len(flown.starts) * ANSWER_TOKENS
        flown.starts.append(begun_s)
        text = Text(PROMPT_TOKENS, _right(bits, begin, ANSWER_TOKENS))
        heard, device = _answer(env, scene, arm, text, link, cloud, estimates, flown, scene.duration_s)
        if heard:
            flown.pauses_s += heard[0][0] - begun_s
            flown.num_firsts += heard[0][1]
        flown.finals += heard
        flown.num_steps += device.num_steps
    flown.num_passes = cloud.num_passes
    return flown


def hindsight(scene: Scene, auto: Flown, bits: str) -> float | None:
    """Tokens of the best fixed arms over those of auto, in the windows in which auto began no answer."""
    mine = best = 0
    for window in range(1, int(scene.duration_s // WINDOW_S), WINDOW_STRIDE):
        start_s, end_s = window * WINDOW_S, (window + 1) * WINDOW_S
        if any(start_s - 2 * RUN_IN_S <= at_s <= end_s for at_s in auto.starts):
            continue
        standing = sum(number for at_s, number in auto.finals if at_s < start_s - RUN_IN_S)
        within = sum(number for at_s, number in auto.finals if start_s <= at_s < end_s)
        mine += within
        best += max(_restarted(scene, arm, bits, standing, start_s, end_s) for arm in FIXED)
    return best / mine if mine else None


def _restarted(scene: Scene, arm: str, bits: str, standing: int, start_s: float, end_s: float) -> int:
    """Tokens of an arm that begins where auto stood, in a window."""
    env, link, cloud = _world(scene, start_s - RUN_IN_S)
    already = standing % ANSWER_TOKENS
    text = Text(PROMPT_TOKENS + already, _right(bits, standing, ANSWER_TOKENS))
    cloud.know(text.prompt)
    heard, _ = _answer(env, scene, arm, text, link, cloud, Estimates.unknown(), None, end_s)
    return sum(number for at_s, number in heard if at_s >= start_s)


def _right(bits: str, begin: int, number: int) -> list[bool]:
    return [bits[(begin + i) % len(bits)] == "1" for i in range(number)]


def _world(scene: Scene, now_s: float) -> tuple[Environment, VirtualLink, VirtualCloud]:
    env = Environment(now_s)
    rate: RateFunction | None = None if scene.trace is None else _trace(scene.trace).rate
    link = VirtualLink(env, _round_trips(scene), rate, rate)
    times = PassTimes(scene.ms_by_rows, scene.per_context_token_ms, scene.rows_context)
    cloud = VirtualCloud(env, Text(1, [True]), times, _company(scene), scene.overhead_ms, NOISE, scene.seed)
    return env, link, cloud


def _answer(
    env: Environment,
    scene: Scene,
    arm: str,
    text: Text,
    link: VirtualLink,
    cloud: VirtualCloud,
    estimates: Estimates,
    flown: Flown | None,
    until_s: float,
) -> tuple[list[tuple[float, int]], VirtualDevice]:
    """One answer, or as much of it as there is time for.  -> when so many tokens became final"""
    cloud.open(text)
    device = VirtualDevice(env, text, scene.step_ms, scene.read_ms, estimates)
    planner: Planner = Controller(estimates) if arm == "auto" else Fixed(FIXED[arm])
    flown_by = Pilot(
        text.prompt,
        planner,
        Retry(Timeout(), None, "virtual"),
        EstimatedPatience(estimates, env.now),
        estimates.acceptance,
        max_new_tokens=len(text.answer),
        stop_token_ids=(),
        on_loss="continue" if arm == "auto" else "wait",
        met=32,
    )
    heard: list[tuple[float, int]] = []

    def show(step: Step, now_s: float) -> None:
        if not isinstance(step, Round):
            return
        if step.status == "final" and step.token_ids:
            heard.append((now_s, len(step.token_ids)))
        if flown is not None:
            flown.num_drafted += step.num_draft_tokens

    flight = VirtualGeneration(env, flown_by, device, link, cloud, estimates, show)
    flight.begin()
    env.run(env.any_of([flight.ended, env.timeout(max(0.0, until_s - env.now))]))
    return heard, device


@lru_cache
def _trace(path: Path) -> Trace:
    return read_trace(path)


def _round_trips(scene: Scene) -> Callable[[float], float]:
    """A round trip at a time: drawn anew every so often, the same for every arm."""
    drawn: dict[int, float] = {}
    quantiles = scene.rtt

    def rtt_ms(time_s: float) -> float:
        slot = int(time_s / RTT_HOLDS_S)
        if slot not in drawn:
            share = Random(scene.seed * 1_000_003 + slot).random()
            at = next(i for i in range(1, len(quantiles)) if share <= quantiles[i][0])
            (low, low_ms), (high, high_ms) = quantiles[at - 1], quantiles[at]
            drawn[slot] = low_ms + (high_ms - low_ms) * (share - low) / (high - low)
        return drawn[slot]

    if len(quantiles) == 1:
        return lambda _: quantiles[0][1]
    return rtt_ms


def _company(scene: Scene) -> Callable[[float], Company]:
    kinds = [Company(number, scene.rows_each) for number in scene.company]
    if len(kinds) == 1:
        return lambda _: kinds[0]
    order = Random(scene.seed).choices(kinds, k=1000)
    return lambda time_s: order[int(time_s / scene.company_s) % 1000]


def compare(scene: Scene, bits: str) -> dict[str, Any]:
    """All arms through one scene."""
    flown = {arm: fly(scene, arm, bits) for arm in ARMS}
    tpot = {arm: round(f.tpot_ms(scene.duration_s), 2) for arm, f in flown.items()}
    against_best = hindsight(scene, flown["auto"], bits)
    return {
        "name": scene.name,
        "duration_s": round(scene.duration_s, 1),
        "tpot_ms": tpot,
        "passes_per_token": {arm: round(f.num_passes / max(1, f.num_tokens), 3) for arm, f in flown.items()},
        "best_fixed": min(FIXED, key=tpot.__getitem__),
        "regret": round(tpot["auto"] / min(tpot[arm] for arm in FIXED), 3),
        "hindsight": None if against_best is None else round(against_best, 3),
    }


def fitted(recorded: Path) -> dict[str, Any]:
    """Times of this machine's pair, as a Scene takes them."""
    times = json.loads(recorded.read_text("utf-8"))
    rows, least = {}, 0.0
    for number, ms in sorted((int(n), ms) for n, ms in times["pass_ms_by_rows"].items()):
        rows[number] = least = max(least, ms)  # more rows never take less
    context = sorted((int(n), ms) for n, ms in times["pass_ms_by_context"].items())
    slope = max(0.0, (context[-1][1] - context[0][1]) / (context[-1][0] - context[0][0]))
    return {
        "ms_by_rows": rows,
        "per_context_token_ms": slope,
        "rows_context": times["rows_context"],
        "step_ms": times["step_ms"],
        "read_ms": times["read_ms_per_token"],
    }


def here(pair: dict[str, Any], traces: Path | None, minutes: float) -> list[Scene]:
    """The pair of this machine: constant round trips, profiles, and every trace, quiet and with sessions that come and go."""
    made = [Scene(f"rtt {rtt_ms} ms", minutes * 60, [(0.0, rtt_ms)], **pair) for rtt_ms in (2, 20, 60, 120, 250)]
    made += [Scene(name, minutes * 60, rtt, **pair) for name, rtt in PROFILES.items()]
    files = [] if traces is None else sorted(path for kind in TRACE_RTT for path in (traces / kind).iterdir())
    for number, path in enumerate(files):
        trace, kind = read_trace(path), path.parent.name
        shape: dict[str, Any] = {
            "duration_s": min(trace.period_s, minutes * 60),
            "rtt": TRACE_RTT[kind],
            "trace": path,
            "seed": number,
            **pair,
        }
        made.append(Scene(f"{kind}/{path.stem}", **shape))
        made.append(Scene(f"{kind}/{path.stem}, company", company=[0, 0, 2, 6, 12], **shape))
    return made


def on_paper(minutes: float) -> list[Scene]:
    """Published pass times, devices of two speeds."""
    return [
        Scene(
            f"{gpu}, {users} users, step {step_ms:g}, rtt {rtt_ms}",
            minutes * 60,
            [(0.0, rtt_ms)],
            ms_by_rows,
            0.0,
            0,
            step_ms,
            1.0,
            company=[users - 1],
        )
        for gpu, ms_by_rows in GPUS.items()
        for users in GPU_USERS
        for step_ms in GPU_STEP_MS
        for rtt_ms in GPU_RTT_MS
    ]


def _compared(bits: str, scene: Scene) -> dict[str, Any]:
    return compare(scene, bits)


def compare_all(scenes: Sequence[Scene], bits: str, processes: int) -> list[dict[str, Any]]:
    if processes == 1:
        return [compare(scene, bits) for scene in scenes]
    with Pool(processes) as pool:
        results = pool.map(partial(_compared, bits), scenes, chunksize=1)
        pool.close()
        pool.join()  # or their time would not be counted
    return results


def shown(rows: Iterable[dict[str, Any]]) -> None:
    print(f"{'':42}" + "".join(f"{arm:>8}" for arm in ARMS) + "   passes  best   regret  hindsight")
    for row in rows:
        line = "".join(f"{row['tpot_ms'][arm]:8.1f}" for arm in ARMS)
        print(
            f"{row['name'][:41]:42}{line}{row['passes_per_token']['auto']:9.2f}  {row['best_fixed']:6}"
            f"{row['regret']:7.2f}{row['hindsight'] or math.nan:9.2f}"
        )


def grouped(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for all traces of a kind: medians."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in results:
        folder, _, rest = row["name"].partition("/")
        groups.setdefault(folder + (", company" if rest.endswith(", company") else ""), []).append(row)
    rows = []
    for name, members in groups.items():
        tpot = {arm: statistics.median(m["tpot_ms"][arm] for m in members) for arm in ARMS}
        passes = {arm: statistics.median(m["passes_per_token"][arm] for m in members) for arm in ARMS}
        common = [m["best_fixed"] for m in members]
        rows.append(
            {
                "name": f"{name} ({len(members)})" if len(members) > 1 else name,
                "tpot_ms": tpot,
                "passes_per_token": passes,
                "best_fixed": max(set(common), key=common.count),
                "regret": statistics.median(m["regret"] for m in members),
                "hindsight": _median([m["hindsight"] for m in members if m["hindsight"]]),
            }
        )
    return rows


def _median(values: list[float]) -> float | None:
    return statistics.median(values) if values else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--traces", type=Path, help="a folder with hsdpa_3g, fcc and oboe; without it no traces")
    parser.add_argument("--acceptance", type=Path, default=RESULTS / "acceptance.json")
    parser.add_argument("--times", type=Path, default=RESULTS / "times.json")
    parser.add_argument("--temperature", default="0", choices=["0", "1"])
    parser.add_argument("--minutes", type=float, default=5.0, help="at most, of any one")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--gpu", action="store_true", help="published pass times instead of this machine's")
    parser.add_argument("--json-out", type=Path, help="default: replay.json or replay_gpu.json in results")
    options = parser.parse_args()
    out = options.json_out or RESULTS / ("replay_gpu.json" if options.gpu else "replay.json")
    recorded = json.loads(options.acceptance.read_text("utf-8"))
    answers = [answer["bits"] for answer in recorded["answers"][options.temperature]]
    bits = "".join(Random(0).sample(answers, len(answers)))
    gc.set_threshold(100_000)  # worlds are many small objects, nearly all of them freed without the collector
    start = time.perf_counter()
    scenes = on_paper(options.minutes) if options.gpu else here(fitted(options.times), options.traces, options.minutes)
    results = compare_all(scenes, bits, options.processes)
    took_s = time.perf_counter() - start
    cpu_s = sum(sum(getrusage(who)[:2]) for who in (RUSAGE_SELF, RUSAGE_CHILDREN))
    windows = len(FIXED) * (RUN_IN_S + WINDOW_S) / (WINDOW_STRIDE * WINDOW_S)  # flown again, for the hindsight
    trace_minutes = sum(row["duration_s"] for row in results) * (len(ARMS) + windows) / 60
    rows = grouped(results)
    shown(rows)
    rate = round(trace_minutes / took_s * 60)
    print(f"{trace_minutes:.0f} trace minutes in {took_s:.1f} s: {rate} a minute")
    traced = [row for row in results if "/" in row["name"]]
    figures: list[tuple[str, float, str, float]] = []
    for name, some in (
        ("quiet", [row for row in traced if "company" not in row["name"]]),
        ("company", [row for row in traced if "company" in row["name"]]),
        ("all traces", traced),
    ):
        if some:
            ahead = _median([r["hindsight"] for r in some if r["hindsight"]]) or math.inf
            figures.append((f"auto against the best arm of every 5 s, {name}", ahead, "<=", 1.1))
            figures.append((f"auto against the best fixed arm, {name}", statistics.median(r["regret"] for r in some), "<=", 1.1))
    raw: dict[str, Any] = {"on_paper": GPUS} if options.gpu else {}
    speed = {
        "trace_minute": "a minute of one scene for one arm, also what is flown again for the hindsight",
        "trace_minutes": round(trace_minutes),
        "wall_s": round(took_s, 1),
        "trace_minutes_per_minute": rate,
        "trace_minutes_per_cpu_minute": round(trace_minutes / cpu_s * 60),  # whatever else the machine did
        "processes": options.processes,
        "compiled": not str(pilot.__file__).endswith(".py"),
    }
    raw |= {"speed": speed, "table": rows, "results": results}
    report(out, figures, raw)


if __name__ == "__main__":
    main()
