"""Model files: what is read beside them, what is converted, and every file that is refused."""

import numpy as np
import onnx
import pytest
from graphs import build, constant, load, node, write
from onnx import TensorProto, helper

from afpq.errors import ModelError
from afpq.graph import load_model


def test_external_data_is_read(tmp_path):
    proto = build([node("MatMul", "x w")], {"x": [2, 12]}, {"w": constant(12, 10)})
    onnx.save(
        proto, tmp_path / "m.onnx", save_as_external_data=True, size_threshold=0, location="d"
    )
    np.testing.assert_array_equal(
        load_model(tmp_path / "m.onnx").layers[0].weight, constant(12, 10).T
    )


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "tensor 'w' lies in d, which is not beside the model"),
        (lambda path: path.write_bytes(b"short"), "tensor 'w' needs 480 bytes of d, which has 5: cut short"),
    ],
)  # fmt: skip
def test_missing_and_short_external_data_are_refused(damage, message, tmp_path):
    proto = build([node("MatMul", "x w")], {"x": [2, 12]}, {"w": constant(12, 10)})
    onnx.save(
        proto, tmp_path / "m.onnx", save_as_external_data=True, size_threshold=0, location="d"
    )
    damage(tmp_path / "d")
    with pytest.raises(ModelError, match=message):
        load_model(tmp_path / "m.onnx")


def _bytes():
    constants = {"w": constant(120, 100)}
    return build([node("MatMul", "x w")], {"x": [2, 120]}, constants).SerializeToString()


@pytest.mark.parametrize(
    "content",
    [b"", b"not a model, but some text\n" * 20, _bytes()[:-1000], _bytes()[:20], b"\x00" * 64],
    ids=["empty", "text", "truncated", "head", "zeros"],
)
def test_files_that_are_no_model_are_refused(content, tmp_path):
    path = tmp_path / "bad.onnx"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=r"bad\.onnx: not an ONNX model, or cut short"):
        load_model(path)


def test_missing_files_and_directories_are_refused(tmp_path):
    with pytest.raises(ModelError, match=r"none\.onnx: no such file"):
        load_model(tmp_path / "none.onnx")
    with pytest.raises(ModelError, match="is a directory, not an ONNX file"):
        load_model(tmp_path)


@pytest.mark.parametrize(("value", "what"), [(np.nan, "NaN"), (np.inf, "infinity")])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_weights_that_are_not_finite_are_refused_by_name(value, what, dtype, tmp_path):
    weight = constant(12, 10, dtype=dtype)
    weight[3, 4] = value
    with pytest.raises(ModelError, match=rf"tensor 'w' of node 'matmul_y' \(MatMul\) holds {what}"):
        load(tmp_path, [node("MatMul", "x w")], {"x": [2, 12]}, {"w": weight})


def test_biases_that_are_not_finite_are_refused_by_name(tmp_path):
    bias = np.full(10, np.nan, np.float32)
    with pytest.raises(ModelError, match=r"tensor 'b' of node 'gemm_y' \(Gemm\) holds NaN"):
        load(tmp_path, [node("Gemm", "x w b")], {"x": [2, 12]}, {"w": constant(12, 10), "b": bias})


@pytest.mark.parametrize(
    ("op", "domain"),
    [
        ("DequantizeLinear", ""),
        ("QLinearConv", ""),
        ("ConvInteger", ""),
        ("MatMulInteger", ""),
        ("MatMulNBits", "com.microsoft"),
        ("QLinearAdd", "com.microsoft"),
        ("MatMul", "afpq"),
    ],
)
def test_quantized_models_are_refused(op, domain, tmp_path):
    with pytest.raises(ModelError, match=rf"already quantized \(node 'that' is .*{op}\)"):
        load(tmp_path, [node(op, "x s", name="that", domain=domain)], {"x": [2], "s": [1]})


def test_sparse_initializers_are_refused(tmp_path):
    proto = build([node("Identity", "x")], {"x": [2]})
    values = helper.make_tensor("sparse_w", TensorProto.FLOAT, [1], [1.0])
    indices = helper.make_tensor("i", TensorProto.INT64, [1], [3])
    proto.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [9]))
    with pytest.raises(ModelError, match="sparse initializer 'sparse_w'"):
        load_model(write(tmp_path, proto))


def test_old_opsets_are_converted(tmp_path):
    nodes = [node("MatMul", "x w", "m"), node("Clip", "m", min=0.0, max=6.0)]
    inputs = {"x": [2, 12], "w": [12, 10]}
    model = load(
        tmp_path,
        nodes,
        inputs,
        {"w": constant(12, 10)},
        outputs={"y": [2, 10]},
        opset=9,
        ir_version=3,
    )
    assert model.ir.graph.opset_imports[""] >= 11 and model.ir.ir_version >= 4
    assert [i.name for i in model.inputs] == ["x"]
    assert [layer.kind for layer in model.layers] == ["matmul"]


def test_old_opsets_that_cannot_be_converted_are_refused(tmp_path):
    with pytest.raises(ModelError, match="opset 5 is older than 11 and cannot be converted"):
        load(
            tmp_path,
            [node("NoSuchOp", "x")],
            {"x": [2, 12]},
            outputs={"y": [2, 12]},
            opset=5,
            ir_version=3,
        )


def test_local_functions_are_inlined(tmp_path):
    opsets = [helper.make_opsetid("", 17)]
    body = helper.make_function(
        "local", "Linear", ["a", "b"], ["c"], [node("MatMul", "a b", "c")], opsets
    )
    proto = build([node("Linear", "x w", domain="local")], {"x": [2, 12]}, {"w": constant(12, 10)})
    proto.functions.append(body)
    proto.opset_import.append(helper.make_opsetid("local", 1))
    model = load_model(write(tmp_path, proto))
    assert [layer.kind for layer in model.layers] == ["matmul"]
