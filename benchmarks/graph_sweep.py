"""Cut graphs: the plan's choice, its prediction and mode `auto` against every cut of the bundle, over five links.

The device has a core. The cloud has the other one, and then both, for it works while the device waits: nothing is emulated but the
link, which runs beside the cloud. Arms in turn.
    python benchmarks/graph_sweep.py [--seconds 4] [--models ppocr-det,minilm]
"""

from __future__ import annotations

import itertools
import math
import random
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import graph_inputs
import harness
import numpy as np

from edgecloud.client import Client
from edgecloud.graph_bundle import GraphBundle
from edgecloud.inference import InferenceReply
from edgecloud.links import Link
from edgecloud.partitioner.graph_partition import partition_graph
from edgecloud.partitioner.graph_plan import cheapest, cost_ms
from edgecloud.partitioner.graph_prepare import prepare
from edgecloud.partitioner.graph_request import GraphRequest
from edgecloud.partitioner.link_spec import LinkSpec

LINKS = (LinkSpec(100, 100, 5), LinkSpec(50, 50, 20), LinkSpec(20, 20, 40), LinkSpec(5, 5, 40), LinkSpec(5, 5, 100))
JUDGED = LINKS[3]  # where auto must not lose to either side alone
MAX_LOSS = 0.02
MIN_ROUNDS, FAR_BEHIND = 3, 2.0
Times = dict[str, list[float]]  # milliseconds of every round by arm


def plan(name: str, cloud_threads: int, cpus: tuple[int, int], folder: Path) -> tuple[GraphBundle, GraphRequest, Path]:
    """A bundle planned for one core, and for a cloud with the other one or with both."""
    model, sample = graph_inputs.write_graph(name, folder)
    cloud, device = cpus
    profile = folder / f"{name}-{cloud_threads}.json"
    seen = GraphRequest(model, folder / "none", (sample,), save_profile=profile, num_threads=cloud_threads)
    with harness.pinned(cloud if cloud_threads == 1 else None):
        prepare(seen, lambda _: None)
    request = GraphRequest(
        model=model, bundle=folder / f"{name}-{cloud_threads}", inputs=(sample,), link=JUDGED, cloud_profile=profile,
        max_loss=MAX_LOSS, loss_metric=graph_inputs.LOSS[name], num_threads=1,
    )  # fmt: skip
    with harness.pinned(device):
        partition_graph(request)
    return GraphBundle.open(request.bundle), request, sample


@contextmanager
def serving(bundle: GraphBundle, cloud_threads: int, cpu: int) -> Iterator[list[str]]:
    """-> an address for every link"""
    words = ["serve", str(bundle.path), "--port", "0", "--threads", str(cloud_threads)]
    with ExitStack() as stack:
        said = stack.enter_context(harness.listening(words, cpu if cloud_threads == 1 else None))
        links = [Link(str(link), link.rtt_ms, 0, link.up_mbps, link.down_mbps) for link in LINKS]
        yield [stack.enter_context(harness.listening(link.arguments(said["address"]), cpu))["listen"] for link in links]


def sweep(
    bundle: GraphBundle, sample: Path, addresses: Sequence[str], seconds: float
) -> Iterator[tuple[Times, list[InferenceReply]]]:
    """-> for every link what each arm took, and the replies of auto"""
    inputs = dict(np.load(sample))
    for address in addresses:
        with ExitStack() as stack:
            arms = {
                name: stack.enter_context(Client(bundle.path, address, num_threads=1)) for name in [cut.name for cut in bundle.cuts]
            }
            arms["auto"] = stack.enter_context(Client(bundle.path, address, num_threads=1))
            for arm, client in arms.items():  # loads its graph and opens its connection
                client.run(inputs, mode=arm)
            times: Times = {arm: [] for arm in arms}
            replies = []
            racing, end = list(arms), math.inf
            for done in itertools.count():
                if done == MIN_ROUNDS:  # what is far behind is known well enough
                    medians = {arm: statistics.median(times[arm]) for arm in arms}
                    racing = [arm for arm in arms if arm == "auto" or medians[arm] <= FAR_BEHIND * min(medians.values())]
                    end = time.monotonic() + seconds
                if time.monotonic() > end:
                    break
                for arm in random.Random(done).sample(racing, len(racing)):  # who follows whom matters to caches and schedulers
                    reply = arms[arm].run(inputs, mode=arm)
                    times[arm].append(round(reply.metrics.total_ms, 3))
                    replies += [reply] if arm == "auto" else []
            yield times, replies


def against(times: Times, arm: str, others: Sequence[str]) -> float:
    """Median over the rounds of what the arm took / what the best of the others did, by their medians."""
    best = min(others, key=lambda name: statistics.median(times[name]))
    return statistics.median(a / b for a, b in zip(times[arm], times[best], strict=False))  # from the first round on


def cell(
    bundle: GraphBundle, request: GraphRequest, link: LinkSpec, times: Times, replies: Sequence[InferenceReply]
) -> dict[str, Any]:
    """Of one model on one link."""
    cuts = [cut.name for cut in bundle.cuts]
    predicted = {cut.name: round(cost_ms(cut, request, link), 2) for cut in bundle.cuts}
    measured = {arm: round(statistics.median(values), 2) for arm, values in times.items()}
    chosen = cheapest(bundle.cuts, request, link)
    return {
        "link": str(link),
        "chosen": chosen,
        "best": min(cuts, key=lambda name: measured[name]),
        "chosen_to_best": round(against(times, chosen, cuts), 4),
        "auto_to_one_side": round(against(times, "auto", [name for name in cuts if name in ("edge", "cloud")]), 4),
        "auto_to_best": round(against(times, "auto", cuts), 4),
        "auto_cuts": [reply.cut for reply in replies],
        "predicted_ms": predicted,
        "measured_ms": measured,
        "error": {name: round(abs(predicted[name] / measured[name] - 1), 4) for name in cuts},
        "raw_ms": times,
    }


def summary(cells: Sequence[dict[str, Any]], title: str) -> list[tuple[str, float, str, float]]:
    to_best = [cell["chosen_to_best"] for cell in cells]
    judged = [cell["auto_to_one_side"] for cell in cells if cell["link"] == str(JUDGED)]
    errors = [error for cell in cells for error in cell["error"].values()]
    return [
        (f"{title}: chosen plan / best cut, median of {len(to_best)} model-link pairs", statistics.median(to_best), "<=", 1.05),
        (f"{title}: chosen plan / best cut, worst pair", max(to_best), "<=", 1.05),
        (f"{title}: auto / better of edge only and cloud only, {JUDGED}, worst model", max(judged), "<=", 1.02),
        (f"{title}: predicted against measured latency, median error of {len(errors)}", statistics.median(errors), "<=", 0.15),
    ]


def main() -> None:
    parser = harness.arguments(__doc__, __file__)  # --bundle is not used: the graphs are other models
    parser.add_argument("--models", default=",".join(graph_inputs.LOSS))
    parser.add_argument("--seconds", type=float, default=4.0, help="for each model, link and cloud, after three rounds of all arms")
    options = parser.parse_args()
    cpus = harness.cores()
    cells: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for model, cloud_threads in itertools.product(options.models.split(","), dict.fromkeys((1, len(set(cpus))))):
            title = f"cloud of {cloud_threads} thread{'s' * (cloud_threads > 1)}"
            harness.progress(f"{model}, {title}: partition")
            bundle, request, sample = plan(model, cloud_threads, cpus, Path(folder))
            with serving(bundle, cloud_threads, cpus[0]) as addresses, harness.pinned(cpus[1]):
                for link, (times, replies) in zip(LINKS, sweep(bundle, sample, addresses, options.seconds), strict=True):
                    found = {"model": model, **cell(bundle, request, link, times, replies)}
                    cells.setdefault(title, []).append(found)
                    harness.progress(
                        f"{model}, {title}, {link}: chosen {found['chosen']}, best {found['best']}, "
                        f"{found['chosen_to_best']:.3f}; auto {found['auto_to_one_side']:.3f}; {found['measured_ms']}"
                    )
    figures = [figure for title, of_title in cells.items() for figure in summary(of_title, title)]
    harness.report(options.json_out, figures, {"seconds": options.seconds, "cells": cells})


if __name__ == "__main__":
    main()
