"""ResNet-50 with random weights: its layers have the right shapes, and that is what speed depends on."""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

__all__ = ["write_resnet50"]

STAGES = (
    (64, 3, 1),
    (128, 4, 2),
    (256, 6, 2),
    (512, 3, 2),
)  # channels, blocks, stride of the first


class _Graph:
    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self._rng = np.random.default_rng(0)

    def add(self, op: str, inputs: list[str], **fields: object) -> str:
        name = f"{op.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [name], name=name, **fields))
        return name

    def conv(self, x: str, cin: int, cout: int, size: int, stride: int = 1, pad: int = 0) -> str:
        spread = np.sqrt(1 / (cin * size * size))
        weight = self._rng.standard_normal((cout, cin, size, size)).astype(np.float32) * np.float32(
            spread
        )
        names = [f"w{len(self.weights)}", f"b{len(self.weights)}"]
        for name, array in zip(names, (weight, np.zeros(cout, np.float32)), strict=True):
            self.weights.append(numpy_helper.from_array(array, name))
        fields = dict(kernel_shape=[size] * 2, strides=[stride] * 2, pads=[pad] * 4)
        return self.add("Conv", [x, *names], **fields)

    def block(self, x: str, cin: int, width: int, stride: int) -> str:
        y = self.add("Relu", [self.conv(x, cin, width, 1)])
        y = self.add("Relu", [self.conv(y, width, width, 3, stride, 1)])
        y = self.conv(y, width, 4 * width, 1)
        if stride > 1 or cin != 4 * width:
            x = self.conv(x, cin, 4 * width, 1, stride)
        return self.add("Relu", [self.add("Add", [y, x])])


def write_resnet50(path: Path) -> Path:
    """Writes the network: input [N, 3, 224, 224], logits [N, 1000]."""
    graph = _Graph()
    x = graph.add("Relu", [graph.conv("input", 3, 64, 7, 2, 3)])
    x = graph.add("MaxPool", [x], kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    channels = 64
    for width, blocks, stride in STAGES:
        for index in range(blocks):
            x = graph.block(x, channels, width, stride if index == 0 else 1)
            channels = 4 * width
    x = graph.add("Flatten", [graph.add("GlobalAveragePool", [x])])
    rng = np.random.default_rng(1)
    weight = rng.standard_normal((1000, channels)).astype(np.float32) / np.float32(
        np.sqrt(channels)
    )
    graph.weights.append(numpy_helper.from_array(weight, "fc"))
    graph.nodes.append(helper.make_node("Gemm", [x, "fc"], ["logits"], name="fc", transB=1))
    model = helper.make_graph(
        graph.nodes,
        "resnet50",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["N", 3, 224, 224])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", 1000])],
        graph.weights,
    )
    opsets = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(model, opset_imports=opsets, ir_version=8), path)
    return path
