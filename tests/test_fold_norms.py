"""BatchNormalization goes into the convolution before it, where nobody else has a say."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import graphs
import numpy as np
import onnx
import pytest

import afpq
from afpq._fold_norms import fold_batch_norms
from afpq.evaluate import compare
from afpq.graph import Model, load_model
from afpq.runtime import FloatModel

NORM = "gamma beta mean variance"
X = np.random.default_rng(0).standard_normal((3, 3, 6, 6)).astype(np.float32)


def constants() -> dict[str, Any]:
    rng = np.random.default_rng(5)
    values = {"gamma": rng.normal(size=8), "beta": rng.normal(size=8), "mean": rng.normal(size=8)}
    values |= {
        "variance": rng.uniform(0.5, 2, 8),
        "w": graphs.constant(8, 3, 3, 3),
        "b": rng.normal(size=8),
    }
    return {name: array.astype(np.float32) for name, array in values.items()}


def network(folder: Path, conv: str = "x w b", *more: Any, **options: Any) -> Model:
    nodes = [
        graphs.node("Conv", conv, "a"),
        graphs.node("BatchNormalization", f"a {NORM}", "c", epsilon=1e-3),
        graphs.node("Relu", "c", "y"),
    ]
    built = graphs.build([*nodes, *more], {"x": ["n", 3, 6, 6]}, constants(), **options)
    return load_model(graphs.write(folder, built))


def op_types(model: Model) -> list[str]:
    return [node.op_type for node in model.ir.graph]


def outputs(model: Model) -> list[Any]:
    return FloatModel(model, threads=1).run({"x": X})


@pytest.mark.parametrize("conv", ["x w b", "x w"])
def test_the_function_of_a_network_stays(tmp_path: Path, conv: str) -> None:
    model = network(tmp_path, conv)
    folded = fold_batch_norms(model)
    assert op_types(folded) == ["Conv", "Relu"]
    assert op_types(model) == ["Conv", "BatchNormalization", "Relu"]  # nothing was changed
    (before,), (after,) = outputs(model), outputs(folded)
    np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-5)
    (layer,) = folded.layers
    assert layer.name == model.layers[0].name and layer.output_name == "c"
    assert layer.bias is not None and not set(NORM.split()) & set(folded.ir.graph.initializers)


def test_constants_may_be_computed_or_listed_as_inputs(tmp_path: Path) -> None:
    network(tmp_path)
    path = tmp_path / "model.onnx"
    built = onnx.load(path)
    built.graph.node.insert(0, graphs.node("Identity", "beta", "same"))
    built.graph.node[2].input[2] = "same"
    built.graph.input.append(
        onnx.helper.make_tensor_value_info("gamma", onnx.TensorProto.FLOAT, [8])
    )
    onnx.save(built, path)
    model = load_model(path)
    folded = fold_batch_norms(model)
    assert op_types(folded) == ["Conv", "Relu"] and len(folded.ir.graph.inputs) == 1
    np.testing.assert_allclose(outputs(folded)[0], outputs(model)[0], rtol=1e-5, atol=1e-5)


def test_an_output_keeps_its_name(tmp_path: Path) -> None:
    model = network(tmp_path, outputs=("y", "c"))
    folded = fold_batch_norms(model)
    assert op_types(folded) == ["Conv", "Relu"]
    for before, after in zip(outputs(model), outputs(folded), strict=True):
        np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-5)


def training(model: onnx.ModelProto) -> None:
    model.graph.node[1].attribute.append(onnx.helper.make_attribute("training_mode", 1))
    model.graph.node[1].output.extend(["running_mean", "running_variance"])


def shared_weight(model: onnx.ModelProto) -> None:
    model.graph.node.append(graphs.node("Conv", "x w", "z"))
    model.graph.output.append(onnx.helper.make_empty_tensor_value_info("z"))


def second_reader(model: onnx.ModelProto) -> None:
    model.graph.node.append(graphs.node("Abs", "a", "z"))
    model.graph.output.append(onnx.helper.make_empty_tensor_value_info("z"))


def output_of_the_network(model: onnx.ModelProto) -> None:
    model.graph.output.append(onnx.helper.make_empty_tensor_value_info("a"))


def behind_an_activation(model: onnx.ModelProto) -> None:
    relu = graphs.node("Relu", "a", "r")
    model.graph.node.insert(1, relu)
    model.graph.node[2].input[0] = "r"


def negative_variance(model: onnx.ModelProto) -> None:
    (tensor,) = (t for t in model.graph.initializer if t.name == "variance")
    tensor.CopyFrom(onnx.numpy_helper.from_array(np.full(8, -1, np.float32), "variance"))


@pytest.mark.parametrize(
    "change",
    [
        training, shared_weight, second_reader, output_of_the_network, behind_an_activation,
        negative_variance,
    ],
)  # fmt: skip
def test_what_others_have_a_say_in_stays(
    tmp_path: Path, change: Callable[[onnx.ModelProto], None]
) -> None:
    network(tmp_path)
    path = tmp_path / "model.onnx"
    model = onnx.load(path)
    change(model)
    onnx.save(model, path)
    loaded = load_model(path)
    assert fold_batch_norms(loaded) is loaded


def test_a_packed_network_has_no_normalization_left(models: Path, tmp_path: Path) -> None:
    path = models / "resnet_digits-bn.onnx"
    data = {"input": np.load(models / "digits_calibration.npz")["input"]}
    afpq.quantize(path, data=data, bits=5, mode="quick").save(tmp_path / "packed.onnx")
    packed = onnx.load(tmp_path / "packed.onnx")
    assert not {node.op_type for node in packed.graph.node} & {"BatchNormalization", "Relu"}
    comparison = compare(path, tmp_path / "packed.onnx", data=data)
    assert comparison.outputs[0].kl is not None and comparison.outputs[0].kl < 1e-3
