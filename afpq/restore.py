"""Restores the statistics that quantization changed: mean and variance of every channel, place by place.

A place is the output of a layer, or the input of a BatchNormalization that is still in the graph. Over calibration
samples each of its channels has mean m and deviation s in the float network, m' and s' in the quantized one. A line
gives it the float network's statistics back: x -> slope x + offset with slope = s / s', offset = m - slope m'.

- BatchNormalization takes the line into its mean and variance, gamma and beta stay: the re-estimation of Sun et al.
  2019 ("Hybrid 8-bit Floating Point Training and Inference for Deep Neural Networks"), see `BatchNorm.refitted`.
- A layer with a scale per output channel takes the slope into its scales and the offset into its bias. This is the same
  where the normalization was folded into the layer before. The slope is the one that stored scales can express; the
  bias goes by that. Other layers (one scale for the whole tensor, a tensor of several layers) take the offset only.

Places come in the order of the network, each with what the places before it have become. Both networks are measured on
the same samples, so the means of few samples do no harm: what they are off by is off in both. A channel that does not
vary, in either network, keeps its scale.

The slope of least squares, cov(x, y) / s'^2 for outputs y of the float network, makes the smallest error at the place
itself, but it is the correlation times the slope above: what is noisy fades, place after place. Through whole networks
neither is always ahead, and this one is what a normalization does. Whether the network gains is measured where this is
used, on other samples.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from afpq._batchnorm import BatchNorm, batch_norms
from afpq._moments import output_rows, spread
from afpq._walk import Changes, Stop, visit
from afpq.compensate import MAX_SAMPLES
from afpq.correct import can_correct
from afpq.data import Data
from afpq.formats import round_scale
from afpq.graph import Layer, Model
from afpq.packing import PackedTensor
from afpq.runtime import FloatModel

__all__ = ["Restored", "restore"]

_MOST_ROWS = 1 << 16  # positions that are looked at of each place
_PHASE = 7919  # batches start at different positions
# A deviation below this share of the mean is rounding of float32, not signal.
_FLAT = 1e-5

Floats = npt.NDArray[np.float64]
Narrow = npt.NDArray[np.float32]
Array = npt.NDArray[Any]
Progress = Callable[[int, int], None]


@dataclass(frozen=True, eq=False)
class Restored:
    """What has changed in a network, and what has not, ready for `rewrite`."""

    tensors: dict[str, PackedTensor] = field(repr=False)  # by weight_name
    biases: dict[str, Narrow] = field(repr=False)  # [n] by layer name
    constants: dict[str, Narrow] = field(repr=False)  # [channels] by initializer


@dataclass(frozen=True, eq=False)
class _Place:
    """Tensors that are looked at together, and who takes their lines."""

    stop: Stop
    owners: tuple[Layer | BatchNorm, ...]


def restore(
    network: FloatModel,
    data: Data,
    tensors: Mapping[str, PackedTensor],
    biases: Mapping[str, Narrow],
    *,
    num_threads: int = 1,
    progress: Progress | None = None,
) -> Restored:
    """Restores mean and variance of every channel, in the order of the network.

    Args:
        network: the float network; one thread, so that results do not depend on the machine.
        data: samples to measure both networks on, a few hundred at most are used.
        tensors: rounded weights by weight_name; codes stay as they are.
        biases: by layer name, where they are not the layers' own.
        num_threads: the result is the same for any number.
        progress: is told what is done and how much there is.

    Returns:
        All tensors and biases, and the means and variances of BatchNormalization by the names of their initializers.
        Places that meet numbers which are not finite are left as they are.
    """
    model = network.model
    users = Counter(layer.weight_name for layer in model.layers)
    result = Restored(dict(tensors), dict(biases), {})
    weights = {name: tensor.decode() for name, tensor in tensors.items()}
    changes = Changes(weights, result.biases, result.constants)
    places = _places(model, tensors)
    visits = visit(
        network,
        data.take(MAX_SAMPLES),
        [place.stop for place in places],
        changes,
        num_threads=num_threads,
    )
    for done, (place, seen) in enumerate(zip(places, visits, strict=True), 1):
        sums = [_Sums(owner) for owner in place.owners]
        rows = max(_MOST_ROWS // seen.num_batches, 1)
        for number, (wanted, found) in enumerate(seen.batches):
            for part, y, x in zip(sums, wanted, found, strict=True):
                part.add(y, x, rows, number * _PHASE)
        for owner, part in zip(place.owners, sums, strict=True):
            if not part.is_finite:
                continue
            if isinstance(owner, BatchNorm):
                mean, variance = owner.refitted(part.slope(), part.offset(part.slope()))
                result.constants[owner.mean_name] = mean.astype(np.float32)
                result.constants[owner.variance_name] = variance.astype(np.float32)
                continue
            name = owner.weight_name
            alone = users[name] == 1
            tensor, slope = _rescaled(result.tensors[name], part.slope() if alone else None)
            result.tensors[name], weights[name] = tensor, tensor.decode()
            bias = result.biases.get(owner.name, owner.bias)
            # The line applies to the output, of which the old bias is a part.
            old = 0.0 if bias is None else slope * bias.astype(np.float64)
            result.biases[owner.name] = np.asarray(old + part.offset(slope), np.float32)
        if progress is not None:
            progress(done, len(places))
    return result


class _Sums:
    """Means and deviations of one place in both networks."""

    def __init__(self, owner: Layer | BatchNorm) -> None:
        self._owner = owner
        self._count = 0
        self._means = self._squares = np.zeros((2, 1))  # of the float network, of the quantized one

    def add(self, wanted: Array, found: Array, max_rows: int, phase: int) -> None:
        """Adds the tensors of one batch."""
        rows = [self._rows(value) for value in (wanted, found)]
        picked = spread(len(rows[0]), max_rows, phase)
        pair = np.stack([part[picked] for part in rows]).astype(np.float64)
        self._count += pair.shape[1]
        self._means = self._means + pair.sum(1)
        self._squares = self._squares + np.square(pair, out=pair).sum(1)

    @property
    def is_finite(self) -> bool:
        """Whether there were positions, and no number was met that is none."""
        return self._count > 0 and bool(np.isfinite(self._squares).all())

    def slope(self) -> Floats:
        """[channels] what brings the deviation back; 1 where nothing varies."""
        mean = self._means / self._count
        variance = self._squares / self._count - np.square(mean)
        varies = (variance > _FLAT**2 * np.square(mean)).all(0)
        wanted, found = np.where(varies, variance, 1.0)
        return np.asarray(np.sqrt(wanted / found))

    def offset(self, slope: Floats) -> Floats:
        """[channels] what brings the mean back, after this slope."""
        wanted, found = self._means / self._count
        return np.asarray(wanted - slope * found)

    def _rows(self, value: Array) -> Array:
        if isinstance(self._owner, BatchNorm):
            return np.moveaxis(value, 1, -1).reshape(-1, value.shape[1])
        return output_rows(self._owner, value)


def _places(model: Model, tensors: Mapping[str, PackedTensor]) -> list[_Place]:
    """Layers that read the same tensor together, every BatchNormalization on its own, in the order of the nodes."""
    readers: dict[str | None, list[Layer]] = {}
    for layer in model.layers:
        # Where a Gemm keeps its C, its output holds more than the layer computes.
        if layer.weight_name in tensors and can_correct(layer) and not layer.keeps_c:
            readers.setdefault(layer.input_name, []).append(layer)
    places = [
        _place(group[0].node_index, [layer.output_name for layer in group], *group)
        for group in readers.values()
    ]
    places += [_place(norm.node_index, [norm.input_name], norm) for norm in batch_norms(model)]
    return sorted(places, key=lambda place: place.stop.node_index)


def _place(node_index: int, names: list[str], *owners: Layer | BatchNorm) -> _Place:
    return _Place(Stop(node_index, tuple(names), tuple(names)), owners)


def _rescaled(tensor: PackedTensor, slope: Floats | None) -> tuple[PackedTensor, Floats]:
    """A tensor with scales times `slope` [n] as far as they can be stored, and by how much each has grown."""
    if slope is None or tensor.granularity != "per_channel":
        return tensor, np.ones(tensor.n)
    scale = round_scale(tensor.format, np.asarray(tensor.scale * slope, np.float32), tensor.kind)
    return replace(tensor, scale=scale), scale / tensor.scale.astype(np.float64)
