"""What a stored tensor can become: every format with its size and its error, for the layers that share the tensor."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from afpq.calibrate import Stats
from afpq.formats import AfpFormat, all_formats
from afpq.graph import Layer
from afpq.plan import storage_bits
from afpq.rounding import best_scale, fake_quantize_rows

__all__ = ["DEFAULT_FORMATS", "Candidate", "Target", "candidates", "quantized_values", "targets"]

# e1mX has the values of e0m(X+1); e5 never wins, its few mantissa bits cost more than its range gains.
DEFAULT_FORMATS = tuple(f for f in all_formats() if f.exponent_bits in (0, 2, 3, 4))

# Inputs that calibration hardly saw may still occur: every product counts at least so much of the mean.
_ENERGY_FLOOR = 0.01
# Other scales than the default are tried where those take more than this share of a layer, in small tensors only.
_SCALE_SHARE = 0.08
_MANY_WEIGHTS = 1 << 18
# A format of a slower kernel class has to be better by this factor than the best of the faster ones.
_SLOWER_MUST_GAIN = 0.95
_CLASSES = ("byte", "pair", "wide")


@dataclass(frozen=True, eq=False)
class Target:
    """A stored tensor, the layers that use it, and how much an error of each product counts."""

    weight_name: str
    layers: tuple[Layer, ...]
    energy: npt.NDArray[np.float64] | None = field(repr=False)  # [rows, k], see `best_scale`
    signal: npt.NDArray[np.float64] = field(
        repr=False
    )  # [n]: energy-weighted sum of squared weights

    @property
    def weight(self) -> npt.NDArray[np.float32]:
        return self.layers[0].weight

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(layer.name for layer in self.layers)


@dataclass(frozen=True)
class Candidate:
    """One choice for a tensor.

    `error` is the expected squared output error of a position, summed over channels. `noise` is the mean over channels
    of the error relative to the channel's own output energy: no channel decides alone.
    """

    format: AfpFormat
    kind: str
    granularity: str
    storage_bits: int  # codes, padding and scales
    error: float
    noise: float


def targets(layers: Sequence[Layer], stats: Stats | None) -> list[Target]:
    """One target for every stored tensor, in the order of the layers."""
    shared: dict[str, list[Layer]] = {}
    for layer in layers:
        shared.setdefault(layer.weight_name, []).append(layer)
    return [_target(name, tuple(group), stats) for name, group in shared.items()]


def candidates(
    target: Target,
    *,
    kind: str = "real",
    formats: Sequence[AfpFormat] = DEFAULT_FORMATS,
    num_threads: int = 0,
) -> list[Candidate]:
    """Every format of the list that is worth considering, by rising size; `kind` is the kind of scale preferred.

    A layer whose scales take much of its size also gets cheaper ones to choose from: one per tensor, or exponent
    biases in place of real scales.
    """
    n, k = target.weight.shape
    result: list[Candidate] = []
    for fmt in formats:
        choices = [(kind, "per_channel")]
        scales = storage_bits(n, k, fmt, kind, "per_channel") - storage_bits(
            n, k, fmt, kind, "per_tensor"
        )
        if scales > _SCALE_SHARE * storage_bits(n, k, fmt, kind, "per_channel"):
            choices += [("integer", "per_channel")] if kind == "real" else []
            choices += [(kind, "per_tensor")] if target.weight.size <= _MANY_WEIGHTS else []
        result += [_candidate(target, fmt, k_, g, num_threads) for k_, g in choices]
    kept = _drop_slower(result) if len(formats) > 1 else result
    return sorted(kept, key=lambda c: (c.storage_bits, c.noise, c.format))


def quantized_values(
    target: Target, candidate: Candidate, *, num_threads: int = 0
) -> npt.NDArray[np.float32]:
    """The weight as the candidate would store it, decoded: float32 [n, k]."""
    scale, _ = best_scale(
        target.weight,
        candidate.format,
        target.energy,
        kind=candidate.kind,
        granularity=candidate.granularity,
        num_threads=num_threads,
    )
    return fake_quantize_rows(target.weight, candidate.format, scale, num_threads=num_threads)


def _target(name: str, layers: tuple[Layer, ...], stats: Stats | None) -> Target:
    weight = layers[0].weight
    known = [stats[layer.name].second_moment for layer in layers if stats and layer.name in stats]
    energies = [_floored(e) for e in known]
    if len(layers) > 1 and energies:
        # Layers of one tensor count alike: each by its error relative to its output. A table has no input to weigh.
        if len(known) < len(layers):
            energies.append(np.ones((1, weight.shape[1])))
        totals = [float(_signal(weight, e).sum()) for e in energies]
        rows = max(len(e) for e in energies)
        energy = sum(
            np.repeat(e, rows // len(e), axis=0) / (t or 1.0)
            for e, t in zip(energies, totals, strict=True)
        )
        energies = [np.asarray(energy)]
    chosen = energies[0] if energies else None
    return Target(name, layers, chosen, _signal(weight, chosen))


def _floored(energy: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return np.asarray(energy + _ENERGY_FLOOR * energy.mean(1, keepdims=True))


def _signal(
    weight: npt.NDArray[np.float32], energy: npt.NDArray[np.float64] | None
) -> npt.NDArray[np.float64]:
    rows = 1 if energy is None else len(energy)
    squares = np.square(weight, dtype=np.float64).reshape(rows, -1, weight.shape[1])
    if energy is None:
        return np.asarray(squares.sum(2).reshape(-1))
    return np.asarray(np.einsum("gnk,gk->gn", squares, energy).reshape(-1))


def _candidate(
    target: Target, fmt: AfpFormat, kind: str, granularity: str, num_threads: int
) -> Candidate:
    _, error = best_scale(
        target.weight,
        fmt,
        target.energy,
        kind=kind,
        granularity=granularity,
        num_threads=num_threads or os.cpu_count() or 1,
    )
    noise = np.divide(error, target.signal, out=np.zeros_like(error), where=target.signal > 0)
    n, k = target.weight.shape
    return Candidate(
        fmt,
        kind,
        granularity,
        storage_bits(n, k, fmt, kind, granularity),
        float(error.sum()),
        float(noise.mean()),
    )


def _drop_slower(choices: list[Candidate]) -> list[Candidate]:
    """Leaves out what runs slower than another choice of the same size without being clearly better."""

    def beaten(c: Candidate) -> bool:
        rank = _CLASSES.index(c.format.kernel_class)
        return any(
            _CLASSES.index(o.format.kernel_class) < rank
            and o.storage_bits <= c.storage_bits
            and c.noise > _SLOWER_MUST_GAIN * o.noise
            for o in choices
        )

    return [c for c in choices if not beaten(c)]
