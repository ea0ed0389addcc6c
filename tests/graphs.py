"""Tiny ONNX models for tests: every way in which a weight is used, each as one case."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from afpq.formats import AfpFormat, encode, round_scale
from afpq.graph import load_model
from afpq.packing import PackedTensor, pack


def constant(*shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def node(op, inputs, outputs="y", **attributes):
    """`node("MatMul", "x w")`: names are separated by blanks, `_` is an absent operand."""
    names = ["" if name == "_" else name for name in inputs.split()]
    attributes.setdefault("name", f"{op.lower()}_{outputs.split()[0]}")
    return helper.make_node(op, names, outputs.split(), **attributes)


def build(nodes, inputs, constants=None, outputs=("y",), opset=17, ir_version=8, typed=True):
    """A model; an input is name -> shape or (shape, ONNX type)."""

    def info(name, what):
        shape, kind = what if isinstance(what, tuple) else (what, TensorProto.FLOAT)
        return helper.make_tensor_value_info(name, kind, shape)

    results = [helper.make_empty_tensor_value_info(name) for name in outputs]
    if typed:
        results = (
            [info(name, what) for name, what in outputs.items()]
            if isinstance(outputs, dict)
            else results
        )
    graph = helper.make_graph(
        nodes,
        "g",
        [info(name, what) for name, what in inputs.items()],
        results,
        [numpy_helper.from_array(array, name) for name, array in (constants or {}).items()],
    )
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version
    )


def write(folder: Path, model, name="model.onnx") -> Path:
    path = folder / name
    onnx.save(model, path)
    return path


def load(folder, nodes, inputs, constants=None, **options):
    return load_model(write(folder, build(nodes, inputs, constants, **options)))


def packed(layer, text="e2m3", kind="real", group_size=0):
    """A layer's weight, packed with scales that let the largest weight of each row fit."""
    fmt, weight = AfpFormat.parse(text), layer.weight
    if group_size:
        groups = -(-layer.k // group_size)
        padded = np.zeros((layer.n, groups * group_size), np.float32)
        padded[:, : layer.k] = np.abs(weight)
        largest = padded.reshape(layer.n, groups, group_size).max(2).T
        scale = round_scale(fmt, np.maximum(largest, 1e-6) / fmt.max_integer, kind)
        columns = np.repeat(scale, group_size, axis=0)[: layer.k].T
    else:
        scale = round_scale(fmt, np.abs(weight).max(1) / fmt.max_integer, kind)
        columns = scale[:, None]
    data = pack(encode(weight, fmt, columns), fmt.bits)
    return PackedTensor(fmt, layer.n, layer.k, data, scale, kind, group_size)


@dataclass(frozen=True)
class Case:
    """A model, an input for it, and what is found: (kind of each layer, operators after rewriting)."""

    nodes: list
    inputs: dict
    constants: dict
    kinds: str
    ops: str  # of all nodes after rewriting, those of afpq marked with *
    feeds: dict = field(default_factory=dict)

    def model(self):
        outputs = [self.nodes[-1].output[0]]
        return build(self.nodes, self.inputs, self.constants, outputs)

    def arrays(self):
        made = {n: constant(*w, seed=9) for n, w in self.inputs.items() if not isinstance(w, tuple)}
        return made | self.feeds


F16 = TensorProto.FLOAT16


def half(*shape, seed=0):
    return constant(*shape, seed=seed, dtype=np.float16)


def _case(nodes, inputs, constants, kinds, ops, **feeds):
    return Case(nodes, inputs, constants, kinds, ops, feeds)


_LEFT_UNKNOWN = [node("Reshape", "x shape", "r"), node("MatMul", "w r")]
_IDS = np.array([[0, -1, 3], [5, 2, 2]])

CASES = {
    "matmul": _case(
        [node("MatMul", "x w")], {"x": [2, 3, 12]}, {"w": constant(12, 10)}, "matmul", "*MatMul"
    ),
    "matmul_vector": _case(
        [node("MatMul", "x w")], {"x": [12]}, {"w": constant(12, 10)}, "matmul", "*MatMul"
    ),
    "matmul_with_leading_one": _case(
        [node("MatMul", "x w")], {"x": [2, 3, 12]}, {"w": constant(1, 12, 10)}, "matmul", "*MatMul"
    ),
    "matmul_batched": _case(
        [node("MatMul", "x w")],
        {"x": [3, 5, 12]},
        {"w": constant(3, 12, 10)},
        "unpack",
        "*Unpack MatMul",
    ),
    "matmul_bias": _case(
        [node("MatMul", "x w", "m"), node("Add", "b m")],
        {"x": [2, 12]},
        {"w": constant(12, 10), "b": constant(10, seed=1)},
        "matmul",
        "*MatMul",
    ),
    "matmul_bias_with_leading_ones_relu": _case(
        [node("MatMul", "x w", "m"), node("Add", "m b", "a"), node("Relu", "a")],
        {"x": [2, 4, 12]},
        {"w": constant(12, 10), "b": constant(1, 1, 10, seed=1)},
        "matmul",
        "*MatMul",
    ),
    "matmul_bias_that_adds_an_axis": _case(
        [node("MatMul", "x w", "m"), node("Add", "m b")],
        {"x": [2, 12]},
        {"w": constant(12, 10), "b": constant(1, 1, 10, seed=1)},
        "matmul",
        "*MatMul Add",
    ),
    "matmul_bias_read_twice": _case(
        [node("MatMul", "x w", "m"), node("Add", "m b", "a"), node("Mul", "a m")],
        {"x": [2, 12]},
        {"w": constant(12, 10), "b": constant(10, seed=1)},
        "matmul",
        "*MatMul Add Mul",
    ),
    "matmul_left": _case(
        [node("MatMul", "w x")],
        {"x": [2, 12, 5]},
        {"w": constant(10, 12)},
        "matmul",
        "Transpose *MatMul Transpose",
    ),
    "matmul_left_bias_relu": _case(
        [node("MatMul", "w x", "m"), node("Add", "m b", "a"), node("Relu", "a")],
        {"x": [12, 5]},
        {"w": constant(10, 12), "b": constant(10, 1, seed=1)},
        "matmul",
        "Transpose *MatMul Transpose",
    ),
    "matmul_left_vector": _case(
        [node("MatMul", "w x")], {"x": [12]}, {"w": constant(10, 12)}, "matmul", "*MatMul"
    ),
    "matmul_left_of_unknown_rank": _case(
        _LEFT_UNKNOWN,
        {"x": [60], "shape": (["r"], TensorProto.INT64)},
        {"w": constant(10, 12)},
        "unpack",
        "Reshape *Unpack MatMul",
        shape=np.array([12, 5]),
    ),
    "gemm": _case(
        [node("Gemm", "x w b", transB=1)],
        {"x": [4, 12]},
        {"w": constant(10, 12), "b": constant(10, seed=1)},
        "matmul",
        "*MatMul",
    ),
    "gemm_alpha_beta_trans_a": _case(
        [node("Gemm", "x w b", "g", alpha=0.5, beta=-2.0, transA=1), node("Relu", "g")],
        {"x": [12, 4]},
        {"w": constant(12, 10), "b": constant(1, 10, seed=1)},
        "matmul",
        "Transpose *MatMul",
    ),
    "gemm_without_c_then_add": _case(
        [node("Gemm", "x w", "g"), node("Add", "g b")],
        {"x": [4, 12]},
        {"w": constant(12, 10), "b": constant(10, seed=1)},
        "matmul",
        "*MatMul",
    ),
    "gemm_scalar_c": _case(
        [node("Gemm", "x w b", beta=3.0)],
        {"x": [4, 12]},
        {"w": constant(12, 10), "b": constant(seed=1)[()].reshape(())},
        "matmul",
        "*MatMul",
    ),
    "gemm_matrix_c": _case(
        [node("Gemm", "x w b", "g", beta=0.5), node("Relu", "g")],
        {"x": [4, 12]},
        {"w": constant(12, 10), "b": constant(4, 10, seed=1)},
        "matmul",
        "*MatMul Mul Add Relu",
    ),
    "gemm_dynamic_c": _case(
        [node("Gemm", "x w c")],
        {"x": [4, 12], "c": [10]},
        {"w": constant(12, 10)},
        "matmul",
        "*MatMul Add",
    ),
    "gemm_left": _case(
        [node("Gemm", "w x", transB=1)],
        {"x": [4, 12]},
        {"w": constant(10, 12)},
        "unpack",
        "*Unpack Gemm",
    ),
    "conv1d": _case(
        [node("Conv", "x w b", "c", strides=[2], pads=[1, 0]), node("Relu", "c")],
        {"x": [2, 6, 17]},
        {"w": constant(10, 6, 3), "b": constant(10, seed=1)},
        "conv",
        "*Conv",
    ),
    "conv2d_grouped": _case(
        [node("Conv", "x w", group=2, dilations=[2, 1], pads=[2, 1, 2, 1])],
        {"x": [2, 8, 9, 7]},
        {"w": constant(6, 4, 3, 3)},
        "conv",
        "*Conv",
    ),
    "conv2d_depthwise_clip": _case(
        [node("Conv", "x w b", "c", group=9, pads=[1, 1, 1, 1]), node("Clip", "c low high")],
        {"x": [1, 9, 6, 6]},
        {
            "w": constant(9, 1, 3, 3),
            "b": constant(9, seed=1),
            "low": np.float32(0),
            "high": np.float32(1),
        },
        "conv",
        "*Conv",
    ),
    "conv2d_auto_pad": _case(
        [node("Conv", "x w", auto_pad="SAME_LOWER", strides=[2, 2])],
        {"x": [1, 4, 8, 7]},
        {"w": constant(5, 4, 3, 3)},
        "conv",
        "*Conv",
    ),
    "conv3d": _case(
        [node("Conv", "x w")],
        {"x": [1, 3, 5, 4, 4]},
        {"w": constant(5, 3, 2, 3, 2)},
        "conv",
        "*Conv",
    ),
    "conv2d_bias_add": _case(
        [node("Conv", "x w", "c"), node("Add", "c b", "a"), node("Clip", "a low")],
        {"x": [1, 4, 5, 5]},
        {"w": constant(5, 4, 3, 3), "b": constant(5, 1, 1, seed=1), "low": np.float32(-0.5)},
        "conv",
        "*Conv",
    ),
    "conv_transpose": _case(
        [node("ConvTranspose", "x w")],
        {"x": [1, 6, 4, 4]},
        {"w": constant(6, 3, 3, 3)},
        "unpack",
        "*Unpack ConvTranspose",
    ),
    "gather": _case(
        [node("Gather", "w i")],
        {"i": ([2, 3], TensorProto.INT64)},
        {"w": constant(9, 11)},
        "gather",
        "*Gather",
        i=_IDS,
    ),
    "tied_embedding": _case(
        [
            node("Gather", "w i", "e"),
            node("Transpose", "w", "t", perm=[1, 0]),
            node("MatMul", "e t"),
        ],
        {"i": ([2, 3], TensorProto.INT64)},
        {"w": constant(9, 11)},
        "gather matmul",
        "*Gather *MatMul",
        i=_IDS,
    ),
    "untied_layouts": _case(
        [node("Gather", "w i", "e"), node("MatMul", "e w")],
        {"i": ([2, 3], TensorProto.INT64)},
        {"w": constant(11, 11)},
        "gather matmul",
        "*Gather *MatMul",
        i=_IDS,
    ),
    "lstm": _case(
        [node("LSTM", "x w r", "y", hidden_size=5)],
        {"x": [3, 2, 7]},
        {"w": constant(1, 20, 7), "r": constant(1, 20, 5, seed=1)},
        "unpack unpack",
        "*Unpack *Unpack LSTM",
    ),
    "gru": _case(
        [node("GRU", "x w r", "y", hidden_size=5)],
        {"x": [3, 2, 7]},
        {"w": constant(1, 15, 7), "r": constant(1, 15, 5, seed=1)},
        "unpack unpack",
        "*Unpack *Unpack GRU",
    ),
    "weight_behind_reshape_and_transpose": _case(
        [
            node("Reshape", "w s", "r"),
            node("Transpose", "r", "t", perm=[1, 0]),
            node("MatMul", "x t"),
        ],
        {"x": [4, 12]},
        {"w": constant(5, 2, 12), "s": np.array([0 + 10, -1])},
        "matmul",
        "*MatMul",
    ),
    "weight_in_constant_node": _case(
        [
            node("Constant", "", "w", value=numpy_helper.from_array(constant(12, 10))),
            node("MatMul", "x w"),
        ],
        {"x": [4, 12]},
        {},
        "matmul",
        "*MatMul",
    ),
    "weight_cast_from_half": _case(
        [node("Cast", "w", "c", to=1), node("MatMul", "x c")],
        {"x": [4, 12]},
        {"w": half(12, 10)},
        "matmul",
        "*MatMul",
    ),
    "half_matmul_bias_relu": _case(
        [node("MatMul", "x w", "m"), node("Add", "m b", "a"), node("Relu", "a")],
        {"x": ([4, 12], F16)},
        {"w": half(12, 10), "b": half(10, seed=1)},
        "matmul",
        "Cast *MatMul Cast",
        x=half(4, 12, seed=2),
    ),
    "half_left": _case(
        [node("MatMul", "w x")],
        {"x": ([12, 4], F16)},
        {"w": half(10, 12)},
        "matmul",
        "Cast Transpose *MatMul Transpose Cast",
        x=half(12, 4, seed=2),
    ),
    "half_gemm_matrix_c": _case(
        [node("Gemm", "x w b", beta=0.5)],
        {"x": ([4, 12], F16)},
        {"w": half(12, 10), "b": half(4, 10, seed=1)},
        "matmul",
        "Cast *MatMul Cast Mul Add",
        x=half(4, 12, seed=2),
    ),
    "half_gather": _case(
        [node("Gather", "w i")],
        {"i": ([2, 3], TensorProto.INT64)},
        {"w": half(9, 11)},
        "gather",
        "*Gather Cast",
        i=_IDS,
    ),
    "half_conv_transpose": _case(
        [node("ConvTranspose", "x w")],
        {"x": ([1, 6, 4, 4], F16)},
        {"w": half(6, 3, 3, 3)},
        "unpack",
        "*Unpack Cast ConvTranspose",
        x=half(1, 6, 4, 4, seed=2),
    ),
}
