"""Measures what a report shows of a packed model: speed, time and loss of single layers, weights over the codebook.

All of it is brief: a second or two for the times, one run over a few samples for each layer. What cannot be known is
left out, and `RunFacts.not_measured` says why.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from afpq._judge import Judge, in_threads
from afpq._measure import stage
from afpq._probe import Feeds
from afpq.bench import Timing, node_shares, time_models
from afpq.data import Data
from afpq.errors import AfpqError
from afpq.evaluate import compare
from afpq.formats import codebook
from afpq.graph import Layer, Model
from afpq.packed import PackedLayer, PackedModel, scale_columns, weight_values
from afpq.packing import unpack
from afpq.report import LayerFacts, RunFacts
from afpq.runtime import FloatModel

__all__ = ["Reference", "examine", "histogram"]

BINS = 64
MAX_SAMPLES = 16  # for the losses and SQNRs of single layers
SECONDS, MIN_ROUNDS = 1.0, 5

Progress = Callable[[str, int, int], None]
Facts = dict[str, dict[str, Any]]  # fields of LayerFacts by layer name


@dataclass(frozen=True, eq=False)
class Reference:
    """The float model that a packed one came from, and samples that judge."""

    model: Model
    data: Data | None = None
    data_name: str = ""


def examine(
    packed: PackedModel,
    facts: RunFacts,
    *,
    reference: Reference | None = None,
    feeds: Feeds | None = None,
    threads: int = 0,
    timed: bool = True,
    progress: Progress | None = None,
) -> RunFacts:
    """The facts, with what can be measured of a saved model; `feeds` is one input, made up if None."""
    missing = dict(facts.not_measured)
    found: Facts = {layer.name: {} for layer in packed.layers}
    floats = {} if reference is None else _floats(packed, reference.model)
    if packed.metadata.get("afpq.equalized"):
        floats = {}
        missing["float weights"] = (
            "equalisation moved factors between layers, so single layers cannot be compared with the float model"
        )
    elif reference is not None and len(floats) < len(packed.layers):
        missing["float weights"] = (
            f"{len(packed.layers) - len(floats)} of {len(packed.layers)} layers have no weight of their name and "
            "shape in the float model"
        )
    _add_weights(packed, floats, found)
    measured = speed = None
    if reference is not None and reference.data is not None:
        data = reference.data.take(MAX_SAMPLES)
        with _reason(missing, "SQNR of outputs of layers"):
            _add_output_sqnr(packed, reference.model, data, threads, found)
        if floats:
            with _reason(missing, "loss of single layers"):
                measured = _add_losses(
                    packed, reference, data, floats, facts.objective, threads, found, progress
                )
    if timed:
        with _reason(missing, "speed"):
            speed = _speed(packed.path, reference, feeds, threads, found, progress)
    layers = {
        name: replace(facts.layers.get(_float_name(name), LayerFacts()), **fields)
        for name, fields in found.items()
    }
    return replace(facts, layers=layers, speed=speed, measured=measured, not_measured=missing)


def histogram(layer: PackedLayer, weight: npt.NDArray[np.float32] | None = None) -> dict[str, Any]:
    """How often each value of the codebook is used, and how the float weights [n, k] lie in the same unit, the scale.

    `codes` counts by rising value, zero once. `float` has `BINS` equal bins from -`limit` to `limit`; what lies further
    out is in the outermost. `clipped` is the share of float weights beyond the largest value.
    """
    values = codebook(layer.format)
    codes = unpack(layer.packed, layer.n, layer.k, layer.format.bits)
    used = np.bincount(codes.reshape(-1), minlength=len(values))
    steps, place = np.unique(values, return_inverse=True)
    counts = np.zeros(len(steps), np.int64)
    np.add.at(counts, place.reshape(-1), used)
    limit = 1.125 * layer.format.max_integer
    result: dict[str, Any] = {"codes": counts.tolist(), "limit": limit, "float": None}
    if weight is not None:
        scaled = (weight / scale_columns(layer)).reshape(-1)
        result["clipped"] = float((np.abs(scaled) > layer.format.max_integer).mean())
        bins = np.histogram(np.clip(scaled, -limit, limit), BINS, (-limit, limit))[0]
        result["float"] = bins.tolist()
    return result


@contextmanager
def _reason(missing: dict[str, str], what: str) -> Iterator[None]:
    """A part of the report that fails is left out, with the reason; the model itself is written and checked."""
    try:
        yield
    except AfpqError as error:
        missing[what] = str(error)


def _floats(packed: PackedModel, model: Model) -> dict[str, Layer]:
    """The float layers of the packed ones, by packed name, where name and shape agree."""
    known = {layer.name: layer for layer in model.layers}
    pairs = ((p, known.get(_float_name(p.name))) for p in packed.layers)
    return {p.name: f for p, f in pairs if f is not None and (f.n, f.k) == (p.n, p.k)}


def _float_name(name: str) -> str:
    return name.removesuffix(".unpack")


def _add_weights(packed: PackedModel, floats: Mapping[str, Layer], found: Facts) -> None:
    for layer in packed.tensors().values():
        weight = floats[layer.name].weight if layer.name in floats else None
        found[layer.name]["codebook_histogram"] = histogram(layer, weight)
        if weight is not None:
            signal = float(np.square(weight, dtype=np.float64).sum())
            noise = float(np.square(weight - weight_values(layer), dtype=np.float64).sum())
            if signal > 0 and noise > 0:
                found[layer.name]["weight_sqnr_db"] = float(10 * np.log10(signal / noise))


def _add_output_sqnr(
    packed: PackedModel, model: Model, data: Data, threads: int, found: Facts
) -> None:
    result = compare(model.path, packed.path, data, layers=True, threads=threads)
    for layer in result.layers:
        if np.isfinite(layer.sqnr_db):
            found[layer.name]["output_sqnr_db"] = layer.sqnr_db


def _add_losses(
    packed: PackedModel,
    reference: Reference,
    data: Data,
    floats: Mapping[str, Layer],
    objective: str | None,
    threads: int,
    found: Facts,
    progress: Progress | None,
) -> dict[str, Any]:
    """The loss of the network when one tensor is as packed and everything else float."""
    wanted = objective if objective in ("kl", "squared_error") else "auto"
    network = FloatModel(reference.model, threads=1)
    judge = Judge(network, data, objective=wanted, max_samples=MAX_SAMPLES)
    groups: dict[str, list[PackedLayer]] = {}
    for layer in packed.layers:
        if layer.name in floats:
            groups.setdefault(layer.weight_name, []).append(layer)

    def measure(group: list[PackedLayer]) -> float:
        weight = {floats[group[0].name].weight_name: weight_values(group[0])}
        biases = {}
        for layer in group:
            bias = layer.bias
            if bias is not None:
                biases[floats[layer.name].name] = bias
        return judge.loss(weight, biases)

    tasks = list(groups.values())
    workers = threads or os.cpu_count() or 1
    losses = in_threads(measure, tasks, workers, stage(progress, "layers"))
    for group, loss in zip(tasks, losses, strict=True):
        for layer in group:
            found[layer.name]["measured_loss"] = loss
    return {
        "objective": judge.objective.name,
        "samples": judge.num_samples,
        "data": reference.data_name,
    }


def _speed(
    path: Path,
    reference: Reference | None,
    feeds: Feeds | None,
    threads: int,
    found: Facts,
    progress: Progress | None,
) -> dict[str, Any]:
    paths = [path] if reference is None else [reference.model.path, path]
    rounds = time_models(
        paths,
        feeds=feeds,
        threads=threads,
        seconds=SECONDS,
        min_rounds=MIN_ROUNDS,
        progress=progress,
    )
    shares = node_shares(path, feeds, threads=threads, seconds=SECONDS / 2)
    rest = 1.0
    for name, fields in found.items():
        if name in shares:
            fields["time_share"] = shares[name]
            rest -= shares[name]
    ratio = None
    if reference is not None:
        ratio = dict(zip(("median", "p10", "p90"), rounds.ratio(), strict=True))
    return {
        "model": _times(rounds.timings[-1]),
        "reference": None if reference is None else _times(rounds.timings[0]),
        "ratio": ratio,
        "rounds": rounds.milliseconds.shape[1],
        "threads": threads or os.cpu_count(),
        "inputs": "made up" if feeds is None else "a sample of the data",
        "shapes": {name: list(shape) for name, shape in rounds.shapes.items()},
        "other_nodes_share": max(rest, 0.0) if shares else None,
    }


def _times(timing: Timing) -> dict[str, float]:
    return {
        "median_ms": timing.median_ms,
        "p10_ms": timing.p10_ms,
        "p90_ms": timing.p90_ms,
        "min_ms": timing.min_ms,
        "load_ms": timing.load_ms,
    }
