"""Cross-layer equalisation: factors for channels that make the next weights easier to round, the function unchanged.

Where channels run from a producer to layers that read them (see `_pairs`), the producer may divide each by a factor s
and the readers multiply by it: ReLU and its kin pass positive factors (Nagel et al. 2019, "Data-Free Quantization
Through Weight Equalization and Bias Correction", section 4.1). What the producer's weights gain or lose does not matter
here: scales per output channel take it. What changes is how the columns of the readers' weights compare inside a row,
where all share a scale, and how much an error in each counts: its energy, the second moment of the input, becomes
energy / s^2. So the factors are

    s = input^a / column^b    input: root of the energy, column: norm of the weights relative to their rows

and a, b are the best of a few by expected output error, as the search for scales gives it. (1 / column equalises
ranges as Nagel et al. do, on the side that counts; input^a is the rule of AWQ, Lin et al. 2023.) Powers of two would
leave every bit of the float network as it is, but nearly every rounding error too: a mantissa does not see them.

A Clip at h > 0 does not pass factors, unless it never cuts: channels that come near h on the calibration samples,
before or after, are left alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product

import numpy as np
import numpy.typing as npt

from afpq._candidates import DEFAULT_FORMATS
from afpq._pairs import Constant, Pair, find_pairs
from afpq.calibrate import Stats
from afpq.data import Data
from afpq.errors import PlanError
from afpq.formats import AfpFormat
from afpq.graph import Layer, Model, with_constants
from afpq.rounding import best_scale
from afpq.runtime import FloatModel

__all__ = ["Equalized", "equalize"]

_EXPONENTS = (0.0, 0.25, 0.5, 1.0)
# Of a factor, up and down.
_LARGEST = 2.0**12
# A clip must be this far from what was seen.
_MARGIN = 2.0
# A pair whose readers gain less stays as it is.
_LEAST_GAIN = 0.98
_MAX_SAMPLES = 256

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Equalized:
    """A model with factors in its weights, and the factors [channels] by the name of their producer."""

    model: Model = field(repr=False)
    factors: Mapping[str, Floats]


def equalize(
    model: Model, stats: Stats, data: Data | None = None, *, bits: int = 4, num_threads: int = 0
) -> Equalized:
    """Puts factors where they lower the expected output error; the function of the network stays.

    Args:
        model: the float model; it is not changed.
        stats: of the inputs of its layers.
        data: samples that tell which channels a Clip cuts; without them no pair with a Clip is touched.
        bits: width of the formats by which factors are judged, 2..8.
        num_threads: 0 means one per core; the result is the same for any number.

    Raises:
        PlanError: there is no format of this width.
    """
    formats = [fmt for fmt in DEFAULT_FORMATS if fmt.bits == bits]
    if not formats:
        raise PlanError(f"bits {bits} is not in the range 2..8")
    pairs = list(find_pairs(model))
    highest = _highest(model, pairs, data)
    changed: dict[str, npt.NDArray[np.float32]] = {}
    factors = {}
    for pair in pairs:
        if any(clip.value not in highest for clip in pair.clips):
            continue
        if any(layer.name not in stats for layer, _ in pair.readers):
            continue
        found = _factors(pair, stats, highest, formats, num_threads)
        if found is None:
            continue
        factors[pair.name] = found
        edits = [(constant, 1 / found) for constant in pair.divided]
        edits += [
            (constant, np.repeat(found, _size(model, constant) // pair.channels))
            for _, constant in pair.readers
        ]
        for constant, factor in edits:
            _multiply(model, changed, constant, factor)
    return Equalized(with_constants(model, changed), factors)


def _factors(
    pair: Pair,
    stats: Stats,
    highest: Mapping[str, Floats],
    formats: Sequence[AfpFormat],
    num_threads: int,
) -> Floats | None:
    """[channels] the best factors, None if they gain too little."""
    views = [_View(layer, stats, pair.channels) for layer, _ in pair.readers]
    before = sum(view.noise(np.ones(pair.channels), formats, num_threads) for view in views)
    energy = np.sum([view.energy_of_channels() for view in views], 0)
    columns = np.sum([view.columns() for view in views], 0)
    usable = (energy > 0) & (columns > 0)
    for clip in pair.clips:
        usable &= _MARGIN * highest[clip.value] < clip.high
    # Dividing must not bring a channel to the bound.
    lowest = np.full(pair.channels, 1 / _LARGEST)
    for clip in pair.clips:
        lowest = np.maximum(lowest, _MARGIN * highest[clip.value] / clip.high)
    best, least = None, _LEAST_GAIN * before
    for a, b in product(_EXPONENTS, _EXPONENTS) if usable.any() else ():
        exponent = a / 2 * np.log2(energy, where=usable, out=np.zeros(pair.channels))
        exponent -= b / 2 * np.log2(columns, where=usable, out=np.zeros(pair.channels))
        factor = np.exp2(exponent - exponent[usable].mean())
        factor = np.where(usable, np.clip(factor, lowest, _LARGEST), 1.0)
        noise = sum(view.noise(factor, formats, num_threads) for view in views)
        if noise < least:
            best, least = factor, noise
    return best


class _View:
    """The weight of a reader [n, k] with the energy of its input, and the channel of every step of k."""

    def __init__(self, layer: Layer, stats: Stats, channels: int) -> None:
        self._weight = layer.weight.astype(np.float64)
        self._energy = stats[layer.name].second_moment
        repeats = layer.k // channels
        # Stored order: channels innermost for a convolution; what Flatten made runs over positions innermost.
        steps = np.arange(layer.k)
        self._channel = steps % channels if layer.kind == "conv" else steps // repeats
        self._channels = channels
        signal = np.square(self._weight) @ self._energy[0]
        self._signal = np.where(signal > 0, signal, 1.0)

    def noise(self, factor: Floats, formats: Sequence[AfpFormat], num_threads: int) -> float:
        """Mean over output channels of the expected error relative to the channel's energy, with the best format."""
        spread = factor[self._channel]
        weight = np.asarray(self._weight * spread, np.float32)
        energy = self._energy / np.square(spread)
        errors = (
            best_scale(weight, fmt, energy, num_threads=num_threads)[1] / self._signal
            for fmt in formats
        )
        return min(float(error.mean()) for error in errors)

    def energy_of_channels(self) -> Floats:
        """[channels] mean second moment, relative to the mean of all."""
        return self._by_channel(self._energy[0] / max(float(self._energy.mean()), 1e-300))

    def columns(self) -> Floats:
        """[channels] mean square of the weights relative to their rows."""
        rows = np.square(self._weight).mean(1, keepdims=True)
        return self._by_channel((np.square(self._weight) / np.where(rows > 0, rows, 1.0)).mean(0))

    def _by_channel(self, values: Floats) -> Floats:
        sums = np.bincount(self._channel, values, self._channels)
        return np.asarray(sums / np.bincount(self._channel, minlength=self._channels))


def _highest(model: Model, pairs: Sequence[Pair], data: Data | None) -> dict[str, Floats]:
    """[channels] the largest number that was met in each value that is clipped."""
    names = list(dict.fromkeys(clip.value for pair in pairs for clip in pair.clips))
    result: dict[str, Floats] = {}
    if data is None or not names:
        return result
    network = FloatModel(model, threads=1)
    axes = {clip.value: clip.axis for pair in pairs for clip in pair.clips}
    for feed in data.take(_MAX_SAMPLES).batches(4):
        for name, value in zip(names, network.run(feed, names), strict=True):
            rows = np.moveaxis(value, axes[name], -1).reshape(-1, value.shape[axes[name]])
            result[name] = np.maximum(result.get(name, -np.inf), rows.max(0).astype(np.float64))
    return result


def _size(model: Model, constant: Constant) -> int:
    tensor = model.ir.graph.initializers[constant.name].const_value
    assert tensor is not None
    return int(tensor.numpy().shape[constant.axis])


def _multiply(
    model: Model,
    changed: dict[str, npt.NDArray[np.float32]],
    constant: Constant,
    factor: Floats,
) -> None:
    array = changed.get(constant.name)
    if array is None:
        tensor = model.ir.graph.initializers[constant.name].const_value
        assert tensor is not None
        array = np.asarray(tensor.numpy(), np.float32)
    shape = [1] * array.ndim
    shape[constant.axis] = len(factor)
    changed[constant.name] = np.asarray(array * factor.reshape(shape), np.float32)
