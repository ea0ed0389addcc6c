"""Compensated rounding: codes, scales and biases that keep what a layer computes, not its weights.

A layer of the quantized network reads other inputs than in the float network. From their covariance H, and from the
covariance C of the float outputs with them, follow three steps for each layer, in the order of the network:

1. The weight W becomes the ridge regression of the float outputs on the inputs there are now:
   W' = (C + d W) (H + d)^-1. It makes up for what earlier layers lost, and stays at W where the data says nothing.
2. W' is rounded with feedback, then by coordinate descent, with scales refitted (`csrc/core/compensate.h`): GPTQ of
   Frantar et al. 2022 in the form of LDLQ (Chee et al. 2023), on a grid that is a float's.
3. The bias takes out what is left of the mean.

Covariances are centred because of step 3: a mean that the bias restores must not cost the weights anything.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from scipy import linalg

from afpq import _core
from afpq._moments import Moments
from afpq._walk import groups_of, walk
from afpq.data import Data
from afpq.formats import AfpFormat
from afpq.graph import Layer
from afpq.packing import PackedTensor
from afpq.rounding import best_scale, quantize_tensor
from afpq.runtime import FloatModel

__all__ = ["MAX_SAMPLES", "Choice", "Rounded", "compensate", "probe", "round_layer"]

# What is added to the diagonal of H, in units of its mean; more where there are few rows for each unknown.
_DAMPING = 0.1
_MAX_REFITS = 4
# A few hundred samples say all that moments can say; more would only take time.
MAX_SAMPLES = 256
_TINY = 1e-300

Floats = npt.NDArray[np.float32]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Choice:
    """How a tensor is stored."""

    format: AfpFormat
    kind: str = "real"
    granularity: str = "per_channel"


@dataclass(frozen=True, eq=False)
class Rounded:
    """What a layer becomes: `values` = integers of the format times `scale`, and the bias that goes with them."""

    values: Floats = field(repr=False)  # [n, k]
    scale: Floats = field(repr=False)  # [n], or [1] per tensor
    bias: Floats = field(repr=False)  # [n]
    sqnr_db: float  # expected, of the products on the inputs there are now


def round_layer(layer: Layer, moments: Moments, choice: Choice, *, num_threads: int = 1) -> Rounded:
    """Rounds the weight of one layer so that its outputs come close to those that the moments ask for."""
    groups, k = moments.input_mean.shape
    weight = layer.weight.reshape(groups, -1, k).astype(np.float64)
    values = np.empty(weight.shape, np.float32)
    common = _common_scale(layer, moments, choice) if choice.granularity == "per_tensor" else None
    strength = _DAMPING + k / moments.count
    scales, noise, signal = [], 0.0, 0.0
    for g in range(groups):
        covariance = moments.covariance[g]
        damping = strength * float(covariance.trace()) / k or 1.0
        damped = covariance + damping * np.eye(k)
        target = linalg.cho_solve(
            linalg.cho_factor(damped, lower=True), (moments.cross[g] + damping * weight[g]).T
        ).T
        # Inputs that vary most come first: what rounding does to them, all others can make up for.
        order = np.argsort(-covariance.diagonal(), kind="stable")
        values[g][:, order], scale, error = _round(
            target[:, order], damped[np.ix_(order, order)], choice, common, num_threads
        )
        scales.append(scale)
        noise += error
        signal += float(np.einsum("nk,nk->", target @ damped, target))
    return Rounded(
        values.reshape(layer.n, k),
        np.concatenate(scales) if common is None else common,
        _bias(moments, values),
        10 * float(np.log10(max(signal, _TINY) / max(noise, _TINY))),
    )


def compensate(
    network: FloatModel,
    data: Data,
    choices: Mapping[str, Choice],
    start: Mapping[str, PackedTensor],
    biases: Mapping[str, Floats],
    *,
    num_threads: int = 1,
    progress: Progress | None = None,
) -> tuple[dict[str, PackedTensor], dict[str, Floats], dict[str, float]]:
    """Rounds layer by layer, each on what the layers before it have become.

    Args:
        network: the float network; one thread, so that results do not depend on the machine.
        data: samples to calibrate on.
        choices: by weight_name, of all tensors that are to be quantized.
        start: nearest rounding of these, kept for tensors that are not compensated: tables, shared weights, rows that
            are too long, layers that meet numbers which are not finite.
        biases: corrected biases by layer name, for the same case.
        num_threads: the result is the same for any number.
        progress: is told what is done and how much there is.

    Returns:
        The tensors by weight_name, biases by layer name, and the expected SQNR by weight_name of what was compensated.
    """
    groups = groups_of(network.model, choices.keys())
    walked = {layer.name: layer.weight_name for group in groups for layer in group}
    tensors, sqnr = dict(start), dict[str, float]()
    weights = {n: t.decode() for n, t in start.items() if n not in walked.values()}
    used = {name: bias for name, bias in biases.items() if name not in walked}
    steps = walk(
        network,
        data.take(MAX_SAMPLES),
        groups,
        weights=weights,
        biases=used,
        num_threads=num_threads,
    )
    for done, step in enumerate(steps, 1):
        for layer, moments in zip(step.layers, step.moments, strict=True):
            name, choice = layer.weight_name, choices[layer.weight_name]
            if moments.is_finite:
                rounded = round_layer(layer, moments, choice, num_threads=num_threads)
                tensors[name] = quantize_tensor(
                    rounded.values, choice.format, rounded.scale, kind=choice.kind
                )
                used[layer.name], sqnr[name] = rounded.bias, rounded.sqnr_db
            elif layer.name in biases:
                used[layer.name] = biases[layer.name]
            weights[name] = tensors[name].decode()
        if progress is not None:
            progress(done, len(groups))
    return tensors, used, sqnr


def probe(
    network: FloatModel,
    data: Data,
    choices: Mapping[str, Sequence[Choice]],
    *,
    weights: Mapping[str, Floats] | None = None,
    biases: Mapping[str, Floats] | None = None,
    num_threads: int = 1,
    progress: Progress | None = None,
) -> dict[str, list[Rounded]]:
    """Rounds each layer on the inputs it has in the float network, once for each of its choices.

    With `weights` (values by weight_name, of all tensors) and `biases` (by layer name), on the inputs it has when every
    layer before it has become its first choice; tensors that `compensate` passes by are as given. Keys are weight
    names; those tensors are missing.
    """
    groups = groups_of(network.model, choices.keys())
    result: dict[str, list[Rounded]] = {}
    walked = {layer.name: layer.weight_name for group in groups for layer in group}
    changed = {n: w for n, w in (weights or {}).items() if n not in walked.values()}
    used = {n: b for n, b in (biases or {}).items() if n not in walked}
    steps = walk(
        network,
        data.take(MAX_SAMPLES),
        groups,
        weights=None if weights is None else changed,
        biases=used,
        num_threads=num_threads,
    )
    for done, step in enumerate(steps, 1):
        for layer, moments in zip(step.layers, step.moments, strict=True):
            name = layer.weight_name
            if moments.is_finite:
                result[name] = [
                    round_layer(layer, moments, choice, num_threads=num_threads)
                    for choice in choices[name]
                ]
            if name in result:
                changed[name], used[layer.name] = result[name][0].values, result[name][0].bias
            elif weights is not None:
                changed[name] = weights[name]
                used |= {n: b for n, b in (biases or {}).items() if n == layer.name}
        if progress is not None:
            progress(done, len(groups))
    return result


def _round(
    target: npt.NDArray[np.float64],
    covariance: npt.NDArray[np.float64],
    choice: Choice,
    common: Floats | None,
    num_threads: int,
) -> tuple[Floats, Floats, float]:
    """Values [n, k], scales [n] and the expected squared error of rounding a target [n, k]."""
    narrow = np.ascontiguousarray(target, np.float32)
    unit = float(covariance.diagonal().max())
    if common is None:
        energy = covariance.diagonal()[None]
        start, _ = best_scale(
            narrow, choice.format, energy, kind=choice.kind, num_threads=num_threads
        )
    else:
        start = np.repeat(common, len(narrow))
    values, scale, errors = _core.round_compensated(
        narrow,
        np.ascontiguousarray(covariance / unit, np.float32),
        _feedback(covariance),
        str(choice.format),
        choice.kind,
        start,
        0 if common is not None else _MAX_REFITS,
        num_threads,
    )
    return values, scale, float(errors.sum()) * unit


def _feedback(covariance: npt.NDArray[np.float64]) -> Floats:
    """U of covariance = (1 + U) D (1 + U)^T, strictly upper triangular."""
    lower = linalg.cholesky(covariance[::-1, ::-1], lower=True)
    unit = (lower / lower.diagonal())[::-1, ::-1]
    return np.ascontiguousarray(np.triu(unit, 1), np.float32)


def _common_scale(layer: Layer, moments: Moments, choice: Choice) -> Floats:
    energy = np.diagonal(moments.covariance, axis1=1, axis2=2)
    scale, _ = best_scale(
        layer.weight, choice.format, energy, kind=choice.kind, granularity=choice.granularity
    )
    return scale


def _bias(moments: Moments, values: Floats) -> Floats:
    """The bias that restores the mean of every output channel."""
    shift = np.einsum("gnk,gk->gn", values, moments.input_mean).reshape(-1)
    return np.asarray(moments.output_mean - shift, np.float32)
