"""What a layer is: a node, the constant it multiplies by as a matrix [n, k], and how that matrix lies in the node."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from afpq import _core
from afpq.formats import AfpFormat

__all__ = [
    "ConvExtent",
    "ConvSpec",
    "Layer",
    "Skipped",
    "TensorInfo",
    "conv_extent",
    "conv_matrix",
    "is_planar",
    "original_layout",
    "reads_bytes",
    "takes_bytes",
]


@dataclass(frozen=True)
class TensorInfo:
    """An input or output of a model. A dimension is an int, the name of a dynamic axis, or None."""

    name: str
    dtype: str  # NumPy's name: "float32", "int64", ..
    shape: tuple[int | str | None, ...] | None  # None: unknown rank


@dataclass(frozen=True)
class ConvSpec:
    """The geometry of a convolution; `pads` (begin .. end, as in ONNX) counts only where auto_pad is NOTSET."""

    kernel_shape: tuple[int, ...]
    strides: tuple[int, ...]
    pads: tuple[int, ...]
    dilations: tuple[int, ...]
    auto_pad: str = "NOTSET"


@dataclass(frozen=True)
class ConvExtent:
    """One spatial axis of a convolution: its output positions, and the zeros before and after the input."""

    positions: int
    begin: int
    end: int


@dataclass(frozen=True, eq=False)
class Layer:
    """A weight that can be quantized, at one place of use.

    `weight` is [n, k] in stored order: one row for each output channel (table row), the products of one output along
    k. Convolutions have k = tap * channels_per_group + channel. Layers with equal `weight_name` hold equal matrices
    and share one stored tensor. The output is `x @ weight.T + bias` over axis `k_axis` of the input (kind matmul).
    """

    name: str  # of the node, made unique and not empty
    kind: str  # "matmul", "conv", "gather" or "unpack" (no kernel of its own: decoded to float for the node)
    op_type: str
    weight_name: str
    weight: npt.NDArray[np.float32] = field(repr=False)
    input_name: str | None  # the float activation; None for gather and unpack
    output_name: str  # the output with the layer's own bias, before any Relu or Clip
    bias: npt.NDArray[np.float32] | None = field(repr=False)  # [n], zero if None
    groups: int = 1
    conv: ConvSpec | None = None
    k_axis: int | None = (
        None  # axis of the input that k runs along: -1; 1 for conv; 0 or -2 if transposed
    )
    dtype: str = "float32"  # of the model's weight; float16 is widened
    shape: tuple[int, ...] = ()  # of the node's operand
    note: str = (
        ""  # why the weight is not shared, or has no kernel; empty when there is nothing to say
    )
    # Where it is in the graph: positions in the list of nodes, which a clone of the graph keeps.
    node_index: int = field(default=0, repr=False)
    weight_input: int = field(default=1, repr=False)
    add_index: int | None = field(default=None, repr=False)  # an Add that holds the bias
    rank: int | None = field(default=None, repr=False)  # of the input, where rewriting needs it
    alpha: float = field(default=1.0, repr=False)  # of a Gemm: already in `weight`
    k_first: bool = field(default=False, repr=False)  # the operand is [k, n]
    keeps_c: bool = field(
        default=False, repr=False
    )  # a Gemm whose C stays an Add after the product

    @property
    def n(self) -> int:
        """Output channels, or rows of a table."""
        return int(self.weight.shape[0])

    @property
    def k(self) -> int:
        """Products in one output, or columns of a table."""
        return int(self.weight.shape[1])

    @property
    def num_weights(self) -> int:
        """Weights in the matrix."""
        return self.weight.size

    @property
    def is_left(self) -> bool:
        """Whether the constant is the left operand of a MatMul."""
        return self.kind == "matmul" and self.op_type == "MatMul" and self.weight_input == 0


@dataclass(frozen=True)
class Skipped:
    """A constant operand that stays float, and why."""

    name: str
    op_type: str
    reason: str
    num_weights: int


def conv_extent(size: int, conv: ConvSpec, axis: int) -> ConvExtent:
    """What a convolution does along spatial axis `axis` of an input that has `size` elements there."""
    stride = conv.strides[axis]
    reach = (conv.kernel_shape[axis] - 1) * conv.dilations[axis] + 1
    begin, end = conv.pads[axis], conv.pads[axis + len(conv.kernel_shape)]
    if conv.auto_pad == "VALID":
        begin = end = 0
    elif conv.auto_pad.startswith("SAME"):
        needed = max((-(-size // stride) - 1) * stride + reach - size, 0)
        begin = needed - needed // 2 if conv.auto_pad == "SAME_LOWER" else needed // 2
        end = needed - begin
    return ConvExtent(max((size + begin + end - reach) // stride + 1, 0), begin, end)


def conv_matrix(weight: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """[c_out, channels_per_group, *kernel] -> [c_out, taps * channels_per_group], channels innermost."""
    moved = np.moveaxis(weight, 1, -1)
    return np.ascontiguousarray(moved).reshape(weight.shape[0], -1)


def original_layout(layer: Layer, weight: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """A matrix [n, k] in stored order as the operand that the layer's node reads (a Gemm's with alpha = 1)."""
    if layer.kind == "conv":
        out, channels, *kernel = layer.shape
        return np.ascontiguousarray(np.moveaxis(weight.reshape(out, *kernel, channels), -1, 1))
    if layer.k_first:
        return np.ascontiguousarray(weight.T).reshape(layer.shape)
    return np.ascontiguousarray(weight).reshape(layer.shape)


def reads_bytes(layer: Layer, fmt: AfpFormat) -> bool:
    """Whether kernels round what a layer reads, if its weight has this format: not where they multiply floats."""
    return fmt.kernel_class != "wide" and has_products(layer)


def takes_bytes(layer: Layer, fmt: AfpFormat) -> bool:
    """The same if what it reads has a static format: `reads_bytes`, first layers of few channels and depthwise ones."""
    return fmt.kernel_class != "wide" and has_products(layer, static=True)


def has_products(layer: Layer, static: bool = False) -> bool:
    """Whether a layer is a matrix product or a convolution of dot products: its format decides how fast it is.

    `static` says that what it reads has a static format.
    """
    if layer.kind not in ("matmul", "conv"):
        return False
    conv = layer.conv
    return conv is None or not is_planar(layer.n, layer.k, layer.groups, conv.kernel_shape, static)


def is_planar(
    n: int, k: int, groups: int, kernel_shape: Sequence[int], static: bool = False
) -> bool:
    """Whether a convolution with weights [n, k] runs on float planes: too few channels for dot products.

    `static` says that what it reads has a static format.
    """
    taps = math.prod(kernel_shape)
    return bool(_core.conv_is_planar(k // taps * groups, n, groups, taps, static))
