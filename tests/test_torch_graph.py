"""Every operator that torch runs gives what onnxruntime gives, and a network as a torch function is the network."""

import itertools
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

torch = pytest.importorskip("torch")

import onnx_ir as ir  # noqa: E402

from afpq._blocks import block_borders  # noqa: E402
from afpq._torch_graph import TorchGraph, as_tensor  # noqa: E402
from afpq._torch_ops import OPERATORS, UnsupportedError  # noqa: E402
from afpq.graph import load_model  # noqa: E402
from afpq.runtime import FloatModel  # noqa: E402

MODELS = Path(__file__).resolve().parents[1] / "models"
RNG = np.random.default_rng(0)


def floats(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


def positive(*shape: int) -> np.ndarray:
    return np.abs(floats(*shape)) + np.float32(0.1)


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


X = floats(2, 3, 8, 6)
CASES = [
    *[(op, {}, [X]) for op in ("Abs", "Erf", "Exp", "Identity", "Neg", "Relu", "Sigmoid", "Tanh")],
    *[(op, {}, [positive(2, 5)]) for op in ("Log", "Reciprocal", "Sqrt")],
    *[(op, {}, [floats(2, 1, 5), floats(4, 1)]) for op in ("Add", "Sub", "Mul", "Max", "Min", "Sum")],
    ("Div", {}, [floats(3, 4), positive(4)]),
    ("Pow", {}, [positive(3, 4), np.float32(2.5)]),
    ("HardSwish", {}, [X]),
    ("HardSigmoid", {"alpha": 0.3, "beta": 0.4}, [X]),
    ("LeakyRelu", {"alpha": 0.2}, [X]),
    ("Gelu", {}, [X]),
    ("Gelu", {"approximate": "tanh"}, [X]),
    ("Clip", {}, [X, np.float32(-0.5), np.float32(0.7)]),
    ("Clip", {}, [X, np.float32(0)]),
    ("Cast", {"to": TensorProto.FLOAT}, [X]),
    ("Softmax", {}, [X]),
    ("Softmax", {"axis": 1}, [X]),
    ("Reshape", {}, [X, ints(0, -1, 6)]),
    ("Flatten", {"axis": 2}, [X]),
    ("Flatten", {"axis": 0}, [X]),
    ("Squeeze", {}, [floats(2, 1, 3, 1), ints(1, -1)]),
    ("Unsqueeze", {}, [floats(2, 3), ints(0, -1)]),
    ("Transpose", {"perm": [0, 2, 1, 3]}, [X]),
    ("Transpose", {}, [X]),
    ("Concat", {"axis": 1}, [floats(2, 3), floats(2, 4)]),
    ("Split", {"axis": 1}, [floats(2, 5), ints(2, 3)]),
    ("Slice", {}, [X, ints(1, -5), ints(2**62, -1), ints(1, 2), ints(1, 2)]),
    ("Pad", {}, [X, ints(0, 0, 1, 2, 0, 0, 3, 0), np.float32(1.5)]),
    ("Gather", {"axis": 1}, [X, np.array([[0, -1], [2, 1]])]),
    ("Where", {}, [X > 0, X, np.float32(7)]),
    ("Expand", {}, [floats(3, 1), ints(2, 1, 4)]),
    ("ReduceMean", {"keepdims": 0}, [X, ints(1, -1)]),
    ("ReduceSum", {}, [X, ints(2)]),
    ("ReduceMean", {}, [X]),
    ("MatMul", {}, [floats(2, 1, 3, 4), floats(5, 4, 2)]),
    ("Gemm", {"transA": 1, "transB": 1, "alpha": 0.5, "beta": 2.0}, [floats(4, 3), floats(5, 4), floats(5)]),
    ("Conv", {"strides": [2, 1], "pads": [1, 0, 2, 1]}, [X, floats(4, 3, 3, 2), floats(4)]),
    ("Conv", {"group": 3, "auto_pad": "SAME_UPPER"}, [X, floats(6, 1, 3, 2)]),
    ("Conv", {"strides": [2, 3], "auto_pad": "SAME_LOWER"}, [X, floats(6, 3, 3, 2)]),
    ("Conv", {"dilations": [2, 1]}, [X, floats(6, 3, 3, 2)]),
    ("Conv", {"pads": [1, 1]}, [floats(2, 3, 9), floats(4, 3, 3)]),
    ("BatchNormalization", {"epsilon": 1e-3}, [X, *[positive(3) for _ in range(4)]]),
    ("LayerNormalization", {"axis": -2}, [X, floats(8, 6), floats(8, 6)]),
    ("LayerNormalization", {}, [X, floats(6)]),
    ("MaxPool", {"kernel_shape": [3, 2], "strides": [2, 2], "pads": [1, 0, 0, 1]}, [X]),
    ("AveragePool", {"kernel_shape": [3, 2], "strides": [2, 1], "pads": [1, 1, 1, 0]}, [X]),
    ("AveragePool", {"kernel_shape": [3, 2], "pads": [1, 1, 1, 0], "count_include_pad": 1}, [X]),
    ("GlobalAveragePool", {}, [X]),
    ("Dropout", {}, [X]),
]  # fmt: skip

REFUSED = [
    ("AveragePool", {"kernel_shape": [3, 2], "ceil_mode": 1}, [X]),
    ("MaxPool", {"kernel_shape": [3, 2], "auto_pad": "SAME_UPPER"}, [X]),
    ("Slice", {}, [X, ints(-1), ints(0), ints(1), ints(-1)]),
    ("Pad", {"mode": "reflect"}, [X, ints(0, 0, 1, 1, 0, 0, 1, 1)]),
    ("Cast", {"to": TensorProto.INT64}, [X]),
]


def one_node(op_type: str, attributes: dict, inputs: list[np.ndarray]) -> onnx.ModelProto:
    names = [f"x{i}" for i in range(len(inputs))]
    outputs = ["y0", "y1"] if op_type == "Split" else ["y0"]
    node = helper.make_node(op_type, names, outputs, **attributes)
    values = [
        helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(np.asarray(a).dtype), np.shape(a))
        for n, a in zip(names, inputs, strict=True)
    ]  # fmt: skip
    results = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in outputs]
    graph = helper.make_graph([node], "g", values, results)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    if op_type == "Cast" and attributes["to"] != TensorProto.FLOAT:
        model.graph.output[0].type.tensor_type.elem_type = attributes["to"]
    return model


def run_torch(model: onnx.ModelProto, inputs: list[np.ndarray]) -> list[np.ndarray]:
    node = next(iter(ir.serde.deserialize_model(model).graph))
    tensors = [as_tensor(np.array(a)) for a in inputs]
    return [t.numpy() for t in OPERATORS[node.op_type](node, tensors)]


@pytest.mark.parametrize(
    ("op_type", "attributes", "inputs"), CASES, ids=[f"{i}-{c[0]}" for i, c in enumerate(CASES)]
)
def test_operators_agree_with_onnxruntime(op_type, attributes, inputs):
    model = one_node(op_type, attributes, inputs)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    feeds = {f"x{i}": np.asarray(a) for i, a in enumerate(inputs)}
    expected = session.run(None, feeds)
    for ours, theirs in zip(run_torch(model, inputs), expected, strict=True):
        assert ours.shape == theirs.shape
        np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=2e-6)


def test_every_operator_is_compared():
    assert set(OPERATORS) == {case[0] for case in CASES}


@pytest.mark.parametrize(("op_type", "attributes", "inputs"), REFUSED, ids=[c[0] for c in REFUSED])
def test_what_would_be_wrong_is_refused(op_type, attributes, inputs):
    with pytest.raises(UnsupportedError):
        run_torch(one_node(op_type, attributes, inputs), inputs)


@pytest.mark.parametrize("name", ["lenet5_digits", "resnet_digits", "resnet_digits-bn"])
def test_a_network_is_the_same_in_torch(name):
    model = load_model(MODELS / f"{name}.onnx")
    with np.load(MODELS / "digits_evaluation.npz") as arrays:
        feeds = {"input": arrays["input"][:5]}
    outputs = [info.name for info in model.outputs]
    graph = TorchGraph(model, outputs, model.tensors().keys())
    network = FloatModel(model, threads=1)
    read = dict(zip(graph.context, map(as_tensor, network.run(feeds, graph.context)), strict=True))
    weights = {n: as_tensor(x.weight.copy()) for n, x in model.tensors().items()}
    biases = {
        x.name: as_tensor(np.zeros(x.n, np.float32) if x.bias is None else x.bias.copy())
        for x in graph.layers
    }
    expected = network.run(feeds)[0]
    for given in ({}, biases):
        (logits,) = graph(read, weights, given)
        np.testing.assert_allclose(logits.numpy(), expected, rtol=1e-4, atol=1e-4)

    shifted = {n: b + 0.1 for n, b in biases.items()}
    expected = network.simulate(
        {n: 1.5 * x.weight for n, x in model.tensors().items()},
        {n: b.numpy() for n, b in shifted.items()},
    ).run(feeds)[0]
    (logits,) = graph(read, {n: 1.5 * w for n, w in weights.items()}, shifted)
    np.testing.assert_allclose(logits.numpy(), expected, rtol=1e-4, atol=1e-3)


def test_a_border_of_blocks_carries_all_there_is():
    model = load_model(MODELS / "resnet_digits.onnx")
    borders = block_borders(model, model.tensors().keys())
    network = FloatModel(model, threads=1)
    with np.load(MODELS / "digits_evaluation.npz") as arrays:
        feeds = {"input": arrays["input"][:2]}
    outputs = [info.name for info in model.outputs]
    expected = network.run(feeds)[0]
    assert len(borders) >= 2
    for border in borders:
        (value,) = network.run(feeds, [border])
        # Nothing else is fed: what a residual branch carries past the border would be missing.
        rest = network.simulate({}, fetch=outputs, given={border: value})
        np.testing.assert_allclose(rest.run({border: value})[0], expected, rtol=1e-4, atol=1e-4)


def test_blocks_have_three_layers_or_more():
    model = load_model(MODELS / "resnet_digits.onnx")
    names = block_borders(model, model.tensors().keys())
    made = {v.name: i for i, node in enumerate(model.ir.graph) for v in node.outputs}
    edges = [-1, *(made[name] for name in names)]
    for first, last in itertools.pairwise(edges):
        assert sum(first < layer.node_index <= last for layer in model.layers) >= 3
