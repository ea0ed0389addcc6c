"""Statistics of layer inputs against onnxruntime's own convolution of one-hot kernels, and against NumPy."""

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from afpq.calibrate import HISTOGRAM_LOWEST, Stats, TensorStats, calibrate
from afpq.errors import DataError
from afpq.graph import load_model

Floats = npt.NDArray[np.float32]
MODULE = importlib.import_module("afpq.calibrate")  # the package shows the function of this name


def normal(*shape: int) -> Floats:
    return np.random.default_rng(list(shape)).standard_normal(shape).astype(np.float32)


def save_model(
    path: Path,
    nodes: list[onnx.NodeProto],
    shape: list[int | str],
    constants: dict[str, Floats],
    *,
    rank: int | None = None,
) -> Path:
    """A model from "x" of this shape to "y"."""
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * (rank or len(shape)))],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    opset = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=9), path)
    return path


def run(path: Path, x: Floats) -> Floats:
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": x})[0])


def conv_stats(
    folder: Path, x: Floats, kernel: tuple[int, ...], groups: int, attributes: dict[str, Any]
) -> TensorStats:
    channels = x.shape[1]
    taps = int(np.prod(kernel))
    per_group = -(-64 * groups // (channels * taps)) * groups  # enough weights for a layer
    node = helper.make_node("Conv", ["x", "w"], ["y"], name="conv", group=groups, **attributes)
    weight = normal(per_group, channels // groups, *kernel)
    path = save_model(folder / "m.onnx", [node], ["N", *x.shape[1:]], {"w": weight})
    return calibrate(path, x)["conv"]


def shifted_inputs(
    folder: Path, x: Floats, kernel: tuple[int, ...], attributes: dict[str, Any]
) -> Floats:
    """What tap t reads in channel c at every output position: [n, channels, taps, positions]."""
    channels, taps = x.shape[1], int(np.prod(kernel))
    one_hot = np.tile(np.eye(taps, dtype=np.float32), (channels, 1)).reshape(-1, 1, *kernel)
    node = helper.make_node("Conv", ["x", "w"], ["y"], group=channels, **attributes)
    path = save_model(folder / "shift.onnx", [node], ["N", *x.shape[1:]], {"w": one_hot})
    return run(path, x).reshape(len(x), channels, taps, -1)


GEOMETRIES: list[tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = [
    ((3, 4, 7, 6), (1, 1), {}),
    ((3, 4, 7, 6), (1, 1), {"strides": [2, 2]}),
    ((3, 4, 7, 6), (3, 3), {"pads": [1, 1, 1, 1]}),
    ((2, 4, 9, 8), (3, 3), {"pads": [0, 2, 1, 0], "strides": [2, 3]}),
    ((2, 4, 9, 8), (3, 2), {"pads": [2, 1, 2, 1], "dilations": [2, 3]}),
    ((2, 4, 3, 3), (3, 3), {"pads": [2, 2, 2, 2], "dilations": [2, 2], "strides": [3, 1]}),
    ((2, 4, 2, 2), (5, 5), {"pads": [4, 4, 4, 4]}),
    ((2, 4, 8, 7), (3, 3), {"auto_pad": "SAME_UPPER", "strides": [2, 2]}),
    ((2, 4, 8, 7), (4, 2), {"auto_pad": "SAME_LOWER", "strides": [2, 1]}),
    ((2, 4, 8, 7), (3, 3), {"auto_pad": "VALID", "strides": [3, 2]}),
    ((2, 8, 30), (5,), {"pads": [4, 0]}),
    ((2, 8, 30), (4,), {"strides": [3], "dilations": [2], "pads": [1, 3]}),
    ((2, 4, 4, 5, 3), (2, 3, 2), {"pads": [1, 0, 1, 0, 2, 1], "strides": [1, 2, 1]}),
]


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize(("shape", "kernel", "attributes"), GEOMETRIES)
def test_a_convolution_averages_what_each_tap_reads(
    tmp_path: Path,
    shape: tuple[int, ...],
    kernel: tuple[int, ...],
    attributes: dict[str, Any],
    groups: int,
) -> None:
    x = normal(*shape)
    stats = conv_stats(tmp_path, x, kernel, groups, attributes)
    read = shifted_inputs(tmp_path, x, kernel, attributes).astype(np.float64)
    read = read.reshape(len(x), groups, shape[1] // groups, *read.shape[2:])
    for moment, got in ((read, stats.mean), (read**2, stats.second_moment)):
        expected = moment.mean(axis=(0, 4)).transpose(0, 2, 1)  # [groups, taps, channels of group]
        np.testing.assert_allclose(got, expected.reshape(groups, -1), rtol=1e-6, atol=1e-7)
    assert stats.count == len(x) * read.shape[-1]
    assert (stats.low, stats.high) == (x.min(), x.max())


def matmul_model(folder: Path, shape: list[int | str], weight: Floats) -> Path:
    node = helper.make_node("MatMul", ["x", "w"], ["y"], name="mm")
    return save_model(folder / "m.onnx", [node], shape, {"w": weight})


@pytest.mark.parametrize("shape", [(6, 8), (3, 5, 8), (2, 3, 5, 8)])
def test_a_matrix_product_averages_over_all_leading_axes(
    tmp_path: Path, shape: tuple[int, ...]
) -> None:
    x = normal(*shape)
    stats = calibrate(matmul_model(tmp_path, ["N", *shape[1:]], normal(8, 10)), x)["mm"]
    rows = x.reshape(-1, 8).astype(np.float64)
    np.testing.assert_allclose(stats.mean, rows.mean(0)[None], rtol=1e-12)
    np.testing.assert_allclose(stats.second_moment, (rows**2).mean(0)[None], rtol=1e-12)
    assert stats.count == len(rows)


def test_a_constant_on_the_left_averages_over_the_columns(tmp_path: Path) -> None:
    node = helper.make_node("MatMul", ["w", "x"], ["y"], name="mm")
    path = save_model(tmp_path / "m.onnx", [node], ["N", 8, 5], {"w": normal(10, 8)})
    x = normal(3, 8, 5)
    np.testing.assert_allclose(
        calibrate(path, x)["mm"].second_moment[0], (x.astype(np.float64) ** 2).mean((0, 2))
    )


def test_a_transposed_gemm_averages_over_the_other_axis(tmp_path: Path) -> None:
    node = helper.make_node("Gemm", ["x", "w"], ["y"], name="gemm", transA=1)
    path = save_model(tmp_path / "m.onnx", [node], [8, 5], {"w": normal(8, 10)})
    x = normal(8, 5)
    np.testing.assert_allclose(calibrate(path, x)["gemm"].mean[0], x.astype(np.float64).mean(1))


def test_gather_tables_have_no_statistics(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Cast", ["x"], ["i"], to=TensorProto.INT64),
        helper.make_node("Gather", ["t", "i"], ["e"], name="table"),
        helper.make_node("MatMul", ["e", "w"], ["y"], name="mm"),
    ]
    constants = {"t": normal(9, 8), "w": normal(8, 10)}
    path = save_model(tmp_path / "m.onnx", nodes, ["N", 4], constants, rank=3)
    stats = calibrate(path, np.ones((3, 4), np.float32))
    assert list(stats) == ["mm"]
    assert ("table" in stats, stats.get("table")) == (False, None)
    np.testing.assert_allclose(stats["mm"].mean[0], constants["t"][1])


def test_a_model_without_layers_gives_empty_statistics(tmp_path: Path) -> None:
    path = save_model(tmp_path / "m.onnx", [helper.make_node("Relu", ["x"], ["y"])], ["N", 4], {})
    assert len(calibrate(path, normal(2, 4))) == 0


def test_the_histogram_counts_powers_of_two(tmp_path: Path) -> None:
    x = np.array([[0, 1, -1.99, 2, 0.5, 2.0**-60, 2.0**30, -0.0]], np.float32)
    histogram = calibrate(matmul_model(tmp_path, ["N", 8], normal(8, 10)), x)["mm"].histogram
    expected = np.zeros(64, np.int64)
    for power, count in ((0, 2), (1, 1), (-1, 1)):
        expected[power - HISTOGRAM_LOWEST] = count
    expected[0] = expected[63] = 1
    np.testing.assert_array_equal(histogram, expected)


@pytest.fixture
def small_network(tmp_path: Path) -> Path:
    """Two branches over one tensor, a strided convolution, a pooled matrix product."""
    nodes = [
        helper.make_node("Conv", ["x", "a"], ["p"], name="a", pads=[1, 1, 1, 1]),
        helper.make_node("Conv", ["x", "b"], ["q"], name="b", pads=[1, 1, 1, 1]),
        helper.make_node("Add", ["p", "q"], ["s"]),
        helper.make_node("Relu", ["s"], ["r"]),
        helper.make_node("Conv", ["r", "c"], ["t"], name="c", strides=[2, 2], group=8),
        helper.make_node("GlobalAveragePool", ["t"], ["u"]),
        helper.make_node("Flatten", ["u"], ["v"]),
        helper.make_node("Gemm", ["v", "d"], ["y"], name="d"),
    ]
    constants = {
        "a": normal(8, 3, 3, 3),
        "b": normal(8, 3, 3, 3) * np.float32(0.5),
        "c": normal(8, 1, 3, 3),
        "d": normal(8, 10),
    }
    return save_model(tmp_path / "net.onnx", nodes, ["N", 3, 9, 9], constants, rank=2)


def assert_same(one: Stats, other: Stats, rtol: float = 0) -> None:
    assert list(one) == list(other)
    for name in one:
        a, b = one[name], other[name]
        assert (a.count, a.low, a.high) == (b.count, b.low, b.high)
        np.testing.assert_array_equal(a.histogram, b.histogram)
        np.testing.assert_allclose(a.mean, b.mean, rtol=rtol)
        np.testing.assert_allclose(a.second_moment, b.second_moment, rtol=rtol)


@pytest.mark.parametrize("threads", [2, 3, 8])
def test_the_number_of_threads_does_not_change_a_bit(
    small_network: Path, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    monkeypatch.setattr(MODULE, "MAX_BATCH", 3)
    x = normal(20, 3, 9, 9)
    assert_same(
        calibrate(small_network, x, threads=threads), calibrate(small_network, x, threads=1)
    )


def test_activations_that_do_not_fit_are_fetched_in_several_passes(
    small_network: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = normal(7, 3, 9, 9)
    whole = calibrate(small_network, x)
    monkeypatch.setattr(MODULE, "FETCH_BYTES", 2650)  # not all three tensors
    seen: list[tuple[int, ...]] = []
    parts = calibrate(small_network, x, progress=lambda _, done, total: seen.append((done, total)))
    assert_same(parts, whole, rtol=1e-6)
    assert seen[-1] == (14, 14)  # two passes over 7 samples
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_batches_merge_to_the_same_statistics(
    small_network: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = normal(7, 3, 9, 9)
    whole = calibrate(small_network, x)
    monkeypatch.setattr(MODULE, "MAX_BATCH", 2)
    assert_same(calibrate(small_network, x), whole, rtol=1e-6)


def test_statistics_know_their_data(small_network: Path) -> None:
    x = normal(7, 3, 9, 9)
    stats = calibrate(small_network, x)
    assert stats.num_samples == 7
    assert stats.data_hash == calibrate(load_model(small_network), x).data_hash
    assert stats.data_hash != calibrate(small_network, x[:6]).data_hash
    assert calibrate(small_network, x, limit=3).num_samples == 3


def test_statistics_follow_the_order_of_the_layers(small_network: Path) -> None:
    assert list(calibrate(small_network, normal(2, 3, 9, 9))) == ["a", "b", "c", "d"]


def test_sequences_of_different_lengths_count_by_position(tmp_path: Path) -> None:
    path = matmul_model(tmp_path, ["N", "length", 8], normal(8, 10))
    batches = [normal(2, 3, 8), normal(1, 6, 8)]
    rows = np.concatenate([b.reshape(-1, 8) for b in batches]).astype(np.float64)
    stats = calibrate(path, batches)
    assert (stats["mm"].count, stats.num_samples) == (12, 3)
    np.testing.assert_allclose(stats["mm"].mean[0], rows.mean(0))


def test_a_fixed_batch_is_calibrated_whole(tmp_path: Path) -> None:
    seen: list[tuple[int, ...]] = []
    x = normal(7, 8)
    path = matmul_model(tmp_path, [2, 8], normal(8, 10))
    stats = calibrate(path, x, progress=lambda _, *numbers: seen.append(numbers))
    np.testing.assert_allclose(stats["mm"].mean[0], x[:6].astype(np.float64).mean(0))
    assert seen[-1] == (6, 6)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_data_that_is_not_finite_is_an_error(tmp_path: Path, value: float) -> None:
    x = normal(4, 8)
    x[2, 3] = value
    with pytest.raises(DataError, match="the data holds NaN or infinity in input 'x'"):
        calibrate(matmul_model(tmp_path, ["N", 8], normal(8, 10)), x)


def test_a_layer_that_meets_infinity_is_named(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Exp", ["x"], ["e"]),
        helper.make_node("MatMul", ["e", "w"], ["y"], name="head"),
    ]
    path = save_model(tmp_path / "m.onnx", nodes, ["N", 8], {"w": normal(8, 10)})
    with pytest.raises(DataError, match="layer 'head' gets NaN or infinity in its input 'e'"):
        calibrate(path, np.full((2, 8), 1000, np.float32))


def test_saved_statistics_come_back_unchanged(small_network: Path, tmp_path: Path) -> None:
    stats = calibrate(small_network, normal(5, 3, 9, 9))
    stats.save(tmp_path / "one.stats")
    again = Stats.load(tmp_path / "one.stats")
    assert_same(again, stats)
    assert (again.num_samples, again.data_hash) == (stats.num_samples, stats.data_hash)
    again.save(tmp_path / "two.stats")
    assert (tmp_path / "one.stats").read_bytes() == (tmp_path / "two.stats").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["net.onnx", "one.stats", "two.stats"]


def test_other_files_are_no_statistics(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x=normal(2))
    with pytest.raises(DataError, match=r"x.npz holds no statistics of afpq"):
        Stats.load(tmp_path / "x.npz")
    np.savez(tmp_path / "x.npz", meta=np.array('{"version": 7}'))
    with pytest.raises(DataError, match=r"statistics of version 7, not 1"):
        Stats.load(tmp_path / "x.npz")


def test_expected_output_error_is_weight_error_times_second_moment(tmp_path: Path) -> None:
    # The reason for the statistics: with independent inputs the error of an output is a weighted sum.
    x = normal(2000, 8)
    stats = calibrate(matmul_model(tmp_path, ["N", 8], normal(8, 10)), x)["mm"]
    error = normal(8) * np.float32(0.01)
    measured = float(((x @ error).astype(np.float64) ** 2).mean())
    predicted = float((stats.second_moment[0] * error**2).sum())
    assert measured == pytest.approx(predicted, rel=0.1)


@pytest.mark.parametrize(
    ("model", "shape"),
    [("mnist/mnist_cnn_cntk.onnx", (3, 1, 28, 28)), ("tinyml/kws_dscnn.onnx", (3, 1, 49, 10))],
)
def test_real_networks_are_calibrated(shared: Path, model: str, shape: tuple[int, ...]) -> None:
    loaded = load_model(shared / "models" / model)
    stats = calibrate(loaded, normal(*shape))
    for layer in loaded.layers:
        if layer.kind in ("matmul", "conv"):
            assert stats[layer.name].mean.shape == (layer.groups, layer.k)
            assert (stats[layer.name].second_moment >= stats[layer.name].mean ** 2 - 1e-9).all()


def test_the_geometries_cover_all_ranks_and_paddings() -> None:
    paddings = {attributes.get("auto_pad", "NOTSET") for _, _, attributes in GEOMETRIES}
    assert {len(kernel) for _, kernel, _ in GEOMETRIES} == {1, 2, 3}
    assert paddings == {"NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER"}
