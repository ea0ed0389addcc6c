"""Simulated networks: rounding by ONNX operators equals the definition, and budgets of both kinds are kept."""

from pathlib import Path

import graphs
import numpy as np
import pytest

from afpq.errors import DataError, PlanError
from afpq.formats import AfpFormat, all_formats, fake_quantize, magnitudes, round_scale
from afpq.graph import load_model
from afpq.packed import DOMAIN
from afpq.plan import ActivationEntry
from afpq.rewrite import rewrite, serialize
from afpq.runtime import session
from afpq.simulate import parse_simulation, round_in_graph, simulate

FORMATS = [fmt for fmt in (*all_formats(), *all_formats(signed=False)) if fmt.fits_activations]


class Summary:
    plan_hash, bits_per_weight, activations = "ab" * 32, 8.0, None


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_rounding_in_the_graph_equals_the_definition(tmp_path: Path, fmt: AfpFormat) -> None:
    # The product with a unit matrix shows what the layer reads.
    nodes = [graphs.node("MatMul", "x w", "y")]
    path = graphs.write(
        tmp_path, graphs.build(nodes, {"x": ["m", 16]}, {"w": np.eye(16, dtype=np.float32)})
    )
    model = load_model(path)
    tensors = {la.weight_name: graphs.packed(la, "e0m7") for la in model.layers}
    unpacked = next(iter(tensors.values())).decode()[0, 0]
    graph = rewrite(model, Summary(), tensors, activations="f32")
    for scale in (float(round_scale(fmt, 0.0731, "real")), 1.0):
        clone = graph.clone()
        entry = ActivationEntry("x", fmt, scale)
        round_in_graph(clone, {model.layers[0].name: entry})
        levels = magnitudes(fmt)
        points = np.concatenate([levels, (levels[1:] + levels[:-1]) / 2, levels[-1:] * 2])
        x = (points * scale).astype(np.float32)
        x = np.concatenate([x, np.nextafter(x, np.float32(0)), np.nextafter(x, np.float32(1e9))])
        x = np.concatenate([x, -x])
        x = np.resize(x, (-(-x.size // 16), 16))
        y = session(serialize(clone)).run(None, {"x": x})[0]
        np.testing.assert_array_equal(y, fake_quantize(x, fmt, scale) * unpacked)


def test_other_readers_keep_float_values(tmp_path: Path) -> None:
    nodes = [graphs.node("MatMul", "x w", "h"), graphs.node("Add", "h x", "y")]
    path = graphs.write(
        tmp_path, graphs.build(nodes, {"x": ["m", 16]}, {"w": graphs.constant(16, 16)})
    )
    model = load_model(path)
    tensors = {la.weight_name: graphs.packed(la) for la in model.layers}
    graph = rewrite(model, Summary(), tensors, activations="f32")
    round_in_graph(graph, {model.layers[0].name: ActivationEntry("x", AfpFormat(0, 7), 64.0)})
    x = np.ones((3, 16), np.float32)  # all of it is rounded to 0

    np.testing.assert_array_equal(session(serialize(graph)).run(None, {"x": x})[0], x)


def test_a_simulation_keeps_both_budgets(models: Path) -> None:
    result = simulate(
        models / "lenet5_digits.onnx",
        models / "digits_calibration.npz",
        bits=5,
        activation_bits=4.5,
        samples=48,
    )
    assert result.plan.bits_per_weight <= 5
    assert 4 < result.activation_bits <= 4.5
    products = [n for n in result.graph.graph if n.domain == DOMAIN]
    assert all(node.inputs[0].producer().op_type == "Mul" for node in products)
    assert result.session().run(None, {"input": np.zeros((2, 1, 28, 28), np.float32)})


def test_a_simulation_needs_data(models: Path) -> None:
    with pytest.raises(DataError, match="a simulation needs data"):
        simulate(models / "lenet5_digits.onnx", None, bits=5, activation_bits=5)


@pytest.mark.parametrize(("text", "expected"), [("w5a5", (5, 5)), ("w4.8a5.75", (4.8, 5.75))])
def test_a_simulation_is_read(text: str, expected: tuple[float, float]) -> None:
    assert parse_simulation(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("5a5", "not of the form w5a5"),
        ("w5", "not of the form w5a5"),
        ("w9a5", "weight bits 9 are not in the range 2..8"),
        ("w5a2", "activation bits 2 are not in the range 3..8"),
    ],
)
def test_a_wrong_simulation_is_refused(text: str, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        parse_simulation(text)
