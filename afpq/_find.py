"""Finds the layers of a graph: what the rules make of each constant operand, then what they share.

A weight that is needed as floats somewhere stays float everywhere, and equal matrices are stored once.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir

from afpq._layer import Layer, Skipped
from afpq._rules import MIN_WEIGHTS, Finder

__all__ = ["find_layers"]


def find_layers(path: Path, model: ir.Model) -> tuple[tuple[Layer, ...], tuple[Skipped, ...]]:
    """Layers in the order of the nodes, and the weights that stay float.

    Raises:
        ModelError: a weight or a bias holds NaN or infinity.
    """
    finder = Finder(path, model)
    found: list[Layer] = []
    skipped: list[Skipped] = []
    for node, index, result, size in finder.candidates():
        if isinstance(result, Layer):
            found.append(result)
        else:
            skipped.append(Skipped(finder.names[index], node.op_type, result, size))
    kept, blocked = _without_blocked(found, finder)
    skipped += blocked
    skipped += _in_subgraphs(finder, model.graph)
    return tuple(_share(kept)), tuple(skipped)


def _without_blocked(found: list[Layer], f: Finder) -> tuple[list[Layer], list[Skipped]]:
    """Drops layers whose weight somebody else needs as floats: packing it would not free the float copy."""
    kept, skipped = found, list[Skipped]()
    while True:
        supported = {(f.nodes[layer.node_index], layer.weight_input) for layer in kept}
        reasons = [_blocker(layer, f, supported) for layer in kept]
        skipped += [
            Skipped(layer.name, layer.op_type, reason, layer.num_weights)
            for layer, reason in zip(kept, reasons, strict=True)
            if reason
        ]
        if not any(reasons):
            return kept, skipped
        kept = [layer for layer, reason in zip(kept, reasons, strict=True) if not reason]


def _blocker(layer: Layer, f: Finder, supported: set[tuple[ir.Node, int]]) -> str:
    value = f.nodes[layer.node_index].inputs[layer.weight_input]
    assert value is not None
    for root in f.constants.roots(value):
        if f.constants.is_output(root):
            return f"its weight {root.name!r} is an output of the graph"
        for node, position in f.constants.uses(root):
            if (node, position) not in supported:
                where = "" if node in f.index else " in a sub-graph"
                return f"its weight {root.name!r} is also needed as floats by {node.op_type} {node.name!r}{where}"
    return ""


def _share(layers: list[Layer]) -> Iterator[Layer]:
    """Gives layers with equal matrices one weight_name, and different matrices different ones."""
    owners: dict[tuple[tuple[int, ...], bytes], str] = {}
    taken: set[str] = set()
    for layer in layers:
        key = (layer.weight.shape, hashlib.sha256(layer.weight.data).digest())
        name, note = layer.weight_name, layer.note
        if key not in owners:
            if name in taken:
                note = note or f"another layer reads {name!r} in a different layout"
                name = next(
                    c for c in (f"{name}_{i}" for i in range(2, len(layers) + 3)) if c not in taken
                )
            taken.add(name)
            owners[key] = name
        yield replace(layer, weight_name=owners[key], note=note)


def _in_subgraphs(f: Finder, graph: ir.Graph) -> Iterator[Skipped]:
    for node in graph:
        for attr in node.attributes.values():
            if attr.type == ir.AttributeType.GRAPH:
                bodies = [attr.value]
            elif attr.type == ir.AttributeType.GRAPHS:
                bodies = list(attr.value)
            else:
                continue
            reason = f"inside {attr.name} of {node.op_type} {node.name!r}: sub-graphs stay float"
            for body in bodies:
                for inner in body:
                    for _, array in f.weights(inner):
                        if array.size >= MIN_WEIGHTS:
                            yield Skipped(
                                inner.name or inner.op_type, inner.op_type, reason, array.size
                            )
                yield from _in_subgraphs(f, body)
