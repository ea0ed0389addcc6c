"""A Relu, or a Clip with constant bounds, behind a value that nothing else reads."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from afpq._fold import Constants

__all__ = ["Clip", "clip_fields", "find_clip"]


@dataclass(frozen=True)
class Clip:
    """The node, and its bounds."""

    node: ir.Node
    low: float
    high: float


def find_clip(graph: ir.Graph, constants: Constants, output: ir.Value) -> Clip | None:
    """The Relu or Clip with constant bounds that alone reads a value."""
    if output.is_graph_output() or len(output.uses()) != 1:
        return None
    node, position = next(iter(output.uses()))
    if node.domain != "" or node.graph is not graph or position != 0:
        return None
    if node.op_type == "Relu":
        return Clip(node, 0.0, math.inf)
    if node.op_type != "Clip":
        return None
    bounds = [-math.inf, math.inf]
    for index, operand in enumerate(node.inputs[1:3]):
        if operand is not None:
            bound = constants.value(operand)
            if bound is None or bound.size != 1 or np.isnan(bound).any():
                return None
            bounds[index] = float(bound.reshape(()))
    return Clip(node, *bounds) if bounds[0] <= bounds[1] else None


def clip_fields(clip: Clip | None) -> dict[str, Any]:
    """The attributes of an operator that clips by itself."""
    fields: dict[str, Any] = {}
    if clip is not None and clip.low != -math.inf:
        fields["clip_min"] = clip.low
    if clip is not None and clip.high != math.inf:
        fields["clip_max"] = clip.high
    return fields
