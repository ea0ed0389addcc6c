"""Replaces the nodes of a graph by operators of the domain `afpq`, one layer at a time.

The operators take and give float32: a float16 layer gets a Cast on either side. Attributes with their default value are
left out, and new tensors have the shortest names (q0 codes, s0 scales, b0 bias): the nodes keep the layers' names, and
in a small network every name shows in the size of the file.
"""

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from afpq._activation_entry import ActivationEntry
from afpq._clip import clip_fields, find_clip
from afpq._fold import Constants, attribute, drop_constant
from afpq._layer import Layer, takes_bytes
from afpq.formats import AfpFormat
from afpq.packing import PackedTensor, store_scale

__all__ = ["DOMAIN", "Emitter", "pack_scale"]

DOMAIN = "afpq"

Floats = npt.NDArray[np.float32]


def pack_scale(fmt: AfpFormat, scale: Floats, kind: str, *, name: str = "") -> ir.TensorProtocol:
    """Scales as the tensor that is stored: bfloat16 (`real`) or int8 exponent biases (`integer`), same shape.

    Raises:
        FormatError: a scale cannot be stored without rounding, or the kind does not exist.
    """
    stored = store_scale(fmt, scale, kind)
    if kind == "real":
        return ir.Tensor(stored.view(ml_dtypes.bfloat16), dtype=ir.DataType.BFLOAT16, name=name)
    return ir.Tensor(stored, name=name)


class Emitter:
    """Edits one graph; `checksums` names every packed tensor that was written."""

    def __init__(
        self,
        graph: ir.Graph,
        tensors: Mapping[str, PackedTensor],
        activations: str,
        static: Mapping[str, ActivationEntry],
    ) -> None:
        self.checksums: dict[str, str] = {}
        self._graph = graph
        self._nodes = list(graph)
        self._tensors = tensors
        self._activations = activations
        self._static = static
        self._constants = Constants(graph)
        self._stored: dict[str, tuple[ir.Value, ir.Value]] = {}
        self._biases: dict[bytes, ir.Value] = {}
        self._taken = set(graph.initializers) | {v.name for v in graph.inputs if v.name}
        for node in graph.all_nodes():
            self._taken |= {v.name for v in node.outputs if v.name}

    def replace(self, layer: Layer, bias: Floats | None) -> None:
        """Puts the packed operator in the place of a layer's node; `bias` replaces the layer's own."""
        if layer.kind == "unpack":
            self._unpack(layer)
        elif layer.kind == "gather":
            self._gather(layer)
        else:
            self._product(layer, bias)

    def finish(self) -> None:
        """Drops initializers that nothing reads."""
        for name, value in list(self._graph.initializers.items()):
            if not value.uses() and not value.is_graph_output() and not value.is_graph_input():
                del self._graph.initializers[name]

    # The three shapes of a replacement.

    def _unpack(self, layer: Layer) -> None:
        node = self._nodes[layer.node_index]
        operand = node.inputs[layer.weight_input]
        weight, scale = self._weight(layer)
        fields = {**self._format(layer), "shape": list(layer.shape)}
        op = self._node("Unpack", [weight, scale], fields, f"{layer.name}.unpack")
        new = [op, *self._cast(layer, op.outputs[0], f"{weight.name}_f")]
        self._graph.insert_before(node, new)
        node.replace_input_with(layer.weight_input, new[-1].outputs[0])
        drop_constant(self._constants, operand)

    def _gather(self, layer: Layer) -> None:
        node = self._nodes[layer.node_index]
        weight, scale = self._weight(layer)
        op = self._node("Gather", [weight, scale, node.inputs[1]], self._format(layer), layer.name)
        new = [op, *self._cast(layer, op.outputs[0], f"{layer.output_name}_f")]
        self._swap(node, [node], new)

    def _product(self, layer: Layer, bias: Floats | None) -> None:
        node = self._nodes[layer.node_index]
        old = [node]
        if layer.add_index is not None:
            old.append(self._nodes[layer.add_index])
        clip = (
            None if layer.keeps_c else find_clip(self._graph, self._constants, old[-1].outputs[0])
        )
        if clip is not None:
            old.append(clip.node)
        activation = node.inputs[0 if layer.weight_input == 1 else 1]
        assert activation is not None
        before = self._before(layer, activation)
        weight, scale = self._weight(layer)
        inputs = [before[-1].outputs[0] if before else activation, weight, scale]
        inputs += self._bias(layer, bias)
        fields = self._format(layer) | self._conv_fields(layer) | clip_fields(clip)
        fields |= self._activation_fields(layer)
        if self._tensors[layer.weight_name].group_size:
            fields["group_size"] = self._tensors[layer.weight_name].group_size
        op = self._node("Conv" if layer.kind == "conv" else "MatMul", inputs, fields, layer.name)
        new = [*before, op]
        new += self._after(layer, node, op.outputs[0])
        self._swap(node, old, new)

    # What stands before and behind the operator.

    def _before(self, layer: Layer, activation: ir.Value) -> list[ir.Node]:
        nodes = []
        if layer.dtype == "float16":
            nodes.append(ir.node("Cast", [activation], {"to": int(ir.DataType.FLOAT)}))
        if layer.k_axis in (0, -2) and layer.kind == "matmul":
            operand = nodes[-1].outputs[0] if nodes else activation
            nodes.append(ir.node("Transpose", [operand], {"perm": _swapped(layer.rank or 2)}))
        for number, node in enumerate(nodes):
            node.outputs[0].name = self._fresh(f"{layer.output_name}_i{number}")
        return nodes

    def _after(self, layer: Layer, node: ir.Node, value: ir.Value) -> list[ir.Node]:
        nodes = []
        if layer.is_left and layer.k_axis == -2:
            nodes.append(ir.node("Transpose", [value], {"perm": _swapped(layer.rank or 2)}))
        if layer.dtype == "float16":
            operand = nodes[-1].outputs[0] if nodes else value
            nodes.append(ir.node("Cast", [operand], {"to": int(ir.DataType.FLOAT16)}))
        if layer.keeps_c:
            nodes += self._add_c(layer, node, nodes[-1].outputs[0] if nodes else value)
        for number, new in enumerate([value, *(n.outputs[0] for n in nodes)][: len(nodes)]):
            new.name = self._fresh(f"{layer.output_name}_o{number}")
        return nodes

    def _add_c(self, layer: Layer, node: ir.Node, product: ir.Value) -> list[ir.Node]:
        """A Gemm's C that is no bias of one number a channel: beta * C is added as it is."""
        c, beta = node.inputs[2], float(attribute(node, "beta", 1.0))
        if beta == 1.0:
            return [ir.node("Add", [product, c])]
        factor = self._constant(f"{layer.output_name}_beta", np.asarray(beta, layer.dtype))
        scaled = ir.node("Mul", [c, factor])
        return [scaled, ir.node("Add", [product, scaled.outputs[0]])]

    def _cast(self, layer: Layer, value: ir.Value, name: str) -> list[ir.Node]:
        value.name = self._fresh(name)
        if layer.dtype == "float32":
            return []
        cast = ir.node("Cast", [value], {"to": int(ir.DataType.FLOAT16)})
        cast.outputs[0].name = self._fresh(name)
        return [cast]

    # Operands and attributes.

    def _weight(self, layer: Layer) -> tuple[ir.Value, ir.Value]:
        name = layer.weight_name
        if name not in self._stored:
            tensor, number = self._tensors[name], len(self._stored)
            weight = self._constant(f"q{number}", tensor.data)
            scale_name = self._fresh(f"s{number}")
            scale = pack_scale(tensor.format, tensor.scale, tensor.kind, name=scale_name)
            self._stored[name] = weight, self._register(scale_name, scale)
            self.checksums[weight.name or ""] = tensor.checksum()
        return self._stored[name]

    def _bias(self, layer: Layer, bias: Floats | None) -> list[ir.Value]:
        values = layer.bias if bias is None else bias
        if values is None:
            return []
        values = np.ascontiguousarray(values, np.float32)
        key = values.tobytes()
        if key not in self._biases:
            self._biases[key] = self._constant(f"b{len(self._biases)}", values)
        return [self._biases[key]]

    def _format(self, layer: Layer) -> dict[str, Any]:
        return {
            "format": str(self._tensors[layer.weight_name].format),
            "n": layer.n,
            "k": layer.k,
        }

    def _conv_fields(self, layer: Layer) -> dict[str, Any]:
        if layer.conv is None:
            return {}
        fields: dict[str, Any] = {"kernel_shape": list(layer.conv.kernel_shape)}
        if set(layer.conv.strides) != {1}:
            fields["strides"] = list(layer.conv.strides)
        if set(layer.conv.pads) != {0} and layer.conv.auto_pad == "NOTSET":
            fields["pads"] = list(layer.conv.pads)
        if set(layer.conv.dilations) != {1}:
            fields["dilations"] = list(layer.conv.dilations)
        if layer.groups != 1:
            fields["group"] = layer.groups
        if layer.conv.auto_pad != "NOTSET":
            fields["auto_pad"] = layer.conv.auto_pad
        return fields

    def _activation_fields(self, layer: Layer) -> dict[str, Any]:
        if self._activations == "a16":
            return {}
        fields: dict[str, Any] = {"activations": self._activations}
        entry = self._static.get(layer.input_name or "")
        if entry is not None and takes_bytes(layer, self._tensors[layer.weight_name].format):
            fields["activation_format"] = str(entry.format)
            fields["activation_scale"] = entry.scale
        return fields

    # Editing.

    def _node(
        self,
        op_type: str,
        inputs: list[ir.Value | None] | list[ir.Value],
        fields: dict[str, Any],
        name: str,
    ) -> ir.Node:
        return ir.node(op_type, inputs, fields, domain=DOMAIN, name=name)

    def _constant(self, name: str, array: npt.NDArray[Any]) -> ir.Value:
        name = self._fresh(name)
        return self._register(name, ir.Tensor(array, name=name))

    def _register(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        value = ir.val(name, const_value=tensor)
        self._graph.register_initializer(value)
        return value

    def _fresh(self, name: str) -> str:
        candidate, number = name, 2
        while candidate in self._taken:
            candidate, number = f"{name}{number}", number + 1
        self._taken.add(candidate)
        return candidate

    def _swap(self, place: ir.Node, old: list[ir.Node], new: list[ir.Node]) -> None:
        """Puts `new` in the place of the chain `old`; the last output keeps its name, type and readers."""
        before, after = old[-1].outputs[0], new[-1].outputs[0]
        after.name, after.type, after.shape = before.name, before.type, before.shape
        before.replace_all_uses_with(after, replace_graph_outputs=True)
        self._graph.insert_before(place, new)
        operands = [v for node in old for v in node.inputs]
        for node in reversed(old):
            self._graph.remove(node, safe=True)
        for operand in operands:
            drop_constant(self._constants, operand)


def _swapped(rank: int) -> list[int]:
    """The permutation that exchanges the last two axes."""
    return [*range(rank - 2), rank - 1, rank - 2]
