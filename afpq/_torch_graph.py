"""A float network as a torch function of its weights and biases, so that they can be learned.

Only nodes between a quantized weight and an output run in torch. What they read besides (masks, shapes, the network's
inputs) is the same in the quantized network, and onnxruntime computes it: `context` names it.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from torch import Tensor

from afpq._blocks import is_flag
from afpq._fold import Constants
from afpq._torch_ops import OPERATORS, UnsupportedError
from afpq.graph import Layer, Model, original_layout

__all__ = ["TorchGraph", "UnsupportedError"]


class TorchGraph:
    """The part of a network that leads from some weights to `outputs`.

    Attributes:
        layers: those with these weights that are on the way.
        context: names of the other tensors that it reads, computed at run time, equal for all weights.

    Raises:
        UnsupportedError: an operator on the way has no exact counterpart in torch.
    """

    def __init__(self, model: Model, outputs: Sequence[str], weight_names: Collection[str]) -> None:
        self.outputs = tuple(outputs)
        nodes = list(model.ir.graph)
        found = {x.node_index: x for x in model.layers if x.weight_name in weight_names}
        self._nodes = _on_the_way(nodes, found.keys(), self.outputs)
        self._layers = {i: found[i] for i, _ in self._nodes if i in found}
        self.layers = tuple(self._layers.values())
        self._orders = {index: _order(layer) for index, layer in self._layers.items()}
        self._adders = {x.add_index: x for x in self.layers if x.add_index is not None}
        self._products = {x.name: nodes[x.node_index].outputs[0].name for x in self.layers}
        for _, node in self._nodes:
            if node.domain not in ("", "ai.onnx") or node.op_type not in OPERATORS:
                raise UnsupportedError(f"operator {node.op_type}")
        constants = Constants(model.ir.graph)
        self._constants: dict[str, Tensor] = {}
        context = set[str]()
        made = {v.name for _, node in self._nodes for v in node.outputs}
        for index, node in self._nodes:
            for position, value in enumerate(node.inputs):
                is_weight = index in self._layers and position == self._layers[index].weight_input
                if value is None or value.name is None or value.name in made or is_weight:
                    continue
                array = constants.value(value)
                if array is None:
                    context.add(value.name)
                elif value.name not in self._constants:
                    self._constants[value.name] = as_tensor(array)
        self.context = tuple(sorted(context))

    def __call__(
        self,
        tensors: Mapping[str, Tensor],
        weights: Mapping[str, Tensor],
        biases: Mapping[str, Tensor],
    ) -> list[Tensor]:
        """The outputs. `tensors` are the context; `weights` [n, k] by weight_name, `biases` [n] by
        layer name, in place of the layers' own where there is one.
        """
        values: dict[str | None, Tensor] = {}
        values.update(self._constants)
        values.update(tensors)
        for index, node in self._nodes:
            inputs = [None if v is None else values.get(v.name) for v in node.inputs]
            layer = self._layers.get(index)
            adder = self._adders.get(index)
            if adder is not None and adder.name in biases:  # the bias is in there already
                results: Sequence[Tensor] = [values[self._products[adder.name]]]
            elif layer is None:
                results = OPERATORS[node.op_type](node, inputs)
            else:
                inputs[layer.weight_input] = weights[layer.weight_name].reshape(-1)[
                    self._orders[index]
                ]
                bias = biases.get(layer.name)
                if bias is not None and node.op_type in ("Conv", "Gemm") and not layer.keeps_c:
                    inputs = inputs[:2]
                results = OPERATORS[node.op_type](node, inputs)
                if bias is not None:
                    results = [results[0] + bias.reshape(_bias_shape(layer))]
            values.update((v.name, r) for v, r in zip(node.outputs, results, strict=False))
        return [values[name] for name in self.outputs]


def as_tensor(array: npt.NDArray[Any]) -> Tensor:
    """A tensor of an array; float16 becomes float32."""
    if array.dtype == np.float16:
        array = array.astype(np.float32)
    return torch.from_numpy(np.require(array, requirements=("C", "W")))


def _on_the_way(
    nodes: Sequence[ir.Node], starts: Collection[int], outputs: tuple[str, ...]
) -> list[tuple[int, ir.Node]]:
    """The nodes that depend on a start and that an output depends on, in order."""
    varying = set[str | None]()
    candidates = []
    for index, node in enumerate(nodes):
        changes = index in starts or any(v is not None and v.name in varying for v in node.inputs)
        if changes and not is_flag(node):
            varying.update(v.name for v in node.outputs)
            candidates.append((index, node))
    needed: set[str | None] = set(outputs)
    result = []
    for index, node in reversed(candidates):
        if any(v.name in needed for v in node.outputs):
            needed.update(v.name for v in node.inputs if v is not None)
            result.append((index, node))
    return result[::-1]


def _order(layer: Layer) -> Tensor:
    """Where the operand of the node finds its numbers in the flat matrix [n, k]."""
    places = np.arange(layer.weight.size, dtype=np.float64).reshape(layer.weight.shape)
    return torch.from_numpy(original_layout(layer, places).astype(np.int64))  # type: ignore[arg-type]


def _bias_shape(layer: Layer) -> tuple[int, ...]:
    if layer.conv is not None:
        return (layer.n, *[1] * len(layer.conv.kernel_shape))
    return (layer.n, 1) if layer.is_left and layer.k_axis == -2 else (layer.n,)
