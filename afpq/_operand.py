"""How a packed tensor becomes an operand of standard ONNX: as float32, as codes of a standard type, for QONNX.

Packed tensors are matrices [n, k]; a `Placement` says in which shape a node of ONNX wants one and along which axis its
channels run. An `Operand` is what stands for it in the graph: constants, and the node that makes float32 of them.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from afpq._standard import Fitted
from afpq.errors import ModelError
from afpq.packed import PackedLayer, scale_columns, weight_values

__all__ = ["QONNX", "Operand", "Placement", "dequantized", "placement", "plain", "quant_node"]

QONNX = "qonnx.custom_op.general"

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Placement:
    """The shape of an operand that holds a matrix [n, k].

    order "rows": [n, k] row-major in any shape; "columns": [k, n]; "taps": [n, channels, *kernel], k = tap * channels +
    channel. `axis` is the one that n runs along, None if it is none by itself.
    """

    order: str
    shape: tuple[int, ...]
    axis: int | None

    def arrange(self, matrix: Array) -> Array:
        """A matrix [n, k] in this shape."""
        if self.order == "columns":
            return np.ascontiguousarray(matrix.T)
        if self.order == "taps":
            n, channels, *kernel = self.shape
            return np.ascontiguousarray(np.moveaxis(matrix.reshape(n, *kernel, channels), -1, 1))
        return np.ascontiguousarray(matrix).reshape(self.shape)


@dataclass(frozen=True, eq=False)
class Operand:
    """Constants by the name they ask for, and the node that computes the operand from them in this order.

    Without an op_type the only constant is the operand.
    """

    constants: tuple[tuple[str, Array], ...] = field(repr=False)
    op_type: str = ""
    domain: str = ""
    attributes: Mapping[str, Any] = field(default_factory=dict)
    storage_bytes: int = 0  # of weights and scales


def placement(layer: PackedLayer) -> Placement:
    """The operand of the ONNX node that a packed node stands for.

    Raises:
        ModelError: the domain has no such operator, or the node's attributes do not fit one another.
    """
    n, k = layer.n, layer.k
    if layer.op not in ("MatMul", "Conv", "Gather", "Unpack"):
        raise ModelError(f"the domain afpq has no operator {layer.op!r}")
    if layer.op == "MatMul":
        return Placement("columns", (k, n), 1)
    if layer.op == "Gather":
        return Placement("rows", (n, k), 0)
    name = "kernel_shape" if layer.op == "Conv" else "shape"
    if name not in layer.node.attributes:
        raise ModelError(f"attribute {name} is missing")
    shape = tuple(int(d) for d in layer.node.attributes[name].value)
    fits = k % max(math.prod(shape), 1) == 0 if layer.op == "Conv" else math.prod(shape) == n * k
    if not fits:
        raise ModelError(f"{name} {list(shape)} does not fit a matrix of [{n}, {k}]")
    if layer.op == "Conv":
        return Placement("taps", (n, k // math.prod(shape), *shape), 0)
    return Placement("rows", shape, _channel_axis(shape, n))


def plain(layer: PackedLayer, where: Placement) -> Operand:
    """The decoded weights in float32."""
    weight = where.arrange(weight_values(layer))
    return Operand(((layer.weight_name, weight),), storage_bytes=weight.nbytes)


def dequantized(layer: PackedLayer, where: Placement, fitted: Fitted) -> Operand:
    """Codes of a standard type, and DequantizeLinear."""
    scale, attributes = fitted.scale, {}
    if layer.group_size:
        attributes = {"axis": int(where.order == "rows"), "block_size": layer.group_size}
        scale = scale if where.order == "columns" else np.ascontiguousarray(scale.T)
    elif scale.size == 1:
        scale = scale.reshape(())
    else:
        assert where.axis is not None
        attributes = {"axis": where.axis}
    constants = ((layer.weight_name, where.arrange(fitted.codes)), (layer.scale_name, scale))
    return Operand(constants, "DequantizeLinear", "", attributes, fitted.storage_bytes)


def quant_node(layer: PackedLayer, where: Placement) -> Operand:
    """The decoded weights in float32, and the QONNX operator that leaves them as they are: FloatQuant or IntQuant.

    FloatQuant has the values I * 2^(1 - M - exponent_bias) * scale. Its exponent_bias is the usual 2^(E - 1) - 1 here,
    one number, as QONNX wants it; afpq's own is in the scale.
    """
    fmt = layer.format
    weight = where.arrange(weight_values(layer))
    if fmt.exponent_bits == 0:
        scale = _spread(layer, where, 1.0)
        numbers = {"zero_point": 0, "bits": fmt.bits}
        fields: dict[str, Any] = {"signed": 1, "narrow": 1, "rounding_mode": "ROUND"}
        op_type = "IntQuant"
    else:
        exponent_bias = 2 ** (fmt.exponent_bits - 1) - 1
        unit = 2.0 ** (1 - fmt.mantissa_bits - exponent_bias)
        scale = _spread(layer, where, unit)
        numbers = {
            "exponent_bits": fmt.exponent_bits,
            "mantissa_bits": fmt.mantissa_bits,
            "exponent_bias": exponent_bias,
            "max_value": fmt.max_integer * unit,
        }
        fields = {"has_inf": 0, "has_nan": 0, "has_subnormal": 1, "saturation": 1}
        fields["rounding_mode"] = "ROUND"
        op_type = "FloatQuant"
    scalars = tuple((f"{fmt}_{name}", np.array(v, np.float32)) for name, v in numbers.items())
    constants = ((layer.weight_name, weight), (layer.scale_name, scale), *scalars)
    return Operand(constants, op_type, QONNX, fields, weight.nbytes + scale.nbytes)


def _channel_axis(shape: tuple[int, ...], n: int) -> int | None:
    """The one axis of a row-major tensor that n runs along; axes of one element may stand around it."""
    if n == 1:
        return 0
    leading = 1
    for axis, extent in enumerate(shape):
        leading *= extent
        if leading == n:
            return axis if extent == n else None
    return None


def _spread(layer: PackedLayer, where: Placement, unit: float) -> Array:
    """Scales over a power of two, shaped to broadcast against the operand; those of groups once for every weight."""
    scale: Array = scale_columns(layer) / np.float32(unit)
    if layer.group_size:
        return where.arrange(scale)
    if layer.stored_scale.size == 1:
        return np.asarray(scale[0]).reshape(())
    assert where.axis is not None
    shape = [1] * len(where.shape)
    shape[where.axis] = layer.n
    return scale.reshape(shape)
