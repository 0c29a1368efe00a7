"""Heads of exits, trained all at once: an adapter each, and one classifier that they share, so that their features can be compared.

A head sees its features pooled (mean and largest, as in SDN, arXiv 1810.07052). It learns the labels, or, without any, what the
whole classifier says (Hinton et al., arXiv 1503.02531).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

Floats = npt.NDArray[np.float32]

MAX_EPOCHS, PATIENCE = 200, 20
BATCH = 64
LEARNING_RATE, WEIGHT_DECAY = 5e-3, 1e-2


@dataclass(frozen=True, slots=True)
class Head:
    """features = relu(pooled @ adapter + shift); answer = features @ classifier + bias."""

    adapter: Floats  # [num_pooled, width]
    shift: Floats  # [width]
    classifier: Floats  # [width, classes], that of all heads
    bias: Floats  # [classes]

    @property
    def num_parameters(self) -> int:
        """Of this head, the shared classifier included."""
        return self.adapter.size + self.shift.size + self.classifier.size + self.bias.size


def train_heads(
    pooled: Sequence[Floats], targets: Floats, train: npt.NDArray[np.int64], held_out: npt.NDArray[np.int64], width: int, seed: int
) -> list[Head]:
    """Until the held-out loss has not fallen for a while; the best weights are kept.

    Args:
        pooled: of every exit  # [samples, num_pooled]
        targets: probability of every class  # [samples, classes]
        train: indices of the samples to learn from.
        held_out: of those to stop by.
        width: of an adapter.
        seed: of weights and batches.
    """
    generator = torch.Generator().manual_seed(seed)
    wanted = torch.from_numpy(targets)
    means = [features[train].mean(axis=0) for features in pooled]
    scales = [1.0 / np.maximum(features[train].std(axis=0), np.float32(1e-5)) for features in pooled]
    inputs = [torch.from_numpy((f - m) * s) for f, m, s in zip(pooled, means, scales, strict=True)]
    adapters = [_random(generator, features.shape[1], width) for features in inputs]
    shifts = [torch.zeros(width, requires_grad=True) for _ in inputs]
    classifier, bias = _random(generator, width, targets.shape[1]), torch.zeros(targets.shape[1], requires_grad=True)
    weights = [*adapters, *shifts, classifier, bias]
    optimizer = torch.optim.AdamW(weights, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)

    def loss(rows: torch.Tensor) -> torch.Tensor:
        answers = [
            functional.relu(features[rows] @ adapter + shift) @ classifier + bias
            for features, adapter, shift in zip(inputs, adapters, shifts, strict=True)
        ]
        return torch.stack([functional.cross_entropy(answer, wanted[rows]) for answer in answers]).mean()

    learned, judged = torch.from_numpy(train), torch.from_numpy(held_out)
    best, best_loss, since = [weight.detach().clone() for weight in weights], float("inf"), 0
    for _ in range(MAX_EPOCHS):
        for rows in torch.split(learned[torch.randperm(len(learned), generator=generator)], BATCH):
            optimizer.zero_grad()
            torch.autograd.backward(loss(rows))
            optimizer.step()
        with torch.no_grad():
            found = float(loss(judged))
        since += 1
        if found < best_loss:
            best, best_loss, since = [weight.detach().clone() for weight in weights], found, 0
        if since >= PATIENCE:
            break
    arrays = [weight.numpy() for weight in best]
    count = len(inputs)
    return [
        Head(
            np.ascontiguousarray(arrays[i] * scales[i][:, None]),  # the standardization is part of the adapter
            arrays[count + i] - (means[i] * scales[i]) @ arrays[i],
            arrays[-2],
            arrays[-1],
        )
        for i in range(count)
    ]


def _random(generator: torch.Generator, num_in: int, num_out: int) -> torch.Tensor:
    weight: torch.Tensor = torch.randn(num_in, num_out, generator=generator) / num_in**0.5
    return weight.requires_grad_()
