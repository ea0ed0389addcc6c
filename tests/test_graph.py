"""What is found in a model, what is left float and why."""

import ml_dtypes
import numpy as np
import pytest
from graphs import CASES, build, constant, load, node, write
from onnx import TensorProto, helper, numpy_helper

from afpq.errors import ModelError
from afpq.graph import load_model, original_layout, with_constants


def reasons(model):
    return [(s.name, s.op_type, s.reason, s.num_weights) for s in model.skipped]


@pytest.mark.parametrize("name", CASES)
def test_layers_are_found_with_their_kind(name, tmp_path):
    model = load_model(write(tmp_path, CASES[name].model()))
    assert " ".join(layer.kind for layer in model.layers) == CASES[name].kinds
    assert not model.skipped


@pytest.mark.parametrize("name", CASES)
def test_original_layout_gives_back_the_operand(name, tmp_path):
    model = load_model(write(tmp_path, CASES[name].model()))
    for layer in model.layers:
        operand = original_layout(layer, layer.weight)
        assert operand.shape == layer.shape
        source = (
            constant(*CASES[name].constants["w"].shape) if "w" in CASES[name].constants else None
        )
        if source is not None and operand.shape == source.shape and layer.dtype == "float32":
            expected = CASES[name].constants["r" if layer.name.endswith(".R") else "w"]
            np.testing.assert_allclose(operand, expected * np.float32(layer.alpha))


def test_conv_weight_runs_over_taps_then_channels(tmp_path):
    weight = constant(6, 4, 3, 3)
    attributes = {"strides": [2, 1], "pads": [1, 0, 1, 0], "group": 2}
    model = load(tmp_path, [node("Conv", "x w b", **attributes)], {"x": [1, 8, 9, 9]},
                 {"w": weight, "b": constant(6, seed=1)})  # fmt: skip
    layer = model.layers[0]
    np.testing.assert_array_equal(layer.weight[5, (2 * 3 + 1) * 4 + 3], weight[5, 3, 2, 1])
    np.testing.assert_array_equal(layer.bias, constant(6, seed=1))
    assert (layer.name, layer.input_name, layer.output_name) == ("conv_y", "x", "y")
    assert (layer.groups, layer.k_axis, layer.weight_name) == (2, 1, "w")
    assert layer.conv.kernel_shape == (3, 3) and layer.conv.strides == (2, 1)
    assert layer.conv.pads == (1, 0, 1, 0) and layer.conv.dilations == (1, 1)


def test_gemm_folds_alpha_into_the_weight_and_beta_into_the_bias(tmp_path):
    layer = load_model(write(tmp_path, CASES["gemm_alpha_beta_trans_a"].model())).layers[0]
    np.testing.assert_array_equal(layer.weight, constant(12, 10).T * np.float32(0.5))
    np.testing.assert_array_equal(layer.bias, constant(10, seed=1) * np.float32(-2))
    assert (layer.k_axis, layer.output_name) == (0, "g")


def test_output_is_the_tensor_behind_the_bias_and_before_the_relu(tmp_path):
    case = CASES["matmul_bias_with_leading_ones_relu"]
    layer = load_model(write(tmp_path, case.model())).layers[0]
    assert layer.output_name == "a"
    np.testing.assert_array_equal(layer.bias, constant(10, seed=1))


def test_half_weights_are_widened(tmp_path):
    model = load_model(write(tmp_path, CASES["half_matmul_bias_relu"].model()))
    layer = model.layers[0]
    assert (layer.dtype, layer.weight.dtype, layer.bias.dtype) == (
        "float16",
        np.float32,
        np.float32,
    )
    assert model.float_weight_bytes == 2 * 120
    assert model.inputs[0].dtype == "float16"


def test_tied_weights_share_one_tensor(tmp_path):
    model = load_model(write(tmp_path, CASES["tied_embedding"].model()))
    assert [layer.weight_name for layer in model.layers] == ["w", "w"]
    assert model.num_weights == 99


def test_equal_copies_of_a_weight_share_one_tensor(tmp_path):
    table = constant(9, 11)
    nodes = [node("Gather", "w i", "e"), node("MatMul", "e copy")]
    inputs = {"i": ([2], TensorProto.INT64)}
    model = load(tmp_path, nodes, inputs, {"w": table, "copy": table.T.copy()})
    assert [layer.weight_name for layer in model.layers] == ["w", "w"]


def test_one_tensor_in_two_layouts_becomes_two_with_a_note(tmp_path):
    layers = load_model(write(tmp_path, CASES["untied_layouts"].model())).layers
    assert [layer.weight_name for layer in layers] == ["w", "w_2"]
    assert [layer.note for layer in layers] == ["", "another layer reads 'w' in a different layout"]


def test_names_are_unique_and_never_empty(tmp_path):
    nodes = [
        node("MatMul", "x w", "a", name=""),
        node("MatMul", "a w", "b", name="same"),
        node("MatMul", "b w", "c", name="same"),
        node("MatMul", "c w", name="same_2"),
    ]
    model = load(tmp_path, nodes, {"x": [2, 8]}, {"w": constant(8, 8)})
    assert [layer.name for layer in model.layers] == ["MatMul_0", "same", "same_3", "same_2"]


def test_inputs_and_outputs_are_described(tmp_path):
    model = load_model(write(tmp_path, build(
        [node("MatMul", "x w")], {"x": ["N", 2, None, 12]}, {"w": constant(12, 10)}, {"y": ["N", 2, None, 10]}
    )))  # fmt: skip
    info = model.inputs[0]
    assert (info.name, info.dtype, info.shape) == ("x", "float32", ("N", 2, None, 12))
    assert [o.name for o in model.outputs] == ["y"]


def test_layer_is_looked_up_by_name(tmp_path):
    model = load_model(write(tmp_path, CASES["gemm"].model()))
    assert model.layer("gemm_y") is model.layers[0]
    with pytest.raises(ModelError, match="no layer is called 'z'"):
        model.layer("z")


@pytest.mark.parametrize(
    ("nodes", "constants", "reason"),
    [
        ([node("MatMul", "x w")], {"w": constant(12, 5)}, "only 60 weights (fewer than 64)"),
        ([node("MatMul", "x w")], {"w": constant(100)}, "a constant vector"),
        (
            [node("MatMul", "x w", "m"), node("Mul", "m w", "y", name="other")],
            {"w": constant(12, 10)},
            "its weight 'w' is also needed as floats by Mul 'other'",
        ),
        (
            [node("Transpose", "w", "t"), node("MatMul", "x w", "m"), node("Mul", "m t", "y", name="o")],
            {"w": constant(12, 10)},
            "its weight 'w' is also needed as floats by Mul 'o'",
        ),
        (
            [node("Conv", "x w b")],
            {"w": constant(12, 4, 3, 3), "f": constant(1)},
            "its bias is computed at run time",
        ),
        (
            [node("Gather", "w i", axis=1)],
            {"w": constant(12, 10)},
            "a Gather along axis 1 of a constant with 2 axes (axis 0 of 2 is possible)",
        ),
        (
            [node("MatMul", "x w")],
            {"w": constant(12, 10).astype(ml_dtypes.bfloat16)},
            "its weights are bfloat16; afpq reads float32 and float16",
        ),
        (
            [node("MatMul", "x w")],
            {"w": constant(12, 10, dtype=np.float64)},
            "its weights are float64; afpq reads float32 and float16",
        ),
    ],
)  # fmt: skip
def test_weights_that_stay_float_are_named_with_the_reason(nodes, constants, reason, tmp_path):
    inputs = {"x": [2, 12], "b": [12], "i": ([2], TensorProto.INT64)}
    model = load(tmp_path, nodes, inputs, constants)
    assert not model.layers
    assert [s.reason for s in model.skipped] == [reason]
    assert model.skipped[0].num_weights == constants["w"].size


def test_weight_that_is_an_output_stays_float(tmp_path):
    model = load(
        tmp_path,
        [node("MatMul", "x w")],
        {"x": [2, 12]},
        {"w": constant(12, 10)},
        outputs=["y", "w"],
    )
    assert reasons(model) == [
        ("matmul_y", "MatMul", "its weight 'w' is an output of the graph", 120)
    ]


def test_a_skipped_reader_keeps_the_others_float(tmp_path):
    nodes = [node("Gather", "w i", "e", name="first", axis=1), node("MatMul", "x w", name="second")]
    inputs = {"x": [2, 12], "i": ([2], TensorProto.INT64)}
    model = load(tmp_path, nodes, inputs, {"w": constant(12, 10)})
    assert [s.name for s in model.skipped] == ["first", "second"]


def test_two_runtime_operands_and_integer_tables_are_no_layers(tmp_path):
    nodes = [node("MatMul", "x x", "m"), node("Gather", "t i"), node("Identity", "m", "z")]
    inputs = {"x": [9, 9], "i": ([2], TensorProto.INT64)}
    model = load(tmp_path, nodes, inputs, {"t": np.arange(200).reshape(20, 10)}, outputs=["y", "z"])
    assert not model.layers and not model.skipped


def test_nodes_in_subgraphs_stay_float_with_the_reason(tmp_path):
    def body(name, weight):
        tensor = numpy_helper.from_array(weight, f"{name}_w")
        nodes = [node("MatMul", f"x {name}_w", f"{name}_y", name=f"{name}_mm")]
        result = helper.make_tensor_value_info(f"{name}_y", TensorProto.FLOAT, None)
        return helper.make_graph(nodes, name, [], [result], [tensor])

    branches = {
        "then_branch": body("a", constant(12, 10)),
        "else_branch": body("b", constant(12, 5)),
    }
    inputs = {"x": [2, 12], "c": ([], TensorProto.BOOL)}
    model = load(tmp_path, [node("If", "c", "y", name="choice", **branches)], inputs)
    reason = "inside then_branch of If 'choice': sub-graphs stay float"
    assert reasons(model) == [("a_mm", "MatMul", reason, 120)]


def test_weight_that_a_subgraph_reads_stays_float(tmp_path):
    result = helper.make_tensor_value_info("z", TensorProto.FLOAT, None)
    body = helper.make_graph([node("Identity", "w", "z")], "b", [], [result])
    nodes = [node("MatMul", "x w"), node("If", "c", "q", then_branch=body, else_branch=body)]
    inputs = {"x": [2, 12], "c": ([], TensorProto.BOOL)}
    model = load(tmp_path, nodes, inputs, {"w": constant(12, 10)}, outputs=["y", "q"])
    assert [s.reason for s in model.skipped] == [
        "its weight 'w' is also needed as floats by Identity 'identity_z' in a sub-graph"
    ]


@pytest.mark.parametrize(
    ("nodes", "constants"),
    [
        (["Unsqueeze w a u", "Squeeze u a s", "MatMul x s y"], {"a": np.array([0])}),
        (["Identity w i", "Flatten i f", "MatMul x f y"], {}),
        (["Slice w b e s", "MatMul x s y"], {"b": np.array([0]), "e": np.array([12])}),
    ],
)
def test_constant_expressions_are_folded(nodes, constants, tmp_path):
    made = [node(n.split()[0], " ".join(n.split()[1:-1]), n.split()[-1]) for n in nodes]
    model = load(tmp_path, made, {"x": [2, 12]}, {"w": constant(12, 10), **constants})
    np.testing.assert_array_equal(model.layers[0].weight, constant(12, 10).T)
    assert model.layers[0].weight_name == "w"


def test_concatenated_weights_are_one_layer(tmp_path):
    nodes = [node("Concat", "v w", "c", axis=1), node("MatMul", "x c")]
    constants = {"v": constant(12, 4), "w": constant(12, 6)}
    layer = load(tmp_path, nodes, {"x": [2, 12]}, constants).layers[0]
    assert (layer.weight.shape, layer.weight_name) == ((10, 12), "v")


REAL = {
    "cifar10/resnet20": (20, 0, 268336),
    "cifar10/resnet20-bn": (20, 0, 268336),
    "cifar10/resnet32": (32, 0, 461872),
    "detection/FastestDet": (70, 0, 236112),
    "imagenet/mobilenetv2_tv": (53, 0, 3469760),
    "imagenet/squeezenet1_1": (26, 0, 1231552),
    "lm/stories260k": (37, 0, 259328),
    "minilm/all-MiniLM-L6-v2.float16-weights": (39, 0, 22534656),
    "mnist/mnist_cnn_cntk": (3, 0, 5960),
    "speech/silero_vad_16k_op15": (6, 4, 177152),
    "speech/silero_vad_op18_ifless": (0, 16, 0),
    "tinyml/kws_dscnn": (10, 0, 22016),
    "tinyml/resnet8_cifar10": (10, 0, 77360),
    "tinyml/vww_mobilenetv1_025": (28, 0, 208112),
}


@pytest.mark.parametrize("name", REAL)
def test_layers_of_real_models(name, shared):
    model = load_model(shared / f"models/{name}.onnx")
    assert (len(model.layers), len(model.skipped), model.num_weights) == REAL[name]


def test_other_constants_make_another_model(tmp_path):
    model = load_model(write(tmp_path, CASES["matmul_bias"].model()))

    other = with_constants(model, {"w": np.ones((12, 10), np.float32)})

    assert (other.layers[0].weight == 1).all() and not (model.layers[0].weight == 1).any()
    np.testing.assert_array_equal(other.layers[0].bias, model.layers[0].bias)
    assert [layer.name for layer in other.layers] == [layer.name for layer in model.layers]
