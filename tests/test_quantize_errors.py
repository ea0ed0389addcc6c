"""What the pipeline refuses: options, plans, data and models."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import afpq
from afpq.errors import DataError, ModelError, PlanError
from afpq.plan import Plan, PlanEntry
from afpq.quantize import prepare


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 9}, r"bits 9 is not in the range 2\.\.8"),
        ({"bits": float("nan")}, "bits nan is not in the range"),
        ({"bits": 5, "size": 1000}, "one of plan, bits, size and max_drop"),
        ({"size": 0}, "size 0 is not a positive"),
        ({"activations": "a4"}, "activations 'a4' is not one of"),
        ({"kind": "fixed"}, "kind 'fixed' is not one of"),
        ({"exclude": ["conv*"]}, "--exclude 'conv[*]' matches no layer; nearest: "),
        ({"include": ["conv*"]}, "--include 'conv[*]' matches no layer"),
        ({"overrides": {"fc": "e2m1"}}, "--layer 'fc' matches no layer"),
        ({"exclude": ["*"]}, "every layer float"),
    ],
)
def test_wrong_options_are_refused(lenet: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        prepare(lenet, **options)


def test_a_plan_of_another_model_is_refused(lenet: Path) -> None:
    entry = PlanEntry(("conv",), "conv.weight", 4, 9, afpq.AfpFormat(2, 1))

    with pytest.raises(PlanError, match="no layer 'conv'"):
        prepare(lenet, Plan((entry,), 4.0, "weight_error"))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"image": np.zeros((4, 1, 28, 28), np.float32)}, "image"),
        ({"input": np.zeros((4, 3, 28, 28), np.float32)}, "input"),
        ({"input": np.zeros((4, 28, 28), np.float32)}, "input"),
    ],
)
def test_data_that_does_not_fit_is_refused(lenet: Path, data: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        prepare(lenet, data=data)


def test_weights_with_nan_are_refused(lenet: Path, tmp_path: Path) -> None:
    model = onnx.load(lenet)
    tensor = max(model.graph.initializer, key=lambda t: len(t.raw_data))
    values = onnx.numpy_helper.to_array(tensor).copy()
    values.flat[7] = np.nan
    tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    onnx.save(model, tmp_path / "nan.onnx")

    with pytest.raises(ModelError, match="NaN"):
        prepare(tmp_path / "nan.onnx")


def test_a_model_without_weights_is_refused(tmp_path: Path) -> None:
    value = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in "xy"]
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Relu", ["x"], ["y"])], "g", value[:1], value[1:]
    )
    onnx.save(onnx.helper.make_model(graph), tmp_path / "relu.onnx")

    with pytest.raises(ModelError, match="nothing to quantize"):
        prepare(tmp_path / "relu.onnx")
