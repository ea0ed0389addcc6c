"""From a model to a plan: what each format costs each layer, and the best choice of formats under one budget.

With calibration data the network itself is measured: one layer at a time is rounded to a few formats, and the loss at
the outputs is interpolated over all others by their error. With statistics alone, or with nothing, layers are ranked by
their expected output error or their weight error; the plan's `objective` says which it was.
"""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from afpq._candidates import (
    DEFAULT_FORMATS,
    Candidate,
    Target,
    candidates,
    quantized_values,
    targets,
)
from afpq._costs import Costs
from afpq._judge import Judge, Objective, choose_objective
from afpq._layer import Layer, has_products
from afpq._measure import Progress, Workshop, measure_sensitivity, split_samples
from afpq._second import second_pass
from afpq._sensitivity import Sensitivity, read_sensitivities, write_sensitivities
from afpq.calibrate import Stats
from afpq.data import Data, open_data
from afpq.errors import PlanError
from afpq.formats import AfpFormat
from afpq.graph import Model, load_model
from afpq.journal import Journal
from afpq.plan import Plan, match_names, read_format
from afpq.rates import RATE_MODES, product_seconds
from afpq.runtime import FloatModel

__all__ = [
    "DEFAULT_FORMATS",
    "MODES",
    "Candidate",
    "Costs",
    "Judge",
    "Objective",
    "Sensitivity",
    "Target",
    "candidates",
    "choose_objective",
    "measure",
    "measure_sensitivity",
    "quantized_values",
    "search",
    "targets",
]

_MAX_WORKERS = 8  # each holds a network of its own


@dataclass(frozen=True)
class Mode:
    """How much is done: the widths that every layer is probed at, on how many samples, and how weights are rounded."""

    widths: tuple[int, ...]
    num_samples: int
    compensated: bool = True
    second_pass: bool = False  # measure again where all layers are rounded, and choose again
    learned: bool = False  # rounding is learned through the network too, which needs torch


# The loss of one layer is close to linear in its error, and what one rounding does to it varies by a third: a few
# probes tell as much as all widths. At two bits layers collapse: no wider probe foresees it (losses come out as high as
# twice what it would say), and what is measured there counts only between two and three bits.
MODES = {
    "quick": Mode((4,), 32, compensated=False),
    "default": Mode((2, 3, 5), 64),
    "best": Mode((2, 3, 4, 5, 7), 128, second_pass=True, learned=True),
}


def search(
    model: Model | str | Path,
    stats: Stats | None = None,
    *,
    bits: float | None = None,
    size: int | None = None,
    data: object = None,
    kind: str = "real",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    overrides: Mapping[str, str] | None = None,
    mode: str = "default",
    rates: Mapping[str, float] | None = None,
    activations: str = "a16",
    threads: int = 0,
    progress: Progress | None = None,
    journal: Journal | None = None,
) -> Plan:
    """Finds the plan with the least predicted loss that a budget allows.

    Args:
        model: the float model, or its path.
        stats: of the inputs of its layers; without them weights count by their own error.
        bits: stored bits per weight, scales and padding included, over all quantized layers (default 5).
        size: stored bytes of all quantized layers, in place of `bits`.
        data: samples (see `afpq.data`) to measure the network on; needs `stats`.
        kind: how exponent biases are stored, `real` or `integer`.
        include: names or globs of the layers to quantize (default: all).
        exclude: names or globs of layers that stay float.
        overrides: format by name or glob, such as {"conv1*": "e2m3"}, `float` to leave it alone; the last one wins.
        mode: `quick` (one probe a layer, nearest rounding), `default`, or `best` (more probes, a second pass).
        rates: how fast formats multiply (`afpq.rates.read_rates`): the plan is the fastest, by its products, of those
            whose predicted loss is at most a tenth above the least; needs `stats`.
        activations: the way to round activations that `rates` are of. With `a8` first layers count as well.
        threads: 0 means one per core; the plan is the same for any number.
        progress: is told the stage, what is done and how much there is.
        journal: keeps what was measured, should the run be stopped.

    Raises:
        PlanError: the budget is too small, a pattern matches nothing, or an option does not exist.

    Example:
        >>> stats = afpq.calibrate("models/lenet5_digits.onnx", "models/digits_calibration.npz", limit=32)
        >>> plan = afpq.search("models/lenet5_digits.onnx", stats, bits=4.5)
        >>> plan.bits_per_weight <= 4.5
        True
    """
    _check_budget(bits, size)
    costs = measure(
        model,
        stats,
        bits=bits,
        size=size,
        data=data,
        kind=kind,
        include=include,
        exclude=exclude,
        overrides=overrides,
        mode=mode,
        rates=rates,
        activations=activations,
        threads=threads,
        progress=progress,
        journal=journal,
    )
    if costs.shop is None or not MODES[mode].second_pass:
        return costs.plan(bits=bits, size=size)
    corrected, choice = second_pass(costs, costs.budget_bits(bits, size))
    return corrected.plan_of(choice, costs.budget(bits, size))


def measure(
    model: Model | str | Path,
    stats: Stats | None = None,
    *,
    bits: float | None = None,
    size: int | None = None,
    data: object = None,
    kind: str = "real",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    overrides: Mapping[str, str] | None = None,
    mode: str = "default",
    rates: Mapping[str, float] | None = None,
    activations: str = "a16",
    threads: int = 0,
    progress: Progress | None = None,
    journal: Journal | None = None,
) -> Costs:
    """What `search` does before it chooses: the costs of all candidates, for plans under several budgets.

    A budget is optional, and only refused if it is too small, before the heavy steps. For the rest see `search`.

    Raises:
        PlanError: as `search`.
    """
    _check_options(kind, mode)
    model = model if isinstance(model, Model) else load_model(model)
    threads = threads or os.cpu_count() or 1
    pins = _choose(model, include, exclude, overrides or {})
    every = tuple(targets(model.layers, stats))
    active = [t for t in every if pins[t.weight_name] is not None]
    found = {}
    for done, target in enumerate(active):
        pinned = pins[target.weight_name]
        choices = (pinned,) if isinstance(pinned, AfpFormat) else DEFAULT_FORMATS
        found[target.weight_name] = candidates(
            target, kind=kind, formats=choices, num_threads=threads
        )
        if progress is not None:
            progress("formats", done + 1, len(active))
    seconds = None if rates is None else _seconds(active, found, stats, rates, activations)
    unmeasured = Costs(every, found, {}, "none", seconds=seconds)
    if not active:
        return unmeasured
    if bits is not None or size is not None:
        unmeasured.budget_bits(bits, size)
    losses, name, shop = _losses(
        model, active, found, stats, data, MODES[mode], threads, progress, journal
    )
    return replace(unmeasured, losses=losses, objective=name, shop=shop)


def _seconds(
    active: Sequence[Target],
    found: Mapping[str, Sequence[Candidate]],
    stats: Stats | None,
    rates: Mapping[str, float],
    activations: str,
) -> dict[str, list[float]]:
    """What the products of one sample take: nothing where a format does not matter, as on float planes."""
    if stats is None:
        raise PlanError(
            "rates need calibration data: how often a layer multiplies is counted there"
        )
    if activations not in RATE_MODES:
        raise PlanError(
            f"there are no rates of activations {activations!r}, only of {', '.join(RATE_MODES)}"
        )

    def matters(layer: Layer) -> bool:
        # With data, a8 has static formats; depthwise kernels take any integers.
        static = activations == "a8" and layer.groups == 1
        return layer.name in stats and has_products(layer, static)

    result = {}
    for target in active:
        layers = [x for x in target.layers if matters(x)]
        positions = sum(stats[layer.name].count for layer in layers) / stats.num_samples
        result[target.weight_name] = [
            target.weight.size * positions * product_seconds(rates, c.format)
            for c in found[target.weight_name]
        ]
    return result


def _losses(
    model: Model,
    active: Sequence[Target],
    found: Mapping[str, Sequence[Candidate]],
    stats: Stats | None,
    data: object,
    mode: Mode,
    threads: int,
    progress: Progress | None,
    journal: Journal | None,
) -> tuple[dict[str, list[float]], str, Workshop | None]:
    """The predicted loss of every candidate, the name of what was minimised, and where it can be measured again."""
    if data is None:
        name = "weight_error" if stats is None else "output_error"
        return {key: [c.noise for c in choices] for key, choices in found.items()}, name, None
    samples = data if isinstance(data, Data) else open_data(data, model.inputs)
    fitted, judged = split_samples(samples) if mode.compensated else (None, samples)
    judge = Judge(FloatModel(model, threads=1), judged, max_samples=mode.num_samples)
    measured = partial(
        measure_sensitivity,
        judge,
        active,
        found,
        widths=mode.widths,
        stats=stats,
        samples=fitted,
        num_threads=min(threads, _MAX_WORKERS),
        progress=progress,
    )
    sensitivities = (journal or Journal()).step(
        "sensitivities", measured, write_sensitivities, read_sensitivities
    )
    losses = {
        key: [sensitivities[key].loss(c.noise) for c in choices] for key, choices in found.items()
    }
    if fitted is None or stats is None:
        return losses, judge.objective.name, None
    shop = Workshop(judge, fitted, stats, min(threads, _MAX_WORKERS), progress)
    return losses, judge.objective.name, shop


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


def _check_budget(bits: float | None, size: int | None) -> None:
    if bits is not None and size is not None:
        raise PlanError("a budget is either bits or size, not both")
    if bits is not None and not (math.isfinite(bits) and bits > 0):
        raise PlanError(f"a budget of {bits} bits per weight is not a positive number")
    if size is not None and size <= 0:
        raise PlanError(f"a size of {size} bytes is not positive")


def _check_options(kind: str, mode: str) -> None:
    if kind not in ("real", "integer"):
        raise PlanError(f"exponent bias kind {kind!r} is not one of real, integer")
    if mode not in MODES:
        raise PlanError(f"mode {mode!r} is not one of {', '.join(MODES)}")
