"""How far a changed network is from the float one, on its outputs: the loss that a search minimises."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from afpq.data import Data
from afpq.errors import DataError, PlanError
from afpq.graph import Model
from afpq.runtime import FloatModel, Simulation

__all__ = [
    "LOWEST_PROBABILITY",
    "OBJECTIVES",
    "Judge",
    "Objective",
    "choose_objective",
    "divergence",
    "in_threads",
    "num_classes",
]

Array = npt.NDArray[Any]
Weights = Mapping[str, npt.NDArray[np.float32]]
T = TypeVar("T")
R = TypeVar("R")

OBJECTIVES = ("auto", "kl", "squared_error")

_BATCH = 4  # more takes more memory for activations, not less time on one thread
# What is kept of feeds and outputs. A language model has outputs so large that comparing them takes longer than running
# it, and every one of its tokens is a sample.
_KEPT_BYTES = 256 << 20
_OUTPUT_BYTES = 16 << 20
LOWEST_PROBABILITY = 1e-12
# The loss of a network whose outputs are not finite any more: worse than anything, still a number to add up.
WORST_LOSS = 1e6


@dataclass(frozen=True)
class Objective:
    """`kl` over the last axis of one output, or `squared_error` relative to the float output, averaged over outputs."""

    name: str
    outputs: tuple[int, ...]  # positions among the model's outputs
    is_distribution: bool = False  # the output holds probabilities, not logits


class Judge:
    """The float network's outputs on a few samples, and the loss of changed networks against them.

    Samples are spread evenly over `data` and kept in memory. The same arguments give the same losses; `float_model`
    should run on one thread, so that this holds on every machine.
    """

    def __init__(
        self,
        float_model: FloatModel,
        data: Data,
        *,
        objective: str = "auto",
        max_samples: int = 64,
    ) -> None:
        self.network = float_model
        reference = float_model.simulate({})
        self._feeds: list[Mapping[str, Array]] = []
        self._references: list[list[Array]] = []
        kept_bytes = output_bytes = 0
        self.num_samples = 0
        samples = data.take(max_samples) if max_samples < data.num_samples else data
        for feeds in samples.batches(_BATCH):
            outputs = reference.run(feeds)
            self._feeds.append(feeds)
            self._references.append(outputs)
            self.num_samples += len(next(iter(feeds.values())))
            output_bytes += sum(a.nbytes for a in outputs)
            kept_bytes += sum(a.nbytes for a in feeds.values())
            if output_bytes > _OUTPUT_BYTES or kept_bytes > _KEPT_BYTES:
                break
            if self.num_samples >= max_samples:
                break
        if not self._references:
            raise DataError("there are no samples to measure the network on")
        self.objective = choose_objective(float_model.model, self._references, objective)

    def loss(self, weights: Weights, biases: Weights | None = None) -> float:
        """The loss of the float network with these weights (by weight_name) and biases (by layer name)."""
        return self.loss_of(self.network.simulate(weights, biases))

    def losses(self, weights: Weights, biases: Weights | None = None) -> tuple[float, float]:
        """As `loss`, and beside it the relative squared error of the same outputs."""
        network = self.network.simulate(weights, biases)
        pairs = [
            (ref, network.run(feeds))
            for feeds, ref in zip(self._feeds, self._references, strict=True)
        ]
        squared = replace(self.objective, name="squared_error")
        return divergence(self.objective, pairs), divergence(squared, pairs)

    def loss_of(self, network: Simulation) -> float:
        """The loss of anything that runs the same feeds to the same outputs."""
        return divergence(
            self.objective,
            (
                (ref, network.run(feeds))
                for feeds, ref in zip(self._feeds, self._references, strict=True)
            ),
        )


def divergence(
    objective: Objective, pairs: Iterable[tuple[Sequence[Array], Sequence[Array]]]
) -> float:
    """Mean KL of (float || other) rows, or the mean over outputs of the relative squared error, over all batches."""
    sums = np.zeros((len(objective.outputs), 2))
    for reference, other in pairs:
        for row, position in enumerate(objective.outputs):
            a, b = reference[position], other[position]
            if not np.isfinite(b).all():
                return WORST_LOSS
            sums[row] += (
                _kl_sum(a, b, objective.is_distribution)
                if objective.name == "kl"
                else _squared_sums(a, b)
            )
    loss = float(np.mean(sums[:, 0] / np.maximum(sums[:, 1], np.finfo(np.float64).tiny)))
    return min(max(loss, 0.0), WORST_LOSS)


def choose_objective(model: Model, references: Sequence[Sequence[Array]], wanted: str) -> Objective:
    """`auto`: KL if one float output [N, classes] (or [N, classes, 1..]) is all there is, or one has the vocabulary of
    a token table as its last axis; else squared error over all float outputs.

    Raises:
        PlanError: the objective does not exist, or the model has no output for it.
    """
    if wanted not in OBJECTIVES:
        raise PlanError(f"objective {wanted!r} is not one of {', '.join(OBJECTIVES)}")
    first = references[0]
    floats = tuple(i for i, a in enumerate(first) if a.dtype.kind == "f" and a.size)
    if not floats:
        raise PlanError(f"{model.path}: no output is a float tensor, so no loss can be measured")
    tables = {layer.n for layer in model.layers if layer.kind == "gather"}
    words = [i for i in floats if first[i].ndim >= 3 and first[i].shape[-1] in tables]
    classes = [i for i in floats if _is_classes(first[i].shape)]
    chosen = words if len(words) == 1 else classes if len(floats) == 1 else []
    if wanted == "squared_error" or (wanted == "auto" and not chosen):
        return Objective("squared_error", floats)
    if not chosen:
        raise PlanError(f"{model.path}: objective 'kl' needs one float output [samples, classes]")
    rows = _rows(first[chosen[0]])
    total = rows.sum(-1)
    is_distribution = bool((rows >= 0).all() and (np.abs(total - 1) < 1e-3).all())
    return Objective("kl", (chosen[0],), is_distribution)


def in_threads(
    function: Callable[[T], R],
    items: Sequence[T],
    num_threads: int,
    progress: Callable[[int, int], None] | None = None,
) -> list[R]:
    """`[function(x) for x in items]` on several threads; `progress` is told (done, all) from the caller's thread."""
    results: list[R] = []
    pool = ThreadPoolExecutor(max(1, num_threads))
    try:
        for result in pool.map(function, items):
            results.append(result)
            if progress is not None:
                progress(len(results), len(items))
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    return results


def num_classes(shape: Sequence[int]) -> int:
    """Length of the rows that are distributions: [N, classes, 1, 1] is a classifier, [N, S, words] a language model."""
    return shape[1] if _is_classes(shape) else shape[-1]


def _is_classes(shape: Sequence[int]) -> bool:
    return len(shape) >= 2 and shape[1] >= 2 and math.prod(shape[2:]) == 1


def _rows(output: Array) -> npt.NDArray[np.float64]:
    return output.reshape(-1, num_classes(output.shape)).astype(np.float64)


def _kl_sum(reference: Array, other: Array, is_distribution: bool) -> tuple[float, float]:
    p, q = (_log_probabilities(_rows(a), is_distribution) for a in (reference, other))
    return float((np.exp(p) * (p - q)).sum()), float(len(p))


def _log_probabilities(
    rows: npt.NDArray[np.float64], is_distribution: bool
) -> npt.NDArray[np.float64]:
    if is_distribution:
        clipped = np.maximum(rows, LOWEST_PROBABILITY)
        return np.asarray(np.log(clipped / clipped.sum(-1, keepdims=True)))
    shifted = rows - rows.max(-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))


def _squared_sums(reference: Array, other: Array) -> tuple[float, float]:
    a = reference.astype(np.float64)
    return float(((other - a) ** 2).sum()), float((a**2).sum())
