"""Per-channel bias correction: takes the mean error that quantized weights cause out of a layer's bias.

The input's mean is known from calibration, so the correction is analytic. It removes the expected error of one layer on
its own; whether the network as a whole gains is measured when a model is built, on samples held out for that.
"""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from afpq.calibrate import Stats, TensorStats
from afpq.errors import PlanError
from afpq.graph import Layer

__all__ = ["can_correct", "correct_bias", "correct_biases"]


def can_correct(layer: Layer) -> bool:
    """Whether a layer has a bias of its own to correct, or can be given one."""
    return layer.kind in ("matmul", "conv")


def correct_bias(
    layer: Layer, stats: TensorStats, quantized: npt.NDArray[np.float32]
) -> npt.NDArray[np.float32]:
    """The bias that keeps the mean of every output channel: bias - (quantized - weight) @ mean, float32 [n].

    Args:
        layer: the float layer.
        stats: of its input; row g of `mean` serves the g-th part of the channels.
        quantized: the values of the quantized weight, [n, k].

    Raises:
        PlanError: a shape does not fit the layer.
    """
    groups = len(stats.mean)
    if quantized.shape != layer.weight.shape:
        raise PlanError(
            f"layer {layer.name!r}: quantized weight {list(quantized.shape)} "
            f"is not {list(layer.weight.shape)}"
        )
    if stats.mean.shape[1:] != (layer.k,) or layer.n % max(groups, 1):
        raise PlanError(
            f"layer {layer.name!r}: input means {list(stats.mean.shape)} "
            f"do not fit a weight {list(layer.weight.shape)}"
        )
    change = quantized.astype(np.float64) - layer.weight
    shift = np.einsum("gnk,gk->gn", change.reshape(groups, -1, layer.k), stats.mean).reshape(-1)
    bias = np.zeros(layer.n) if layer.bias is None else layer.bias.astype(np.float64)
    return np.asarray(bias - shift, np.float32)


def correct_biases(
    layers: tuple[Layer, ...], stats: Stats, quantized: Mapping[str, npt.NDArray[np.float32]]
) -> dict[str, npt.NDArray[np.float32]]:
    """`correct_bias` of every layer that has statistics, a bias, and a weight in `quantized` (by weight_name)."""
    return {
        layer.name: correct_bias(layer, stats[layer.name], quantized[layer.weight_name])
        for layer in layers
        if can_correct(layer) and layer.weight_name in quantized and layer.name in stats
    }
