"""Replaces the operators of the domain `afpq` in a graph by standard ones, one stored tensor at a time.

Nodes keep their names and results theirs. What nodes share stays shared: one operand for all readers of a stored
tensor; if they want it in different shapes it is stored as [n, k], with Reshape and Transpose behind it.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from afpq._chain import channels_first
from afpq._operand import Operand, Placement, placement
from afpq.packed import PackedLayer

__all__ = ["TensorKey", "Unpacker", "shared_layers"]

TensorKey = tuple[str, str, str, int, int, int]
MakeOperand = Callable[[PackedLayer, Placement], Operand]

_SMALL = 8  # elements: bounds, shapes, parameters of a format
_CONV_FIELDS = ("kernel_shape", "strides", "pads", "dilations", "group", "auto_pad")


def shared_layers(layers: Iterable[PackedLayer]) -> dict[TensorKey, list[PackedLayer]]:
    """Layers by stored tensor: those with the same codes and scales, in file order."""
    found: dict[TensorKey, list[PackedLayer]] = {}
    for layer in layers:
        names = layer.weight_name, layer.scale_name, str(layer.format)
        key = (*names, layer.n, layer.k, layer.group_size)
        found.setdefault(key, []).append(layer)
    return found


class Unpacker:
    """Edits one graph and those inside it."""

    def __init__(self, graph: ir.Graph) -> None:
        channels_first(graph)
        self._main = graph
        self._owners: dict[int, ir.Node] = {}  # of subgraphs, by identity
        self._taken = {v.name for v in graph.inputs}
        for node in graph.all_nodes():
            self._taken |= {v.name for v in node.outputs}
            for attr in node.attributes.values():
                for inner in _graphs(attr):
                    self._owners[id(inner)] = node
        for inner in (graph, *graph.subgraphs()):
            self._taken |= {v.name for v in inner.inputs} | set(inner.initializers)
        self._small: dict[tuple[str, str, bytes], ir.Value] = {}

    def replace(self, layers: list[PackedLayer], make: MakeOperand) -> Operand:
        """Replaces all readers of one stored tensor by those of the operand that `make` turns it into."""
        places = {id(layer): placement(layer) for layer in layers}
        first = layers[0]
        stored = places[id(first)]
        if any(place != stored for place in places.values()) or stored.axis is None:
            stored = Placement("rows", (first.n, first.k), 0)
        position = 0 if first.op in ("Gather", "Unpack") else 1
        old = [v for v in first.node.inputs[position : position + 2] if v is not None]
        home = old[0].graph if isinstance(old[0].graph, ir.Graph) else self._main
        readers = {id(layer.node) for layer in layers}
        for value in old:
            self._release(value, readers)
        values = {stored: ir.Value()}
        operand = make(first, stored)
        nodes = self._define(values[stored], operand, home)
        for place in places.values():
            if place not in values:
                nodes += self._rearrange(values[stored], place)
                values[place] = nodes[-1].outputs[0]
        home.insert_before(self._ancestor(first.node, home), nodes)
        for layer in layers:
            self._swap_layer(layer, values[places[id(layer)]])
        for value in old:
            self._drop(value)
        return operand

    # Operands.

    def _define(self, value: ir.Value, operand: Operand, home: ir.Graph) -> list[ir.Node]:
        """Makes a value an operand: an initializer, or the result of the node that is returned."""
        if not operand.op_type:
            ((name, array),) = operand.constants
            self._register(value, name, array, home)
            return []
        inputs = [self._constant(name, array, home) for name, array in operand.constants]
        name = inputs[0].name or ""
        value.name = self._fresh(f"{name}_f")
        node = ir.node(
            operand.op_type,
            inputs,
            dict(operand.attributes),
            domain=operand.domain,
            outputs=[value],
            name=f"{name}.{operand.op_type.lower()}",
        )
        return [node]

    def _rearrange(self, value: ir.Value, place: Placement) -> list[ir.Node]:
        """[n, k] in another shape."""
        if place.order == "columns":
            nodes = [ir.node("Transpose", [value], {"perm": [1, 0]})]
        elif place.order == "taps":
            n, channels, *kernel = place.shape
            rank = len(place.shape)
            shape = self._constant("shape", np.array([n, *kernel, channels], np.int64))
            nodes = [ir.node("Reshape", [value, shape])]
            perm = [0, rank - 1, *range(1, rank - 1)]
            nodes.append(ir.node("Transpose", [nodes[0].outputs[0]], {"perm": perm}))
        else:
            shape = self._constant("shape", np.array(place.shape, np.int64))
            nodes = [ir.node("Reshape", [value, shape])]
        for node in nodes:
            node.outputs[0].name = self._fresh("weight")
        return nodes

    # Nodes.

    def _swap_layer(self, layer: PackedLayer, weight: ir.Value) -> None:
        node = layer.node
        if layer.op == "Unpack":
            if not node.outputs[0].is_graph_output():
                node.outputs[0].replace_all_uses_with(weight)
                _graph(node).remove(node, safe=True)
                return
            new = [ir.node("Identity", [weight])]
        elif layer.op == "Gather":
            new = [ir.node("Gather", [weight, node.inputs[2]])]
        elif layer.op == "MatMul":
            new = [ir.node("MatMul", [node.inputs[0], weight])]
            if _bias(node) is not None:
                new.append(ir.node("Add", [new[0].outputs[0], _bias(node)]))
        else:
            fields = {n: node.attributes[n].value for n in _CONV_FIELDS if n in node.attributes}
            inputs = [node.inputs[0], weight, _bias(node)]
            new = [ir.node("Conv", inputs if inputs[2] is not None else inputs[:2], fields)]
        if layer.adds_residual:
            new.append(ir.node("Add", [new[-1].outputs[0], node.inputs[4]]))
        new += self._clip(node, new[-1].outputs[0])
        self._swap(node, new)

    def _clip(self, node: ir.Node, value: ir.Value) -> list[ir.Node]:
        fields = {name: attr.value for name, attr in node.attributes.items()}
        low, high = fields.get("clip_min", -math.inf), fields.get("clip_max", math.inf)
        if (low, high) == (-math.inf, math.inf):
            return []
        if (low, high) == (0.0, math.inf):
            return [ir.node("Relu", [value])]
        inputs: list[ir.Value | None] = [value]
        inputs += [
            self._constant(f"clip_{bound:g}", np.array(bound, np.float32))
            if math.isfinite(bound)
            else None
            for bound in (low, high)
        ]
        return [ir.node("Clip", inputs if inputs[2] is not None else inputs[:2])]

    def _swap(self, node: ir.Node, new: list[ir.Node]) -> None:
        """Puts `new` in the place of a node, whose name goes to the first and whose result to the last."""
        before, after = node.outputs[0], new[-1].outputs[0]
        for index, part in enumerate(new):
            part.name = node.name
            if node.name and index > 0:
                kind = part.op_type.lower()
                number = [other.op_type for other in new[1:index]].count(part.op_type) + 1
                part.name = f"{node.name}.{kind}" if number == 1 else f"{node.name}.{kind}{number}"
            if part is not new[-1]:
                part.outputs[0].name = self._fresh(f"{before.name}_o{index}")
        after.name, after.type, after.shape = before.name, before.type, before.shape
        before.replace_all_uses_with(after, replace_graph_outputs=True)
        graph = _graph(node)
        graph.insert_before(node, new)
        graph.remove(node, safe=True)

    # Names and constants.

    def _constant(
        self, name: str, array: npt.NDArray[Any], home: ir.Graph | None = None
    ) -> ir.Value:
        """A new initializer; small ones that are equal and ask for one name are one, in the main graph."""
        if array.size > _SMALL:
            return self._register(ir.Value(), name, array, home or self._main)
        key = (name, str(array.dtype), array.tobytes())
        if key not in self._small:
            self._small[key] = self._register(ir.Value(), name, array, self._main)
        return self._small[key]

    def _register(
        self, value: ir.Value, name: str, array: npt.NDArray[Any], home: ir.Graph
    ) -> ir.Value:
        value.name = self._fresh(name)
        value.const_value = ir.Tensor(array, name=value.name)
        home.register_initializer(value)
        return value

    def _fresh(self, name: str) -> str:
        candidate, number = name, 2
        while candidate in self._taken:
            candidate, number = f"{name}{number}", number + 1
        self._taken.add(candidate)
        return candidate

    def _release(self, value: ir.Value, readers: set[int]) -> None:
        """Frees the name of an initializer that only these nodes read."""
        if value.name and all(id(use.node) in readers for use in value.uses()):
            self._taken.discard(value.name)
            value.name = self._fresh(f"{value.name}_packed")

    def _drop(self, value: ir.Value) -> None:
        """Removes an initializer that nothing reads."""
        home = value.graph
        if home is None or value.uses() or value.is_graph_output():
            return
        if value.name is not None and value.name in home.initializers:
            del home.initializers[value.name]
        if value.is_graph_input():
            home.inputs.remove(value)
        self._taken.discard(value.name)

    def _ancestor(self, node: ir.Node, home: ir.Graph) -> ir.Node:
        """The node of `home` that is, or holds, a node."""
        while node.graph is not home:
            node = self._owners[id(node.graph)]
        return node


def _graphs(attr: ir.Attr) -> Iterable[ir.Graph]:
    if attr.type == ir.AttributeType.GRAPH:
        return [attr.value]
    return attr.value if attr.type == ir.AttributeType.GRAPHS else []


def _graph(node: ir.Node) -> ir.Graph:
    assert isinstance(node.graph, ir.Graph)
    return node.graph


def _bias(node: ir.Node) -> ir.Value | None:
    return node.inputs[3] if len(node.inputs) > 3 else None
