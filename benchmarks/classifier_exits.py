"""Exits of a classifier: what leaves, how right it is, how often a stated risk is kept, and the calls of the cloud that are saved.

A small convolutional network learns 500 of scikit-learn's 1,797 handwritten digits (8 x 8). Exits after its first and second block
learn on 40 % of the others. The rest, 778, is taken as all there is: 200 calibrations draw as many of it, with replacement, and
what they promise is compared with all of it, and with what was not drawn. Then digits run through a service, call by call.
    python benchmarks/classifier_exits.py [--draws 200]
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import harness
import numpy as np
import torch
from sklearn.datasets import load_digits
from torch.nn import Conv2d, Linear, Module, ReLU, Sequential, functional

from edgecloud.client import Client
from edgecloud.exit_scores import scores
from edgecloud.exits import RULES, ExitPoint, Exits
from edgecloud.graph_bundle import GraphBundle
from edgecloud.partitioner.binomial import interval
from edgecloud.partitioner.classifier_calibration import split, with_counts
from edgecloud.partitioner.classifier_exits import SHARES, ExitRequest, make_exits
from edgecloud.partitioner.classifier_metadata import read_exits
from edgecloud.partitioner.classifier_samples import load_stack
from edgecloud.partitioner.export_classifier import export_classifier
from edgecloud.partitioner.graph_partition import partition_graph
from edgecloud.partitioner.graph_request import GraphRequest
from edgecloud.partitioner.onnx_model import load_model
from edgecloud.partitioner.ort_session import Session

NUM_TAUGHT = 500
RISKS = (0.02, 0.05, 0.1)
PLAN = 0.3  # of what a calibration has, for planning thresholds
OFTEN = 100  # draws that found a threshold, so that a mean over them says something


class Network(Module):
    """Three blocks, 74 thousand parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.block1 = Sequential(Conv2d(1, 16, 3, padding=1), ReLU(), Conv2d(16, 32, 3, padding=1), ReLU())
        self.block2 = Sequential(Conv2d(32, 32, 3, padding=1, stride=2), ReLU(), Conv2d(32, 32, 3, padding=1), ReLU())
        self.block3 = Sequential(Conv2d(32, 64, 3, padding=1, stride=2), ReLU(), Conv2d(64, 64, 3, padding=1), ReLU())
        self.last = Linear(256, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.block3(self.block2(self.block1(x))).flatten(1))


def teach(images: np.ndarray, labels: np.ndarray) -> Network:
    torch.manual_seed(0)
    network = Network()
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)
    x, y = torch.from_numpy(images), torch.from_numpy(labels)
    for _ in range(30):
        for rows in torch.randperm(len(x)).split(50):
            optimizer.zero_grad()
            functional.cross_entropy(network(x[rows]), y[rows]).backward()
            optimizer.step()
    return network


@dataclass(frozen=True)
class Drawn:
    """One calibration: its threshold held against everything, and against what it had not drawn."""

    share: float  # that leaves, of everything
    wrong: float  # of those
    reported_share: float
    share_in_interval: bool
    accuracy_in_interval: bool
    unseen_wrong: float  # of those not drawn that leave


def draws(exits: Exits, found: dict[str, np.ndarray], right: np.ndarray, num: int) -> list[dict[str, Any]]:
    """Of every exit, rule and risk, over all draws."""
    everything = np.arange(len(right))
    kept: dict[tuple[str, str, float], list[Drawn]] = {}
    for seed in range(num):
        seen = np.random.default_rng(seed).choice(everything, len(everything))
        unseen = np.setdiff1d(everything, seen)
        again = with_counts(exits, {n: v[seen] for n, v in found.items()}, right[seen], split(len(seen), (0.0, PLAN), seed))
        for index, head in enumerate(again.heads):
            wrong = found[head.answer].argmax(axis=1) != right
            before = found[again.heads[index - 1].features] if index else None
            for rule, risk in product(RULES, RISKS):
                if (point := head.curve(rule).point(risk, again)) is not None:
                    out = scores(rule, found[head.answer], found[head.features], before, exits.answers) >= point.threshold
                    kept.setdefault((head.name, rule, risk), []).append(_drawn(point, again.num_samples, out, wrong, unseen))
    return [_cell(key, values, num) for key, values in kept.items()]


def _drawn(point: ExitPoint, num_samples: int, out: np.ndarray, wrong: np.ndarray, unseen: np.ndarray) -> Drawn:
    low, high = interval(point.num_left, num_samples, 0.05)
    least, most = interval(point.num_wrong, point.num_left, 0.05)
    share, rate = float(out.mean()), float(wrong[out].mean())
    unseen_wrong = float(wrong[unseen][out[unseen]].mean()) if out[unseen].any() else 0.0
    return Drawn(share, rate, point.num_left / num_samples, low <= share <= high, least <= rate <= most, unseen_wrong)


def _cell(key: tuple[str, str, float], drawn: list[Drawn], num: int) -> dict[str, Any]:
    name, rule, risk = key
    return {
        "exit": name, "rule": rule, "risk": risk, "thresholds": len(drawn),
        "share": round(float(np.mean([d.share for d in drawn])), 4),
        "reported_share": round(float(np.mean([d.reported_share for d in drawn])), 4),
        "wrong": round(float(np.mean([d.wrong for d in drawn])), 4),
        "unseen_wrong": round(float(np.mean([d.unseen_wrong for d in drawn])), 4),
        "within_risk": 1.0 - sum(d.wrong > risk for d in drawn) / num,
        "share_in_interval": round(float(np.mean([d.share_in_interval for d in drawn])), 4),
        "accuracy_in_interval": round(float(np.mean([d.accuracy_in_interval for d in drawn])), 4),
    }  # fmt: skip


def served(bundle: GraphBundle, images: np.ndarray, right: np.ndarray, cpu: int) -> list[dict[str, Any]]:
    """Every image through a service, at the cut of each exit and each risk, and without a risk."""
    assert bundle.exits is not None
    rows = []
    with harness.serving(bundle.path, cpu) as address, Client(bundle.path, address, num_threads=1) as client:
        for head in bundle.exits.heads:
            deep = [h.answer for h in bundle.exits.heads[: bundle.exits.heads.index(head) + 1]]
            outputs = {cut.name: [o for o in cut.edge_outputs if o.endswith("/answer")] for cut in bundle.cuts if cut.cloud}
            cut = next(name for name, on_device in outputs.items() if sorted(on_device) == sorted(deep))
            for risk in (None, *RISKS):
                try:
                    replies = [client.run({"input": image[None]}, mode=cut, risk=risk) for image in images]
                except ValueError as error:
                    rows.append({"exit": head.name, "risk": risk, "refused": str(error)})
                    continue
                said = np.array([int(reply["scores"].argmax()) for reply in replies])
                left = np.array([reply.exit is not None for reply in replies])
                rows.append(
                    {
                        "exit": head.name, "cut": cut, "risk": risk, "runs": len(replies),
                        "cloud_calls": sum(reply.metrics.num_attempts for reply in replies), "left": int(left.sum()),
                        "left_wrong": int((said != right)[left].sum()), "all_wrong": int((said != right).sum()),
                        "uplink_bytes": sum(reply.metrics.uplink_bytes for reply in replies),
                    }
                )  # fmt: skip
    return rows


def main() -> None:
    parser = harness.arguments(__doc__, __file__)  # --bundle is not used: the graph is another model
    parser.add_argument("--draws", type=int, default=200)
    options = parser.parse_args()
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    images, labels = (digits.images[order, None] / 16).astype(np.float32), digits.target[order].astype(np.int64)
    harness.progress("teaching the classifier")
    network = teach(images[:NUM_TAUGHT], labels[:NUM_TAUGHT])
    images, labels = images[NUM_TAUGHT:], labels[NUM_TAUGHT:]
    cloud, _ = harness.cores()
    raw: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        export_classifier(network, torch.zeros(1, 1, 8, 8), folder / "digits.onnx")
        np.savez(folder / "samples.npz", input=images)
        np.save(folder / "labels.npy", labels)
        np.savez(folder / "one.npz", input=images[:1])
        for judge, given in (("model", None), ("labels", folder / "labels.npy")):
            harness.progress(f"exits, judged by the {judge}")
            made = folder / f"{judge}.onnx"
            report = make_exits(
                ExitRequest(
                    folder / "digits.onnx", folder / "samples.npz", labels=given, output=made, risks=RISKS, num_threads=1,
                    at=("/block1/block1.3/Relu_output_0", "/block2/block2.3/Relu_output_0"),
                )
            )  # fmt: skip
            exits = read_exits(load_model(made))
            assert exits is not None
            stack = load_stack(folder / "samples.npz", load_model(made).inputs)
            found = stack.run(Session(load_model(made).proto, 1), ["scores", *sorted(exits.outputs)])
            right = found["scores"].argmax(axis=1) if given is None else labels
            unseen = np.setdiff1d(np.arange(len(right)), split(len(right), SHARES, 0).train)
            cells = draws(exits, {n: v[unseen] for n, v in found.items()}, right[unseen], options.draws)
            raw[judge] = {"report": {**report.to_dict(), "path": made.name}, "draws": cells}
            if given is None:
                partition_graph(GraphRequest(made, folder / "bundle", (folder / "one.npz",), timing_s=0.5, num_threads=1))
                held = split(len(right), SHARES, 0).plan  # neither heads nor bounds have seen them
                raw["served"] = served(GraphBundle.open(folder / "bundle"), images[held], right[held], cloud)
    raw["classifier_accuracy"] = float((found["scores"].argmax(axis=1) == labels).mean())
    harness.report(options.json_out, figures(raw), raw)


def figures(raw: dict[str, Any]) -> list[tuple[str, float, str, float]]:
    cells = [cell for judge in ("model", "labels") for cell in raw[judge]["draws"]]
    often = [cell for cell in cells if cell["thresholds"] >= OFTEN]
    off = [abs(cell["share"] - cell["reported_share"]) for cell in often]
    rows = {(row["exit"], row["risk"]): row for row in raw["served"]}
    saved = rows["exit-2", 0.05]
    return [
        (
            "draws within the risk, least of all exits, rules, risks and judges",
            min(cell["within_risk"] for cell in cells),
            ">=",
            0.95,
        ),
        (
            "wrong among the unseen that left / risk, mean over draws, worst",
            max(c["unseen_wrong"] / c["risk"] for c in often),
            "<=",
            1.0,
        ),
        ("share that leaves, reported against true, largest difference of means", max(off), "<=", 0.02),
        ("draws whose interval holds the true share, least", min(cell["share_in_interval"] for cell in often), ">=", 0.9),
        ("draws whose interval holds the true accuracy, least", min(cell["accuracy_in_interval"] for cell in often), ">=", 0.9),
        ("cloud calls at risk 0.05, exit after block 2 / without a risk", saved["cloud_calls"] / saved["runs"], "<=", 0.6),
        ("runs without a risk that left early", sum(row["left"] for row in raw["served"] if row["risk"] is None), "<=", 0),
    ]


if __name__ == "__main__":
    main()
