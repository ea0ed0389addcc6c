"""Reading packed files: layers, decoded weights, what stayed float, and files that are something else."""

from pathlib import Path

import graphs
import numpy as np
import onnx_ir as ir
import pytest

from afpq.errors import ModelError
from afpq.graph import load_model, reads_bytes
from afpq.packed import checksum, file_bytes, is_packed, read_ir, read_packed, weight_values
from afpq.quantize import quantize
from afpq.rewrite import rewrite, save


class Summary:
    plan_hash = "0" * 64
    bits_per_weight = 6.0


def write_packed(folder: Path, nodes: list, inputs: dict, constants: dict, **packing) -> Path:
    """A tiny model, packed without a search."""
    model = load_model(graphs.write(folder, graphs.build(nodes, inputs, constants)))
    tensors = {name: graphs.packed(layer, **packing) for name, layer in model.tensors().items()}
    save(rewrite(model, Summary(), tensors), folder / "packed.onnx")
    return folder / "packed.onnx"


def matmul(folder: Path, **packing) -> Path:
    nodes = [graphs.node("MatMul", "x w")]
    return write_packed(folder, nodes, {"x": ["m", 24]}, {"w": graphs.constant(24, 18)}, **packing)


@pytest.mark.parametrize("kind", ["real", "integer"])
@pytest.mark.parametrize("group_size", [0, 8])
def test_weights_decode_as_they_were_packed(tmp_path: Path, kind: str, group_size: int) -> None:
    path = matmul(tmp_path, text="e2m2", kind=kind, group_size=group_size)
    source = load_model(tmp_path / "model.onnx").layers[0]

    layer = read_packed(path).layers[0]

    expected = graphs.packed(source, "e2m2", kind, group_size).decode()
    np.testing.assert_array_equal(weight_values(layer), expected)
    assert (layer.kind, layer.group_size) == (kind, group_size)
    assert layer.granularity == ("per_group:8" if group_size else "per_channel")


def test_layer_fields_and_sizes(tmp_path: Path) -> None:
    path = matmul(tmp_path, text="e2m3")

    model = read_packed(path)

    (layer,) = model.layers
    assert (layer.op, layer.n, layer.k, str(layer.format)) == ("MatMul", 18, 24, "e2m3")
    assert (layer.activations, layer.kernel, layer.remark) == ("a16", "byte", "")
    assert layer.storage_bytes == 2 * 6 * 8 * 6 + 2 * 18
    assert layer.bits_per_weight == 8 * layer.storage_bytes / (18 * 24)
    assert model.checksums == {layer.weight_name: checksum(layer)}
    assert model.file_bytes == path.stat().st_size


def test_float_constants_that_remain_are_listed(tmp_path: Path) -> None:
    nodes = [graphs.node("MatMul", "x w", "h"), graphs.node("Mul", "h table")]
    constants = {"w": graphs.constant(24, 18), "table": graphs.constant(1, 18)}

    model = read_packed(write_packed(tmp_path, nodes, {"x": ["m", 24]}, constants))

    assert [(t.name, t.shape, t.nbytes, t.used_by) for t in model.floats] == [
        ("table", (1, 18), 72, "Mul")
    ]


@pytest.mark.parametrize(
    ("text", "kernel"), [("e2m4", "byte"), ("e2m5", "pair"), ("e3m4", "pair"), ("e4m1", "wide")]
)
def test_kernel_of_a_format(tmp_path: Path, text: str, kernel: str) -> None:
    layer = read_packed(matmul(tmp_path, text=text)).layers[0]

    assert layer.kernel == kernel
    assert bool(layer.remark) == (kernel == "wide")


def test_depthwise_convolutions_run_planar(tmp_path: Path) -> None:
    nodes = [graphs.node("Conv", "x w", kernel_shape=[3, 3], group=8)]
    constants = {"w": graphs.constant(8, 1, 3, 3)}

    layer = read_packed(write_packed(tmp_path, nodes, {"x": [1, 8, 9, 9]}, constants)).layers[0]

    assert layer.kernel == "planar"
    assert "too few channels" in layer.remark


def test_a_first_convolution_of_few_products_runs_planar(tmp_path: Path) -> None:
    nodes = [graphs.node("Conv", "x w", kernel_shape=[3, 3])]
    constants = {"w": graphs.constant(16, 3, 3, 3)}

    layer = read_packed(write_packed(tmp_path, nodes, {"x": [1, 3, 9, 9]}, constants)).layers[0]

    assert (layer.kernel, layer.input_format) == ("planar", "f32")


def test_a_first_convolution_multiplies_bytes_of_a_static_format(tmp_path: Path) -> None:
    nodes = [graphs.node("Conv", "x w", kernel_shape=[3, 3])]
    model = graphs.build(nodes, {"x": ["N", 3, 9, 9]}, {"w": graphs.constant(16, 3, 3, 3)})
    data = {"x": np.random.default_rng(0).standard_normal((24, 3, 9, 9)).astype(np.float32)}

    packed = quantize(
        graphs.write(tmp_path, model), data=data, bits=6, activations="a8", mode="quick"
    )
    packed.save(tmp_path / "packed.onnx")

    layer = read_packed(tmp_path / "packed.onnx").layers[0]
    assert layer.kernel == layer.format.kernel_class
    assert layer.activation_format is not None and not layer.remark


@pytest.mark.parametrize("group", [1, 2, 8])
@pytest.mark.parametrize("channels", [8, 16, 32])
@pytest.mark.parametrize("kernel", [1, 3])
def test_the_file_and_the_float_model_agree_on_planes(
    tmp_path: Path, group: int, channels: int, kernel: int
) -> None:
    nodes = [graphs.node("Conv", "x w", kernel_shape=[kernel, kernel], group=group)]
    constants = {"w": graphs.constant(64, channels // group, kernel, kernel)}

    path = write_packed(tmp_path, nodes, {"x": [1, channels, 9, 9]}, constants)

    layer, source = read_packed(path).layers[0], load_model(tmp_path / "model.onnx").layers[0]
    assert reads_bytes(source, layer.format) == (layer.kernel != "planar")


def test_tables_and_unpacked_operands(tmp_path: Path) -> None:
    nodes = [
        graphs.node("Gather", "table i", "h"),
        graphs.node("MatMul", "h w", "g"),
        graphs.node("ConvTranspose", "z f", "u"),
    ]
    constants = {
        "table": graphs.constant(30, 8),
        "w": graphs.constant(8, 12),
        "f": graphs.constant(4, 6, 3, 3),
    }
    inputs = {"i": ([5], 7), "z": [1, 4, 6, 6]}
    model = graphs.build(nodes, inputs, constants, outputs=("g", "u"))
    path = graphs.write(tmp_path, model)
    quantize(path, bits=6).save(tmp_path / "out.onnx")

    kernels = {layer.op: layer.kernel for layer in read_packed(tmp_path / "out.onnx").layers}

    assert kernels == {"Gather": "rows", "MatMul": "byte", "Unpack": "unpack"}


@pytest.mark.parametrize("content", [b"", b"hello\n", b"\x08\x07\x12"])
def test_files_that_are_no_models(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.onnx").write_bytes(content)

    with pytest.raises(ModelError, match="not an ONNX model, or cut short"):
        read_ir(tmp_path / "x.onnx")


def test_missing_files_and_folders(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such file"):
        read_ir(tmp_path / "none.onnx")
    with pytest.raises(ModelError, match="is a directory"):
        read_ir(tmp_path)


def test_float_models_are_not_packed(models: Path) -> None:
    path = models / "lenet5_digits.onnx"

    assert not is_packed(read_ir(path))
    assert file_bytes(path) == path.stat().st_size
    with pytest.raises(ModelError, match="not a packed model"):
        read_packed(path)


def test_a_newer_file_format_is_refused(tmp_path: Path) -> None:
    path = matmul(tmp_path)
    model = read_ir(path)
    model.metadata_props["afpq.spec_version"] = "2"
    save(model, path)

    with pytest.raises(ModelError, match="file format version 2, this afpq reads version 1"):
        read_packed(path)


def test_a_missing_attribute_is_named(tmp_path: Path) -> None:
    path = matmul(tmp_path)
    model = read_ir(path)
    del next(iter(model.graph)).attributes["k"]
    save(model, path)

    with pytest.raises(ModelError, match=r"afpq MatMul.*attribute k is missing"):
        read_packed(path)


@pytest.mark.parametrize("name", ["format", "activation_format"])
def test_a_format_that_does_not_exist_names_the_attribute(tmp_path: Path, name: str) -> None:
    path = matmul(tmp_path)
    model = read_ir(path)
    attributes = next(iter(model.graph)).attributes
    attributes[name] = ir.AttrString(name, "e9m1")
    attributes["activation_scale"] = ir.AttrFloat32("activation_scale", 0.5)
    save(model, path)

    with pytest.raises(ModelError, match=rf"afpq MatMul.*attribute {name}: .*exponent_bits 9"):
        read_packed(path)
