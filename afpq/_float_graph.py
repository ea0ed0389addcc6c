"""A float graph as onnxruntime takes it: serialized without its large constants, weights and biases in slots."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime as ort

from afpq._fold import set_constants
from afpq.errors import ModelError
from afpq.graph import Layer, Model, original_layout

__all__ = ["FloatGraph"]

Array = npt.NDArray[Any]

_INLINE_BYTES = 1024  # smaller constants stay in the graph: shape arithmetic wants to see them
_PLACEHOLDER = "afpq-in-memory"
_EXTERNAL_TYPES = frozenset(
    {
        ir.DataType.BOOL,
        ir.DataType.DOUBLE,
        ir.DataType.FLOAT,
        ir.DataType.FLOAT16,
        ir.DataType.INT32,
        ir.DataType.INT64,
        ir.DataType.INT8,
        ir.DataType.UINT8,
    }
)


class FloatGraph:
    """A serialized graph, and the constants that it leaves out by name.

    With `slots`, the weight operand of every layer is a constant of its own (`weight_slots`); with `biases`, so is the
    bias of every layer, added where there was none (`bias_slots`: name, shape and dtype by layer name).
    """

    def __init__(
        self,
        model: Model,
        *,
        fetch: tuple[str, ...] | None = None,
        given: Mapping[str, Array] | None = None,
        slots: bool = False,
        biases: bool = False,
        constants: Mapping[str, Array] | None = None,
    ) -> None:
        self.constants: dict[str, ort.OrtValue] = {}
        self.weight_slots: dict[str, Layer] = {}
        self.bias_slots: dict[str, tuple[str, tuple[int, ...], str]] = {}
        clone = model.ir.clone()
        self._graph = clone.graph
        self._nodes = list(clone.graph)
        set_constants(clone.graph, constants or {})
        if biases:  # first: the positions of nodes are those of the model
            for layer in model.layers:
                if layer.kind in ("matmul", "conv"):
                    self._add_bias_slot(layer)
        if slots:
            self._add_weight_slots(model.layers)
        for name, example in (given or {}).items():
            _make_input(model, clone.graph, name, example)
        if fetch is not None:
            _set_outputs(model, clone.graph, fetch)
        self._take_out_constants()
        self.proto = _serialize(model, clone)

    def _new_constant(self, name: str, array: Array) -> ir.Value:
        value = ir.val(name, const_value=ir.tensor(array, name=name))
        self._graph.register_initializer(value)
        return value

    def _add_weight_slots(self, layers: Iterable[Layer]) -> None:
        # Two layers share a slot only if they read the same operand the same way.
        slots: dict[tuple[ir.Value, str, float], ir.Value] = {}
        for layer in layers:
            node = self._nodes[layer.node_index]
            operand = node.inputs[layer.weight_input]
            assert operand is not None
            key = (operand, layer.weight_name, layer.alpha)
            if key not in slots:
                name = f"afpq.weight.{len(slots)}"
                base = original_layout(layer, layer.weight).astype(layer.dtype, copy=False)
                slots[key] = self._new_constant(name, base)
                self.weight_slots[name] = layer
            node.replace_input_with(layer.weight_input, slots[key])
            if layer.alpha != 1.0:
                node.attributes["alpha"] = ir.AttrFloat32("alpha", 1.0)

    def _add_bias_slot(self, layer: Layer) -> None:
        node = self._nodes[layer.node_index]
        name = f"afpq.bias.{len(self.bias_slots)}"
        channel_axis = -2 if layer.is_left and layer.k_axis == -2 else -1
        shape: tuple[int, ...] = (layer.n,) if channel_axis == -1 else (layer.n, 1)
        if layer.kind == "conv" and layer.conv is not None and layer.add_index is not None:
            shape = (layer.n, *[1] * len(layer.conv.kernel_shape))
        bias = np.zeros(layer.n, np.float32) if layer.bias is None else layer.bias
        slot = self._new_constant(name, bias.astype(layer.dtype).reshape(shape))
        self.bias_slots[layer.name] = (name, shape, layer.dtype)
        if layer.add_index is not None:
            add = self._nodes[layer.add_index]
            position = 1 if add.inputs[0] is node.outputs[0] else 0
            add.replace_input_with(position, slot)
        elif layer.kind == "conv" or (layer.op_type == "Gemm" and not layer.keeps_c):
            node.resize_inputs(3)
            node.replace_input_with(2, slot)
            if "beta" in node.attributes:
                node.attributes["beta"] = ir.AttrFloat32("beta", 1.0)
        else:
            self._insert_add(node, slot)

    def _insert_add(self, node: ir.Node, slot: ir.Value) -> None:
        output = node.outputs[0]
        add = ir.node("Add", [output, slot])
        result, name = add.outputs[0], output.name
        result.type, result.shape = output.type, output.shape
        uses = [use for use in output.uses() if use.node is not add]
        for user, position in uses:
            user.replace_input_with(position, result)
        for position, value in enumerate(self._graph.outputs):
            if value is output:
                self._graph.outputs[position] = result
        output.name, result.name = f"{name}.without_bias", name
        self._graph.insert_after(node, add)

    def _take_out_constants(self) -> None:
        slots = self.weight_slots.keys() | {name for name, _, _ in self.bias_slots.values()}
        for name, value in list(self._graph.initializers.items()):
            tensor = value.const_value
            if tensor is None:
                continue
            if not value.uses() and not value.is_graph_output():
                del self._graph.initializers[name]
            elif name in slots or (
                tensor.nbytes >= _INLINE_BYTES and tensor.dtype in _EXTERNAL_TYPES
            ):
                array = np.require(tensor.numpy(), requirements="C")
                self.constants[name] = ort.OrtValue.ortvalue_from_numpy(array)
                value.const_value = ir.ExternalTensor(
                    _PLACEHOLDER,
                    0,
                    tensor.nbytes,
                    tensor.dtype,
                    shape=ir.Shape(array.shape),
                    name=name,
                )


def _make_input(model: Model, graph: ir.Graph, name: str, example: Array) -> None:
    """Feeds the tensor called `name` instead of computing it; an input of the model is one already."""
    if any(value.name == name for value in graph.inputs):
        return
    computed = next((v for node in graph for v in node.outputs if v.name == name), None)
    if computed is None:
        raise ModelError(f"{model.path}: no tensor of the main graph is called {name!r}")
    computed.name = f"{name}.computed"
    fed = ir.val(
        name,
        dtype=ir.DataType.from_numpy(example.dtype),
        shape=[f"{name}.{axis}" for axis in range(example.ndim)],
    )
    computed.replace_all_uses_with(fed)
    graph.inputs.append(fed)


def _set_outputs(model: Model, graph: ir.Graph, fetch: tuple[str, ...]) -> None:
    """Makes exactly the tensors called `fetch` the outputs, and drops the nodes that no longer matter."""
    known = {v.name: v for node in graph for v in node.outputs if v.name}
    known |= {name: v for name, v in graph.initializers.items()}
    missing = [name for name in fetch if name not in known]
    if missing:
        raise ModelError(f"{model.path}: no tensor of the main graph is called {missing[0]!r}")
    graph.outputs[:] = [known[name] for name in fetch]
    for node in reversed(graph):
        if not any(v.uses() or v.is_graph_output() for v in node.outputs):
            graph.remove(node, safe=True)
    graph.inputs[:] = [v for v in graph.inputs if v.uses() or v.is_graph_output()]


def _serialize(model: Model, clone: ir.Model) -> bytes:
    for graph in (clone.graph, *clone.graph.subgraphs()):
        for value in graph.initializers.values():
            tensor = value.const_value
            if isinstance(tensor, ir.ExternalTensor) and str(tensor.location) != _PLACEHOLDER:
                value.const_value = ir.Tensor(np.array(tensor.numpy()), name=value.name)
    try:
        return bytes(ir.to_proto(clone).SerializeToString(deterministic=True))
    except ValueError as error:  # protobuf's limit of 2 GB
        raise ModelError(
            f"{model.path}: more than 2 GB of constants lie outside the initializers of the main graph"
        ) from error
