"""Finds where channels can be scaled without changing a network: a producer divides, all readers multiply.

A producer is an operator whose constants have one number, or one row, for each channel of its output. From there the
channels are followed through operators that a positive factor for each channel passes (f(x / s) = f(x) / s), up to the
layers that read them. Where anything else reads them, or a constant has other users, there is no pair.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from afpq._fold import Constants, attribute
from afpq.graph import Layer, Model

__all__ = ["Clip", "Constant", "Pair", "find_pairs"]

_POOLS = frozenset({"AveragePool", "GlobalAveragePool", "GlobalMaxPool", "MaxPool"})
_PASSING = frozenset({"Dropout", "Identity", "LeakyRelu", "Relu"})
_NORMS = frozenset({"LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization"})


@dataclass(frozen=True)
class Constant:
    """An initializer, and its axis (from the end) that runs over channels."""

    name: str
    axis: int


@dataclass(frozen=True)
class Clip:
    """A value that is cut at `high`: dividing must neither bring it there nor take it away from there."""

    value: str
    axis: int  # of channels
    high: float


@dataclass(frozen=True, eq=False)
class Pair:
    """Channels with a factor each that can be chosen freely."""

    name: str  # of the producer's node
    channels: int
    divided: tuple[Constant, ...]
    readers: tuple[tuple[Layer, Constant], ...] = field(repr=False)  # constants to multiply
    clips: tuple[Clip, ...] = ()


@dataclass(eq=False)
class _Followed:
    """What was met on the way from one producer."""

    channels: int
    divided: list[Constant]
    readers: list[tuple[Layer, Constant]] = field(default_factory=list)
    clips: list[Clip] = field(default_factory=list)
    values: set[ir.Value] = field(default_factory=set)
    factors: list[ir.Value] = field(default_factory=list)  # what channels are multiplied by


def find_pairs(model: Model) -> Iterator[Pair]:
    """All pairs, in the order of their producers; no layer reads in two of them."""
    finder = _Finder(model)
    taken: set[str] = set()
    for value, axis, followed in finder.producers():
        if not finder.follow(followed, value, axis) or not followed.readers:
            continue
        names = {layer.name for layer, _ in followed.readers}
        if names & taken or any(factor in followed.values for factor in followed.factors):
            continue
        taken |= names
        node = value.producer()
        assert node is not None
        yield Pair(
            node.name or value.name or "",
            followed.channels,
            tuple(followed.divided),
            tuple(followed.readers),
            tuple(followed.clips),
        )


class _Finder:
    """The graph of a model, with what the rules look up. Axis 1 means channels first, -1 channels last."""

    def __init__(self, model: Model) -> None:
        self._graph = model.ir.graph
        self._constants = Constants(self._graph)
        self._nodes = list(self._graph)
        self._layers = {self._nodes[layer.node_index]: layer for layer in model.layers}
        self._users = Counter(layer.weight_name for layer in model.layers)
        self._values = {v.name: v for node in self._nodes for v in node.outputs}

    def producers(self) -> Iterator[tuple[ir.Value, int, _Followed]]:
        for node in self._nodes:
            layer = self._layers.get(node)
            found: list[Constant | None] = []
            axis, value = -1, node.outputs[0]
            if layer is not None:
                axis, value = 1 if layer.kind == "conv" else -1, self._values[layer.output_name]
                found = self._rows(node, layer)
            elif node.domain != "" or node.op_type not in _NORMS | {"BatchNormalization", "Mul"}:
                continue
            elif node.op_type == "Mul":  # the last step of a normalization in several nodes
                found = [c for c in map(self._vector, node.inputs) if c is not None]
            elif len(node.inputs) > 1 and int(attribute(node, "axis", -1)) == -1:
                axis = 1 if node.op_type == "BatchNormalization" else -1
                found = [self._vector(v) for v in node.inputs[1:3] if v is not None]
            divided = [c for c in found if c is not None]
            if divided and len(divided) == len(found):
                yield value, axis, _Followed(self._size(divided[0]), divided)

    def follow(self, f: _Followed, value: ir.Value, axis: int) -> bool:
        """Collects all that reads the channels of a value; False if something does that must not."""
        if value in f.values:
            return True
        f.values.add(value)
        if value.is_graph_output():
            return False
        return all(self._reads(f, node, index, axis) for node, index in value.uses())

    def _reads(self, f: _Followed, node: ir.Node, index: int, axis: int) -> bool:
        if node.graph is not self._graph or node.domain != "":
            return False
        if node in self._layers:
            return self._layer_reads(f, self._layers[node], index, axis)
        if index > 0 and node.op_type not in ("Add", "Mul"):
            return False
        if any(extra.uses() or extra.is_graph_output() for extra in node.outputs[1:]):
            return False
        output = node.outputs[0]
        if node.op_type in _PASSING or (node.op_type in _POOLS and axis == 1):
            return self.follow(f, output, axis)
        if node.op_type == "Flatten" and axis == 1 and int(attribute(node, "axis", 1)) == 1:
            return self.follow(f, output, -1)
        if node.op_type == "Clip":
            return self._clip_reads(f, node, axis) and self.follow(f, output, axis)
        if node.op_type in ("Add", "Mul") and axis == -1:
            return self._arithmetic_reads(f, node, index) and self.follow(f, output, axis)
        return False

    def _layer_reads(self, f: _Followed, layer: Layer, index: int, axis: int) -> bool:
        if layer.kind not in ("matmul", "conv") or index == layer.weight_input or layer.is_left:
            return False
        if layer.groups != 1 or layer.k_axis != axis or self._users[layer.weight_name] != 1:
            return False
        if index > 1:  # a Gemm's C
            return False
        rank = len(layer.shape)
        place = 1 - rank if layer.kind == "conv" else -2 if layer.k_first else -1
        constant = self._own(self._nodes[layer.node_index].inputs[layer.weight_input], place)
        # A convolution that was flattened has several steps of k for a channel.
        if constant is None or self._size(constant) % f.channels:
            return False
        if layer.kind == "conv" and self._size(constant) != f.channels:
            return False
        f.readers.append((layer, constant))
        return True

    def _clip_reads(self, f: _Followed, node: ir.Node, axis: int) -> bool:
        bounds = [self._constants.value(v) for v in node.inputs[1:3]]
        if any(b is None and v is not None for b, v in zip(bounds, node.inputs[1:3], strict=True)):
            return False
        low, high = [None if b is None else float(b.reshape(())) for b in (*bounds, None, None)][:2]
        if low not in (None, 0.0) or (high is not None and high <= 0):
            return False
        if high is not None and np.isfinite(high):
            value = node.inputs[0]
            assert value is not None
            f.clips.append(Clip(value.name or "", axis, high))
        return True

    def _arithmetic_reads(self, f: _Followed, node: ir.Node, index: int) -> bool:
        other = node.inputs[1 - index]
        assert other is not None
        vector = self._vector(other)
        if node.op_type == "Add":
            if vector is None or self._size(vector) != f.channels:
                return False
            f.divided.append(vector)
            return True
        f.factors.append(other)
        return True

    def _rows(self, node: ir.Node, layer: Layer) -> list[Constant | None]:
        """The weight of a layer over its output channels, and its bias."""
        if layer.kind not in ("matmul", "conv") or layer.is_left or layer.keeps_c:
            return []
        if self._users[layer.weight_name] != 1:
            return []
        rank = len(layer.shape)
        place = -rank if layer.kind == "conv" else -1 if layer.k_first else -2
        found = [self._own(node.inputs[layer.weight_input], place)]
        if layer.bias is None:
            return found
        bias, place = node.inputs[2] if len(node.inputs) > 2 else None, -1
        if layer.add_index is not None:
            add = self._nodes[layer.add_index]
            bias = next(v for v in add.inputs if v is not None and v.producer() is not node)
            place = -1 if layer.conv is None else -1 - len(layer.conv.kernel_shape)
        constant = self._own(bias, place)
        return [*found, constant if constant and self._size(constant) == layer.n else None]

    def _vector(self, value: ir.Value | None) -> Constant | None:
        """An initializer of one number a channel that one node reads."""
        constant = self._own(value, -1)
        shape = None if constant is None else self._graph.initializers[constant.name].shape
        return constant if shape is not None and len(shape) == 1 and shape[0] != 1 else None

    def _own(self, value: ir.Value | None, axis: int) -> Constant | None:
        if value is None or not value.is_initializer() or value.is_graph_output():
            return None
        tensor = value.const_value
        if tensor is None or len(value.uses()) != 1 or len(tensor.shape) < -axis:
            return None
        if tensor.dtype != ir.DataType.FLOAT:  # a float16 has too little range for factors
            return None
        return Constant(str(value.name), axis)

    def _size(self, constant: Constant) -> int:
        tensor = self._graph.initializers[constant.name].const_value
        assert tensor is not None
        return int(tensor.numpy().shape[constant.axis])
