"""Lets layers add residuals, and convolutions pass bytes to each other: tensors with a static format are stored in it,
channels last.

A residual of floats is added as the Add did, to the last bit. A tensor becomes bytes if what makes it can write them
and all that reads it can read them:

    writes   Conv; Conv behind which a residual of bytes is added; MaxPool and Concat of bytes
    reads    Conv with this static format; the Add of a residual, which becomes part of the Conv before it; MaxPool and
             Concat whose result is bytes

A convolution reads the numbers that it would have rounded to itself. Only residuals are rounded in addition.
"""

from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass

import onnx_ir as ir

from afpq._activation_entry import ActivationEntry
from afpq._clip import Clip, clip_fields, find_clip
from afpq._fold import Constants, attribute
from afpq._shapes import same_shape

__all__ = ["Residual", "add_residuals", "channels_first", "find_residuals", "pass_bytes"]

_POOL_FIELDS = ("kernel_shape", "strides", "pads", "dilations", "auto_pad", "ceil_mode")


@dataclass(frozen=True)
class Residual:
    """An Add of what a layer made, and nothing else reads, and of another tensor; then perhaps a clip."""

    add: ir.Node
    layer: ir.Node
    position: int  # of the other tensor among the inputs of the Add
    clip: Clip | None

    @property
    def other(self) -> ir.Value:
        value = self.add.inputs[self.position]
        assert value is not None
        return value

    @property
    def nodes(self) -> list[ir.Node]:
        return [self.layer, self.add, *([] if self.clip is None else [self.clip.node])]

    @property
    def end(self) -> ir.Value:
        return self.nodes[-1].outputs[0]


def find_residuals(graph: ir.Graph, made: Set[str]) -> Iterator[Residual]:
    """Residuals behind layers, in the order of the nodes; `made` names the tensors that these make.

    Only where both shapes are known (`with_shapes`) and equal: nothing is broadcast.
    """
    order = {node: index for index, node in enumerate(graph)}
    constants = Constants(graph)
    for add in graph:
        if add.domain != "" or add.op_type != "Add":
            continue
        found = []
        for position, other in enumerate(add.inputs):
            value = add.inputs[1 - position]
            if value is None or other is None or value.name not in made:
                continue
            node = value.producer()
            if len(value.uses()) == 1 and not value.is_graph_output() and node in order:
                found.append((order[node], node, position))
        if found:
            _, layer, position = max(found, key=lambda item: item[0])
            residual = Residual(add, layer, position, find_clip(graph, constants, add.outputs[0]))
            if residual.other.producer() in order and same_shape(layer.outputs[0], residual.other):
                yield residual


def add_residuals(graph: ir.Graph) -> None:
    """Gives residuals of floats to the layers before them, with the clip behind. Nodes are as in `pass_bytes`."""
    layers = [n for n in graph if _is_conv(n) or _is_matmul(n)]
    made = {n.outputs[0].name or "" for n in layers if _has_open_end(n)}
    for residual in list(find_residuals(graph, made)):
        _replace(graph, residual.nodes, _with_residual(residual, {}))


def pass_bytes(graph: ir.Graph, entries: Mapping[str, ActivationEntry], integer: Set[str]) -> int:
    """Makes bytes of all tensors that can be; returns how many. `entries` goes by tensor.

    Nodes of the domain `afpq` are as `Emitter` leaves them; `integer` names those that multiply integers, and so can
    take bytes and residuals.
    """
    return _Chain(graph, entries, integer).run()


def channels_first(graph: ir.Graph) -> None:
    """Undoes `pass_bytes` for nodes that are no convolutions: tensors are floats with channels on axis 1 again."""
    for node in list(graph):
        if node.domain == "afpq" and node.op_type == "MaxPoolU8":
            node.domain, node.op_type = "", "MaxPool"
        elif _is_concat(node, -1) and any(_makes_bytes(v) for v in node.inputs):
            node.attributes["axis"] = ir.AttrInt64("axis", 1)


def _makes_bytes(value: ir.Value | None) -> bool:
    """Whether a tensor is, or was before `channels_first`, one that `pass_bytes` made bytes of."""
    node = None if value is None else value.producer()
    if node is None:
        return False
    if node.domain == "afpq":
        return node.op_type in ("ConvU8", "MaxPoolU8")
    return (_is_pool(node) or _is_concat(node, 1)) and any(_makes_bytes(v) for v in node.inputs)


class _Chain:
    def __init__(
        self, graph: ir.Graph, entries: Mapping[str, ActivationEntry], integer: Set[str]
    ) -> None:
        self._graph = graph
        self._given = entries
        self._integer = integer
        convs = [node for node in graph if _is_conv(node)]
        hosts = {n.outputs[0].name or "" for n in convs if n.name in integer and _has_open_end(n)}
        found = list(find_residuals(graph, hosts))
        self._adds = {residual.add: residual for residual in found}
        self._ends = {residual.end: residual for residual in found}
        self._entries: dict[ir.Value, ActivationEntry] = {}
        for node in graph:
            for value in node.outputs:
                entry = self._entry(value)
                if entry is not None and not value.is_graph_output():
                    self._entries[value] = entry

    def run(self) -> int:
        while self._drop():
            pass
        for node in list(self._graph):
            self._rewrite(node)
        return len(self._entries)

    def _entry(self, value: ir.Value) -> ActivationEntry | None:
        """The format of a tensor: its own, or that of the MaxPool or Concat which alone reads it."""
        given = self._given.get(value.name or "")
        if given is not None:
            return given
        uses = list(value.uses())
        if len(uses) == 1 and (_is_pool(uses[0].node) or _is_concat(uses[0].node)):
            return self._entry(uses[0].node.outputs[0])
        return None

    # What can be bytes.

    def _drop(self) -> bool:
        """Removes one round of tensors that cannot be bytes as long as others are not."""
        wrong = [v for v in self._entries if not (self._is_written(v) and self._is_read(v))]
        for value in wrong:
            del self._entries[value]
        return bool(wrong)

    def _same(self, value: ir.Value | None, entry: ActivationEntry) -> bool:
        other = self._entries.get(value) if value is not None else None
        return other is not None and (other.format, other.scale) == (entry.format, entry.scale)

    def _fuses(self, residual: Residual) -> bool:
        return residual.other in self._entries

    def _is_written(self, value: ir.Value) -> bool:
        if value in self._ends:
            return self._fuses(self._ends[value])
        node, entry = value.producer(), self._entries[value]
        if node is None:
            return False
        if _is_pool(node):
            return self._same(node.inputs[0], entry)
        if _is_concat(node):
            return all(self._same(operand, entry) for operand in node.inputs)
        return _is_conv(node)

    def _is_read(self, value: ir.Value) -> bool:
        entry = self._entries[value]
        return all(self._reads(node, index, entry) for node, index in value.uses())

    def _reads(self, node: ir.Node, index: int, entry: ActivationEntry) -> bool:
        if node.graph is not self._graph:
            return False
        if _is_conv(node):
            fields = node.attributes
            return (
                index == 0
                and node.name in self._integer
                and "activation_format" in fields
                and fields["activation_format"].value == str(entry.format)
                and fields["activation_scale"].value == entry.scale
            )
        if node in self._adds:
            return index == self._adds[node].position
        if _is_pool(node) or _is_concat(node):
            return self._same(node.outputs[0], entry)
        return False

    # What becomes of the nodes.

    def _rewrite(self, node: ir.Node) -> None:
        if node in self._adds and self._fuses(self._adds[node]):
            self._fuse(self._adds[node])
        elif node.outputs[0] in self._entries:
            entry = self._entries[node.outputs[0]]
            if _is_conv(node):
                self._write_bytes(node, entry)
            elif _is_pool(node):
                fields = [node.attributes[n] for n in _POOL_FIELDS if n in node.attributes]
                new = ir.Node("afpq", "MaxPoolU8", node.inputs[:1], fields, name=node.name)
                self._replace([node], new)
            elif _is_concat(node):
                node.attributes["axis"] = ir.AttrInt64("axis", -1)

    def _write_bytes(self, node: ir.Node, entry: ActivationEntry) -> None:
        node.op_type = "ConvU8"
        node.attributes["output_format"] = ir.AttrString("output_format", str(entry.format))
        node.attributes["output_scale"] = ir.AttrFloat32("output_scale", entry.scale)

    def _fuse(self, residual: Residual) -> None:
        entry = self._entries[residual.other]
        written = self._entries.get(residual.end)
        new = _with_residual(
            residual, {"residual_format": str(entry.format), "residual_scale": entry.scale}
        )
        self._replace(residual.nodes, new)
        if written is not None:
            self._write_bytes(new, written)

    def _replace(self, old: list[ir.Node], new: ir.Node) -> None:
        entry = self._entries.pop(old[-1].outputs[0], None)
        _replace(self._graph, old, new)
        if entry is not None:
            self._entries[new.outputs[0]] = entry


def _with_residual(residual: Residual, fields: Mapping[str, str | float]) -> ir.Node:
    """The layer, to be where the Add is, with its residual and its clip."""
    old = residual.layer
    inputs = [*old.inputs, *[None] * (4 - len(old.inputs)), residual.other]
    new = ir.Node("afpq", old.op_type, inputs, list(old.attributes.values()), name=old.name)
    for name, value in {**clip_fields(residual.clip), **fields}.items():
        new.attributes[name] = (
            ir.AttrString(name, value) if isinstance(value, str) else ir.AttrFloat32(name, value)
        )
    return new


def _replace(graph: ir.Graph, old: list[ir.Node], new: ir.Node) -> None:
    """Puts a node behind those that it replaces; its output keeps the name of theirs."""
    before, after = old[-1].outputs[0], new.outputs[0]
    after.name, after.type, after.shape = before.name, before.type, before.shape
    before.replace_all_uses_with(after, replace_graph_outputs=True)
    graph.insert_after(old[-1], new)
    for node in reversed(old):
        graph.remove(node, safe=True)


def _is_conv(node: ir.Node) -> bool:
    return node.domain == "afpq" and node.op_type == "Conv"


def _is_matmul(node: ir.Node) -> bool:
    return node.domain == "afpq" and node.op_type == "MatMul"


def _has_open_end(node: ir.Node) -> bool:
    """Whether something may be added to what a layer makes."""
    return len(node.inputs) < 5 and not {"clip_min", "clip_max"} & set(node.attributes)


def _is_pool(node: ir.Node) -> bool:
    return (
        node.domain == ""
        and node.op_type == "MaxPool"
        and len(node.outputs) == 1
        and attribute(node, "storage_order", 0) == 0
    )


def _is_concat(node: ir.Node, axis: int = 1) -> bool:
    return node.domain == "" and node.op_type == "Concat" and attribute(node, "axis", 0) == axis
