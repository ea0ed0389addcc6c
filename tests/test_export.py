"""Exported models: that they compute what the packed model does, from the same weights to the last bit."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from exported import (
    NEW_ENOUGH,
    close,
    evaluate,
    every_code,
    pack_case,
    per_tensor,
    run,
    stored_weights,
)
from graphs import CASES, build, constant, node
from onnx import TensorProto, helper

import afpq
from afpq.errors import ModelError
from afpq.export import TARGETS, export
from afpq.graph import original_layout
from afpq.runtime import session

pytestmark = NEW_ENOUGH

# One format for each standard type, and what stands in the file.
TYPES = {
    "e0m3": ("int4", TensorProto.INT4, 21),
    "e2m1": ("float4e2m1", TensorProto.FLOAT4E2M1, 23),
    "e2m3": ("int8", TensorProto.INT8, 17),
    "e3m3": ("float8e4m3fn", TensorProto.FLOAT8E4M3FN, 19),
    "e5m1": ("float8e5m2", TensorProto.FLOAT8E5M2, 19),
}
SHAPES = (
    "matmul",
    "conv1d",
    "conv2d_grouped",
    "conv2d_depthwise_clip",
    "conv3d",
    "conv_transpose",
    "gather",
    "tied_embedding",
    "lstm",
    "matmul_batched",
)


def same_bits(result, expected):
    assert result.shape == expected.shape
    assert (np.asarray(result).view(np.uint32) == np.asarray(expected).view(np.uint32)).all()


def operands(model, tensors):
    """What stands for each packed tensor, from the float model's layers: float32 in the shape of its reader."""
    readers = {}
    for layer in model.layers:
        readers.setdefault(layer.weight_name, []).append(layer)
    result = {}
    for number, (name, layers) in enumerate(readers.items()):
        matrix, layer = tensors[name].decode(), layers[0]
        kinds = {layer.kind for layer in layers}
        if kinds == {"matmul"}:
            result[f"q{number}"] = matrix.T
        elif len(kinds) > 1 or layer.shape[0] == 3 != layer.n:  # a batch of matrices has no axis
            result[f"q{number}"] = matrix
        else:
            result[f"q{number}"] = original_layout(layer, matrix)
    return {name: np.ascontiguousarray(value) for name, value in result.items()}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("to", TARGETS)
def test_exported_model_computes_what_the_packed_one_does(name, to, tmp_path):
    case = CASES[name]
    path, _, _ = pack_case(tmp_path, case.model())
    expected = session(path, threads=1).run(None, case.arrays())[0]

    exported = export(path, to=to)
    exported.save(tmp_path / "out.onnx")

    assert all(layer.exact for layer in exported.layers)
    proto = onnx.load(tmp_path / "out.onnx")
    assert not [n for n in proto.graph.node if n.domain == "afpq"]
    assert "afpq" not in {o.domain for o in proto.opset_import}
    runner = evaluate if to == "qonnx" else run
    if not (
        to == "qonnx" and case.kinds.startswith("unpack unpack")
    ):  # no LSTM in this shape there
        close(runner(tmp_path / "out.onnx", case.arrays())[0], expected)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("text", TYPES)
def test_standard_types_hold_every_weight_to_the_last_bit(name, text, tmp_path):
    path, model, tensors = pack_case(tmp_path, CASES[name].model(), text=text, change=every_code)

    exported = export(path, to="qdq")
    exported.save(tmp_path / "out.onnx")

    kind, number, opset = TYPES[text]
    assert {layer.type for layer in exported.layers} == {kind}
    proto = onnx.load(tmp_path / "out.onnx")
    assert {t.data_type for t in proto.graph.initializer if t.name.startswith("q")} == {number}
    assert exported.opset == proto.opset_import[0].version == opset
    found = stored_weights(tmp_path / "out.onnx")
    expected = operands(model, tensors)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        same_bits(found[key], value)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("to", ["float", "qonnx"])
@pytest.mark.parametrize("text", ["e0m3", "e2m0", "e3m4", "e4m3", "e5m2"])
def test_float32_weights_are_the_packed_ones_to_the_last_bit(name, to, text, tmp_path):
    path, model, tensors = pack_case(tmp_path, CASES[name].model(), text=text, change=every_code)

    export(path, to=to).save(tmp_path / "out.onnx")

    found = stored_weights(tmp_path / "out.onnx")
    for key, value in operands(model, tensors).items():
        same_bits(found[key], value)


@pytest.mark.parametrize("to", TARGETS)
@pytest.mark.parametrize("kind", ["real", "integer"])
@pytest.mark.parametrize("name", ["matmul", "conv2d_grouped", "gather", "lstm", "tied_embedding"])
def test_one_scale_for_the_whole_tensor_stays_one(name, kind, to, tmp_path):
    case = CASES[name]
    path, model, tensors = pack_case(tmp_path, case.model(), kind=kind, change=per_tensor)

    export(path, to=to).save(tmp_path / "out.onnx")

    found = stored_weights(tmp_path / "out.onnx")
    for key, value in operands(model, tensors).items():
        same_bits(found[key], value)
    if to == "qdq":
        scales = [t for t in onnx.load(tmp_path / "out.onnx").graph.initializer if t.name[0] == "s"]
        assert all(list(t.dims) == [] for t in scales)
        expected = session(path, threads=1).run(None, case.arrays())[0]
        close(run(tmp_path / "out.onnx", case.arrays())[0], expected)


@pytest.mark.parametrize("to", TARGETS)
@pytest.mark.parametrize("kind", ["real", "integer"])
@pytest.mark.parametrize("text", TYPES)
@pytest.mark.parametrize("group_size", [4, 8])
def test_scales_of_groups_stay_with_their_weights(group_size, text, kind, to, tmp_path):
    # 12 steps: with groups of 8 the last one is half empty.
    case = CASES["matmul"]
    path, model, tensors = pack_case(
        tmp_path,
        case.model(),
        text=text,
        kind=kind,
        group_size=group_size,
        change=every_code,
    )

    exported = export(path, to=to)
    exported.save(tmp_path / "out.onnx")

    same_bits(stored_weights(tmp_path / "out.onnx")["q0"], operands(model, tensors)["q0"])
    if to == "qdq":
        assert exported.opset == max(TYPES[text][2], 21)
        (dequantize,) = [
            n for n in onnx.load(tmp_path / "out.onnx").graph.node if "Deq" in n.op_type
        ]
        fields = {a.name: a.i for a in dequantize.attribute}
        assert fields == {"axis": 0, "block_size": group_size}
    expected = session(path, threads=1).run(None, case.arrays())[0]
    close(evaluate(tmp_path / "out.onnx", case.arrays())[0], expected)
    if not exported.missing:
        close(run(tmp_path / "out.onnx", case.arrays())[0], expected)


def test_every_kind_of_node_is_evaluated_in_float4(tmp_path):
    # onnxruntime's CPU provider has no DequantizeLinear of it: the file is checked and not run.
    for name in (
        "matmul_bias_with_leading_ones_relu",
        "conv2d_grouped",
        "gather",
        "tied_embedding",
    ):
        case = CASES[name]
        path, _, _ = pack_case(tmp_path, case.model(), text="e2m1")
        exported = export(path, to="qdq")
        exported.save(tmp_path / "out.onnx")
        expected = session(path, threads=1).run(None, case.arrays())[0]
        close(evaluate(tmp_path / "out.onnx", case.arrays())[0], expected)
        if "float4e2m1" in exported.missing:
            assert exported.checks["loaded"] is False
            with pytest.raises(Exception, match="NOT_IMPLEMENTED"):
                ort.InferenceSession(str(tmp_path / "out.onnx"))


def test_names_of_nodes_results_and_tensors_stay(tmp_path):
    case = CASES["conv2d_depthwise_clip"]
    path, _, _ = pack_case(tmp_path, case.model())
    source = onnx.load(path)

    export(path, to="float").save(tmp_path / "out.onnx")

    proto = onnx.load(tmp_path / "out.onnx")
    assert proto.graph.input == source.graph.input and proto.graph.output == source.graph.output
    assert [n.name for n in proto.graph.node] == ["conv_c", "conv_c.clip"]
    assert list(proto.graph.node[0].input) == ["x", "q0", "b0"]
    assert {t.name for t in proto.graph.initializer} == {"q0", "b0", "clip_0", "clip_1"}
    metadata = {p.key: p.value for p in proto.metadata_props}
    assert metadata["afpq.export"] == "float" and metadata["afpq.plan_hash"] == "ab" * 32
    assert "afpq.spec_version" not in metadata and "afpq.checksums" not in metadata


@pytest.mark.parametrize("to", TARGETS)
def test_tied_table_is_stored_once(to, tmp_path):
    path, _, _ = pack_case(tmp_path, CASES["tied_embedding"].model())

    exported = export(path, to=to)
    exported.save(tmp_path / "out.onnx")

    proto = onnx.load(tmp_path / "out.onnx")
    large = [t.name for t in proto.graph.initializer if np.prod(t.dims) == 99]
    assert large == ["q0"]
    assert [layer.shared_with for layer in exported.layers] == [None, exported.layers[0].name]
    (tensor,) = exported.tensors
    assert tensor.packed_bytes == 1 * 3 * 8 * 6 + 2 * 9  # tiles of codes, and a scale a row


def test_equal_matrices_that_many_nodes_read_are_stored_in_their_own_shape(tmp_path):
    nodes = [node("MatMul", "x w", "a"), node("MatMul", "a w", "y")]
    path, _, _ = pack_case(tmp_path, build(nodes, {"x": [2, 12]}, {"w": constant(12, 12)}))

    export(path, to="qdq").save(tmp_path / "out.onnx")

    ops = [n.op_type for n in onnx.load(tmp_path / "out.onnx").graph.node]
    assert ops == ["DequantizeLinear", "MatMul", "MatMul"]


def branches(path, target):
    """Puts the packed node of a file into both branches of an If; the weight stays outside."""
    proto = onnx.load(path)
    (packed,) = proto.graph.node
    arms = []
    for name in ("then", "else"):
        inner = onnx.NodeProto()
        inner.CopyFrom(packed)
        inner.name, inner.output[0] = f"{name}_node", f"{name}_y"
        result = helper.make_tensor_value_info(f"{name}_y", TensorProto.FLOAT, None)
        arms.append(helper.make_graph([inner], name, [], [result]))
    choice = helper.make_node("If", ["c"], ["y"], "if", then_branch=arms[0], else_branch=arms[1])
    del proto.graph.node[:]
    proto.graph.node.append(choice)
    proto.graph.input.append(helper.make_tensor_value_info("c", TensorProto.BOOL, []))
    onnx.save(proto, target)


@pytest.mark.parametrize("to", ["float", "qdq"])
@pytest.mark.parametrize("text", ["e0m3", "e2m3"])
@pytest.mark.parametrize("name", ["matmul", "gather"])
def test_nodes_inside_branches_read_one_weight_outside(name, text, to, tmp_path):
    case = CASES[name]
    flat, _, _ = pack_case(tmp_path, case.model(), text=text)
    path = tmp_path / "branches.onnx"
    branches(flat, path)
    expected = session(flat, threads=1).run(None, case.arrays())[0]

    exported = export(path, to=to)
    exported.save(tmp_path / "out.onnx")

    first, second = exported.layers
    assert (first.shared_with, second.shared_with) == (None, first.name)
    for choice in (True, False):
        feeds = {**case.arrays(), "c": np.array(choice)}
        close(run(tmp_path / "out.onnx", feeds)[0], expected)


def test_values_that_no_type_holds_are_an_error_that_names_the_layers(tmp_path):
    path, _, _ = pack_case(tmp_path, CASES["lstm"].model(), text="e3m4")

    with pytest.raises(
        ModelError, match=r"no standard type holds all values of layers .*e3m4"
    ) as e:
        export(path, to="qdq")

    assert str(e.value).count("(e3m4)") == 2 and "lstm_y" in str(e.value)


def test_nearest_type_says_what_it_costs(tmp_path):
    case = CASES["matmul"]
    path, model, tensors = pack_case(tmp_path, case.model(), text="e3m4")

    exported = export(path, to="qdq", inexact="nearest")
    exported.save(tmp_path / "out.onnx")

    (layer,) = exported.layers
    found = stored_weights(tmp_path / "out.onnx")["q0"].astype(np.float64)
    exact = operands(model, tensors)["q0"].astype(np.float64)
    noise = ((found - exact) ** 2).sum()
    assert layer.type == "int8" and not layer.exact
    assert layer.sqnr_db == pytest.approx(10 * np.log10((exact**2).sum() / noise))
    assert layer.sqnr_db > 40


def test_nearest_changes_nothing_where_a_type_is_exact(tmp_path):
    path, model, tensors = pack_case(tmp_path, CASES["conv3d"].model(), text="e3m3")

    exported = export(path, to="qdq", inexact="nearest")
    exported.save(tmp_path / "out.onnx")

    assert exported.layers[0].exact
    same_bits(stored_weights(tmp_path / "out.onnx")["q0"], operands(model, tensors)["q0"])


@pytest.mark.parametrize("to", ["float", "qdq"])
def test_network_keeps_its_outputs(to, models, tmp_path):
    data = np.load(models / "digits_evaluation.npz")["input"][:64]
    formats = {"/0/*": "e3m3", "/3/*": "e2m3", "/4/*": "e3m3", "/5/*": "e0m3", "/8/*": "e2m3"}
    results = {}
    for mode in ("f32", "a16"):
        path = tmp_path / f"{mode}.onnx"
        afpq.quantize(
            models / "resnet_digits.onnx", bits=7, activations=mode, overrides=formats
        ).save(path)
        exported = export(path, to=to)
        exported.save(tmp_path / "out.onnx")
        assert all(layer.exact for layer in exported.layers)
        results[mode] = run(tmp_path / "out.onnx", {"input": data})[0]
        expected = session(path, threads=1).run(None, {"input": data})[0]
        # a16 rounds each layer's input to 1 / 65535 of its range.
        eps = 1e-5 if mode == "f32" else 1e-3
        np.testing.assert_allclose(
            results[mode], expected, rtol=0, atol=eps * np.abs(expected).max()
        )
    np.testing.assert_array_equal(results["f32"], results["a16"])
