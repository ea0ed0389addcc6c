"""What each operator with a constant operand makes of it: one rule for each.

A rule looks at one node and one constant operand and returns a `Layer`, or the reason why the operand stays float.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from afpq._fold import Array, Constants, attribute
from afpq._layer import ConvSpec, Layer, conv_matrix
from afpq._shapes import with_shapes
from afpq.errors import ModelError

__all__ = ["MIN_WEIGHTS", "Finder"]

MIN_WEIGHTS = 64

# Operand positions that can hold weights, and what a second one is called in the layer's name.
_WEIGHT_INPUTS: dict[str, tuple[int, ...]] = {
    "Conv": (1,),
    "ConvTranspose": (1,),
    "GRU": (1, 2),
    "Gather": (0,),
    "Gemm": (1, 0),
    "LSTM": (1, 2),
    "MatMul": (1, 0),
    "RNN": (1, 2),
}
_Result = Layer | str  # a layer, or why there is none


class Finder:
    """The graph with what the rules look up in it."""

    def __init__(self, path: Path, model: ir.Model) -> None:
        self.path = path
        self.model = model
        self.constants = Constants(model.graph)
        self.nodes = list(model.graph)
        self.index = {node: i for i, node in enumerate(self.nodes)}
        self.names = _unique_names(self.nodes)
        self._ranks: Mapping[str, int] | None = None

    def candidates(self) -> Iterator[tuple[ir.Node, int, _Result, int]]:
        for index, node in enumerate(self.nodes):
            for position, array in self.weights(node):
                yield node, index, self.look(node, position, array), array.size

    def weights(self, node: ir.Node) -> Iterator[tuple[int, Array]]:
        """The float constants among the operands that can hold weights."""
        positions = _WEIGHT_INPUTS.get(node.op_type, ()) if node.domain == "" else ()
        present = [p for p in positions if p < len(node.inputs)]
        arrays = [(p, self.constants.value(node.inputs[p])) for p in present]
        constant = [(p, a) for p, a in arrays if a is not None]
        if node.op_type in ("Gemm", "MatMul"):
            constant = constant[:1] if len(constant) < 2 or node.op_type == "Gemm" else []
        yield from ((p, a) for p, a in constant if a.dtype.kind not in "iub")

    def look(self, node: ir.Node, position: int, array: Array) -> _Result:
        if array.dtype.name not in ("float16", "float32"):
            return f"its weights are {array.dtype.name}; afpq reads float32 and float16"
        if array.size < MIN_WEIGHTS:
            return f"only {array.size} weights (fewer than {MIN_WEIGHTS})"
        if array.ndim < 2:
            return "a constant vector"
        self.check_finite(node, position, array)
        return _RULES[node.op_type](self, node, position, array)

    def layer(self, node: ir.Node, position: int, array: Array, **fields: Any) -> Layer:
        """A layer with everything that all rules fill in alike; `weight` defaults to rows of the last axis."""
        index = self.index[node]
        value = node.inputs[position]
        assert value is not None
        root = next(self.constants.roots(value), value)
        fields.setdefault("weight", array.reshape(-1, array.shape[-1]))
        weight = np.ascontiguousarray(fields.pop("weight"), np.float32)
        defaults: dict[str, Any] = {
            "kind": "unpack",
            "input_name": None,
            "output_name": node.outputs[0].name or "",
            "bias": None,
        }
        return Layer(
            name=self.names[index],
            op_type=node.op_type,
            weight_name=root.name or self.names[index],
            weight=weight,
            dtype=array.dtype.name,
            shape=array.shape,
            node_index=index,
            weight_input=position,
            **{**defaults, **fields},
        )

    def check_finite(self, node: ir.Node, position: int, array: Array) -> None:
        if not np.isfinite(array).all():
            value = node.inputs[position]
            what = "NaN" if np.isnan(array).any() else "infinity"
            name = self.names[self.index[node]]
            raise ModelError(
                f"{self.path}: tensor {value.name if value else ''!r} of node {name!r} "
                f"({node.op_type}) holds {what}"
            )

    def rank(self, value: ir.Value | None) -> int | None:
        """Number of axes of a value, if the file says so or it can be inferred."""
        if value is None:
            return None
        if value.shape is not None:
            return len(value.shape)
        if self._ranks is None:
            self._ranks = _inferred_ranks(self.model)
        return self._ranks.get(value.name or "")

    def bias_add(
        self, node: ir.Node, n: int, *, channel_axis: int, rank: int | None
    ) -> tuple[ir.Node, int] | None:
        """The Add with a constant of one number a channel that alone reads the node's output, and its position."""
        output = node.outputs[0]
        uses = output.uses()
        if output.is_graph_output() or len(uses) != 1:
            return None
        add, position = next(iter(uses))
        if add.op_type != "Add" or add.domain != "" or add not in self.index:
            return None
        bias = self.constants.value(add.inputs[1 - position])
        if bias is None or bias.dtype.name not in ("float16", "float32") or bias.size != n:
            return None
        if bias.ndim < -channel_axis or bias.shape[channel_axis] != n:
            return None
        # A bias with more axes than the output would add axes to the result.
        if bias.ndim > (1 if rank is None else rank):
            return None
        self.check_finite(add, 1 - position, bias)
        return add, 1 - position

    def with_bias_add(self, layer: Layer, *, channel_axis: int, rank: int | None) -> Layer:
        found = self.bias_add(
            self.nodes[layer.node_index], layer.n, channel_axis=channel_axis, rank=rank
        )
        if found is None:
            return layer
        add, position = found
        bias = self.constants.value(add.inputs[position])
        assert bias is not None
        return replace(
            layer,
            bias=bias.reshape(-1).astype(np.float32),
            output_name=add.outputs[0].name or "",
            add_index=self.index[add],
        )


def _conv(f: Finder, node: ir.Node, position: int, array: Array) -> _Result:
    spatial = array.ndim - 2
    if not 1 <= spatial <= 3:
        return f"a convolution over {spatial} axes (1 to 3 are possible)"
    groups = int(attribute(node, "group", 1))
    if groups < 1 or array.shape[0] % groups:
        return f"{array.shape[0]} channels cannot be cut into {groups} groups"
    operand = node.inputs[2] if len(node.inputs) > 2 else None
    bias = f.constants.value(operand)
    if operand is not None and bias is None:
        return "its bias is computed at run time"
    if bias is not None:
        f.check_finite(node, 2, bias)
    auto_pad = attribute(node, "auto_pad", "NOTSET")
    pads = attribute(node, "pads", [0] * 2 * spatial) if auto_pad == "NOTSET" else [0] * 2 * spatial
    spec = ConvSpec(
        kernel_shape=tuple(array.shape[2:]),
        strides=tuple(attribute(node, "strides", [1] * spatial)),
        pads=tuple(pads),
        dilations=tuple(attribute(node, "dilations", [1] * spatial)),
        auto_pad=auto_pad,
    )
    layer = f.layer(
        node,
        position,
        array,
        weight=conv_matrix(array),
        kind="conv",
        input_name=_name(node.inputs[0]),
        bias=None if bias is None else bias.reshape(-1).astype(np.float32),
        groups=groups,
        conv=spec,
        k_axis=1,
    )
    if bias is not None:
        return layer
    return f.with_bias_add(layer, channel_axis=-1 - spatial, rank=array.ndim)


def _gemm(f: Finder, node: ir.Node, position: int, array: Array) -> _Result:
    if array.ndim != 2:
        return f"a Gemm operand with {array.ndim} axes"
    if position == 0:
        return f.layer(node, 0, array, note="the constant is the left operand of a Gemm")
    k_first = not attribute(node, "transB", 0)
    alpha = float(attribute(node, "alpha", 1.0))
    weight = (array.T if k_first else array).astype(np.float32, copy=False)
    c = node.inputs[2] if len(node.inputs) > 2 else None
    bias = _gemm_bias(f, node, f.constants.value(c), weight.shape[0])
    layer = f.layer(
        node,
        1,
        array,
        weight=weight if alpha == 1.0 else weight * np.float32(alpha),
        kind="matmul",
        input_name=_name(node.inputs[0]),
        bias=bias,
        k_axis=0 if attribute(node, "transA", 0) else -1,
        rank=2,
        alpha=alpha,
        k_first=k_first,
        keeps_c=c is not None and bias is None,
    )
    return layer if c is not None else f.with_bias_add(layer, channel_axis=-1, rank=2)


def _gemm_bias(f: Finder, node: ir.Node, c: Array | None, n: int) -> Array | None:
    """beta * C as one number a channel, or None where C is absent, dynamic or differs between rows."""
    if c is None or c.dtype.name not in ("float16", "float32"):
        return None
    if c.ndim > 2 or (c.ndim == 2 and c.shape[0] != 1) or c.size not in (1, n):
        return None
    f.check_finite(node, 2, c)
    beta = np.float32(attribute(node, "beta", 1.0))
    return np.ascontiguousarray(np.broadcast_to(c.astype(np.float32).reshape(-1) * beta, (n,)))


def _matmul(f: Finder, node: ir.Node, position: int, array: Array) -> _Result:
    other = node.inputs[1 - position]
    rank = f.rank(other)
    if position == 1:
        flat = array.ndim == 2 or (
            rank is not None
            and array.ndim <= rank
            and array.size == array.shape[-2] * array.shape[-1]
        )
        if not flat:
            return f.layer(node, 1, array, note="a batch of matrices, one for each batch element")
        weight = array.reshape(array.shape[-2:]).T
        layer = f.layer(
            node,
            1,
            array,
            weight=weight,
            kind="matmul",
            input_name=_name(other),
            k_axis=-1,
            k_first=True,
        )
        return f.with_bias_add(layer, channel_axis=-1, rank=rank)
    if array.ndim != 2 or rank is None:
        note = (
            "the rank of the other operand is unknown" if array.ndim == 2 else "a batch of matrices"
        )
        return f.layer(node, 0, array, note=f"the constant is the left operand and {note}")
    layer = f.layer(
        node,
        0,
        array,
        weight=array,
        kind="matmul",
        input_name=_name(other),
        k_axis=-1 if rank == 1 else -2,
        rank=rank,
    )
    return f.with_bias_add(layer, channel_axis=-1 if rank == 1 else -2, rank=rank)


def _gather(f: Finder, node: ir.Node, position: int, array: Array) -> _Result:
    axis = int(attribute(node, "axis", 0))
    if array.ndim != 2 or axis not in (0, -2):
        return f"a Gather along axis {axis} of a constant with {array.ndim} axes (axis 0 of 2 is possible)"
    return f.layer(node, position, array, kind="gather")


def _transposed_conv(f: Finder, node: ir.Node, position: int, array: Array) -> _Result:
    weight = array.reshape(array.shape[0], -1)
    return f.layer(
        node, position, array, weight=weight, note="ConvTranspose has no kernel of its own"
    )


def _recurrent(f: Finder, node: ir.Node, position: int, array: Array) -> _Result:
    layer = f.layer(node, position, array, note=f"{node.op_type} has no kernel of its own")
    return replace(layer, name=f"{layer.name}.{'W' if position == 1 else 'R'}")


_RULES: dict[str, Callable[[Finder, ir.Node, int, Array], _Result]] = {
    "Conv": _conv,
    "ConvTranspose": _transposed_conv,
    "GRU": _recurrent,
    "Gather": _gather,
    "Gemm": _gemm,
    "LSTM": _recurrent,
    "MatMul": _matmul,
    "RNN": _recurrent,
}


def _unique_names(nodes: list[ir.Node]) -> list[str]:
    given = {node.name for node in nodes if node.name}
    seen: set[str] = set()
    names = []
    for index, node in enumerate(nodes):
        base = node.name or f"{node.op_type}_{index}"
        name, number = base, 2
        while name in seen or (name in given and name != node.name):
            name, number = f"{base}_{number}", number + 1
        seen.add(name)
        names.append(name)
    return names


def _inferred_ranks(model: ir.Model) -> dict[str, int]:
    clone = with_shapes(model.clone())
    return {
        value.name: len(value.shape)
        for node in clone.graph
        for value in node.outputs
        if value.name and value.shape is not None
    }


def _name(value: ir.Value | None) -> str | None:
    return None if value is None else value.name
