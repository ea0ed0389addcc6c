"""From a torch module to an ONNX file whose layers are named after the modules that own them.

`float_copy` and `fold_batch_norm` make the module that both sides start from: a copy in eval mode, batch norm folded
into the layer before it. `export` writes it as it is, no weight rearranged, and says which ONNX layer belongs to which
module. A weight that is read in any other way than by calling its own layer stays float on both sides.
"""

import copy
import logging
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes.common import IdentityEliminationPass, RemoveUnusedNodesPass
from torch import nn
from torch.nn.utils import fusion

from afpq._find import find_layers
from afpq._fold import Constants
from afpq._layer import Layer
from afpq._torch_layers import kind_of
from afpq.errors import ModelError, RuntimeUnavailableError
from afpq.rewrite import save

__all__ = [
    "BATCH_NORMS",
    "Example",
    "Exported",
    "export",
    "float_copy",
    "fold_batch_norm",
    "replace_modules",
]

_aten = torch.ops.aten
# Where the weight is among the arguments.
_WEIGHT_ARGUMENT: dict[Any, int] = {
    _aten.linear.default: 1,
    _aten.conv1d.default: 1,
    _aten.conv1d.padding: 1,
    _aten.conv2d.default: 1,
    _aten.conv2d.padding: 1,
    _aten.conv3d.default: 1,
    _aten.conv3d.padding: 1,
    _aten.embedding.default: 0,
}
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_Fuse = Callable[[Any, Any], nn.Module]
_BEFORE_BATCH_NORM: dict[str | None, _Fuse] = {
    "matmul": fusion.fuse_linear_bn_eval,
    "conv": fusion.fuse_conv_bn_eval,
}


@dataclass(frozen=True)
class Example:
    """The arguments of one call, by name, and which of their axes are open (as `torch.export` takes it)."""

    arguments: dict[str, torch.Tensor]
    dynamic_shapes: Any


@dataclass(frozen=True)
class Exported:
    """What was written, and the ONNX layers in it by name."""

    path: Path
    owners: dict[str, str]  # -> path of the module
    left_float: dict[str, str]  # -> a sentence that says why


def float_copy(module: nn.Module) -> nn.Module:
    """A copy on the processor for inference, without the fused paths of transformers, which pass their layers by.

    Raises:
        ModelError: the module cannot be copied.
    """
    try:
        result = copy.deepcopy(module).cpu().eval().requires_grad_(False)
    except Exception as error:  # whatever a module's own __deepcopy__ raises
        raise ModelError(f"{_name(module)} cannot be copied: {error}") from error
    for part in result.modules():
        if isinstance(part, nn.TransformerEncoderLayer):
            part.activation_relu_or_gelu = 0
        elif isinstance(part, nn.TransformerEncoder):
            part.enable_nested_tensor = part.use_nested_tensor = False
    return result


def fold_batch_norm(module: nn.Module, example: Example) -> nn.Module:
    """Folds each batch norm that alone reads a layer's output into the layer, in place; returns the module.

    Raises:
        ModelError: `torch.export` refuses the module.
    """
    if not any(isinstance(part, BATCH_NORMS) for part in module.modules()):
        return module
    graph = _Graph(module, _trace(module, example))
    found: dict[nn.Module, nn.Module] = {}
    for node in graph.nodes:
        norm = graph.module_of(node)
        if not isinstance(norm, BATCH_NORMS) or node.target is not _aten.batch_norm.default:
            continue
        before = node.args[0]
        layer = graph.reader(before)
        if layer is None or len(before.users) > 1 or norm.running_var is None:
            continue
        once = graph.calls(norm) == graph.calls(layer) == 1
        private = graph.owns(layer, layer.weight) and graph.owns(layer, layer.bias)
        kind = kind_of(layer)
        if kind in _BEFORE_BATCH_NORM and once and private and not _hooked(norm, layer):
            found[layer], found[norm] = _BEFORE_BATCH_NORM[kind](layer, norm), nn.Identity()
    return replace_modules(module, found)


def export(module: nn.Module, example: Example, path: Path) -> Exported:
    """Writes the module as ONNX.

    Raises:
        ModelError: `torch.export` or the ONNX exporter refuses the module.
        RuntimeUnavailableError: onnxscript is missing.
    """
    if find_spec("onnxscript") is None:
        raise RuntimeUnavailableError(
            "the ONNX exporter of torch needs onnxscript, which is missing: pip install 'afpq[torch]'"
        )
    with _zero_biases(module):
        program = _trace(module, example)
        model = _to_onnx(module, program)
        owners, left_float = _name_layers(path, model, _Graph(module, program))
    for value, name in zip(model.graph.inputs, example.arguments, strict=True):
        value.name = name
    save(model, path)
    return Exported(path, owners, left_float)


def replace_modules(root: nn.Module, found: dict[nn.Module, nn.Module]) -> nn.Module:
    """Puts modules in the places of others, wherever those are registered; returns the root, which may be a new one."""
    for parent in list(root.modules()):
        for name, child in parent._modules.items():
            if child in found:
                parent._modules[name] = found[child]
    return found.get(root, root)


class _Graph:
    """An exported program seen from the modules: who reads which weight, and how."""

    def __init__(self, module: nn.Module, program: torch.export.ExportedProgram) -> None:
        self.nodes = list(program.graph.nodes)
        self._modules = dict(module.named_modules(remove_duplicate=False))
        self.paths = {part: path for path, part in reversed(self._modules.items())}
        self._tensors = dict(module.named_parameters(remove_duplicate=False))
        names = program.graph_signature.inputs_to_parameters
        self._held = {node: self._tensors.get(names.get(node.name, "")) for node in self.nodes}

    def module_of(self, node: Any) -> nn.Module | None:
        """The innermost module that a node was traced in."""
        stack = getattr(node, "meta", {}).get("nn_module_stack") or {}
        path = next(reversed(stack.values()))[0] if stack else ""
        return self._modules.get(re.sub(r"@\d+", "", path))

    def reader(self, node: Any) -> nn.Module | None:
        """The layer whose own call a node is: an operator of its kind on its own weight."""
        layer = self.module_of(node)
        if layer is None or kind_of(layer) is None or node.target not in _WEIGHT_ARGUMENT:
            return None
        held = self._held.get(node.args[_WEIGHT_ARGUMENT[node.target]])
        return layer if held is not None and held is layer.weight else None

    def calls(self, layer: nn.Module | None) -> int:
        """How often a layer or batch norm is called."""
        operators = (*_WEIGHT_ARGUMENT, _aten.batch_norm.default)
        return sum(n.target in operators and self.module_of(n) is layer for n in self.nodes)

    def reads(self, tensor: nn.Parameter) -> list[Any]:
        """The nodes that read a parameter, in order."""
        users = {user for node, held in self._held.items() if held is tensor for user in node.users}
        return [node for node in self.nodes if node in users]

    def owns(self, layer: nn.Module, tensor: object) -> bool:
        """Whether nothing but a layer's own calls reads its weight or its bias."""
        if not isinstance(tensor, nn.Parameter):
            return True
        return all(self.reader(node) is layer for node in self.reads(tensor))

    def name(self, tensor: nn.Parameter) -> str:
        return next(name for name, held in self._tensors.items() if held is tensor)

    def parameter(self, name: str) -> nn.Parameter | None:
        return self._tensors.get(name)


def _trace(module: nn.Module, example: Example) -> torch.export.ExportedProgram:
    try:
        with _quiet():
            return torch.export.export(
                module,
                (),
                example.arguments,
                dynamic_shapes=example.dynamic_shapes,
                strict=False,
            )
    except Exception as error:  # torch has many kinds
        raise ModelError(f"torch.export refuses {_name(module)}: {_first_line(error)}") from error


def _to_onnx(module: nn.Module, program: torch.export.ExportedProgram) -> ir.Model:
    """The ONNX graph with its constant shapes folded, but nothing that a parameter is part of."""
    from onnxscript.optimizer import fold_constants

    try:
        with _quiet():
            exported = torch.onnx.export(program, dynamo=True, optimize=False, verbose=False)
            assert exported is not None
            model: ir.Model = exported.model
            parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}

            def should_fold(node: ir.Node) -> bool | None:
                plain = node.op_type not in ("Shape", "Size", "CastLike")
                return (
                    False
                    if plain and any(v is not None and v.name in parameters for v in node.inputs)
                    else None
                )

            fold_constants(model, should_fold=should_fold)
            for clean in (IdentityEliminationPass(), RemoveUnusedNodesPass()):
                clean(model)
    except Exception as error:  # torch has many kinds
        raise ModelError(
            f"torch cannot write {_name(module)} as ONNX: {_first_line(error)}"
        ) from error
    return model


def _name_layers(
    path: Path, model: ir.Model, graph: _Graph
) -> tuple[dict[str, str], dict[str, str]]:
    """Names ONNX layers after their modules; returns the modules' paths, and why others have to stay float."""
    layers, _ = find_layers(path, model)
    constants, nodes = Constants(model.graph), list(model.graph)
    by_tensor: dict[nn.Parameter, list[Layer]] = {}
    owners: dict[str, str] = {}
    reasons: dict[str, str] = {}
    for layer in layers:
        operand = nodes[layer.node_index].inputs[layer.weight_input]
        assert operand is not None
        roots = {root.name or "" for root in constants.roots(operand)}
        tensor = graph.parameter(next(iter(roots))) if len(roots) == 1 else None
        if tensor is None:
            what = ", ".join(sorted(roots))
            reasons[layer.name] = f"{what} of {layer.op_type} stays float: it is no parameter"
        else:
            by_tensor.setdefault(tensor, []).append(layer)
    taken = {node.name for node in nodes}
    for tensor, readers in by_tensor.items():
        called = [graph.reader(node) for node in graph.reads(tensor)]
        reason = _mismatch(graph, readers, called)
        for number, layer in enumerate(readers):
            module = called[number] if not reason else None
            if module is None:
                reasons[layer.name] = f"{graph.name(tensor)} stays float: {reason}"
                continue
            name = base = graph.paths[module] or "module"
            count = 1
            while name in taken:
                count += 1
                name = f"{base}_{count}"
            taken.add(name)
            nodes[layer.node_index].name = name
            owners[name] = graph.paths[module]
    return owners, reasons


def _mismatch(graph: _Graph, layers: list[Layer], called: list[nn.Module | None]) -> str:
    """Why the ONNX layers of one weight are not the calls of modules, in the same order; empty if they are."""
    if None in called or len(called) != len(layers):
        return "it is read otherwise than by calling the Linear, Conv or Embedding that owns it"
    for layer, module in zip(layers, called, strict=True):
        assert module is not None
        if layer.kind != kind_of(module) or layer.keeps_c or layer.is_left:
            return f"the exporter wrote its {type(module).__name__} as {layer.op_type}"
        if not graph.owns(module, getattr(module, "bias", None)):
            return "its layer's bias is read otherwise than by calling the layer"
        if _hooked(module):
            return f"its {type(module).__name__} has hooks, which would be lost"
    return ""


def _hooked(*modules: nn.Module) -> bool:
    return any(m._forward_hooks or m._forward_pre_hooks for m in modules)


@contextmanager
def _zero_biases(module: nn.Module) -> Iterator[None]:
    """Convolutions without bias have one of zeros: the exporter would compute it, and not of the right shape in 3-D."""
    bare: list[Any] = [m for m in module.modules() if kind_of(m) == "conv" and m.bias is None]
    for part in bare:
        part.bias = nn.Parameter(torch.zeros(len(part.weight), dtype=part.weight.dtype), False)
    try:
        yield
    finally:
        for part in bare:
            part.bias = None


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's warnings, which are about its own future."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _name(module: nn.Module) -> str:
    return type(module).__name__


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
