"""Rounds float32 tensors inside a graph, by plain ONNX operators, exactly as `formats.fake_quantize` rounds."""

from collections.abc import Iterable

import numpy as np
import onnx_ir as ir

from afpq.formats import AfpFormat

__all__ = ["Rounder", "round_inputs"]


def round_inputs(
    graph: ir.Graph, places: Iterable[tuple[ir.Node, int, AfpFormat, float | ir.Value]]
) -> None:
    """Rounds what nodes read: (node, operand, format, scale), in the order of execution.

    What several of them read alike is rounded once. Other readers of a tensor keep its float values.
    """
    rounded: dict[tuple[ir.Value, AfpFormat, float | ir.Value], ir.Value] = {}
    for node, position, fmt, scale in places:
        value = node.inputs[position]
        assert value is not None
        key = value, fmt, scale
        if key not in rounded:
            rounder = Rounder(graph, f"afpq.rounded.{len(rounded)}")
            rounded[key] = rounder.round(value, fmt, scale)
            graph.insert_before(node, rounder.nodes)
        node.replace_input_with(position, rounded[key])


class Rounder:
    """Builds the nodes of one rounding in `nodes`, in the order of execution; the caller inserts them."""

    def __init__(self, graph: ir.Graph, prefix: str) -> None:
        self.nodes: list[ir.Node] = []
        self._graph, self._prefix = graph, prefix
        self._constants: dict[float, ir.Value] = {}

    def round(self, x: ir.Value, fmt: AfpFormat, scale: float | ir.Value) -> ir.Value:
        """The nearest `I * scale`, ties to the even code; `scale` is a number or a float32 scalar of the graph.

        The format needs a mantissa: without one, the even code is not the one with the even multiple of the step.
        """
        assert fmt.mantissa_bits > 0
        unit = scale if isinstance(scale, ir.Value) else self._constant(scale)
        largest = float(fmt.max_integer)
        low = self._constant(-largest if fmt.signed else 0.0)
        ratio = self._op("Clip", self._op("Div", x, unit), low, self._constant(largest))
        if fmt.exponent_bits < 2:  # all integers
            return self._op("Mul", self._op("Round", ratio), unit)
        step = self._step(ratio, fmt)
        steps = self._op("Round", self._op("Div", ratio, step))
        return self._op("Mul", self._op("Mul", steps, step), unit)

    def _step(self, ratio: ir.Value, fmt: AfpFormat) -> ir.Value:
        """The distance of integers `I` around `ratio`: 2 from 2^(M + 1) on, 4 from 2^(M + 2) on, ..

        The power is found by bisection, one bit of it after another. All divisions are by powers of two: exact.
        """
        one, step, size = self._constant(1.0), None, self._op("Abs", ratio)
        for bit in reversed(range(fmt.exponent_bits)):
            reached = self._constant(2.0 ** (fmt.mantissa_bits + (1 << bit)))
            above = self._op("GreaterOrEqual", size, reached)
            factor = self._op("Where", above, self._constant(2.0 ** (1 << bit)), one)
            step = factor if step is None else self._op("Mul", step, factor)
            if bit:
                size = self._op("Div", size, factor)
        assert step is not None
        return step

    def _op(self, op_type: str, *inputs: ir.Value) -> ir.Value:
        node = ir.node(op_type, list(inputs))
        node.outputs[0].name = f"{self._prefix}.{len(self.nodes)}"
        self.nodes.append(node)
        return node.outputs[0]

    def _constant(self, number: float) -> ir.Value:
        if number not in self._constants:
            name = f"{self._prefix}.c{len(self._constants)}"
            value = ir.val(name, const_value=ir.tensor(np.float32(number), name=name))
            self._graph.register_initializer(value)
            self._constants[number] = value
        return self._constants[number]
