"""Packed models: what is in them, that they compute the float network with decoded weights, and how files are saved."""

import json
import os
import stat
from dataclasses import dataclass

import numpy as np
import onnx
import pytest
from graphs import CASES, build, constant, node, packed, write
from onnx import TensorProto, helper

from afpq.errors import FormatError, ModelError, PlanError
from afpq.formats import AfpFormat
from afpq.graph import load_model
from afpq.plan import ActivationEntry
from afpq.rewrite import pack_scale, rewrite, save, serialize
from afpq.runtime import FloatModel, session


@dataclass(frozen=True)
class Summary:
    plan_hash: str = "ab" * 32
    bits_per_weight: float = 6.25
    activations: tuple[ActivationEntry, ...] | None = None


def pack_all(model, **options):
    return {name: packed(layer, **options) for name, layer in model.tensors().items()}


def rewritten(model, tensors, biases=None, **options):
    options.setdefault("activations", "f32")
    return onnx.load_from_string(serialize(rewrite(model, Summary(), tensors, biases, **options)))


def ops(proto):
    return " ".join(("*" if n.domain == "afpq" else "") + n.op_type for n in proto.graph.node)


def fields(n):
    return {a.name: helper.get_attribute_value(a) for a in n.attribute}


def afpq_nodes(proto):
    return [n for n in proto.graph.node if n.domain == "afpq"]


def run(proto, feeds):
    return session(proto.SerializeToString(), threads=2).run(None, feeds)


def float_with(model, tensors, feeds, biases=None):
    weights = {name: tensor.decode() for name, tensor in tensors.items()}
    return FloatModel(model, threads=2).simulate(weights, biases).run(feeds)


@pytest.fixture
def small(tmp_path):
    """conv - relu - gemm, loaded."""
    nodes = [
        node("Conv", "x w b", "c", pads=[1, 1, 1, 1], doc_string="says much"),
        node("Relu", "c", "r"),
        node("Flatten", "r", "f"),
        node("Gemm", "f v", "y", transB=1),
    ]
    constants = {"w": constant(8, 3, 3, 3), "b": constant(8), "v": constant(10, 128)}
    proto = build(nodes, {"x": ["N", 3, 4, 4]}, constants, {"y": ["N", 10]})
    proto.graph.value_info.append(helper.make_tensor_value_info("c", TensorProto.FLOAT, None))
    return load_model(write(tmp_path, proto))


@pytest.mark.parametrize("name", CASES)
def test_packed_model_equals_the_float_model_with_decoded_weights(name, tmp_path):
    case = CASES[name]
    model = load_model(write(tmp_path, case.model()))
    tensors = pack_all(model)
    proto = rewritten(model, tensors)
    assert ops(proto) == case.ops
    expected = float_with(model, tensors, case.arrays())[0]
    result = run(proto, case.arrays())[0]
    assert result.dtype == expected.dtype
    # float16 outputs of either side are rounded once more: one unit in the last place of the largest.
    eps = 2e-3 if result.dtype == np.float16 else 1e-5
    np.testing.assert_allclose(result, expected, rtol=0, atol=eps * np.abs(expected).max())


@pytest.mark.parametrize(
    "name", [n for n, c in CASES.items() if "matmul" in c.kinds or "conv" == c.kinds]
)
def test_corrected_biases_replace_the_layers_own(name, tmp_path):
    case = CASES[name]
    model = load_model(write(tmp_path, case.model()))
    tensors = pack_all(model)
    biases = {
        layer.name: constant(layer.n, seed=5) for layer in model.layers if layer.kind != "gather"
    }
    expected = float_with(model, tensors, case.arrays(), biases)[0]
    result = run(rewritten(model, tensors, biases), case.arrays())[0]
    eps = 2e-3 if result.dtype == np.float16 else 1e-5
    np.testing.assert_allclose(result, expected, rtol=0, atol=eps * np.abs(expected).max())
    assert np.abs(result - float_with(model, tensors, case.arrays())[0]).max() > 0.1


@pytest.mark.parametrize("kind", ["real", "integer"])
@pytest.mark.parametrize("group_size", [0, 8])
def test_scales_of_every_kind_are_executed(kind, group_size, tmp_path):
    case = CASES["matmul"]
    model = load_model(write(tmp_path, case.model()))
    tensors = pack_all(model, kind=kind, group_size=group_size)
    proto = rewritten(model, tensors)
    assert fields(proto.graph.node[0]).get("group_size", 0) == group_size
    expected = float_with(model, tensors, case.arrays())[0]
    np.testing.assert_allclose(run(proto, case.arrays())[0], expected, rtol=1e-5, atol=1e-5)


def test_attributes_are_those_that_differ_from_the_default(small):
    conv, gemm = afpq_nodes(rewritten(small, pack_all(small), activations="a16"))
    assert fields(conv) == {
        "format": b"e2m3", "n": 8, "k": 27, "kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "clip_min": 0.0
    }  # fmt: skip
    assert fields(gemm) == {"format": b"e2m3", "n": 10, "k": 128}
    assert list(conv.input) == ["x", "q0", "s0", "b0"] and list(gemm.input) == ["f", "q1", "s1"]
    assert (conv.name, conv.output[0], gemm.output[0]) == ("conv_c", "r", "y")


def test_activations_are_written_when_they_are_not_a16(small):
    assert (
        fields(afpq_nodes(rewritten(small, pack_all(small), activations="a8"))[0])["activations"]
        == b"a8"
    )


def test_file_holds_nothing_that_is_not_needed(small):
    proto = rewritten(small, pack_all(small))
    assert sorted(t.name for t in proto.graph.initializer) == ["b0", "q0", "q1", "s0", "s1"]
    assert not proto.graph.value_info
    assert b"says much" not in proto.SerializeToString()
    assert {(o.domain, o.version) for o in proto.opset_import} == {("", 17), ("afpq", 1)}


def test_inputs_and_outputs_stay_as_they_were(small):
    source, proto = onnx.load(small.path), rewritten(small, pack_all(small))
    assert proto.graph.input == source.graph.input
    assert proto.graph.output == source.graph.output


def test_metadata_describes_the_file(small):
    tensors = pack_all(small)
    meta = {p.key: p.value for p in rewritten(small, tensors).metadata_props}
    assert json.loads(meta.pop("afpq.checksums")) == {
        "q0": tensors["w"].checksum(), "q1": tensors["v"].checksum()
    }  # fmt: skip
    meta.pop("afpq.version")
    assert meta == {
        "afpq.spec_version": "1",
        "afpq.plan_hash": "ab" * 32,
        "afpq.bits_per_weight": "6.2500",
        "afpq.float_weight_bytes": str(4 * (216 + 1280)),
    }


def test_layers_without_a_packed_tensor_stay_exactly_as_they_were(small):
    source, proto = onnx.load(small.path), rewritten(small, {"v": packed(small.layers[1])})
    untouched = list(source.graph.node)[:3]
    untouched[0].ClearField("doc_string")
    assert list(proto.graph.node)[:3] == untouched
    assert [t.name for t in proto.graph.initializer] == ["w", "b", "q0", "s0"]


def test_model_is_not_changed_by_rewriting(small):
    before = len(list(small.ir.graph)), sorted(small.ir.graph.initializers)
    first, second = (serialize(rewrite(small, Summary(), pack_all(small))) for _ in range(2))
    assert first == second
    assert before == (len(list(small.ir.graph)), sorted(small.ir.graph.initializers))


def test_shared_weight_is_stored_once(tmp_path):
    model = load_model(write(tmp_path, CASES["tied_embedding"].model()))
    proto = rewritten(model, pack_all(model))
    assert [t.name for t in proto.graph.initializer] == ["q0", "s0"]


def test_relu_with_a_second_reader_of_its_input_is_not_fused(tmp_path):
    nodes = [node("MatMul", "x w", "m"), node("Relu", "m", "r"), node("Add", "m r")]
    model = load_model(write(tmp_path, build(nodes, {"x": [2, 12]}, {"w": constant(12, 10)})))
    assert ops(rewritten(model, pack_all(model))) == "*MatMul Relu Add"


def test_relu_of_a_graph_output_is_not_fused(tmp_path):
    nodes = [node("MatMul", "x w", "m"), node("Relu", "m")]
    proto = build(nodes, {"x": [2, 12]}, {"w": constant(12, 10)}, ("m", "y"))
    model = load_model(write(tmp_path, proto))
    assert ops(rewritten(model, pack_all(model))) == "*MatMul Relu"


def test_clip_with_bounds_from_an_input_is_not_fused(tmp_path):
    nodes = [node("MatMul", "x w", "m"), node("Clip", "m low")]
    proto = build(nodes, {"x": [2, 12], "low": []}, {"w": constant(12, 10)})
    model = load_model(write(tmp_path, proto))
    assert ops(rewritten(model, pack_all(model))) == "*MatMul Clip"


def test_new_names_never_take_one_that_exists(tmp_path):
    nodes = [node("MatMul", "q0 w", "b0"), node("Add", "b0 s0")]
    constants = {"w": constant(12, 10), "s0": constant(10)}
    model = load_model(write(tmp_path, build(nodes, {"q0": [2, 12]}, constants)))
    tensors = pack_all(model)
    proto = rewritten(model, tensors)
    assert [t.name for t in proto.graph.initializer] == ["q02", "s02", "b02"]
    feeds = {"q0": constant(2, 12)}
    np.testing.assert_allclose(
        run(proto, feeds)[0], float_with(model, tensors, feeds)[0], atol=1e-5
    )


def test_weight_that_is_also_listed_as_an_input_is_not_one_any_more(tmp_path):
    proto = build([node("MatMul", "x w")], {"x": [2, 12], "w": [12, 10]}, {"w": constant(12, 10)})
    model = load_model(write(tmp_path, proto))
    assert [i.name for i in rewritten(model, pack_all(model)).graph.input] == ["x"]


def test_unknown_names_shapes_and_modes_are_refused(small):
    tensors = pack_all(small)
    with pytest.raises(PlanError, match="no weight is called 'z'"):
        rewrite(small, Summary(), {"z": tensors["w"]})
    with pytest.raises(PlanError, match=r"'w' is \[8, 27\], its packed tensor \[10, 128\]"):
        rewrite(small, Summary(), {"w": tensors["v"]})
    with pytest.raises(PlanError, match="no layer 'z' that can take a bias"):
        rewrite(small, Summary(), tensors, {"z": constant(8)})
    with pytest.raises(PlanError, match=r"bias of layer 'conv_c' has shape \(9,\), not \(8,\)"):
        rewrite(small, Summary(), tensors, {"conv_c": constant(9)})
    with pytest.raises(PlanError, match="activations 'a4' is not one of a16, a8, f32"):
        rewrite(small, Summary(), tensors, activations="a4")
    with pytest.raises(PlanError, match=r"'conv_c' \(Conv\) cannot have a scale per group"):
        rewrite(small, Summary(), {"w": packed(small.layers[0], group_size=4)})


def test_pack_scale_keeps_real_scales_in_two_bytes_and_integer_ones_in_one():
    fmt, scale = AfpFormat(2, 1), np.array([0.5, 0.25], np.float32)
    real, integer = pack_scale(fmt, scale, "real"), pack_scale(fmt, scale, "integer")
    assert (real.dtype.name, real.tobytes()) == ("BFLOAT16", b"\x00\x3f\x80\x3e")
    assert (integer.dtype.name, integer.numpy().tolist()) == ("INT8", [1, 2])


@pytest.mark.parametrize(
    ("value", "kind"), [(0.3, "real"), (0.75, "integer"), (0.0, "real"), (1.0, "other")]
)
def test_pack_scale_refuses_what_cannot_be_stored(value, kind):
    with pytest.raises(FormatError):
        pack_scale(AfpFormat(2, 1), np.array([value], np.float32), kind)


def test_saved_file_is_the_serialized_model(small, tmp_path):
    result = rewrite(small, Summary(), pack_all(small))
    path = tmp_path / "out.onnx"
    assert save(result, path) == path.stat().st_size
    assert path.read_bytes() == serialize(result)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.onnx", "out.onnx"]


def test_large_models_are_saved_with_external_data(small, tmp_path):
    tensors, path = pack_all(small), tmp_path / "out.onnx"
    size = save(rewrite(small, Summary(), tensors, activations="f32"), path, external_bytes=100)
    assert size == path.stat().st_size + (tmp_path / "out.onnx.data").stat().st_size
    feeds = {"x": constant(2, 3, 4, 4)}
    expected = float_with(small, tensors, feeds)[0]
    np.testing.assert_allclose(session(path, threads=2).run(None, feeds)[0], expected, atol=1e-4)


def test_float_tensors_of_an_external_source_are_copied_into_the_file(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    nodes = [node("MatMul", "x w", "m"), node("Mul", "m v")]
    proto = build(nodes, {"x": [2, 64]}, {"w": constant(64, 64), "v": constant(2, 64)})
    onnx.save(proto, source / "m.onnx", save_as_external_data=True, size_threshold=0, location="d")
    model = load_model(source / "m.onnx")
    tensors = pack_all(model)
    save(rewrite(model, Summary(), tensors, activations="f32"), tmp_path / "out.onnx")
    feeds = {"x": constant(2, 64)}
    expected = float_with(model, tensors, feeds)[0]
    result = session(tmp_path / "out.onnx", threads=2).run(None, feeds)[0]
    np.testing.assert_allclose(result, expected, atol=1e-4)


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write anywhere")
def test_folder_that_cannot_be_written_is_named(small, tmp_path):
    folder = tmp_path / "locked"
    folder.mkdir()
    folder.chmod(stat.S_IRUSR | stat.S_IXUSR)
    with pytest.raises(ModelError, match=r"locked/out\.onnx: cannot be written: Permission denied"):
        save(rewrite(small, Summary(), {}), folder / "out.onnx")


def test_missing_folder_is_named(small, tmp_path):
    with pytest.raises(ModelError, match=r"none/out\.onnx: cannot be written: No such file"):
        save(rewrite(small, Summary(), {}), tmp_path / "none" / "out.onnx")


def test_directory_as_target_is_named(small, tmp_path):
    with pytest.raises(ModelError, match="is a directory"):
        save(rewrite(small, Summary(), {}), tmp_path)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("external_bytes", [100, 10**6])
def test_failed_save_leaves_the_old_file_and_nothing_else(
    small, tmp_path, monkeypatch, error, external_bytes
):
    path = tmp_path / "out.onnx"
    path.write_bytes(b"old")

    def fail(*_):
        raise error

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises((ModelError, KeyboardInterrupt)) as raised:
        save(rewrite(small, Summary(), pack_all(small)), path, external_bytes=external_bytes)
    if isinstance(error, OSError):
        assert str(raised.value).endswith("out.onnx: cannot be written: No space left on device")
    assert path.read_bytes() == b"old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.onnx", "out.onnx"]


def test_resnet20_at_five_bits_has_little_around_the_weights(shared):
    model = load_model(shared / "models/cifar10/resnet20.onnx")
    tensors = pack_all(model, text="e2m2")
    around = 8 * len(serialize(rewrite(model, Summary(), tensors))) - sum(
        t.storage_bits for t in tensors.values()
    )
    assert around / model.num_weights <= 0.29


@pytest.mark.parametrize(
    "name",
    [
        "cifar10/resnet20-bn",
        "detection/FastestDet",
        "mnist/mnist_cnn_cntk",
        "tinyml/kws_dscnn",
        "tinyml/vww_mobilenetv1_025",
    ],
)
def test_real_networks_equal_their_simulation(name, shared):
    model = load_model(shared / f"models/{name}.onnx")
    tensors = pack_all(model)
    feeds = {
        i.name: constant(*[d if isinstance(d, int) else 2 for d in i.shape]) for i in model.inputs
    }
    results = run(rewritten(model, tensors), feeds)
    for result, expected in zip(results, float_with(model, tensors, feeds), strict=True):
        np.testing.assert_allclose(result, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
