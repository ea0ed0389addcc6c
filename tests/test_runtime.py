"""Float graphs: any tensor can be fetched, weights and biases can be swapped; sessions and their errors."""

import subprocess
import sys

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from graphs import CASES, build, constant, node, write

from afpq import runtime
from afpq.errors import ModelError, RuntimeUnavailableError
from afpq.graph import load_model
from afpq.runtime import FloatModel, ort_library_path, session


def plain(path, feeds):
    return ort.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, feeds)


@pytest.fixture
def chain(tmp_path):
    """x -> MatMul m -> Add a -> Relu r -> MatMul y; the first bias is small, the second layer has none."""
    nodes = [
        node("MatMul", "x w", "m"),
        node("Add", "m b", "a"),
        node("Relu", "a", "r"),
        node("MatMul", "r v"),
    ]
    constants = {"w": constant(12, 10), "b": constant(10), "v": constant(10, 70, seed=1)}
    return load_model(write(tmp_path, build(nodes, {"x": ["N", 12]}, constants)))


FEEDS = {"x": constant(3, 12, seed=7)}


@pytest.mark.parametrize("name", CASES)
def test_run_equals_onnxruntime_on_the_file(name, tmp_path):
    path = write(tmp_path, CASES[name].model())
    result = FloatModel(load_model(path)).run(CASES[name].arrays())
    np.testing.assert_array_equal(result[0], plain(path, CASES[name].arrays())[0])


@pytest.mark.parametrize("name", CASES)
def test_simulating_the_models_own_weights_and_biases_changes_nothing(name, tmp_path):
    path = write(tmp_path, CASES[name].model())
    model = load_model(path)
    weights = {layer.weight_name: layer.weight for layer in model.layers}
    biases = {
        layer.name: np.zeros(layer.n, np.float32) if layer.bias is None else layer.bias
        for layer in model.layers
        if layer.kind in ("matmul", "conv")
    }
    expected = plain(path, CASES[name].arrays())[0]
    eps = 2e-3 if expected.dtype == np.float16 else 1e-6
    for given in ({}, biases):
        result = FloatModel(model).simulate(weights, given).run(CASES[name].arrays())[0]
        assert result.dtype == expected.dtype
        np.testing.assert_allclose(result, expected, rtol=0, atol=eps * np.abs(expected).max())


def test_intermediate_tensors_inputs_and_constants_can_be_fetched_in_any_order(chain):
    r, x, m, again, b = FloatModel(chain).run(FEEDS, ["r", "x", "m", "r", "b"])
    product = FEEDS["x"] @ constant(12, 10)
    np.testing.assert_allclose(m, product, atol=1e-5)
    np.testing.assert_allclose(r, np.maximum(product + constant(10), 0), atol=1e-5)
    np.testing.assert_array_equal(again, r)
    np.testing.assert_array_equal(x, FEEDS["x"])
    np.testing.assert_array_equal(b, constant(10))


def test_sessions_are_kept_only_for_the_last_sets_of_outputs(chain):
    model = FloatModel(chain)
    for name in ("m", "a", "r", "y", "m", "a"):
        model.run(FEEDS, [name])
    assert list(model._sessions) == [("r",), ("y",), ("m",), ("a",)]


def test_unknown_tensor_is_named(chain):
    with pytest.raises(ModelError, match="no tensor of the main graph is called 'z'"):
        FloatModel(chain).run(FEEDS, ["z"])


def test_inputs_that_only_unused_nodes_read_need_not_be_fed_for_a_part(tmp_path):
    nodes = [node("MatMul", "x w", "m"), node("Add", "m c")]
    model = load_model(
        write(tmp_path, build(nodes, {"x": [3, 12], "c": [10]}, {"w": constant(12, 10)}))
    )
    assert FloatModel(model).run(FEEDS, ["m"])[0].shape == (3, 10)


def test_simulation_uses_the_given_weights_and_biases(chain):
    w, v = constant(10, 12, seed=2), constant(70, 10, seed=3)
    b, c = constant(10, seed=4), constant(70, seed=5)
    biases = {"matmul_m": b, "matmul_y": c}
    result = FloatModel(chain).simulate({"w": w, "v": v}, biases).run(FEEDS)[0]
    expected = np.maximum(FEEDS["x"] @ w.T + b, 0) @ v.T + c
    np.testing.assert_allclose(result, expected, atol=1e-4)


def test_simulations_are_independent_of_one_another(chain):
    model = FloatModel(chain)
    before = model.run(FEEDS)[0]
    zero = model.simulate({"v": np.zeros((70, 10), np.float32)})
    own = model.simulate({})
    assert not zero.run(FEEDS)[0].any()
    np.testing.assert_array_equal(own.run(FEEDS)[0], before)
    np.testing.assert_array_equal(model.run(FEEDS)[0], before)


def test_simulated_names_and_shapes_are_checked(chain):
    model = FloatModel(chain)
    with pytest.raises(ModelError, match="no weight is called 'z'"):
        model.simulate({"z": constant(10, 12)})
    with pytest.raises(ModelError, match=r"weight 'w' has shape \(10, 12\), got \(12, 10\)"):
        model.simulate({"w": constant(12, 10)})
    with pytest.raises(ModelError, match="no layer 'z' that can take a bias"):
        model.simulate({}, {"z": constant(10)})
    with pytest.raises(ModelError, match=r"bias of 'matmul_m' has shape \(10,\), got \(11,\)"):
        model.simulate({}, {"matmul_m": constant(11)})


def test_a_simulation_computes_what_is_fetched_from_what_is_given(chain):
    model = FloatModel(chain)
    zero = np.zeros((10, 12), np.float32)
    inner = chain.layers[1].input_name
    first, output = model.run(FEEDS, [inner, chain.outputs[0].name])

    fetched = model.simulate({"w": zero}, fetch=[inner]).run(FEEDS)[0]
    assert not np.array_equal(fetched, first)

    # The first layer does not count any more: its output is given.
    given = model.simulate(
        {"w": zero}, fetch=[chain.outputs[0].name], given={**FEEDS, inner: first}
    )
    np.testing.assert_array_equal(given.run({inner: first})[0], output)
    assert not np.array_equal(given.run({inner: 2 * first})[0], output)
    with pytest.raises(ModelError, match="no tensor of the main graph is called 'z'"):
        model.simulate({}, fetch=[inner], given={"z": first})


def test_feeds_that_do_not_fit_are_model_errors(chain):
    with pytest.raises(ModelError, match="onnxruntime cannot run the float model"):
        FloatModel(chain).run({"x": constant(3, 11)})


def test_model_with_external_data_runs_from_memory(tmp_path):
    proto = build([node("MatMul", "x w")], {"x": ["N", 64]}, {"w": constant(64, 64)})
    onnx.save(
        proto, tmp_path / "m.onnx", save_as_external_data=True, size_threshold=0, location="d"
    )
    model = FloatModel(load_model(tmp_path / "m.onnx"))
    x = constant(2, 64)
    np.testing.assert_allclose(model.run({"x": x})[0], x @ constant(64, 64), atol=1e-4)
    np.testing.assert_array_equal(model.simulate({}).run({"x": x})[0], model.run({"x": x})[0])


def test_weight_behind_folded_nodes_can_be_replaced(tmp_path):
    case = CASES["weight_behind_reshape_and_transpose"]
    model = load_model(write(tmp_path, case.model()))
    weight = constant(10, 12, seed=6)
    result = FloatModel(model).simulate({"w": weight}).run(case.arrays())[0]
    np.testing.assert_allclose(result, case.arrays()["x"] @ weight.T, atol=1e-5)


def test_session_refuses_what_is_no_model(tmp_path):
    path = tmp_path / "bad.onnx"
    path.write_bytes(b"text")
    with pytest.raises(ModelError, match=r"onnxruntime cannot load .*bad\.onnx"):
        session(path, ops=False)
    with pytest.raises(ModelError, match="onnxruntime cannot load the model"):
        session(b"text", ops=False)


def test_session_takes_threads(tmp_path):
    path = write(tmp_path, CASES["gemm"].model())
    assert session(path, threads=3).get_session_options().intra_op_num_threads == 3


def test_library_that_is_missing_is_an_error_with_a_hint(monkeypatch):
    monkeypatch.setattr(runtime.Path, "is_file", lambda self: False)
    with pytest.raises(RuntimeUnavailableError, match=r"libafpq_ort.* is missing; install afpq"):
        ort_library_path()


def test_library_that_does_not_load_is_an_error(monkeypatch, tmp_path):
    broken = tmp_path / "libafpq_ort.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setattr(runtime, "ort_library_path", lambda: str(broken))
    with pytest.raises(RuntimeUnavailableError, match=r"cannot load .*libafpq_ort\.so"):
        session(b"")


def test_importing_the_package_does_not_start_onnxruntime():
    code = "import sys, afpq; sys.exit('onnxruntime' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_simulation_of_a_real_network_takes_all_weights(shared):
    model = load_model(shared / "models/tinyml/kws_dscnn.onnx")
    runner = FloatModel(model)
    feeds = {"input": constant(2, 1, 49, 10)}
    result = runner.simulate({n: 2 * layer.weight for n, layer in model.tensors().items()}).run(
        feeds
    )
    assert np.abs(result[0] - runner.run(feeds)[0]).max() > 0.1
