"""Learned rounding: stays within neighbouring codes, never judged worse than its start, the same for any threads."""

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from afpq import learn as module  # noqa: E402
from afpq._judge import Objective, divergence  # noqa: E402
from afpq._learned_weight import LearnedWeight  # noqa: E402
from afpq.compensate import Choice  # noqa: E402
from afpq.data import open_data  # noqa: E402
from afpq.errors import JournalError  # noqa: E402
from afpq.formats import AfpFormat, codebook, fake_quantize  # noqa: E402
from afpq.graph import load_model  # noqa: E402
from afpq.journal import Journal  # noqa: E402
from afpq.learn import UnsupportedError, learn  # noqa: E402
from afpq.rounding import best_scale, quantize_tensor  # noqa: E402
from afpq.runtime import FloatModel  # noqa: E402

MODELS = Path(__file__).resolve().parents[1] / "models"
KL = Objective("kl", (0,))
FORMATS = [
    AfpFormat(0, 1),
    AfpFormat(0, 2),
    AfpFormat(2, 1),
    AfpFormat(3, 0),
    AfpFormat(3, 2),
    AfpFormat(4, 3),
]


def codebook_values(fmt: AfpFormat) -> np.ndarray:
    return np.unique(codebook(fmt))


def rounded(weight: np.ndarray, fmt: AfpFormat, kind: str = "real"):
    scale, _ = best_scale(weight, fmt, kind=kind)
    return quantize_tensor(weight, fmt, scale, kind=kind)


@pytest.fixture(scope="module")
def case():
    model = load_model(MODELS / "lenet5_digits.onnx")
    data = open_data(str(MODELS / "digits_calibration.npz"), model.inputs, limit=120)
    choices = {n: Choice(AfpFormat(0, 1)) for n in model.tensors()}
    start = {n: rounded(x.weight, AfpFormat(0, 1)) for n, x in model.tensors().items()}
    return FloatModel(model, threads=1), data, choices, start


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("kind", ["real", "integer"])
def test_a_weight_starts_as_it_is_stored(fmt, kind):
    tensor = rounded(np.random.default_rng(0).normal(size=(6, 20)).astype(np.float32), fmt, kind)
    weight = LearnedWeight(tensor, kind)
    np.testing.assert_array_equal(weight.value().numpy(), tensor.decode())
    stored = weight.stored()
    np.testing.assert_array_equal(stored.data, tensor.data)
    np.testing.assert_array_equal(stored.scale, tensor.scale)


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_a_weight_rounds_as_the_definition(fmt):
    random = np.random.default_rng(1)
    tensor = rounded(random.normal(size=(6, 20)).astype(np.float32), fmt)
    weight = LearnedWeight(tensor, "real")
    weight.offset += torch.from_numpy(random.uniform(-1.4, 1.4, (6, 20)).astype(np.float32))
    moved = fake_quantize(weight.exact.numpy(), fmt, np.asarray(tensor.scale)[:, None])
    np.testing.assert_array_equal(weight.value().numpy(), moved)

    weight.offset *= 10
    weight.stay_near()
    moved = weight.value().numpy()
    # Far offsets reach the neighbouring codes, and no others.
    places = np.searchsorted(codebook_values(fmt), weight.integers.numpy())
    reached = np.searchsorted(
        codebook_values(fmt), np.rint(moved / np.asarray(tensor.scale)[:, None])
    )
    assert np.abs(reached - places).max() == 1


def test_gradients_of_scales_are_those_of_lsq():
    fmt = AfpFormat(0, 2)
    tensor = rounded(np.random.default_rng(2).normal(size=(3, 50)).astype(np.float32), fmt)
    weight = LearnedWeight(tensor, "real")
    weight.offset += 0.3
    direction = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    weight.set_gradients(weight.value(), direction)
    # Codes fixed, a value changes with its scale; what rounding left over counts against it (LSQ, equation 3).
    value, exact = weight.value(), (weight.integers + weight.offset * weight.step) * weight.start
    inside = exact.abs() <= fmt.max_integer * weight.start
    expected = (direction * (value - exact * inside)).sum(1, keepdim=True)
    torch.testing.assert_close(weight.log_scale.grad, expected)
    torch.testing.assert_close(weight.offset.grad, direction * inside * weight.step * weight.start)


def test_learning_helps_and_does_not_depend_on_threads(case, monkeypatch):
    network, data, choices, start = case
    monkeypatch.setattr(module, "_STEPS", 80)
    calls = []
    results = [
        learn(network, data, choices, start, {}, KL, num_threads=n, progress=lambda *x: calls.append(x))
        for n in (1, 3)
    ]  # fmt: skip
    assert calls[79] == (80, 80)
    (tensors, biases), (others, other_biases) = results
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(tensor.data, others[name].data)
        np.testing.assert_array_equal(tensor.scale, others[name].scale)
    for name, bias in biases.items():
        np.testing.assert_array_equal(bias, other_biases[name])
    losses = []
    for weights, shifts in ((start, {}), (tensors, biases)):
        changed = network.simulate({n: t.decode() for n, t in weights.items()}, shifts)
        pairs = [(network.run(feed), changed.run(feed)) for feed in data.batches(40)]
        losses.append(divergence(KL, pairs))
    assert losses[1] < 0.8 * losses[0]


def test_a_state_that_is_judged_worse_is_not_taken(case, monkeypatch):
    network, data, choices, start = case
    monkeypatch.setattr(module, "_STEPS", 8)
    monkeypatch.setattr(module, "_BIAS_RATE", 50.0)
    tensors, biases = learn(network, data, choices, start, {}, KL)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(tensor.data, start[name].data)
    for layer in network.model.layers:
        np.testing.assert_array_equal(biases[layer.name], layer.bias)


def test_float_layers_stay(case, monkeypatch):
    network, data, choices, start = case
    monkeypatch.setattr(module, "_STEPS", 8)
    first = next(iter(choices))
    tensors, biases = learn(network, data, {first: choices[first]}, {first: start[first]}, {}, KL)
    assert tensors.keys() == {first}
    assert len(biases) == 1


class Stopped(Exception):
    pass


def stop_at(step):
    def progress(done, total):
        if done == step:
            raise Stopped

    return progress


@pytest.mark.parametrize("step", [3, 8, 13])
def test_learning_goes_on_to_the_same_result(case, monkeypatch, tmp_path, step):
    network, data, choices, start = case
    monkeypatch.setattr(module, "_STEPS", 16)  # checked, and kept, after every second
    expected, shifted = learn(network, data, choices, start, {}, KL)
    with pytest.raises(Stopped):
        learn(
            network, data, choices, start, {}, KL,
            journal=Journal.open(tmp_path / "j", {}), progress=stop_at(step),
        )  # fmt: skip
    steps = []
    tensors, biases = learn(
        network, data, choices, start, {}, KL,
        journal=Journal.open(tmp_path / "j", {}), progress=lambda done, _: steps.append(done),
    )  # fmt: skip

    assert steps == list(range(1 + step // 2 * 2, 17))
    for name, tensor in expected.items():
        np.testing.assert_array_equal(tensors[name].data, tensor.data)
        np.testing.assert_array_equal(tensors[name].scale, tensor.scale)
    for name, bias in shifted.items():
        np.testing.assert_array_equal(biases[name], bias)


def test_a_damaged_state_is_named(case, tmp_path):
    network, data, choices, start = case
    journal = Journal.open(tmp_path / "j", {})
    journal.keep("state", lambda path: path.write_bytes(b"PK nothing"))
    with pytest.raises(JournalError, match="state: damaged"):
        learn(network, data, choices, start, {}, KL, journal=journal)


def test_samples_that_cannot_be_divided_are_refused(case):
    network, data, choices, start = case
    with pytest.raises(UnsupportedError, match="too few samples"):
        learn(network, data.take(1), choices, start, {}, KL)


def test_torch_keeps_its_number_of_threads(case, monkeypatch):
    network, data, choices, start = case
    monkeypatch.setattr(module, "_STEPS", 8)
    before = torch.get_num_threads()
    learn(network, data, choices, start, {}, KL, num_threads=2)
    assert torch.get_num_threads() == before
