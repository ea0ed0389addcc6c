"""Static formats of activations: what is chosen, for which tensors, and that it is written and executed."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import graphs
import numpy as np
import pytest

from afpq import activations
from afpq.activations import allocate_activations, choose_activations
from afpq.calibrate import calibrate
from afpq.data import open_data
from afpq.errors import AfpqError, PlanError
from afpq.formats import AfpFormat, fake_quantize, round_scale
from afpq.graph import load_model
from afpq.packed import read_packed
from afpq.plan import ActivationEntry, Plan, PlanEntry
from afpq.quantize import quantize
from afpq.verify import check_run, verify

E2M2 = AfpFormat(2, 2)


def plan_of(model: Any, fmt: AfpFormat = E2M2) -> Plan:
    entries = (
        PlanEntry((layer.name,), layer.weight_name, layer.n, layer.k, fmt) for layer in model.layers
    )
    return Plan(tuple(entries), None, "weight_error")


def choose(
    folder: Path, nodes: list[Any], constants: dict[str, Any], x: Any, **options: Any
) -> Any:
    """The entries by tensor for a model with the input x, calibrated on x."""
    shape = ["m", *x.shape[1:]]
    outputs = [name for node in nodes for name in node.output][-1:]
    path = graphs.write(folder, graphs.build(nodes, {"x": shape}, constants, outputs, typed=False))
    model = load_model(path)
    data = open_data({"x": x}, model.inputs)
    fmt = options.pop("fmt", E2M2)
    entries = choose_activations(
        model, plan_of(model, fmt), calibrate(model, data), data, **options
    )
    return {entry.tensor: entry for entry in entries}


def one_product(folder: Path, x: Any, weight: Any = None, **options: Any) -> Any:
    constants = {"w": graphs.constant(x.shape[-1], 16) if weight is None else weight}
    return choose(folder, [graphs.node("MatMul", "x w", "y")], constants, x, **options).get("x")


def normal(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_a_tensor_that_is_never_negative_gets_an_unsigned_format(tmp_path: Path) -> None:
    assert not one_product(tmp_path, np.abs(normal(200, 32))).format.signed
    assert one_product(tmp_path, normal(200, 32)).format.signed


def test_the_scale_has_less_error_than_others_nearby(tmp_path: Path) -> None:
    x, weight = normal(400, 32), graphs.constant(32, 16)
    entry = one_product(tmp_path, x, weight)
    energy = (weight**2).sum(1)

    def error(scale: float) -> float:
        return float((energy * (fake_quantize(x, entry.format, scale) - x) ** 2).sum())

    assert error(entry.scale) < min(error(entry.scale * 0.9), error(entry.scale * 1.1))


def test_rare_outliers_are_clipped(tmp_path: Path) -> None:
    x = np.random.default_rng(0).random((64, 30, 32), np.float32)
    x[7, 3, 3] = 1.5  # one of 61440: coarser steps for all others would cost more
    entry = one_product(tmp_path, x)

    assert 1 < entry.scale * entry.format.max_integer < 1.45


def test_an_outlier_far_beyond_everything_is_left_behind(tmp_path: Path) -> None:
    x = np.abs(normal(64, 30, 32))
    x[7, 3, 3] = 200.0
    weight = graphs.constant(32, 16).copy()
    weight[3] *= 1e-4  # it counts, but little
    entry = one_product(tmp_path, x, weight)

    assert entry.scale * entry.format.max_integer < 10


def test_a_channel_that_nothing_multiplies_does_not_count(tmp_path: Path) -> None:
    x, weight = normal(500, 32), graphs.constant(32, 16).copy()
    x[:, 5] *= 100
    weight[5] = 0
    entry = one_product(tmp_path, x, weight)

    # The range of a row would have to hold the channel; a static format ignores it.
    assert entry.scale * entry.format.max_integer < 10


@pytest.mark.parametrize(
    ("signs", "fmt"), [((1,), AfpFormat(1, 7, signed=False)), ((-1, 1), AfpFormat(0, 7))]
)
def test_values_of_many_magnitudes_get_the_most_numbers(
    tmp_path: Path, signs: tuple[int, ...], fmt: AfpFormat
) -> None:
    # Every row has the same ones, so one range fits all. The other format's numbers are some of these.
    rng = np.random.default_rng(0)
    values = np.exp(-np.linspace(0, 6, 32)).astype(np.float32)
    x = rng.permuted(np.tile(values, (400, 1)), axis=1)
    entry = one_product(tmp_path, x * rng.choice(signs, x.shape).astype(np.float32))

    assert entry.format == fmt


def test_what_channels_count_is_computed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, energy = [], activations._energy
    monkeypatch.setattr(activations, "_energy", lambda layers: calls.append(1) or energy(layers))
    monkeypatch.setattr(sys.modules["afpq.calibrate"], "MAX_BATCH", 16)
    one_product(tmp_path, normal(64, 32))

    assert len(calls) == 1


def test_a_tensor_whose_rows_differ_greatly_keeps_dynamic_ranges(tmp_path: Path) -> None:
    x = normal(300, 32) * np.float32(10.0) ** np.arange(300)[:, None].astype(np.float32).clip(0, 3)
    x[4:] *= np.linspace(0.001, 1, 296, dtype=np.float32)[:, None] ** 4

    assert one_product(tmp_path, x) is None


def test_layers_that_read_one_tensor_share_one_entry(tmp_path: Path) -> None:
    nodes = [
        graphs.node("MatMul", "x v", "a"),
        graphs.node("MatMul", "x w", "b"),
        graphs.node("Add", "a b", "y"),
    ]
    constants = {"v": graphs.constant(32, 16), "w": graphs.constant(32, 16) * 3}

    assert list(choose(tmp_path, nodes, constants, normal(100, 32))) == ["x"]


@pytest.mark.parametrize(
    ("weight", "fields", "fmt"),
    [
        ((8, 2, 3, 3), {"group": 4}, E2M2),  # small groups: float planes
        ((16, 8, 3, 3), {}, AfpFormat(4, 1)),  # a wide format: float lanes
    ],
)
def test_layers_that_multiply_floats_get_no_entry(
    tmp_path: Path, weight: tuple[int, ...], fields: dict[str, Any], fmt: AfpFormat
) -> None:
    nodes = [graphs.node("Conv", "x w", "y", kernel_shape=[3, 3], **fields)]
    constants = {"w": graphs.constant(*weight)}

    assert not choose(tmp_path, nodes, constants, normal(20, 8, 6, 6), fmt=fmt)


def test_kind_integer_gives_powers_of_two(tmp_path: Path) -> None:
    entry = one_product(tmp_path, normal(200, 32), kind="integer")

    assert np.log2(entry.scale) == round(np.log2(entry.scale))


def test_entries_do_not_depend_on_threads(tmp_path: Path) -> None:
    x = normal(300, 32)

    assert one_product(tmp_path, x, threads=1) == one_product(tmp_path, x, threads=3)


@pytest.mark.parametrize("bits", [3.0, 4.5, 8.0])
def test_allocated_widths_keep_the_mean(models: Path, bits: float) -> None:
    model = load_model(models / "lenet5_digits.onnx")
    data = open_data(models / "digits_calibration.npz", model.inputs, limit=32)
    entries, mean = allocate_activations(
        model, plan_of(model), calibrate(model, data), data, bits=bits
    )

    assert mean <= bits
    assert {e.tensor for e in entries} == {layer.input_name for layer in model.layers}
    assert bits > 3 or {e.format.bits for e in entries} == {3}


# The whole pipeline.


@pytest.fixture(scope="module")
def written(models: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Plan]:
    path = tmp_path_factory.mktemp("static") / "out.onnx"
    data = models / "digits_calibration.npz"
    model = quantize(
        models / "resnet_digits.onnx", data=data, bits=5, samples=48, activations="a8", mode="quick"
    )
    model.save(path)
    assert model.plan is not None
    return path, model.plan


def test_the_file_holds_what_the_plan_says(written: tuple[Path, Plan], models: Path) -> None:
    path, plan = written
    found = {e.tensor: e for e in plan.activations or ()}
    inputs = {la.name: la.input_name for la in load_model(models / "resnet_digits.onnx").layers}
    assert found
    for layer in read_packed(path).layers:
        entry = None if layer.kernel == "planar" else found.get(inputs[layer.name] or "")
        expected = (None, None) if entry is None else (entry.format, entry.scale)
        assert (layer.activation_format, layer.activation_scale) == expected
        assert layer.input_format == (
            "f32" if layer.kernel == "planar" else "a8" if entry is None else str(entry.format)
        )


def test_verify_proves_the_rounding_of_inputs(written: tuple[Path, Plan]) -> None:
    assert all(finding.passed for finding in verify(written[0]))

    layer = next(la for la in read_packed(written[0]).layers if la.activation_scale is not None)
    assert layer.activation_scale is not None
    wrong = replace(layer, activation_scale=2 * layer.activation_scale)
    with pytest.raises(AfpqError, match="further from float64 than the bound"):
        check_run(wrong)


def test_an_edited_plan_decides(written: tuple[Path, Plan], models: Path, tmp_path: Path) -> None:
    document = json.loads(written[1].to_json())
    removed = document["activations"].pop(0)["tensor"]
    document["activations"][0] |= {"format": "ue2m5", "scale": 0.1}
    plan = Plan.from_json(json.dumps(document))
    edited = document["activations"][0]["tensor"]
    model = quantize(models / "resnet_digits.onnx", plan, activations="a8")
    model.save(tmp_path / "out.onnx")

    inputs = {la.name: la.input_name for la in load_model(models / "resnet_digits.onnx").layers}
    by_tensor = {inputs[la.name]: la for la in read_packed(tmp_path / "out.onnx").layers}
    assert by_tensor[removed].activation_format is None
    assert str(by_tensor[edited].activation_format) == "ue2m5"
    assert by_tensor[edited].activation_scale == float(round_scale(E2M2, 0.1, "real"))


def test_without_data_activations_stay_dynamic(models: Path) -> None:
    model = quantize(models / "lenet5_digits.onnx", activations="a8")

    assert model.plan is not None and model.plan.activations is None


def test_a_plan_with_static_formats_needs_a8(written: tuple[Path, Plan], models: Path) -> None:
    with pytest.raises(PlanError, match="need activations a8, not a16"):
        quantize(models / "resnet_digits.onnx", written[1])


def test_a_plan_for_a_tensor_that_nothing_reads_is_refused(models: Path) -> None:
    model = load_model(models / "lenet5_digits.onnx")
    entry = ActivationEntry("nothing", AfpFormat(0, 7), 1.0)
    plan = Plan(plan_of(model).entries, None, "weight_error", activations=(entry,))
    with pytest.raises(PlanError, match="activation 'nothing': no layer reads such a tensor"):
        quantize(model, plan, activations="a8")
