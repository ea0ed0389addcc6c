"""Sweeps: rounding by operators equals the definition, points equal a plain computation, the picture shows them all."""

from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import graphs
import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto

from afpq import runtime
from afpq._draw import draw
from afpq._rounder import Rounder
from afpq._sweep_text import write_sweep
from afpq.errors import FormatError, ModelError, PlanError
from afpq.formats import AfpFormat, all_formats, fake_quantize, magnitudes, scale_of
from afpq.graph import load_model
from afpq.rounding import fake_quantize_rows
from afpq.runtime import FloatModel, Simulation, session
from afpq.sweep import Curve, Point, Sweep, distinct_formats, sweep

FORMATS = [f for f in (*all_formats(), *all_formats(signed=False)) if f.mantissa_bits > 0]


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_rounding_in_a_graph_equals_the_definition(fmt: AfpFormat) -> None:
    x = ir.val("x", dtype=ir.DataType.FLOAT, shape=["n"])
    scale = ir.val("scale", dtype=ir.DataType.FLOAT, shape=[])
    graph = ir.Graph([x, scale], [], nodes=[], opset_imports={"": 17})
    rounder = Rounder(graph, "r")
    y = rounder.round(x, fmt, scale)
    graph.extend(rounder.nodes)
    y.dtype, y.shape = ir.DataType.FLOAT, ir.Shape(["n"])
    graph.outputs.append(y)
    model = ir.to_proto(ir.Model(graph, ir_version=8)).SerializeToString()

    levels = magnitudes(fmt)
    for bias in (-3, 4):
        unit = scale_of(fmt, bias)
        points = np.concatenate([levels, (levels[1:] + levels[:-1]) / 2, levels[-1:] * 2])
        values = (points * unit).astype(np.float32)
        near = [np.nextafter(values, np.float32(end)) for end in (0, np.inf)]
        values = np.concatenate([values, *near])
        values = np.concatenate([values, -values])
        result = session(model).run(None, {"x": values, "scale": np.asarray(unit)})[0]
        np.testing.assert_array_equal(result, fake_quantize(values, fmt, unit))


def test_formats_of_equal_values_are_listed_once() -> None:
    assert [str(f) for f in distinct_formats(4)] == ["e0m3", "e2m1", "e3m0"]
    assert [str(f) for f in distinct_formats(8)] == ["e0m7", "e2m5", "e3m4", "e4m3", "e5m2"]


def a_map(float_score: float, *points: tuple[float, float | None]) -> Sweep:
    """One curve from (score, KL) of the biases 3, 4, .."""
    found = tuple(Point(bias, score, kl, None) for bias, (score, kl) in enumerate(points, 3))
    curve = Curve("weights", AfpFormat(2, 1), found)
    return Sweep("m.onnx", "top1", 100, float_score, None, (curve,), ())


def test_a_plateau_is_around_the_least_kl_and_has_no_gap() -> None:
    kls = (0.5, 2, 0.3, 0.2, 0.1, 0.2, 2, 0.3)
    scores = (0.9, 0.2, 0.895, 0.9, 0.91, 0.9, 0.5, 0.95)
    found = a_map(0.93, *zip(scores, kls))

    assert found.curves[0].best.exponent_bias == 7
    assert found.plateau(found.curves[0], 0.01) == (6, 8)
    assert found.plateau(found.curves[0], 0.02) == (5, 8)
    assert found.plateau(found.curves[0], 0) == (7, 7)


def test_a_best_point_above_the_float_network_sets_no_higher_bar() -> None:
    found = a_map(0.9, (0.89, 0.2), (0.93, 0.1), (0.88, 0.2))

    assert found.plateau(found.curves[0], 0.01) == (3, 4)


def test_without_kl_the_highest_sqnr_is_best() -> None:
    points = (Point(0, 0.9, None, 12.0), Point(1, 0.9, None, 15.0), Point(2, 0.0, None, None))

    assert Curve("weights", AfpFormat(2, 1), points).best.exponent_bias == 1


@pytest.fixture(scope="module")
def lenet_map(models: Path) -> Sweep:
    formats = [AfpFormat(4, 3), AfpFormat(3, 0)]
    data = models / "digits_evaluation.npz"
    return sweep(models / "lenet5_digits.onnx", data, formats=formats, samples=60, threads=1)


def test_a_sweep_maps_weights_activations_and_both(lenet_map: Sweep) -> None:
    assert (lenet_map.metric, lenet_map.num_samples) == ("top1", 60)
    kinds = [(c.subject, str(c.format)) for c in lenet_map.curves]
    assert kinds == [("weights", "e4m3"), ("weights", "e3m0"), ("activations", "e4m3")]
    for found in lenet_map.curves:
        biases = [point.exponent_bias for point in found.points]
        assert biases == list(range(biases[0], biases[-1] + 1))
        # Both ends are past the plateau: steps too coarse, and values cut off.
        first, last = lenet_map.plateau(found)
        assert biases[0] < first <= last < biases[-1]
    assert lenet_map.curves[0].best.score >= lenet_map.float_score - 0.02
    assert [str(entry.format) for entry in lenet_map.joint] == ["e4m3"]
    assert lenet_map.joint[0].point.score >= lenet_map.float_score - 0.02


def test_a_float_format_has_a_wider_plateau_than_an_integer(models: Path) -> None:
    formats = [AfpFormat(0, 7), AfpFormat(4, 3), AfpFormat(5, 2)]
    data = models / "digits_evaluation.npz"
    result = sweep(
        models / "lenet5_digits.onnx", data, formats=formats, subjects=["weights"], samples=60
    )
    widths = [last - first for first, last in map(result.plateau, result.curves)]
    assert widths[0] < widths[1] < widths[2]


def test_points_are_those_of_plainly_rounded_networks(models: Path) -> None:
    model, fmt = load_model(models / "lenet5_digits.onnx"), AfpFormat(3, 2)
    with np.load(models / "digits_evaluation.npz") as arrays:
        data = {"input": arrays["input"][:40], "labels": arrays["labels"][:40]}
    found = sweep(model, data, formats=[fmt], subjects=["weights"], threads=1).curves[0]

    for point in found.points[::3]:
        scale = scale_of(fmt, [point.exponent_bias])
        tensors = model.tensors().items()
        weights = {name: fake_quantize_rows(layer.weight, fmt, scale) for name, layer in tensors}
        simulation = FloatModel(model, threads=1).simulate(weights)
        classes = simulation.run({"input": data["input"]})[0].argmax(1)
        assert point.score == pytest.approx((classes == data["labels"]).mean())


def test_the_same_arguments_give_the_same_map(models: Path, lenet_map: Sweep) -> None:
    again = sweep(
        models / "lenet5_digits.onnx",
        models / "digits_evaluation.npz",
        formats=[AfpFormat(4, 3), AfpFormat(3, 0)],
        samples=60,
        threads=1,
    )
    assert again == lenet_map


def test_activations_are_rounded_once_for_all_readers(tmp_path: Path) -> None:
    # Two products and an Add read x: the products see rounded values, the Add the float ones.
    nodes = [
        graphs.node("MatMul", "x a", "h"),
        graphs.node("MatMul", "x b", "g"),
        graphs.node("Add", "h g", "s"),
        graphs.node("Add", "s x", "y"),
    ]
    constants = {"a": np.eye(16, dtype=np.float32), "b": np.zeros((16, 16), np.float32)}
    path = graphs.write(tmp_path, graphs.build(nodes, {"x": ["m", 16]}, constants))
    x = graphs.constant(40, 16)
    fmt = AfpFormat(2, 3)

    result = sweep(path, {"x": x}, formats=[fmt], subjects=["activations"], threads=1)

    assert result.metric == "agreement"
    for point in result.curves[0].points:
        noise = np.square(fake_quantize(x, fmt, scale_of(fmt, point.exponent_bias)) - x).sum()
        expected = 10 * np.log10(np.square(2.0 * x).sum() / noise)
        assert point.sqnr_db == pytest.approx(expected, abs=1e-3)


def test_an_output_of_values_is_scored_by_cosine(tmp_path: Path) -> None:
    nodes = [graphs.node("MatMul", "x w", "embedding")]
    model = graphs.build(
        nodes, {"x": ["m", 16]}, {"w": graphs.constant(16, 8)}, outputs=["embedding"]
    )
    path = graphs.write(tmp_path, model)

    result = sweep(path, {"x": graphs.constant(20, 16, seed=1)}, formats=[AfpFormat(3, 2)])

    assert (result.metric, result.float_stderr) == ("cosine", None)
    assert result.float_score == pytest.approx(1)
    assert all(c.best.kl is None and c.best.score > 0.99 for c in result.curves)


def test_nan_scores_nothing(tmp_path: Path) -> None:
    # Every other output is 0 / 0 where its small weights are rounded to 0.
    nodes = [graphs.node("MatMul", "x w", "h"), graphs.node("Div", "h h", "y")]
    weight = np.tile(np.array([1, 1e-3], np.float32), (16, 8))
    path = graphs.write(tmp_path, graphs.build(nodes, {"x": ["m", 16]}, {"w": weight}))
    data = {"x": np.ones((4, 16), np.float32)}

    points = sweep(path, data, formats=[AfpFormat(4, 3)], subjects=["weights"]).curves[0].points

    assert points[0] == Point(points[0].exponent_bias, 0.0, None, None)
    assert points[-1].score == 1


def test_what_cannot_be_swept_is_refused(tmp_path: Path, models: Path) -> None:
    with pytest.raises(FormatError, match="ue2m5 is unsigned"):
        sweep(models / "lenet5_digits.onnx", {}, formats=[AfpFormat(2, 5, signed=False)])
    nodes = [graphs.node("MatMul", "x w", "h"), graphs.node("Log", "h", "y")]
    model = graphs.build(nodes, {"x": ["m", 16]}, {"w": graphs.constant(16, 8)})
    with pytest.raises(ModelError, match="gives NaN in output 'y'"):
        sweep(graphs.write(tmp_path, model), {"x": graphs.constant(9, 16)})
    path = graphs.write(tmp_path, graphs.build([graphs.node("Relu", "x", "y")], {"x": ["m", 4]}))
    with pytest.raises(ModelError, match="no weights to round"):
        sweep(path, {"x": graphs.constant(3, 4)})


HALF = graphs.constant(16, 8).astype(np.float16)


@pytest.mark.parametrize(
    ("nodes", "inputs", "constants", "message"),
    [
        (
            [graphs.node("MatMul", "x w", "y")],
            {"x": (["m", 16], TensorProto.FLOAT16)},
            {"w": HALF},
            "layer 'matmul_y' has float16 weights; activations can be rounded only where",
        ),
        (
            [graphs.node("Gather", "w x", "y")],
            {"x": (["m"], TensorProto.INT64)},
            {"w": graphs.constant(16, 8)},
            "no matrix product or convolution, so no activations to round",
        ),
    ],
    ids=["float16", "gather"],
)
def test_activations_that_cannot_be_rounded_are_refused_before_any_work(
    tmp_path: Path, nodes: Any, inputs: Any, constants: Any, message: str
) -> None:
    path = graphs.write(tmp_path, graphs.build(nodes, inputs, constants))

    def data() -> Any:
        pytest.fail("the samples were read")

    with pytest.raises(ModelError, match=message):
        sweep(path, data)


def test_the_weights_of_a_float16_model_can_be_swept(tmp_path: Path) -> None:
    inputs = {"x": (["m", 16], TensorProto.FLOAT16)}
    outputs = {"y": (["m", 8], TensorProto.FLOAT16)}
    model = graphs.build([graphs.node("MatMul", "x w", "y")], inputs, {"w": HALF}, outputs)
    x = graphs.constant(20, 16, seed=1).astype(np.float16)

    result = sweep(
        graphs.write(tmp_path, model), {"x": x}, formats=[AfpFormat(3, 2)], subjects=["weights"]
    )

    assert result.curves[0].best.score > 0.8


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"subjects": ("weight",)}, PlanError, "'weight' is not one of weights, activations"),
        ({"subjects": ()}, PlanError, "is not one of weights, activations"),
        ({"formats": ()}, FormatError, "no format to sweep"),
        (
            {"subjects": ("activations",), "formats": (AfpFormat(3, 0),)},
            FormatError,
            r"no format to sweep \(e3m0\): activations need one with a mantissa",
        ),
    ],
)
def test_wrong_options_are_refused(
    models: Path, options: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        sweep(models / "lenet5_digits.onnx", {}, **options)


def test_the_reference_runs_once_and_a_format_is_built_into_one_graph(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs, built = [], []
    run, build = Simulation.run, runtime.FloatGraph
    monkeypatch.setattr(Simulation, "run", lambda *args: runs.append(1) or run(*args))
    monkeypatch.setattr(
        runtime, "FloatGraph", lambda *args, **options: built.append(1) or build(*args, **options)
    )
    formats = [AfpFormat(4, 3), AfpFormat(3, 2)]

    result = sweep(
        models / "lenet5_digits.onnx",
        models / "digits_evaluation.npz",
        formats=formats,
        samples=24,
        threads=1,
    )

    points = sum(len(curve.points) for curve in result.curves) + len(result.joint)
    assert len(runs) == 3 * (1 + points) + 1  # batches of 8; once for the sizes of activations
    assert len(built) == 3 + len(formats)  # the reference, those sizes, all weights


def test_curves_are_in_the_order_of_subjects(models: Path) -> None:
    result = sweep(
        models / "lenet5_digits.onnx",
        models / "digits_evaluation.npz",
        formats=[AfpFormat(3, 2)],
        subjects=["activations", "weights"],
        samples=8,
        threads=1,
    )

    assert [curve.subject for curve in result.curves] == ["weights", "activations"]
    assert len(result.joint) == 1


def test_the_text_says_which_command_wrote_it(lenet_map: Sweep, tmp_path: Path) -> None:
    write_sweep(lenet_map, [tmp_path / "s.md"], tolerance=0.01, command="`study --deep`")

    assert "Written by `study --deep`." in (tmp_path / "s.md").read_text()


def test_the_picture_shows_every_curve_and_its_plateau(lenet_map: Sweep) -> None:
    picture = ElementTree.fromstring(draw(lenet_map, 0.01))

    name = "{http://www.w3.org/2000/svg}"
    texts = [element.text for element in picture.iter(f"{name}text")]
    lines = [element.get("points", "") for element in picture.iter(f"{name}polyline")]
    assert {"e4m3", "e3m0", "float32", "top-1, %"} <= set(texts)
    assert len(lines) == 2 * len(lenet_map.curves)
    drawn = {len(line.split()) for line in lines[1::2]}
    for found in lenet_map.curves:
        first, last = lenet_map.plateau(found, 0.01)
        assert last - first + 1 in drawn
    assert sorted(len(line.split()) for line in lines[::2]) == sorted(
        len(found.points) for found in lenet_map.curves
    )
