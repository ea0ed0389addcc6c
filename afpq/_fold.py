"""Values of constant expressions in a graph, and where a constant ends up.

A constant is an initializer, the output of a Constant node, or a rearrangement of constants (Reshape, Transpose, Cast,
..). Weights behind such expressions are found without touching the nodes; only `set_constants` edits a graph.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

Array = npt.NDArray[Any]

_MAX_DEPTH = 64  # a chain of rearrangements is short; this only stops a malformed graph


class Constants:
    """Evaluates constant expressions of `graph` and the graphs inside it, each at most once."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self._folded: dict[ir.Value, Array | None] = {}

    def value(self, value: ir.Value | None, depth: int = 0) -> Array | None:
        """The array a value always has, or None if it is computed at run time (or too odd to fold)."""
        if value is None or depth > _MAX_DEPTH:
            return None
        node = value.producer()
        if node is None:
            if value.const_value is None or not value.is_initializer():
                return None
            return np.asarray(value.const_value.numpy())
        if value not in self._folded:
            self._folded[value] = self._evaluate(node, depth)
        return self._folded[value]

    def is_constant(self, value: ir.Value | None) -> bool:
        return self.value(value) is not None

    def roots(self, value: ir.Value) -> Iterator[ir.Value]:
        """The initializers and Constant outputs of floats that a constant is made of."""
        node = value.producer()
        if node is None or node.op_type == "Constant":
            array = self.value(value)
            if array is not None and array.dtype.kind not in "iub":
                yield value
            return
        for operand in node.inputs:
            if operand is not None:
                yield from self.roots(operand)

    def uses(self, root: ir.Value) -> Iterator[tuple[ir.Node, int]]:
        """Every (node, input index) that reads a constant, directly or rearranged in this graph."""
        for node, index in root.uses():
            if self._rearranges(node):
                yield from self.uses(node.outputs[0])
            else:
                yield node, index

    def is_output(self, root: ir.Value) -> bool:
        """Whether the constant, or a rearrangement of it, is an output of its graph."""
        if root.is_graph_output():
            return True
        return any(
            self.is_output(node.outputs[0]) for node, _ in root.uses() if self._rearranges(node)
        )

    def _rearranges(self, node: ir.Node) -> bool:
        if node.graph is not self.graph or len(node.outputs) != 1:
            return False
        return self.value(node.outputs[0]) is not None

    def _evaluate(self, node: ir.Node, depth: int) -> Array | None:
        if node.domain != "":
            return None
        if node.op_type == "Constant":
            return _constant(node)
        fold = _FOLDS.get(node.op_type)
        if fold is None:
            return None
        operands = [self.value(v, depth + 1) if v is not None else None for v in node.inputs]
        if any(a is None and v is not None for a, v in zip(operands, node.inputs, strict=True)):
            return None
        try:
            return fold(node, operands)
        except (ValueError, IndexError, TypeError, KeyError):
            return None  # malformed: the runtime will say so


def attribute(node: ir.Node, name: str, default: Any) -> Any:
    """The value of an attribute, or `default` where the node does not have it."""
    found = node.attributes.get(name)
    if found is None or found.value is None:
        return default
    return list(found.value) if isinstance(found.value, (list, tuple)) else found.value


def set_constants(graph: ir.Graph, constants: Mapping[str, Array]) -> None:
    """Gives initializers, which must exist, other values of the same shape; dtypes stay as they are."""
    for name, array in constants.items():
        value = graph.initializers[name]
        before = value.const_value
        assert before is not None and tuple(before.shape) == array.shape, name
        value.const_value = ir.tensor(array.astype(before.dtype.numpy()), name=name)


def drop_constant(constants: Constants, value: ir.Value | None) -> None:
    """Removes a constant, and what computed it, once nothing reads it."""
    graph = constants.graph
    if value is None or value.uses() or value.is_graph_output():
        return
    node = value.producer()
    if node is None:
        if value.is_initializer() and value.name and value.name in graph.initializers:
            del graph.initializers[value.name]
            if value.is_graph_input():
                graph.inputs.remove(value)
    elif node.graph is graph and constants.value(value) is not None:
        operands = list(node.inputs)
        graph.remove(node, safe=True)
        for operand in operands:
            drop_constant(constants, operand)


def _constant(node: ir.Node) -> Array | None:
    for name, found in node.attributes.items():
        if name == "value":
            return np.asarray(found.value.numpy())
        if name in ("value_float", "value_floats"):
            return np.asarray(found.value, np.float32)
        if name in ("value_int", "value_ints"):
            return np.asarray(found.value, np.int64)
    return None


def _reshape(node: ir.Node, operands: list[Any]) -> Array:
    data, shape = operands
    sizes = [int(s) for s in shape]
    if not attribute(node, "allowzero", 0):
        sizes = [data.shape[i] if s == 0 else s for i, s in enumerate(sizes)]
    return np.asarray(data.reshape(sizes))


def _axes(node: ir.Node, operands: list[Any]) -> list[int] | None:
    axes = operands[1] if len(operands) > 1 and operands[1] is not None else None
    found = attribute(node, "axes", None) if axes is None else axes
    return None if found is None else [int(a) for a in found]


def _squeeze(node: ir.Node, operands: list[Any]) -> Array:
    axes = _axes(node, operands)
    return np.asarray(np.squeeze(operands[0], axis=None if axes is None else tuple(axes)))


def _unsqueeze(node: ir.Node, operands: list[Any]) -> Array:
    return np.expand_dims(operands[0], tuple(_axes(node, operands) or ()))


def _transpose(node: ir.Node, operands: list[Any]) -> Array:
    return np.transpose(operands[0], attribute(node, "perm", None))


def _flatten(node: ir.Node, operands: list[Any]) -> Array:
    data = operands[0]
    axis = attribute(node, "axis", 1)
    rows = int(np.prod(data.shape[: axis if axis >= 0 else axis + data.ndim]))
    return np.asarray(data.reshape(rows, -1))


def _cast(node: ir.Node, operands: list[Any]) -> Array:
    return np.asarray(operands[0].astype(ir.DataType(attribute(node, "to", 1)).numpy()))


def _concat(node: ir.Node, operands: list[Any]) -> Array:
    return np.concatenate(operands, axis=node.attributes["axis"].value)


def _slice(node: ir.Node, operands: list[Any]) -> Array:
    data, starts, ends, *rest = operands
    axes = rest[0] if rest and rest[0] is not None else range(len(starts))
    steps = rest[1] if len(rest) > 1 and rest[1] is not None else [1] * len(starts)
    index = [slice(None)] * data.ndim
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        # With a negative step an end before the first element is written -INT_MAX or less in ONNX, None in Python.
        last = None if step < 0 and end < -data.shape[axis] else int(end)
        index[int(axis)] = slice(int(start), last, int(step))
    return np.asarray(data[tuple(index)])


_FOLDS: dict[str, Callable[[ir.Node, list[Any]], Array]] = {
    "Cast": _cast,
    "Concat": _concat,
    "Flatten": _flatten,
    "Identity": lambda _, operands: np.asarray(operands[0]),
    "Reshape": _reshape,
    "Slice": _slice,
    "Squeeze": _squeeze,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}
