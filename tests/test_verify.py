"""Verification: sound files pass every check, and each kind of damage is found."""

from pathlib import Path

import graphs
import numpy as np
import onnx_ir as ir
import pytest

from afpq.errors import AfpqError, ModelError
from afpq.packed import PackedLayer, read_ir, read_packed
from afpq.quantize import quantize
from afpq.rewrite import save
from afpq.verify import check_decode, check_run, verify


@pytest.fixture
def packed(models: Path, tmp_path: Path) -> Path:
    quantize(models / "lenet5_digits.onnx", bits=5).save(tmp_path / "out.onnx")
    return tmp_path / "out.onnx"


def failed(path: Path) -> list[tuple[str, str]]:
    return [(f.layer, f.check) for f in verify(path) if not f.passed]


def change_codes(path: Path, change) -> None:
    """Edits the first stored weight of a packed file behind afpq's back."""
    model, name = read_ir(path), read_packed(path).layers[0].weight_name
    value = model.graph.initializers[name]
    assert value.const_value is not None
    array = np.array(value.const_value.numpy())
    change(array)
    value.const_value = ir.Tensor(array, dtype=value.const_value.dtype, name=name)
    save(model, path)


def test_a_sound_file_passes_every_check(packed: Path) -> None:
    findings = verify(packed)

    assert all(f.passed for f in findings), findings
    assert {f.check for f in findings} == {"load", "checksum", "codes", "decode", "run"}
    assert len(findings) == 1 + 4 * 5


def test_a_changed_code_is_found(packed: Path) -> None:
    def flip(array: np.ndarray) -> None:
        array[3] ^= 1

    change_codes(packed, flip)

    assert [check for _, check in failed(packed)] == ["checksum"]


def test_negative_zero_is_found(packed: Path) -> None:
    fmt = read_packed(packed).layers[0].format

    def write_negative_zero(array: np.ndarray) -> None:
        bits = np.zeros(8 * fmt.bits, np.uint8)
        bits[fmt.bits - 1] = 1  # the sign of the first code, all else zero
        array[: fmt.bits] = np.packbits(bits, bitorder="little")

    change_codes(packed, write_negative_zero)

    assert {"checksum", "codes"} <= {check for _, check in failed(packed)}


@pytest.mark.parametrize(
    ("nodes", "inputs", "constants"),
    [
        (
            [graphs.node("Conv", "x w b", kernel_shape=[3, 3], strides=[2, 1], pads=[1, 0, 1, 2])],
            {"x": [1, 5, 9, 9]},
            {"w": graphs.constant(20, 5, 3, 3), "b": graphs.constant(20)},
        ),
        (
            [graphs.node("Conv", "x w", kernel_shape=[3], auto_pad="SAME_LOWER", dilations=[2])],
            {"x": [1, 8, 30]},
            {"w": graphs.constant(16, 4, 3)},
        ),
        (
            [graphs.node("Conv", "x w", kernel_shape=[2, 2, 2], auto_pad="SAME_UPPER")],
            {"x": [1, 4, 6, 6, 6]},
            {"w": graphs.constant(7, 4, 2, 2, 2)},
        ),
        (
            [graphs.node("Conv", "x w", "h", group=8), graphs.node("Relu", "h")],
            {"x": [1, 8, 9, 9]},
            {"w": graphs.constant(8, 1, 3, 3)},
        ),
        (
            [graphs.node("MatMul", "x w", "h"), graphs.node("Add", "h b")],
            {"x": ["m", 31]},
            {"w": graphs.constant(31, 9), "b": graphs.constant(9)},
        ),
        ([graphs.node("Gather", "w i")], {"i": ([4], 7)}, {"w": graphs.constant(40, 6)}),
    ],
    ids=["conv2d", "conv1d", "conv3d", "depthwise", "matmul", "gather"],
)
@pytest.mark.parametrize("activations", ["a16", "a8", "f32"])
def test_every_operator_is_executed_as_defined(
    tmp_path: Path, nodes: list, inputs: dict, constants: dict, activations: str
) -> None:
    if nodes[0].op_type == "Conv" and "auto_pad" in str(nodes[0]) and len(inputs["x"]) == 3:
        nodes[0].attribute.append(graphs.helper.make_attribute("group", 2))
    path = graphs.write(tmp_path, graphs.build(nodes, inputs, constants))
    quantize(path, bits=8, activations=activations).save(tmp_path / "out.onnx")

    assert failed(tmp_path / "out.onnx") == []


def test_a_wrong_product_is_found(packed: Path) -> None:
    layer = read_packed(packed).layers[-1]
    # Claims one activation mode and runs another: the a8 result is outside the bound for f32.
    wrong = PackedLayer(**{**vars(layer), "activations": "f32"})
    wrong.node.attributes["activations"] = ir.AttrString("activations", "a8")

    with pytest.raises(AfpqError, match="times further from float64 than the bound"):
        check_run(wrong)


def test_a_wrong_decoder_is_found(packed: Path) -> None:
    layer = read_packed(packed).layers[0]
    wrong = PackedLayer(**{**vars(layer), "stored_scale": layer.stored_scale * 2})

    with pytest.raises(AfpqError, match="weights differ, first"):
        check_decode(wrong)


def test_float_models_are_refused(models: Path) -> None:
    with pytest.raises(ModelError, match="not a packed model"):
        verify(models / "lenet5_digits.onnx")
