"""First and second moments of what a layer reads and what it should compute: all that compensated rounding needs.

A layer multiplies rows x [k] by its weight; those of a convolution are the patches under the kernel, taps first, zeros
where it is padded. Moments are folded from pairs of tensors batch by batch. Where there are more positions than the
moments need, positions are taken at equal distances.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from afpq._layer import conv_extent
from afpq.graph import ConvSpec, Layer

__all__ = ["MomentSums", "Moments", "channel_axis", "input_rows", "output_rows", "spread"]

Floats = npt.NDArray[np.float64]
Array = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Moments:
    """Means and covariances over positions; g counts the groups of a convolution, else it is 1."""

    count: int  # at least 1
    input_mean: Floats  # [g, k]
    covariance: Floats  # [g, k, k] of the input
    output_mean: Floats  # [n] of the output that is wanted
    cross: Floats  # [g, n / g, k] covariance of wanted output and input

    @property
    def is_finite(self) -> bool:
        """Whether no number was met that is none."""
        return bool(np.isfinite(self.covariance).all() and np.isfinite(self.cross).all())


class MomentSums:
    """Adds up rows of one layer input, shared by all layers that read it alike, and their wanted outputs."""

    def __init__(self, layers: tuple[Layer, ...]) -> None:
        first = layers[0]
        groups, k = first.groups, first.k
        self._layers = layers
        self._count = 0
        self._rows = np.zeros((groups, k))
        self._squares = np.zeros((groups, k, k))
        self._outputs = [np.zeros(layer.n) for layer in layers]
        self._products = [np.zeros((groups, layer.n // groups, k)) for layer in layers]

    def add(self, value: Array, wanted: list[Array] | None, max_rows: int, phase: int) -> None:
        """Adds one batch: the input tensor, and each layer's wanted output tensor (None: what it computes)."""
        rows, picked = input_rows(self._layers[0], value, max_rows, phase)
        self._count += len(picked)
        self._rows += rows.sum(1, dtype=np.float64)
        # Columns first: the batch of products is then one call of BLAS a group.
        self._squares += np.matmul(rows.transpose(0, 2, 1), rows)
        for layer, tensor, sums, products in zip(
            self._layers, wanted or (), self._outputs, self._products, strict=bool(wanted)
        ):
            outputs = output_rows(layer, tensor)[picked]
            sums += outputs.sum(0, dtype=np.float64)
            products += np.matmul(outputs.T.reshape(layer.groups, -1, len(outputs)), rows)

    def moments(self, wanted: bool) -> list[Moments]:
        """One for each layer; without wanted outputs, those that the float weight gives."""
        count = max(self._count, 1)
        mean = self._rows / count
        covariance = self._squares / count - mean[:, :, None] * mean[:, None, :]
        result = []
        for layer, sums, products in zip(self._layers, self._outputs, self._products, strict=True):
            if wanted:
                output = sums / count
                cross = products / count - output.reshape(len(mean), -1, 1) * mean[:, None, :]
            else:
                weight = layer.weight.reshape(len(mean), -1, layer.k).astype(np.float64)
                output = np.einsum("gnk,gk->gn", weight, mean).reshape(-1)
                output += 0.0 if layer.bias is None else layer.bias
                cross = weight @ covariance
            result.append(Moments(count, mean, covariance, output, cross))
        return result


def input_rows(
    layer: Layer, value: Array, max_rows: int, phase: int = 0
) -> tuple[Array, npt.NDArray[np.intp]]:
    """Rows that the layer multiplies, float32 [g, rows, k], and which positions they are (of all, in order).

    At most about `max_rows` positions, at equal distances; `phase` shifts the first one.
    """
    if layer.conv is None:
        axis = -1 if layer.k_axis is None else layer.k_axis
        rows = np.moveaxis(value, axis, -1).reshape(-1, layer.k)
        picked = spread(len(rows), max_rows, phase)
        return np.ascontiguousarray(rows[picked], np.float32)[None], picked
    return _patches(layer.conv, layer.groups, value, max_rows, phase)


def output_rows(layer: Layer, value: Array) -> Array:
    """The output tensor of a layer as rows [positions, n], in the order of `input_rows`."""
    return (
        np.moveaxis(value, channel_axis(layer), -1)
        .reshape(-1, layer.n)
        .astype(np.float32, copy=False)
    )


def channel_axis(layer: Layer) -> int:
    """The axis of a layer's output that its n channels are on."""
    if layer.conv is not None:
        return 1
    return -2 if layer.is_left and layer.k_axis == -2 else -1


def spread(total: int, wanted: int, phase: int) -> npt.NDArray[np.intp]:
    """At most about `wanted` of `total` positions, at equal distances; `phase` shifts the first one."""
    step = max(1, -(-total // max(wanted, 1)))
    return np.arange(phase % min(step, max(total, 1)), total, step)


def _patches(
    conv: ConvSpec, groups: int, value: Array, max_rows: int, phase: int
) -> tuple[Array, npt.NDArray[np.intp]]:
    rank = len(conv.kernel_shape)
    extents = [conv_extent(value.shape[2 + axis], conv, axis) for axis in range(rank)]
    sizes = [len(value), *(extent.positions for extent in extents)]
    picked = spread(int(np.prod(sizes)), max_rows, phase)
    sample, *places = np.unravel_index(picked, sizes)
    margins = [(0, 0), (0, 0)] + [(extent.begin, extent.end) for extent in extents]
    padded = np.pad(value, margins)
    taps = list(np.ndindex(*conv.kernel_shape))
    channels = value.shape[1] // groups
    rows = np.empty((groups, len(picked), len(taps), channels), np.float32)
    for number, tap in enumerate(taps):
        index = [
            place * conv.strides[axis] + tap[axis] * conv.dilations[axis]
            for axis, place in enumerate(places)
        ]
        place_of = (sample, slice(None), *index)
        found = padded[place_of]  # [positions, channels of all groups]
        rows[:, :, number] = found.reshape(len(picked), groups, channels).transpose(1, 0, 2)
    return rows.reshape(groups, len(picked), -1), picked
