"""Blocks of a network: stretches between points where a single tensor carries all that quantization can change.

A residual connection keeps its branch in one block, as the outputs of both meet behind it: what is reconstructed is
what the rest of the network sees (Li et al. 2021, BRECQ, section 3.2).
"""

from collections.abc import Collection

import onnx_ir as ir

from afpq.graph import Model

__all__ = ["block_borders", "is_flag"]

# Shorter stretches are joined: an inverted bottleneck, a fire module, an attention has three layers or more.
_FEWEST_LAYERS = 3
# Their outputs are integers or flags: what is behind them does not change with small changes of weights.
_FLAGS = frozenset(
    {"And", "ArgMax", "ArgMin", "Equal", "Greater", "GreaterOrEqual", "IsNaN", "Less", "LessOrEqual", "Not", "Or"}
    | {"Shape", "Size"}
)  # fmt: skip


def block_borders(model: Model, weight_names: Collection[str]) -> list[str]:
    """Names of the tensors between the blocks of the layers with these weights, in the order of the network."""
    nodes = list(model.ir.graph)
    starts = {x.node_index for x in model.layers if x.weight_name in weight_names}
    cuts = _cuts(nodes, starts, {info.name for info in model.outputs})
    borders = []
    inside = 0
    for index in sorted(starts):
        if inside >= _FEWEST_LAYERS and index in cuts:
            borders.append(cuts[index])
            inside = 0
        inside += 1
    return borders


def is_flag(node: ir.Node) -> bool:
    """Whether what a node gives does not change with small changes of its inputs."""
    return node.op_type in _FLAGS


def _cuts(
    nodes: list[ir.Node], starts: Collection[int], graph_outputs: Collection[str]
) -> dict[int, str]:
    """Before which nodes one tensor alone carries all that depends on the nodes in `starts`, and its name."""
    last_read: dict[str, int] = {}
    for index, node in enumerate(nodes):
        for value in node.inputs:
            if value is not None and value.name:
                last_read[value.name] = index
    last_read.update(dict.fromkeys(graph_outputs, len(nodes)))
    alive: set[str] = set()
    changing: set[str] = set()
    cuts = {}
    for index, node in enumerate(nodes):
        alive = {name for name in alive if last_read.get(name, -1) >= index}
        if len(alive) == 1:
            cuts[index] = next(iter(alive))
        reads = {v.name for v in node.inputs if v is not None and v.name}
        if index in starts or (reads & changing and not is_flag(node)):
            names = {v.name for v in node.outputs if v.name}
            changing |= names
            alive |= names
    return cuts
