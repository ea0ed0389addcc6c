"""A trained convolution network of an ONNX file as a torch module, with the batch norm it has or once had."""

from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir
import torch
from torch import Tensor, nn

from afpq._fold import attribute
from afpq._torch_ops import OPERATORS


class _Nodes(tuple[ir.Node, ...]):
    """What nothing changes, so that copies of a network share it: ONNX nodes hold their whole graph."""

    def __deepcopy__(self, memo: dict) -> "_Nodes":
        return self


class OnnxNet(nn.Module):
    """The network of an ONNX file in evaluation mode: images in, the file's first output out.

    Conv, Gemm and BatchNormalization become modules of `layers`, which `afpq.train.convert` and training mode find;
    other operators are afpq's own for torch. Raises ValueError for one that is not among them.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        graph = ir.load(path).graph
        self._values = {
            name: torch.tensor(value.const_value.numpy())
            for name, value in graph.initializers.items()
        }
        self._input, self._output = graph.inputs[0].name, graph.outputs[0].name
        self._nodes = _Nodes(graph)
        self.layers = nn.ModuleDict()
        for node in self._nodes:
            if node.op_type in _LAYERS:
                values = [self._values[value.name] for value in node.inputs[1:]]
                with torch.no_grad():
                    self.layers[_key(node)] = _LAYERS[node.op_type](values, node)
            elif node.op_type not in OPERATORS:
                name = node.outputs[0].name
                raise ValueError(f"{path}: {node.op_type} of {name!r} is not known here")
        self.eval()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "OnnxNet":
        self._values = {name: fn(value) for name, value in self._values.items()}
        return super()._apply(fn, recurse)

    def forward(self, images: Tensor) -> Tensor:
        values = {**self._values, self._input: images}
        for node in self._nodes:
            inputs = [None if value is None else values[value.name] for value in node.inputs]
            if node.op_type in _LAYERS:
                made = [self.layers[_key(node)](inputs[0])]
            else:
                made = OPERATORS[node.op_type](node, inputs)
            values.update(zip((value.name for value in node.outputs), made, strict=True))
        return values[self._output]

    @torch.no_grad()
    def unfold(self, images: Tensor) -> None:
        """Gives every convolution whose batch norm was folded one that changes nothing: the statistics of `images`."""
        has_norm = {node.inputs[0] for node in self._nodes if node.op_type == "BatchNormalization"}

        def add_norm(conv: nn.Module, _: tuple[Tensor, ...], y: Tensor) -> None:
            variance, mean = torch.var_mean(y, (0, 2, 3), correction=0)
            norm = nn.BatchNorm2d(len(mean)).eval().to(y.device)
            for to, value in (
                (norm.running_mean, mean),
                (norm.running_var, variance),
                (norm.bias, mean),
                (norm.weight, (variance + norm.eps).sqrt()),
            ):
                to.copy_(value)
            norms[conv] = norm

        norms: dict[nn.Module, nn.Module] = {}
        bare = [n for n in self._nodes if n.op_type == "Conv" and n.outputs[0] not in has_norm]
        hooks = [self.layers[_key(node)].register_forward_hook(add_norm) for node in bare]
        self(images)
        for node, hook in zip(bare, hooks, strict=True):
            hook.remove()
            conv = self.layers[_key(node)]
            self.layers[_key(node)] = nn.Sequential(conv, norms[conv])


def _key(node: ir.Node) -> str:
    return node.outputs[0].name.replace(".", "_")


def _convolution(values: list[Tensor], node: ir.Node) -> nn.Module:
    weight, *bias = values
    top, left, bottom, right = attribute(node, "pads", [0, 0, 0, 0])
    groups = attribute(node, "group", 1)
    same = (top, left) == (bottom, right)
    conv = nn.Conv2d(
        weight.shape[1] * groups,
        weight.shape[0],
        tuple(weight.shape[2:]),
        tuple(attribute(node, "strides", [1, 1])),
        (top, left) if same else 0,
        tuple(attribute(node, "dilations", [1, 1])),
        groups,
        bias=bool(bias),
    )
    conv.weight.copy_(weight)
    if bias:
        conv.bias.copy_(bias[0])
    return conv if same else nn.Sequential(nn.ZeroPad2d((left, right, top, bottom)), conv)


def _linear(values: list[Tensor], node: ir.Node) -> nn.Module:
    weight, bias = values
    if not attribute(node, "transB", 0):
        weight = weight.T
    linear = nn.Linear(weight.shape[1], weight.shape[0])
    linear.weight.copy_(weight)
    linear.bias.copy_(bias)
    return linear


def _norm(values: list[Tensor], node: ir.Node) -> nn.Module:
    norm = nn.BatchNorm2d(len(values[0]), eps=attribute(node, "epsilon", 1e-5))
    made = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    for to, value in zip(made, values, strict=True):
        to.copy_(value)
    return norm


_LAYERS: dict[str, Callable[[list[Tensor], ir.Node], nn.Module]] = {
    "BatchNormalization": _norm,
    "Conv": _convolution,
    "Gemm": _linear,
}
