"""BatchNormalization nodes in inference form, and the means and variances that they divide by."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from afpq._fold import attribute
from afpq.graph import Model

__all__ = ["BatchNorm", "batch_norms"]

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class BatchNorm:
    """y = gamma (x - mean) / sqrt(variance + epsilon) + beta over axis 1 of x."""

    node_index: int
    input_name: str
    mean_name: str  # of the initializers
    variance_name: str
    mean: Floats = field(repr=False)  # [channels]
    variance: Floats = field(repr=False)  # [channels]
    epsilon: float

    def refitted(self, slope: Floats, offset: Floats) -> tuple[Floats, Floats]:
        """Mean and variance with which x is read as slope x + offset (both [channels], slope > 0).

        (slope x + offset - mean) / sqrt(variance + epsilon) = (x - mean') / sqrt(variance' + epsilon), hence

            mean' = (mean - offset) / slope,    variance' = (variance + epsilon) / slope^2 - epsilon

        A variance' below zero, where epsilon is most of the sum, becomes 0.
        """
        variance = (self.variance + self.epsilon) / slope**2 - self.epsilon
        return (self.mean - offset) / slope, np.maximum(variance, 0.0)


def batch_norms(model: Model) -> Iterator[BatchNorm]:
    """The nodes whose mean and variance are initializers that nothing else reads, in the order of the graph."""
    for index, node in enumerate(model.ir.graph):
        if node.op_type != "BatchNormalization" or node.domain != "":
            continue
        if int(attribute(node, "training_mode", 0)) or len(node.inputs) != 5:
            continue
        values = [node.inputs[0], *node.inputs[3:]]
        if any(value is None or not value.name for value in values):
            continue
        x, *constants = (value for value in values if value is not None)
        if any(
            not c.is_initializer() or len(c.uses()) != 1 or c.is_graph_output() for c in constants
        ):
            continue
        arrays = [None if c.const_value is None else c.const_value.numpy() for c in constants]
        mean, variance = (None if a is None else a.astype(np.float64) for a in arrays)
        if mean is None or variance is None or mean.ndim != 1 or mean.shape != variance.shape:
            continue
        mean_name, variance_name = (str(c.name) for c in constants)
        epsilon = float(attribute(node, "epsilon", 1e-5))
        yield BatchNorm(index, str(x.name), mean_name, variance_name, mean, variance, epsilon)
