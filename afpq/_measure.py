"""Measures how much the network's outputs suffer when one tensor at a time is rounded."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from afpq._candidates import Candidate, Target, quantized_values
from afpq._judge import Judge, in_threads
from afpq._sensitivity import Sensitivity
from afpq.calibrate import Stats
from afpq.compensate import Choice, Rounded, probe
from afpq.correct import correct_biases
from afpq.data import Data
from afpq.errors import DataError

__all__ = ["Progress", "Workshop", "measure_sensitivity", "split_samples", "stage"]

Progress = Callable[[str, int, int], None]  # stage, done, in all

# Compensated rounding fits its samples: what it is worth is judged on this share of them, which it has not seen.
_JUDGED = 1 / 3
_MIN_SAMPLES_TO_SPLIT = 12


@dataclass(frozen=True, eq=False)
class Workshop:
    """What it takes to build a whole network and to judge it."""

    judge: Judge
    samples: Data  # to round on; others than the judge's
    stats: Stats
    num_threads: int = 1
    progress: Progress | None = None


def measure_sensitivity(
    judge: Judge,
    active: Sequence[Target],
    found: Mapping[str, Sequence[Candidate]],
    *,
    widths: Sequence[int],
    stats: Stats | None = None,
    samples: Data | None = None,
    num_threads: int = 1,
    progress: Progress | None = None,
) -> dict[str, Sensitivity]:
    """Rounds one tensor at a time, at about `widths` bits, and measures the loss of the whole network.

    With `samples` rounding is compensated where it can be; with `stats` the biases of other layers are corrected
    meanwhile. Keys are weight names; the sensitivities are functions of a candidate's `noise`.
    """
    probes = {t.weight_name: _probes(found[t.weight_name], widths) for t in active}
    tasks = [(t, number) for t in active for number in range(len(probes[t.weight_name]))]
    compensated: dict[str, list[Rounded]] = {}
    if samples is not None:
        compensated = probe(
            judge.network,
            samples,
            {
                name: [Choice(c.format, c.kind, c.granularity) for c in choices]
                for name, choices in probes.items()
            },
            num_threads=num_threads,
            progress=stage(progress, "probes"),
        )

    def measure(task: tuple[Target, int]) -> tuple[float, float]:
        target, number = task
        name = target.weight_name
        if name in compensated:
            rounded = compensated[name][number]
            return judge.losses({name: rounded.values}, {target.names[0]: rounded.bias})
        weights = {name: quantized_values(target, probes[name][number], num_threads=1)}
        biases = correct_biases(target.layers, stats, weights) if stats is not None else None
        return judge.losses(weights, biases)

    report = stage(progress, "sensitivity")
    points: dict[str, list[tuple[float, float]]] = {t.weight_name: [] for t in active}
    losses = _steadied(in_threads(measure, tasks, num_threads, report))
    for (target, number), loss in zip(tasks, losses, strict=True):
        name = target.weight_name
        points[name].append((probes[name][number].noise, loss))
    return {name: Sensitivity.fit(p) for name, p in points.items()}


def _steadied(measured: Sequence[tuple[float, float]]) -> list[float]:
    """Losses, each averaged (in the logarithm) with what its squared error says at the ratio that is common.

    The KL divergence on a few samples is decided by those that the network is not sure of; all samples tell the squared
    error. Where the loss is the squared error itself, nothing changes.
    """
    tiny = np.finfo(np.float64).tiny
    loss, squared = np.maximum(np.array(measured, np.float64).reshape(-1, 2), tiny).T
    if not len(loss):
        return []
    ratio = np.exp(np.median(np.log(loss / squared)))
    return [float(x) for x in np.sqrt(loss * squared * ratio)]


def stage(progress: Progress | None, name: str) -> Callable[[int, int], None] | None:
    """The progress of one stage."""
    return None if progress is None else lambda done, total: progress(name, done, total)


def _probes(choices: Sequence[Candidate], widths: Sequence[int]) -> list[Candidate]:
    """For every width the candidate with the least noise; the nearest widths that exist."""
    by_width: dict[int, Candidate] = {}
    for c in choices:
        best = by_width.get(c.format.bits)
        if best is None or c.noise < best.noise:
            by_width[c.format.bits] = c
    nearest = {min(by_width, key=lambda b: (abs(b - w), b)) for w in widths}
    return [by_width[b] for b in sorted(nearest)]


def split_samples(samples: Data) -> tuple[Data | None, Data]:
    """Samples to fit probes on, and others to judge them by; only the latter where there are too few."""
    if samples.num_samples < _MIN_SAMPLES_TO_SPLIT:
        return None, samples
    try:
        return samples.split(_JUDGED)
    except DataError:
        return None, samples
