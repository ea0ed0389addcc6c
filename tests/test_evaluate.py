"""Metrics against plain NumPy, and comparisons of float and packed models."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from afpq import _metrics
from afpq.errors import ModelError
from afpq.evaluate import Comparison, OutputComparison, compare
from afpq.formats import AfpFormat
from afpq.graph import load_model
from afpq.rewrite import rewrite, save
from afpq.rounding import best_scale, quantize_tensor
from afpq.runtime import session

Floats = npt.NDArray[np.float32]


def normal(*shape: int, seed: int = 0) -> Floats:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def softmax(z: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    wide = np.exp(z.astype(np.float64) - z.max(-1, keepdims=True))
    return np.asarray(wide / wide.sum(-1, keepdims=True), np.float64)


# --- metrics ---


@pytest.mark.parametrize(
    ("name", "array", "kind"),
    [
        ("logits", normal(4, 10), "logits"),
        ("758", normal(4, 10), "logits"),
        ("y", normal(4, 10, 1, 1), "logits"),
        ("y", softmax(normal(4, 10)), "distribution"),
        ("prob", softmax(normal(4, 6, 10)), "distribution"),
        ("logits", normal(4, 6, 10), "logits"),
        ("last_hidden_state", normal(4, 6, 10), "values"),
        ("y", normal(4, 6, 10), "values"),
        ("sentence_embedding", normal(4, 10), "values"),
        ("stateN", normal(2, 1, 10), "values"),
        ("y", normal(4, 1), "values"),
        ("y", normal(4), "values"),
        ("ids", np.arange(4), "integers"),
        ("mask", np.ones((2, 3), bool), "integers"),
    ],
)
def test_the_kind_of_an_output_is_recognised(name: str, array: npt.NDArray[Any], kind: str) -> None:
    assert _metrics.output_kind(name, array) == kind


def test_kl_of_logits_is_the_one_of_their_softmax() -> None:
    a, b = normal(5, 7), normal(5, 7, seed=1)
    p, q = softmax(a), softmax(b)
    expected = (p * np.log(p / q)).sum(-1)
    np.testing.assert_allclose(_metrics.kl_divergence(a, b, "logits"), expected)
    np.testing.assert_allclose(_metrics.kl_divergence(p, q, "distribution"), expected)
    np.testing.assert_array_equal(_metrics.kl_divergence(a, a, "logits"), np.zeros(5))


def test_kl_ignores_classes_that_the_reference_excludes() -> None:
    p, q = np.array([[0.5, 0.5, 0.0]]), np.array([[0.25, 0.5, 0.25]])
    expected = [0.5 * math.log(2)]
    np.testing.assert_allclose(_metrics.kl_divergence(p, q, "distribution"), expected)
    assert _metrics.kl_divergence(q, p, "distribution")[0] == np.inf
    masked = np.array([[1.0, 2.0, -np.inf]], np.float32)
    np.testing.assert_array_equal(_metrics.kl_divergence(masked, masked, "logits"), [0])


def test_large_logits_do_not_overflow() -> None:
    a = np.array([[1e4, 0.0]], np.float32)
    assert _metrics.kl_divergence(a, a + np.float32(1e4), "logits")[0] == 0


def test_label_ranks_count_the_classes_before_the_right_one() -> None:
    rows = np.array([[3, 1, 2], [3, 1, 2], [1, 1, 1]], np.float32)
    np.testing.assert_array_equal(_metrics.label_ranks(rows, np.array([0, 1, 2])), [0, 2, 2])


@pytest.mark.parametrize(
    ("signal", "noise", "expected"),
    [(100, 1, 20), (1, 0, math.inf), (0, 0, math.inf), (0, 1, -math.inf)],
)
def test_sqnr_is_a_ratio_of_energies(signal: float, noise: float, expected: float) -> None:
    assert _metrics.sqnr_db(signal, noise) == expected


def test_cosines_of_zero_vectors_are_defined() -> None:
    a = np.array([[1, 0], [0, 0], [0, 0], [1, 1]], np.float32)
    b = np.array([[2, 0], [0, 0], [1, 0], [1, -1]], np.float32)
    np.testing.assert_allclose(_metrics.cosines(a, b), [1, 1, 0, 0])


# --- models ---


def save_graph(
    path: Path,
    nodes: Sequence[onnx.NodeProto],
    inputs: dict[str, list[int | str]],
    outputs: dict[str, int],
    constants: dict[str, Floats],
    *,
    output_type: int = TensorProto.FLOAT,
) -> Path:
    graph = helper.make_graph(
        list(nodes),
        "g",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in inputs.items()],
        [helper.make_tensor_value_info(n, output_type, [None] * r) for n, r in outputs.items()],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    opset = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=9), path)
    return path


def linear(path: Path, weight: Floats, output: str = "logits") -> Path:
    node = helper.make_node("MatMul", ["x", "w"], [output], name="head")
    return save_graph(path, [node], {"x": ["N", weight.shape[0]]}, {output: 2}, {"w": weight})


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """Two classifiers of 10 classes that differ a little."""
    weight = normal(8, 10)
    other = weight + np.float32(0.3) * normal(8, 10, seed=1)
    return linear(tmp_path / "a.onnx", weight), linear(tmp_path / "b.onnx", other)


def only_output(comparison: Comparison) -> OutputComparison:
    (output,) = comparison.outputs
    return output


def run(path: Path, x: Floats) -> npt.NDArray[Any]:
    model = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return np.asarray(model.run(None, {"x": x})[0])


def test_a_classifier_is_compared_by_all_its_metrics(pair: tuple[Path, Path]) -> None:
    x, labels = normal(100, 8), np.random.default_rng(0).integers(0, 10, 100)
    result = compare(*pair, {"x": x, "labels": labels})
    output = only_output(result)
    a, b = (run(path, x) for path in pair)
    p, q = softmax(a), softmax(b)
    kl = (p * np.log(p / q)).sum(-1)
    agreement = float((a.argmax(-1) == b.argmax(-1)).mean())
    order = np.argsort(-b, axis=1, kind="stable")
    assert (output.name, output.kind, output.num_rows) == ("logits", "logits", 100)
    assert output.top1_reference == pytest.approx((a.argmax(-1) == labels).mean())
    assert output.top1 == pytest.approx((b.argmax(-1) == labels).mean())
    assert output.top5 == pytest.approx((order[:, :5] == labels[:, None]).any(1).mean())
    assert output.agreement == pytest.approx(agreement)
    assert output.agreement_stderr == pytest.approx(math.sqrt(agreement * (1 - agreement) / 100))
    assert output.kl == pytest.approx(kl.mean(), rel=1e-5)
    assert output.kl_stderr == pytest.approx(kl.std() / 10, rel=1e-5)
    expected = 10 * math.log10((a.astype(float) ** 2).sum() / ((a - b).astype(float) ** 2).sum())
    assert output.sqnr_db == pytest.approx(expected, rel=1e-5)
    assert output.cosine is None
    assert result.num_samples == 100
    sizes = tuple(path.stat().st_size for path in pair)
    assert (result.reference_bytes, result.quantized_bytes) == sizes


def test_without_labels_there_is_no_accuracy(pair: tuple[Path, Path]) -> None:
    output = only_output(compare(*pair, normal(20, 8)))
    assert (output.top1, output.top1_reference, output.top5) == (None, None, None)
    assert output.agreement is not None


def test_rows_that_change_sides_are_counted(pair: tuple[Path, Path]) -> None:
    x, labels = normal(60, 8), np.arange(60) % 10
    output = only_output(compare(*pair, {"x": x, "labels": labels}))
    before, after = (run(path, x).argmax(1) == labels for path in pair)
    assert output.top1_lost == (before & ~after).sum()
    assert output.top1_gained == (after & ~before).sum()
    assert only_output(compare(*pair, x)).top1_lost is None


def test_few_classes_have_no_top5(tmp_path: Path) -> None:
    path = linear(tmp_path / "a.onnx", normal(32, 4))
    data = {"x": normal(6, 32), "labels": np.zeros(6, int)}
    output = only_output(compare(path, path, data))
    assert output.top1 is not None
    assert output.top5 is None


def test_a_model_agrees_with_itself(pair: tuple[Path, Path]) -> None:
    result = compare(pair[0], pair[0], normal(20, 8))
    output = only_output(result)
    assert (output.agreement, output.kl, output.sqnr_db) == (1, 0, math.inf)
    assert result.to_dict()["outputs"][0]["sqnr_db"] is None
    json.dumps(result.to_dict(), allow_nan=False)


def test_sessions_are_compared_like_files(pair: tuple[Path, Path]) -> None:
    files = compare(*pair, normal(20, 8))
    sessions = compare(session(pair[0]), session(pair[1]), normal(20, 8))
    assert sessions.outputs == files.outputs
    assert (sessions.reference_bytes, sessions.quantized_bytes) == (None, None)


@pytest.mark.parametrize("wrong", [10, -1])
def test_labels_beyond_the_classes_give_no_accuracy_and_say_so(
    pair: tuple[Path, Path], wrong: int
) -> None:
    labels = np.zeros(40, int)
    labels[20] = wrong
    output = only_output(compare(*pair, {"x": normal(40, 8), "labels": labels}))
    assert (output.top1, output.top1_reference, output.top5) == (None, None, None)
    assert output.note == f"no accuracy: label {wrong} is not one of 10 classes"
    assert output.agreement is not None


def test_embeddings_are_compared_by_cosine(tmp_path: Path) -> None:
    weight = normal(8, 16)
    a = linear(tmp_path / "a.onnx", weight, "embedding")
    b = linear(tmp_path / "b.onnx", weight + np.float32(0.1) * normal(8, 16, seed=1), "embedding")
    x = normal(30, 8)
    output = only_output(compare(a, b, x))
    p, q = run(a, x).astype(float), run(b, x).astype(float)
    expected = (p * q).sum(1) / np.linalg.norm(p, axis=1) / np.linalg.norm(q, axis=1)
    assert (output.kind, output.kl, output.agreement) == ("values", None, None)
    assert output.cosine == pytest.approx(expected.mean())
    assert output.cosine_min == pytest.approx(expected.min())
    noise, signal = np.square(p - q).sum(1), np.square(p).sum(1)
    assert output.relative_error == pytest.approx(noise.sum() / signal.sum())
    # The error of a ratio by the jackknife, which knows nothing of its derivatives.
    left_out = (noise.sum() - noise) / (signal.sum() - signal)
    jackknife = math.sqrt(29 * np.var(left_out))
    assert output.relative_error_stderr == pytest.approx(jackknife, rel=0.1)


def test_tokens_are_rows_of_a_language_model(tmp_path: Path) -> None:
    node = helper.make_node("MatMul", ["x", "w"], ["logits"])
    inputs: dict[str, list[int | str]] = {"x": ["N", "S", 8]}
    paths = [
        save_graph(
            tmp_path / f"{i}.onnx", [node], inputs, {"logits": 3}, {"w": normal(8, 12, seed=i)}
        )
        for i in range(2)
    ]
    output = only_output(compare(paths[0], paths[1], [normal(2, 3, 8), normal(1, 5, 8)]))
    assert (output.kind, output.num_rows) == ("logits", 11)


def test_integer_outputs_agree_by_element(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["z"]),
        helper.make_node("ArgMax", ["z"], ["class"], axis=1, keepdims=0),
    ]
    paths = [
        save_graph(
            tmp_path / f"{i}.onnx",
            nodes,
            {"x": ["N", 8]},
            {"class": 1},
            {"w": normal(8, 3, seed=i)},
            output_type=TensorProto.INT64,
        )
        for i in range(2)
    ]
    x = normal(40, 8)
    output = only_output(compare(paths[0], paths[1], x))
    expected = (run(paths[0], x) == run(paths[1], x)).mean()
    assert (output.kind, output.num_rows, output.sqnr_db) == ("integers", 40, None)
    assert output.agreement == pytest.approx(expected)


def test_outputs_whose_shapes_differ_are_not_compared(tmp_path: Path) -> None:
    a = linear(tmp_path / "a.onnx", normal(8, 10))
    b = linear(tmp_path / "b.onnx", normal(8, 9))
    output = only_output(compare(a, b, normal(3, 8)))
    assert (output.kind, output.num_rows, output.sqnr_db) == ("varying", 0, None)


def test_a_missing_output_is_named(tmp_path: Path) -> None:
    a = linear(tmp_path / "a.onnx", normal(8, 10), "y")
    b = linear(tmp_path / "b.onnx", normal(8, 10), "z")
    with pytest.raises(ModelError, match="the quantized model has no output 'y'; it has z"):
        compare(a, b, normal(3, 8))


def test_different_inputs_are_named(tmp_path: Path) -> None:
    a = linear(tmp_path / "a.onnx", normal(8, 10))
    node = helper.make_node("MatMul", ["z", "w"], ["logits"])
    inputs: dict[str, list[int | str]] = {"z": ["N", 8]}
    b = save_graph(tmp_path / "b.onnx", [node], inputs, {"logits": 2}, {"w": normal(8, 10)})
    with pytest.raises(ModelError, match="the models have different inputs: z and x"):
        compare(a, b, normal(3, 8))


def test_nan_in_an_output_is_named(tmp_path: Path) -> None:
    a = linear(tmp_path / "a.onnx", normal(8, 10))
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["z"]),
        helper.make_node("Log", ["z"], ["logits"]),
    ]
    constants = {"w": normal(8, 10)}
    b = save_graph(tmp_path / "b.onnx", nodes, {"x": ["N", 8]}, {"logits": 2}, constants)
    with pytest.raises(ModelError, match="the quantized model gives NaN in output 'logits'"):
        compare(a, b, normal(3, 8))


def test_progress_counts_samples(pair: tuple[Path, Path]) -> None:
    seen: list[tuple[str, int, int]] = []
    compare(*pair, normal(40, 8), progress=lambda *event: seen.append(event))
    assert seen == [("compare", 16, 40), ("compare", 32, 40), ("compare", 40, 40)]


# --- packed models ---


@pytest.fixture
def network(tmp_path: Path) -> Path:
    nodes = [
        helper.make_node("Conv", ["x", "a", "b"], ["p"], name="first", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["p"], ["q"]),
        helper.make_node("GlobalAveragePool", ["q"], ["r"]),
        helper.make_node("Flatten", ["r"], ["s"]),
        helper.make_node("Gemm", ["s", "c"], ["logits"], name="last"),
    ]
    constants = {"a": normal(16, 3, 3, 3), "b": normal(16), "c": normal(16, 10)}
    inputs: dict[str, list[int | str]] = {"x": ["N", 3, 8, 8]}
    return save_graph(tmp_path / "net.onnx", nodes, inputs, {"logits": 2}, constants)


def pack_model(path: Path, text: str) -> Path:
    model = load_model(path)
    fmt = AfpFormat.parse(text)
    tensors = {
        layer.weight_name: quantize_tensor(layer.weight, fmt, best_scale(layer.weight, fmt)[0])
        for layer in model.layers
    }
    out = path.with_name(f"{text}.onnx")
    save(rewrite(model, SimpleNamespace(plan_hash="0" * 64, bits_per_weight=8.0), tensors), out)
    return out


def test_a_packed_model_is_compared_layer_by_layer(network: Path) -> None:
    x = normal(20, 3, 8, 8)
    wide = compare(network, pack_model(network, "e0m7"), x, layers=True)
    narrow = compare(network, pack_model(network, "e0m3"), x, layers=True)
    # The convolution's Relu is fused, so its tensor is the one behind it; the last layer is an output, too.
    assert [(e.name, e.output_name) for e in wide.layers] == [("first", "q"), ("last", "logits")]
    assert only_output(wide).name == "logits"
    assert wide.layers[1].sqnr_db == only_output(wide).sqnr_db
    for fine, coarse in zip(wide.layers, narrow.layers, strict=True):
        assert 40 < fine.sqnr_db < 70
        assert 12 < coarse.sqnr_db < fine.sqnr_db - 15


def test_fetching_layers_does_not_change_the_outputs(network: Path) -> None:
    packed = pack_model(network, "e2m2")
    x = normal(6, 3, 8, 8)
    with_layers, plain = compare(network, packed, x, layers=True), compare(network, packed, x)
    assert plain.layers == ()
    assert only_output(with_layers).kl == pytest.approx(only_output(plain).kl, rel=1e-3)


def test_layers_need_files(network: Path) -> None:
    with pytest.raises(ModelError, match="layers can be compared only between model files"):
        compare(network, session(network), normal(2, 3, 8, 8), layers=True)


def test_a_comparison_knows_how_images_were_prepared(models: Path) -> None:
    path = models / "lenet5_digits.onnx"
    result = compare(path, path, models / "digits_evaluation.npz", limit=50)
    assert (result.num_samples, result.preprocess) == (50, None)
    assert only_output(result).top1 == only_output(result).top1_reference


@pytest.mark.slow
def test_a_real_classifier_reaches_its_published_accuracy(shared: Path) -> None:
    path = shared / "models/imagenet/squeezenet1_1.onnx"
    folder = shared / "data/imagenet/evaluation"
    result = compare(path, path, folder, preprocess="imagenet-torchvision")
    output = only_output(result)
    assert (result.num_samples, round(output.top1 or 0, 3), round(output.top5 or 0, 3)) == (
        300,
        0.613,
        0.843,
    )
    assert (result.preprocess or "").startswith("resize=256,crop=224,mean=0.485/0.456/0.406")
