"""From a model to a plan: what each format costs each layer, and the best choice of formats under one budget.

With calibration data the network itself is measured: one layer at a time is rounded to a few formats, and the loss at
the outputs is interpolated over all others by their error. With statistics alone, or with nothing, layers are ranked by
their expected output error or their weight error; the plan's `objective` says which it was.
"""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from afpq._candidates import (
    DEFAULT_FORMATS,
    Candidate,
    Target,
    candidates,
    quantized_values,
    targets,
)
from afpq._judge import OBJECTIVES, Judge, Objective, choose_objective, in_threads
from afpq._sensitivity import Sensitivity
from afpq.calibrate import Stats
from afpq.compensate import Choice, Rounded, probe
from afpq.correct import correct_biases
from afpq.data import Data, open_data
from afpq.errors import DataError, PlanError
from afpq.formats import AfpFormat
from afpq.graph import Model, load_model
from afpq.plan import Option, Plan, PlanEntry, allocate, match_names, read_format
from afpq.runtime import FloatModel

__all__ = [
    "DEFAULT_FORMATS",
    "MODES",
    "OBJECTIVES",
    "Candidate",
    "Judge",
    "Objective",
    "Sensitivity",
    "Target",
    "candidates",
    "choose_objective",
    "measure_sensitivity",
    "quantized_values",
    "search",
    "targets",
]

Progress = Callable[[str, int, int], None]  # stage, done, in all

_MAX_WORKERS = 8  # each holds a network of its own
DEFAULT_BITS = 5.0
# Compensated rounding fits its samples: what it is worth is judged on this share of them, which it has not seen.
_JUDGED = 1 / 3
_MIN_SAMPLES_TO_SPLIT = 12


@dataclass(frozen=True)
class Mode:
    """How much is done: the widths that every layer is probed at, on how many samples, and how weights are rounded."""

    widths: tuple[int, ...]
    num_samples: int
    compensated: bool = True


# The loss of one layer is close to linear in its error, and what one rounding does to it varies by a third: a few
# probes tell as much as all widths. At two bits layers collapse, which says nothing about the wider formats.
MODES = {
    "quick": Mode((4,), 32, compensated=False),
    "default": Mode((3, 5), 64),
    "best": Mode((3, 4, 5, 7), 128),
}


def search(
    model: Model | str | Path,
    stats: Stats | None = None,
    *,
    bits: float | None = None,
    size: int | None = None,
    data: object = None,
    kind: str = "real",
    formats: Sequence[AfpFormat] = DEFAULT_FORMATS,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    overrides: Mapping[str, str] | None = None,
    objective: str = "auto",
    mode: str = "default",
    correct: bool = True,
    threads: int = 0,
    progress: Progress | None = None,
) -> Plan:
    """Finds the plan with the least predicted loss that a budget allows.

    Args:
        model: the float model, or its path.
        stats: of the inputs of its layers; without them weights count by their own error.
        bits: stored bits per weight, scales and padding included, over all quantized layers (default 5).
        size: stored bytes of all quantized layers, in place of `bits`.
        data: samples (see `afpq.data`) to measure the network on; needs `stats`.
        kind: how exponent biases are stored, `real` or `integer`.
        formats: the formats to choose from.
        include: names or globs of the layers to quantize (default: all).
        exclude: names or globs of layers that stay float.
        overrides: format by name or glob, such as {"conv1*": "e2m3"}, `float` to leave it alone; the last one wins.
        objective: `kl`, `squared_error`, or `auto`, which looks at the model's outputs.
        mode: `quick` (one probe a layer, nearest rounding), `default`, or `best` (more probes on more samples).
        correct: measure with compensated rounding and corrected biases, as the plan will be used.
        threads: 0 means one per core; the plan is the same for any number.
        progress: is told the stage, what is done and how much there is.

    Raises:
        PlanError: the budget is too small, a pattern matches nothing, or an option does not exist.
    """
    _check_options(bits, size, kind, formats, objective, mode)
    model = model if isinstance(model, Model) else load_model(model)
    threads = threads or os.cpu_count() or 1
    pins = _choose(model, include, exclude, overrides or {})
    every = targets(model.layers, stats)
    active = [t for t in every if pins[t.weight_name] is not None]
    if not active:
        return Plan(tuple(_float_entry(t) for t in every), None, "none")
    found = {}
    for done, target in enumerate(active):
        pinned = pins[target.weight_name]
        choices = (pinned,) if isinstance(pinned, AfpFormat) else formats
        found[target.weight_name] = candidates(
            target, kind=kind, formats=choices, num_threads=threads
        )
        if progress is not None:
            progress("formats", done + 1, len(active))
    budget_bits = _budget(active, found, bits, size)
    losses, measured = _losses(
        model, active, found, stats, data, objective, MODES[mode], correct, threads, progress
    )
    options = [
        [
            Option(c.storage_bits, x)
            for c, x in zip(found[t.weight_name], losses[t.weight_name], strict=True)
        ]
        for t in active
    ]
    choice = allocate(options, budget_bits)
    chosen = {
        t.weight_name: _entry(t, found[t.weight_name][j], losses[t.weight_name][j])
        for t, j in zip(active, choice, strict=True)
    }
    weights = sum(t.weight.size for t in active)
    entries = tuple(chosen.get(t.weight_name) or _float_entry(t) for t in every)
    return Plan(entries, budget_bits / weights if bits is None else bits, measured)


def measure_sensitivity(
    judge: Judge,
    active: Sequence[Target],
    found: Mapping[str, Sequence[Candidate]],
    *,
    widths: Sequence[int] = MODES["default"].widths,
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
            progress=_stage(progress, "probes"),
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

    report = _stage(progress, "sensitivity")
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


def _stage(progress: Progress | None, name: str) -> Callable[[int, int], None] | None:
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


def _losses(
    model: Model,
    active: list[Target],
    found: Mapping[str, list[Candidate]],
    stats: Stats | None,
    data: object,
    objective: str,
    mode: Mode,
    correct: bool,
    threads: int,
    progress: Progress | None,
) -> tuple[dict[str, list[float]], str]:
    """The predicted loss of every candidate, and the name of what was minimised."""
    if data is None:
        name = "weight_error" if stats is None else "output_error"
        return {key: [c.noise for c in choices] for key, choices in found.items()}, name
    samples = data if isinstance(data, Data) else open_data(data, model.inputs)
    fitted, judged = _split(samples) if correct and mode.compensated else (None, samples)
    judge = Judge(
        FloatModel(model, threads=1), judged, objective=objective, max_samples=mode.num_samples
    )
    sensitivities = measure_sensitivity(
        judge,
        active,
        found,
        widths=mode.widths,
        stats=stats if correct else None,
        samples=fitted,
        num_threads=min(threads, _MAX_WORKERS),
        progress=progress,
    )
    losses = {
        key: [sensitivities[key].loss(c.noise) for c in choices] for key, choices in found.items()
    }
    return losses, judge.objective.name


def _split(samples: Data) -> tuple[Data | None, Data]:
    """Samples to fit probes on, and others to judge them by; only the latter where there are too few."""
    if samples.num_samples < _MIN_SAMPLES_TO_SPLIT:
        return None, samples
    try:
        return samples.split(_JUDGED)
    except DataError:
        return None, samples


def _choose(
    model: Model, include: Sequence[str], exclude: Sequence[str], overrides: Mapping[str, str]
) -> dict[str, AfpFormat | str | None]:
    """For every weight name: a pinned format, "search", or None to stay float."""
    names = [layer.name for layer in model.layers]
    included = match_names(include, names, "--include")
    excluded = match_names(exclude, names, "--exclude")
    pinned = match_names(overrides, names, "--layer")
    float_names = {name for group in excluded.values() for name in group}
    if include:
        float_names |= set(names) - {name for group in included.values() for name in group}
    # Layers that share a tensor share its fate: one that has to stay float keeps all float.
    owner = {layer.name: layer.weight_name for layer in model.layers}
    float_weights = {owner[name] for name in float_names}
    pins: dict[str, AfpFormat | str | None] = {
        weight: None if weight in float_weights else "search" for weight in owner.values()
    }
    for pattern, text in overrides.items():
        fmt = read_format(text, f"--layer {pattern!r}")
        for name in pinned[pattern]:
            if fmt is not None and owner[name] in float_weights:
                raise PlanError(f"--layer {pattern!r}: layer {name!r} is excluded as well")
            pins[owner[name]] = fmt
    return pins


def _budget(
    active: Sequence[Target],
    found: Mapping[str, Sequence[Candidate]],
    bits: float | None,
    size: int | None,
) -> int:
    """The budget in bits, checked against the smallest plan."""
    weights = sum(t.weight.size for t in active)
    smallest = sum(min(c.storage_bits for c in found[t.weight_name]) for t in active)
    if size is not None:
        if smallest > 8 * size:
            raise PlanError(
                f"a size of {size} bytes is impossible: the {len(active)} quantized tensors "
                f"take at least {-(-smallest // 8)} bytes"
            )
        return 8 * size
    wanted = DEFAULT_BITS if bits is None else bits
    limit = math.floor(wanted * weights * (1 + 1e-12))
    if smallest > limit:
        raise PlanError(
            f"a budget of {wanted:g} bits per weight is impossible: the {len(active)} quantized "
            f"tensors take at least {math.ceil(1000 * smallest / weights) / 1000:.3f}, scales and "
            "padding included"
        )
    return limit


def _entry(target: Target, candidate: Candidate, loss: float) -> PlanEntry:
    n, k = target.weight.shape
    return PlanEntry(
        layers=target.names,
        weight_name=target.weight_name,
        n=n,
        k=k,
        format=candidate.format,
        kind=candidate.kind,
        granularity=candidate.granularity,
        error=candidate.error,
        predicted_loss=loss,
    )


def _float_entry(target: Target) -> PlanEntry:
    n, k = target.weight.shape
    return PlanEntry(target.names, target.weight_name, n, k, None)


def _check_options(
    bits: float | None,
    size: int | None,
    kind: str,
    formats: Sequence[AfpFormat],
    objective: str,
    mode: str,
) -> None:
    if bits is not None and size is not None:
        raise PlanError("a budget is either bits or size, not both")
    if bits is not None and not (math.isfinite(bits) and bits > 0):
        raise PlanError(f"a budget of {bits} bits per weight is not a positive number")
    if size is not None and size <= 0:
        raise PlanError(f"a size of {size} bytes is not positive")
    if kind not in ("real", "integer"):
        raise PlanError(f"exponent bias kind {kind!r} is not one of real, integer")
    if not formats or not all(f.signed for f in formats):
        raise PlanError("the list of formats is empty or holds an unsigned one")
    if objective not in OBJECTIVES:
        raise PlanError(f"objective {objective!r} is not one of {', '.join(OBJECTIVES)}")
    if mode not in MODES:
        raise PlanError(f"mode {mode!r} is not one of {', '.join(MODES)}")
