"""A trained convolution network of an ONNX file as a torch module, with the batch norm it has or once had."""

from collections.abc import Callable
from pathlib import Path

import onnx
import torch
from onnx import NodeProto, numpy_helper
from torch import Tensor, nn
from torch.nn import functional


class OnnxNet(nn.Module):
    """The network of an ONNX file in evaluation mode: images in, the file's first output out.

    Conv, Gemm and BatchNormalization become modules of `layers`, which `afpq.train.convert` and training mode find;
    what else convolution networks are made of stays a function. Raises ValueError for an operator that is neither.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        graph = onnx.load(path).graph
        self._values = {
            t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in graph.initializer
        }
        self._input, self._output = graph.input[0].name, graph.output[0].name
        self._nodes = list(graph.node)
        self.layers = nn.ModuleDict()
        for node in self._nodes:
            if node.op_type in _LAYERS:
                values = [self._values[name] for name in node.input[1:]]
                with torch.no_grad():
                    self.layers[_key(node)] = _LAYERS[node.op_type](values, _attributes(node))
            elif node.op_type not in _FUNCTIONS:
                raise ValueError(f"{path}: {node.op_type} of {node.output[0]!r} is not known here")
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        values = {**self._values, self._input: images}
        for node in self._nodes:
            inputs = [values[name] for name in node.input]
            if node.op_type in _LAYERS:
                value = self.layers[_key(node)](inputs[0])
            else:
                value = _FUNCTIONS[node.op_type](inputs, _attributes(node))
            values[node.output[0]] = value
        return values[self._output]

    @torch.no_grad()
    def unfold(self, images: Tensor) -> None:
        """Gives every convolution whose batch norm was folded one that changes nothing: the statistics of `images`."""
        has_norm = {node.input[0] for node in self._nodes if node.op_type == "BatchNormalization"}

        def add_norm(conv: nn.Module, _: tuple[Tensor, ...], y: Tensor) -> None:
            variance, mean = torch.var_mean(y, (0, 2, 3), correction=0)
            norm = nn.BatchNorm2d(len(mean)).eval()
            for to, value in (
                (norm.running_mean, mean),
                (norm.running_var, variance),
                (norm.bias, mean),
                (norm.weight, (variance + norm.eps).sqrt()),
            ):
                to.copy_(value)
            norms[conv] = norm

        norms: dict[nn.Module, nn.Module] = {}
        bare = [n for n in self._nodes if n.op_type == "Conv" and n.output[0] not in has_norm]
        hooks = [self.layers[_key(node)].register_forward_hook(add_norm) for node in bare]
        self(images)
        for node, hook in zip(bare, hooks, strict=True):
            hook.remove()
            conv = self.layers[_key(node)]
            self.layers[_key(node)] = nn.Sequential(conv, norms[conv])


def _key(node: NodeProto) -> str:
    return node.output[0].replace(".", "_")


def _attributes(node: NodeProto) -> dict:
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}


def _convolution(values: list[Tensor], attributes: dict) -> nn.Module:
    weight, *bias = values
    top, left, bottom, right = attributes.get("pads", [0, 0, 0, 0])
    groups = attributes.get("group", 1)
    same = (top, left) == (bottom, right)
    conv = nn.Conv2d(
        weight.shape[1] * groups,
        weight.shape[0],
        tuple(weight.shape[2:]),
        tuple(attributes.get("strides", [1, 1])),
        (top, left) if same else 0,
        tuple(attributes.get("dilations", [1, 1])),
        groups,
        bias=bool(bias),
    )
    conv.weight.copy_(weight)
    if bias:
        conv.bias.copy_(bias[0])
    return conv if same else nn.Sequential(nn.ZeroPad2d((left, right, top, bottom)), conv)


def _linear(values: list[Tensor], attributes: dict) -> nn.Module:
    weight, bias = values
    if not attributes.get("transB", 0):
        weight = weight.T
    linear = nn.Linear(weight.shape[1], weight.shape[0])
    linear.weight.copy_(weight)
    linear.bias.copy_(bias)
    return linear


def _norm(values: list[Tensor], attributes: dict) -> nn.Module:
    norm = nn.BatchNorm2d(len(values[0]), eps=attributes.get("epsilon", 1e-5))
    made = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    for to, value in zip(made, values, strict=True):
        to.copy_(value)
    return norm


def _slice(inputs: list[Tensor], _: dict) -> Tensor:
    x, *rest = inputs
    for begin, end, axis, step in zip(*(t.tolist() for t in rest), strict=True):
        indices = slice(begin, end, step).indices(x.shape[axis])
        x = x.index_select(axis, torch.arange(*indices))
    return x


def _pad(inputs: list[Tensor], _: dict) -> Tensor:
    begins, ends = inputs[1].reshape(2, -1).tolist()
    pairs = zip(reversed(begins), reversed(ends), strict=True)
    return functional.pad(inputs[0], [n for pair in pairs for n in pair])


_LAYERS: dict[str, Callable[[list[Tensor], dict], nn.Module]] = {
    "BatchNormalization": _norm,
    "Conv": _convolution,
    "Gemm": _linear,
}
_FUNCTIONS: dict[str, Callable[[list[Tensor], dict], Tensor]] = {
    "Add": lambda inputs, _: inputs[0] + inputs[1],
    "Clip": lambda inputs, _: inputs[0].clamp(inputs[1], inputs[2]),
    "Flatten": lambda inputs, attributes: inputs[0].flatten(attributes.get("axis", 1)),
    "GlobalAveragePool": lambda inputs, _: inputs[0].mean((2, 3), keepdim=True),
    "Pad": _pad,
    "Relu": lambda inputs, _: inputs[0].relu(),
    "Slice": _slice,
}
