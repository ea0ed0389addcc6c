"""ONNX operators as differentiable torch functions: those that lie between a weight and the outputs of a network.

A function takes the node and its inputs, torch tensors or None, and returns its outputs. What a node reads besides
(shapes, axes, masks) comes as tensors too. Semantics are those of opset 13 and later; where an older one differs, the
node is refused, never approximated.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor
from torch.nn import functional

from afpq._fold import attribute
from afpq._layer import ConvSpec, conv_extent

__all__ = ["OPERATORS", "UnsupportedError", "convolution"]

Inputs = Sequence[Tensor | None]
Operator = Callable[[ir.Node, Inputs], Sequence[Tensor]]

_CONV = (functional.conv1d, functional.conv2d, functional.conv3d)
_MAX_POOL = (functional.max_pool1d, functional.max_pool2d, functional.max_pool3d)


class UnsupportedError(Exception):
    """A node that has no exact counterpart here; the text says which."""


def convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, conv: ConvSpec, groups: int
) -> Tensor:
    """x [samples, channels, ..] * weight [n, channels / groups, *kernel] + bias [n]."""
    rank = len(conv.kernel_shape)
    extents = [conv_extent(x.shape[2 + axis], conv, axis) for axis in range(rank)]
    margins = [(e.begin, e.end) for e in extents]
    symmetric = all(begin == end for begin, end in margins)
    if not symmetric:
        x = functional.pad(x, _torch_pads(margins))
    padding = tuple(begin for begin, _ in margins) if symmetric else 0
    return _CONV[rank - 1](x, weight, bias, conv.strides, padding, conv.dilations, groups)


def _torch_pads(margins: Sequence[tuple[int, int]]) -> list[int]:
    return [size for margin in reversed(margins) for size in margin]


def _unary(function: Callable[[Tensor], Tensor]) -> Operator:
    return lambda node, inputs: [function(_tensor(inputs[0]))]


def _binary(function: Callable[[Tensor, Tensor], Tensor]) -> Operator:
    return lambda node, inputs: [function(_tensor(inputs[0]), _tensor(inputs[1]))]


def _tensor(value: Tensor | None) -> Tensor:
    if value is None:
        raise UnsupportedError("an input is missing")
    return value


def _ints(node: ir.Node, inputs: Inputs, position: int, name: str) -> list[int] | None:
    """Integers that newer opsets read from an input and older ones from an attribute; None if there are none."""
    if len(inputs) > position and inputs[position] is not None:
        # Without an operator of torch, which `torch.export` could not see through.
        values = _tensor(inputs[position]).tolist()
        return [int(x) for x in (values if isinstance(values, list) else [values])]
    found = attribute(node, name, None)
    return None if found is None else [int(x) for x in found]


def _clip(node: ir.Node, inputs: Inputs) -> list[Tensor]:
    bounds = [inputs[i] if len(inputs) > i else None for i in (1, 2)]
    low, high = (
        attribute(node, name, None) if b is None else b.item()
        for b, name in zip(bounds, ("min", "max"), strict=True)
    )
    x = _tensor(inputs[0])
    return [x if low is None and high is None else x.clamp(low, high)]


def _softmax(node: ir.Node, inputs: Inputs) -> list[Tensor]:
    x = _tensor(inputs[0])
    axis = attribute(node, "axis", -1 if (node.version or 13) >= 13 else 1)
    if (node.version or 13) < 13 and axis not in (-1, x.ndim - 1):
        raise UnsupportedError("Softmax over several axes, as before opset 13")
    return [x.softmax(axis)]


def _reshape(node: ir.Node, inputs: Inputs) -> list[Tensor]:
    x, shape = _tensor(inputs[0]), _ints(node, inputs, 1, "shape") or []
    if not attribute(node, "allowzero", 0):
        shape = [x.shape[i] if size == 0 else size for i, size in enumerate(shape)]
    return [x.reshape(shape)]


def _flatten(node: ir.Node, inputs: Inputs) -> list[Tensor]:
    x = _tensor(inputs[0])
    axis = attribute(node, "axis", 1)
    return [x.reshape(math.prod(x.shape[:axis]), -1)]


def _squeeze(node: ir.Node, inputs: Inputs) -> list[Tensor]:
    x, axes = _tensor(inputs[0]), _ints(node, inputs, 1, "axes")
    return [x.squeeze() if axes is None else x.squeeze(tuple(axes))]


def _unsqueeze(node: ir.Node, inputs: Inputs) -> list[Tensor]:
    x, axes = _tensor(inputs[0]), _ints(node, inputs, 1, "axes") or []
    rank = x.ndim + len(axes)
    for axis in sorted(a % rank for a in axes):
        x = x.unsqueeze(axis)
    return [x]


def _transpose(node: ir.Node, inputs: Inputs) -> list[Tensor]:
    x = _tensor(inputs[0])
    return [x.permute(*attribute(node, "perm", list(range(x.ndim))[::-1]))]


def _concat(node: ir.Node, inputs: Inputs) -> list[Tensor]:
    return [torch.cat([_tensor(x) for x in inputs], attribute(node, "axis", 0))]


def _split(node: ir.Node, inputs: Inputs) -> Sequence[Tensor]:
    x, axis = _tensor(inputs[0]), attribute(node, "axis", 0)
    sizes = _ints(node, inputs, 1, "split")
    if sizes is None:
        each = -(-x.shape[axis] // len(node.outputs))
        return torch.split(x, each, axis)
    return torch.split(x, sizes, axis)


def _slice(node: ir.Node, inputs: Inputs) -> list[Tensor]:
    x = _tensor(inputs[0])
    starts, ends = (_ints(node, inputs, i, name) or [] for i, name in ((1, "starts"), (2, "ends")))
    axes = _ints(node, inputs, 3, "axes") or list(range(len(starts)))
    steps = _ints(node, inputs, 4, "steps") or [1] * len(starts)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        if step < 1:
            raise UnsupportedError("Slice with a negative step")
        index: list[slice] = [slice(None)] * x.ndim
        index[axis] = slice(start, end, step)
        x = x[tuple(index)]
    return [x]


def _pad(node: ir.Node, inputs: Inputs) -> list[Tensor]:
    x, pads = _tensor(inputs[0]), _ints(node, inputs, 1, "pads") or []
    value = inputs[2].item() if len(inputs) > 2 and inputs[2] is not None else 0.0
    if attribute(node, "mode", "constant") != "constant" or (
        len(inputs) > 3 and inputs[3] is not None
    ):
        raise UnsupportedError("Pad other than with a constant on all axes")
    half = len(pads) // 2
    return [
        functional.pad(
            x, _torch_pads(list(zip(pads[:half], pads[half:], strict=True))), value=value
        )
    ]


def _gather(node: ir.Node, inputs: Inputs) -> list[Tensor]:
    x, index = _tensor(inputs[0]), _tensor(inputs[1]).long()
    axis = attribute(node, "axis", 0) % x.ndim
    index = torch.where(index < 0, index + x.shape[axis], index)
    shape = (*x.shape[:axis], *index.shape, *x.shape[axis + 1 :])
    return [x.index_select(axis, index.reshape(-1)).reshape(shape)]


def _where(node: ir.Node, inputs: Inputs) -> list[Tensor]:
    return [torch.where(_tensor(inputs[0]), _tensor(inputs[1]), _tensor(inputs[2]))]


def _expand(node: ir.Node, inputs: Inputs) -> list[Tensor]:
    x = _tensor(inputs[0])
    shape = _ints(node, inputs, 1, "shape") or []
    return [x.expand(np.broadcast_shapes(x.shape, shape))]


def _reduce(function: Callable[..., Tensor]) -> Operator:
    def reduce(node: ir.Node, inputs: Inputs) -> list[Tensor]:
        x, axes = _tensor(inputs[0]), _ints(node, inputs, 1, "axes")
        keep = bool(attribute(node, "keepdims", 1))
        if axes is None:
            if attribute(node, "noop_with_empty_axes", 0):
                return [x]
            axes = list(range(x.ndim))
        return [function(x, axes, keep)]

    return reduce


def _conv(node: ir.Node, inputs: Inputs) -> list[Tensor]:
    weight = _tensor(inputs[1])
    rank = weight.ndim - 2
    spec = ConvSpec(
        tuple(weight.shape[2:]),
        tuple(attribute(node, "strides", [1] * rank)),
        tuple(attribute(node, "pads", [0] * 2 * rank)),
        tuple(attribute(node, "dilations", [1] * rank)),
        attribute(node, "auto_pad", "NOTSET"),
    )
    bias = inputs[2] if len(inputs) > 2 else None
    return [convolution(_tensor(inputs[0]), weight, bias, spec, attribute(node, "group", 1))]


def _gemm(node: ir.Node, inputs: Inputs) -> list[Tensor]:
    a, b = _tensor(inputs[0]), _tensor(inputs[1])
    a = a.T if attribute(node, "transA", 0) else a
    b = b.T if attribute(node, "transB", 0) else b
    product = attribute(node, "alpha", 1.0) * (a @ b)
    c = inputs[2] if len(inputs) > 2 else None
    return [product if c is None else product + attribute(node, "beta", 1.0) * c]


def _batch_norm(node: ir.Node, inputs: Inputs) -> list[Tensor]:
    if attribute(node, "training_mode", 0):
        raise UnsupportedError("BatchNormalization in training mode")
    x, scale, bias, mean, var = (_tensor(i) for i in inputs)
    eps = attribute(node, "epsilon", 1e-5)
    return [functional.batch_norm(x, mean, var, scale, bias, eps=eps)]


def _layer_norm(node: ir.Node, inputs: Inputs) -> list[Tensor]:
    x, scale = _tensor(inputs[0]), _tensor(inputs[1])
    if len(node.outputs) > 1:
        raise UnsupportedError("LayerNormalization that gives its statistics too")
    shape = x.shape[attribute(node, "axis", -1) :]
    bias = inputs[2] if len(inputs) > 2 else None
    normal = functional.layer_norm(x, shape, eps=attribute(node, "epsilon", 1e-5))
    return [normal * scale if bias is None else normal * scale + bias]


def _window(node: ir.Node, x: Tensor) -> tuple[Tensor, list[int], list[int], list[tuple[int, int]]]:
    kernel = attribute(node, "kernel_shape", [])
    rank = len(kernel)
    if attribute(node, "auto_pad", "NOTSET") not in ("NOTSET", "VALID") or attribute(
        node, "ceil_mode", 0
    ):
        raise UnsupportedError(f"{node.op_type} with auto_pad or ceil_mode")
    if any(d != 1 for d in attribute(node, "dilations", [])):
        raise UnsupportedError(f"{node.op_type} with dilations")
    pads = attribute(node, "pads", [0] * 2 * rank)
    margins = list(zip(pads[:rank], pads[rank:], strict=True))
    return x, kernel, attribute(node, "strides", [1] * rank), margins


def _max_pool(node: ir.Node, inputs: Inputs) -> list[Tensor]:
    x, kernel, strides, margins = _window(node, _tensor(inputs[0]))
    if len(node.outputs) > 1:
        raise UnsupportedError("MaxPool that gives positions too")
    x = functional.pad(x, _torch_pads(margins), value=float("-inf"))
    return [_MAX_POOL[len(kernel) - 1](x, kernel, strides)]


def _average_pool(node: ir.Node, inputs: Inputs) -> list[Tensor]:
    x, kernel, strides, margins = _window(node, _tensor(inputs[0]))
    pool = (functional.avg_pool1d, functional.avg_pool2d, functional.avg_pool3d)[len(kernel) - 1]
    padded = functional.pad(x, _torch_pads(margins))
    mean = pool(padded, kernel, strides)
    if not any(map(any, margins)) or attribute(node, "count_include_pad", 0):
        return [mean]
    inside = functional.pad(torch.ones_like(x[:1, :1]), _torch_pads(margins))
    return [mean / pool(inside, kernel, strides)]


def _global_average(node: ir.Node, inputs: Inputs) -> list[Tensor]:
    x = _tensor(inputs[0])
    return [x.mean(tuple(range(2, x.ndim)), keepdim=True)]


def _identity(node: ir.Node, inputs: Inputs) -> list[Tensor]:
    if len(node.outputs) > 1:
        raise UnsupportedError(f"{node.op_type} with more than one output")
    return [_tensor(inputs[0])]


def _cast(node: ir.Node, inputs: Inputs) -> list[Tensor]:
    if attribute(node, "to", 1) not in (1, 10):
        raise UnsupportedError("a Cast to another type than float")
    return [_tensor(inputs[0]).float()]


def _gelu(node: ir.Node, inputs: Inputs) -> list[Tensor]:
    return [functional.gelu(_tensor(inputs[0]), approximate=attribute(node, "approximate", "none"))]


def _hard_sigmoid(node: ir.Node, inputs: Inputs) -> list[Tensor]:
    slope, offset = attribute(node, "alpha", 0.2), attribute(node, "beta", 0.5)
    return [(_tensor(inputs[0]) * slope + offset).clamp(0, 1)]


OPERATORS: dict[str, Operator] = {
    "Abs": _unary(torch.abs),
    "Add": _binary(torch.add),
    "AveragePool": _average_pool,
    "BatchNormalization": _batch_norm,
    "Cast": _cast,
    "Clip": _clip,
    "Concat": _concat,
    "Conv": _conv,
    "Div": _binary(torch.div),
    "Dropout": _identity,
    "Erf": _unary(torch.erf),
    "Exp": _unary(torch.exp),
    "Expand": _expand,
    "Flatten": _flatten,
    "Gather": _gather,
    "Gelu": _gelu,
    "Gemm": _gemm,
    "GlobalAveragePool": _global_average,
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": _unary(functional.hardswish),
    "Identity": _identity,
    "LayerNormalization": _layer_norm,
    "LeakyRelu": lambda node, inputs: [
        functional.leaky_relu(_tensor(inputs[0]), attribute(node, "alpha", 0.01))
    ],
    "Log": _unary(torch.log),
    "MatMul": _binary(torch.matmul),
    "Max": lambda node, inputs: [_fold(torch.maximum, inputs)],
    "MaxPool": _max_pool,
    "Min": lambda node, inputs: [_fold(torch.minimum, inputs)],
    "Mul": _binary(torch.mul),
    "Neg": _unary(torch.neg),
    "Pad": _pad,
    "Pow": _binary(torch.pow),
    "Reciprocal": _unary(torch.reciprocal),
    "ReduceMean": _reduce(torch.mean),
    "ReduceSum": _reduce(torch.sum),
    "Relu": _unary(torch.relu),
    "Reshape": _reshape,
    "Sigmoid": _unary(torch.sigmoid),
    "Slice": _slice,
    "Softmax": _softmax,
    "Split": _split,
    "Sqrt": _unary(torch.sqrt),
    "Squeeze": _squeeze,
    "Sub": _binary(torch.sub),
    "Sum": lambda node, inputs: [_fold(torch.add, inputs)],
    "Tanh": _unary(torch.tanh),
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
    "Where": _where,
}


def _fold(function: Callable[[Tensor, Tensor], Tensor], inputs: Inputs) -> Tensor:
    result = _tensor(inputs[0])
    for other in inputs[1:]:
        result = function(result, _tensor(other))
    return result
