"""Files of exported models: what is read, converted, written and refused."""

import importlib
from functools import partial

import numpy as np
import onnx
import pytest
from exported import NEW_ENOUGH, Summary, close, pack_case, run
from graphs import CASES, build, constant, node
from onnx import TensorProto, helper

import afpq
from afpq.errors import ModelError
from afpq.export import export
from afpq.plan import ActivationEntry
from afpq.rewrite import rewrite, save
from afpq.runtime import session

pytestmark = NEW_ENOUGH


def test_raising_the_opset_converts_the_rest_of_the_graph(tmp_path):
    # Softmax and Squeeze mean something else, or are written in another way, after opset 11.
    nodes = [
        node("Softmax", "x", "s"),
        node("Mul", "s big", "m"),
        node("Squeeze", "m", "q", axes=[0]),
        node("MatMul", "q w", "y"),
    ]
    constants = {"big": constant(1, 40, 12), "w": constant(12, 10)}
    proto = build(nodes, {"x": [1, 40, 12]}, constants, opset=11, ir_version=7)
    path, _, _ = pack_case(tmp_path, proto, text="e0m3")
    feeds = {"x": constant(1, 40, 12, seed=4)}
    expected = session(path, threads=1).run(None, feeds)[0]

    exported = export(path, to="qdq")
    exported.save(tmp_path / "out.onnx")

    assert exported.opset == 21
    assert exported.notes[0] == "opset raised from 11 to 21, for int4"
    close(run(tmp_path / "out.onnx", feeds)[0], expected)
    result = onnx.load(tmp_path / "out.onnx")
    assert [i.name for i in result.graph.input] == ["x"]
    assert {t.name for t in result.graph.initializer} >= {"big", "q0", "s0"}
    assert export(path, to="float").opset == 11


def test_large_constants_do_not_go_through_the_converter(tmp_path, monkeypatch):
    # It takes one block of bytes: whole models over 2 GB would not fit.
    nodes = [node("MatMul", "x w", "m"), node("Mul", "m v")]
    constants = {"w": constant(64, 64), "v": constant(32, 64)}
    path, _, _ = pack_case(tmp_path, build(nodes, {"x": [32, 64]}, constants), text="e0m3")
    convert, sizes = onnx.version_converter.convert_version, []

    def watched(proto, opset):
        sizes.append(proto.ByteSize())
        return convert(proto, opset)

    monkeypatch.setattr(onnx.version_converter, "convert_version", watched)
    export(path, to="qdq").save(tmp_path / "out.onnx")

    assert len(sizes) == 1 and sizes[0] < 2000 < path.stat().st_size
    feeds = {"x": constant(32, 64, seed=3)}
    expected = session(path, threads=1).run(None, feeds)[0]
    close(run(tmp_path / "out.onnx", feeds)[0], expected)


def test_graph_that_cannot_be_converted_is_named(tmp_path, monkeypatch):
    path, _, _ = pack_case(tmp_path, CASES["matmul"].model(), text="e0m3")

    def refuse(*_):
        raise RuntimeError("no adapter\n for Foo")

    monkeypatch.setattr(onnx.version_converter, "convert_version", refuse)
    with pytest.raises(ModelError, match="opset 17 cannot be raised to 21: no adapter for Foo"):
        export(path, to="qdq")


@pytest.mark.parametrize("external", [0, 10**9])
def test_external_data_is_read_and_written(external, tmp_path, monkeypatch):
    nodes = [node("MatMul", "x w", "m"), node("Mul", "m v")]
    proto = build(nodes, {"x": [2, 64]}, {"w": constant(64, 64), "v": constant(2, 64)})
    (tmp_path / "source").mkdir()
    path, model, tensors = pack_case(tmp_path / "source", proto)
    feeds = {"x": constant(2, 64, seed=3)}
    expected = session(path, threads=1).run(None, feeds)[0]
    save(rewrite(model, Summary(), tensors, activations="f32"), path, external_bytes=100)
    monkeypatch.setattr("afpq._written.save", partial(save, external_bytes=external))

    size = export(path, to="qdq").save(tmp_path / "out.onnx")

    (tmp_path / "source" / "packed.onnx.data").unlink()
    files = [f for f in tmp_path.iterdir() if f.is_file()]
    names = ["out.onnx", "out.onnx.data"] if external == 0 else ["out.onnx"]
    assert sorted(f.name for f in files) == names
    assert size == sum(f.stat().st_size for f in files)
    close(run(tmp_path / "out.onnx", feeds)[0], expected)


def test_external_data_of_a_type_that_is_not_run_is_checked(tmp_path, monkeypatch):
    path, _, _ = pack_case(tmp_path, CASES["matmul"].model())
    monkeypatch.setattr("afpq._written.save", partial(save, external_bytes=0))

    exported = export(path, to="qonnx")
    exported.save(tmp_path / "out.onnx")

    assert exported.checks["run_once"].startswith("no: onnxruntime has no operators of qonnx")
    assert (tmp_path / "out.onnx.data").exists()


def test_rounding_of_activations_is_named_as_left_out(tmp_path):
    path, model, tensors = pack_case(tmp_path, CASES["conv1d"].model())
    entry = ActivationEntry("x", afpq.AfpFormat.parse("e2m4"), 0.03125, ())
    for plan, mode, text in [
        (Summary((entry,)), "a8", "1 x e2m4"),
        (Summary(), "a8", "1 x a8"),
        (Summary(), "a16", None),
    ]:
        save(rewrite(model, plan, tensors, activations=mode), path)
        notes = export(path, to="float").notes
        if text is None:
            assert notes == ()
        else:
            assert notes == (
                f"rounding of activations is not part of the export ({text}): layers read float32",
            )


def test_model_in_memory_is_exported_and_not_changed(models, tmp_path):
    model = afpq.quantize(models / "lenet5_digits.onnx", bits=5)
    model.save(tmp_path / "packed.onnx")
    before = (tmp_path / "packed.onnx").read_bytes()

    export(model, to="qdq").save(tmp_path / "memory.onnx")
    export(tmp_path / "packed.onnx", to="qdq").save(tmp_path / "file.onnx")
    model.save(tmp_path / "packed.onnx")

    assert (tmp_path / "packed.onnx").read_bytes() == before
    assert (tmp_path / "memory.onnx").read_bytes() == (tmp_path / "file.onnx").read_bytes()


def test_float_export_can_be_quantized_again(tmp_path):
    path, _, _ = pack_case(tmp_path, CASES["gemm"].model())
    export(path, to="float").save(tmp_path / "out.onnx")

    again = afpq.quantize(tmp_path / "out.onnx", bits=8)

    assert [entry.layers for entry in again.plan.entries] == [("gemm_y",)]


def test_damaged_tensor_is_named(tmp_path):
    path, _, _ = pack_case(tmp_path, CASES["matmul"].model())
    proto = onnx.load(path)
    proto.graph.initializer[0].raw_data = bytes(len(proto.graph.initializer[0].raw_data))
    onnx.save(proto, path)
    with pytest.raises(ModelError, match="layer 'matmul_y': its tensor is damaged: checksum"):
        export(path, to="float")


def altered(path, name, values):
    """Sets an attribute of the only packed node and forgets checksums."""
    proto = onnx.load(path)
    (packed,) = [n for n in proto.graph.node if n.domain == "afpq"]
    kept = [a for a in packed.attribute if a.name != name]
    del packed.attribute[:]
    packed.attribute.extend(kept)
    if values is not None:
        packed.attribute.append(helper.make_attribute(name, values))
    onnx.save(proto, path)


@pytest.mark.parametrize(
    ("name", "attribute", "values", "message"),
    [
        ("conv1d", "kernel_shape", None, "attribute kernel_shape is missing"),
        ("conv1d", "kernel_shape", [4], r"kernel_shape \[4\] does not fit a matrix of \[10, 18\]"),
        (
            "conv_transpose",
            "shape",
            [6, 3, 3],
            r"shape \[6, 3, 3\] does not fit a matrix of \[6, 27\]",
        ),
        ("matmul", "group_size", 4, r"'matmul_y': its scale has shape \(10,\), not \(3, 10\)"),
        ("matmul", "n", 40, r"'matmul_y': its scale has shape \(10,\), not \(40,\)"),
        ("matmul", "k", 40, r"'matmul_y': packed data of \[10, 40\] at 6 bits has 480 bytes"),
    ],
)
def test_malformed_node_is_named(name, attribute, values, message, tmp_path):
    path, _, _ = pack_case(tmp_path, CASES[name].model())
    altered(path, attribute, values)
    with pytest.raises(ModelError, match=message):
        export(path, to="float")


def test_unknown_operator_is_named(tmp_path):
    path, _, _ = pack_case(tmp_path, CASES["matmul"].model())
    proto = onnx.load(path)
    proto.graph.node[0].op_type = "Fold"
    onnx.save(proto, path)
    with pytest.raises(ModelError, match="the domain afpq has no operator 'Fold'"):
        export(path, to="float")


def test_equal_bounds_are_stored_once_and_nodes_without_a_name_stay_so(tmp_path):
    nodes = [
        node("MatMul", "x w", "m", name=""),
        node("Clip", "m _ high", "c", name=""),
        node("MatMul", "c w", "n", name=""),
        node("Clip", "n low high", "y", name=""),
    ]
    constants = {"w": constant(12, 12), "low": np.float32(-1), "high": np.float32(2)}
    path, _, _ = pack_case(tmp_path, build(nodes, {"x": [3, 12]}, constants))
    proto = onnx.load(path)
    for packed in proto.graph.node:
        packed.name = ""
    onnx.save(proto, path)
    feeds = {"x": constant(3, 12, seed=1)}

    export(path, to="float").save(tmp_path / "out.onnx")

    result = onnx.load(tmp_path / "out.onnx").graph
    assert [n.op_type for n in result.node] == ["MatMul", "Clip", "MatMul", "Clip"]
    assert {n.name for n in result.node} == {""}
    assert {t.name for t in result.initializer} == {"q0", "clip_2", "clip_-1"}
    expected = session(path, threads=1).run(None, feeds)[0]
    close(run(tmp_path / "out.onnx", feeds)[0], expected)


def test_operator_that_is_an_output_keeps_its_name(tmp_path):
    path, _, tensors = pack_case(tmp_path, CASES["conv_transpose"].model())
    proto = onnx.load(path)
    name = proto.graph.node[0].output[0]
    proto.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, [6, 3, 3, 3]))
    onnx.save(proto, path)

    export(path, to="qdq").save(tmp_path / "out.onnx")

    assert [o.name for o in onnx.load(tmp_path / "out.onnx").graph.output] == ["y", name]
    result = run(tmp_path / "out.onnx", CASES["conv_transpose"].arrays())[1]
    np.testing.assert_array_equal(result.reshape(6, 27), tensors["w"].decode())


@pytest.mark.parametrize("to", ["float", "qdq"])
def test_weight_inside_a_branch_stays_there(to, tmp_path):
    case = CASES["matmul"]
    flat, _, tensors = pack_case(tmp_path, case.model(), text="e0m3")
    proto = onnx.load(flat)
    result = helper.make_tensor_value_info("y1", TensorProto.FLOAT, None)
    inner = onnx.NodeProto()
    inner.CopyFrom(proto.graph.node[0])
    inner.output[0] = "y1"
    yes = helper.make_graph([inner], "yes", [], [result], list(proto.graph.initializer))
    other = helper.make_tensor_value_info("y2", TensorProto.FLOAT, None)
    no = helper.make_graph([helper.make_node("Identity", ["x"], ["y2"], "id")], "no", [], [other])
    del proto.graph.node[:], proto.graph.initializer[:]
    proto.graph.node.append(
        helper.make_node("If", ["c"], ["y"], "if", then_branch=yes, else_branch=no)
    )
    proto.graph.input.append(helper.make_tensor_value_info("c", TensorProto.BOOL, []))
    onnx.save(proto, tmp_path / "inside.onnx")

    export(tmp_path / "inside.onnx", to=to).save(tmp_path / "out.onnx")

    assert not [t for t in onnx.load(tmp_path / "out.onnx").graph.initializer if t.name == "q0"]
    feeds = {**case.arrays(), "c": np.array(True)}
    expected = feeds["x"] @ tensors["w"].decode().T
    close(run(tmp_path / "out.onnx", feeds)[0], expected)
    np.testing.assert_array_equal(
        run(tmp_path / "out.onnx", {**feeds, "c": np.array(False)})[0], feeds["x"]
    )


def test_wrong_choices_and_models_are_refused(models, tmp_path):
    path, _, _ = pack_case(tmp_path, CASES["matmul"].model())
    with pytest.raises(ValueError, match="to 'onnx' is not one of float, qdq, qonnx"):
        export(path, to="onnx")
    with pytest.raises(ValueError, match="inexact 'some' is not one of error, nearest"):
        export(path, to="qdq", inexact="some")
    with pytest.raises(ModelError, match="not a packed model"):
        export(models / "lenet5_digits.onnx", to="float")
    with pytest.raises(ModelError, match="no such file"):
        export(tmp_path / "none.onnx", to="float")


def test_file_that_does_not_load_leaves_nothing_behind(tmp_path, monkeypatch):
    path, _, _ = pack_case(tmp_path, CASES["matmul"].model())
    before = sorted(p.name for p in tmp_path.iterdir())

    def broken(*_, **__):
        raise ModelError("does not load")

    monkeypatch.setattr(importlib.import_module("afpq.export"), "try_file", broken)
    with pytest.raises(ModelError, match="does not load"):
        export(path, to="float").save(tmp_path / "out.onnx")
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_model_that_onnx_refuses_is_not_written(tmp_path):
    path, _, _ = pack_case(tmp_path, CASES["matmul"].model())
    exported = export(path, to="qonnx")
    exported.graph.graph.node(1).op_type = "MatMulle"
    with pytest.raises(ModelError, match=r"onnx refuses the exported model: .*MatMulle"):
        exported.save(tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()
