"""What reports measure: histograms, losses of single layers, speed; and what they say where that is impossible."""

from dataclasses import replace
from pathlib import Path

import graphs
import numpy as np
import pytest

import afpq
from afpq._examine import BINS, Reference, examine, histogram
from afpq.data import open_data
from afpq.errors import ModelError
from afpq.formats import codebook
from afpq.graph import load_model
from afpq.packed import PackedLayer, read_packed, weight_values
from afpq.report import RunFacts


@pytest.fixture
def layer(packed_lenet: Path) -> PackedLayer:
    return read_packed(packed_lenet).layers[2]


def test_code_counts_are_those_of_the_decoded_values(layer: PackedLayer) -> None:
    found = histogram(layer)

    steps = np.unique(codebook(layer.format))
    integers = weight_values(layer) / layer.stored_scale.astype(np.float32).reshape(-1, 1)
    expected = [int((np.rint(integers) == step).sum()) for step in steps]
    assert found["codes"] == expected and found["float"] is None
    assert found["limit"] > steps[-1]


def test_float_weights_are_counted_in_units_of_the_scale(layer: PackedLayer) -> None:
    scale = layer.stored_scale.astype(np.float32).reshape(-1, 1)
    weight = np.zeros((layer.n, layer.k), np.float32)
    weight[:, 0] = (100 * layer.format.max_integer * scale)[:, 0]

    found = histogram(layer, weight)

    assert len(found["float"]) == BINS
    assert found["float"][-1] == layer.n and found["float"][BINS // 2] == layer.n * (layer.k - 1)
    assert found["clipped"] == pytest.approx(1 / layer.k)


def test_losses_of_single_layers_follow_their_widths(models: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.onnx"
    pins = {"/9/Gemm": "e0m1", "/3/Conv": "e0m7"}
    afpq.quantize(models / "lenet5_digits.onnx", overrides=pins, bits=8).save(path)
    model = load_model(models / "lenet5_digits.onnx")
    data = open_data(models / "digits_evaluation.npz", model.inputs, limit=40)

    facts = examine(
        read_packed(path), RunFacts(), reference=Reference(model, data, "digits"), timed=False
    )

    narrow, wide = facts.layers["/9/Gemm"], facts.layers["/3/Conv"]
    assert narrow.measured_loss is not None and wide.measured_loss is not None
    assert narrow.measured_loss > 100 * wide.measured_loss > 0
    assert (narrow.weight_sqnr_db or 0) < 12 < 30 < (wide.weight_sqnr_db or 0)
    assert narrow.output_sqnr_db is not None and facts.speed is None
    assert facts.measured == {"objective": "kl", "samples": 16, "data": "digits"}


def test_the_file_alone_gives_times_and_code_counts(packed_lenet: Path) -> None:
    facts = examine(read_packed(packed_lenet), RunFacts())

    assert facts.speed is not None and facts.speed["reference"] is None
    assert facts.speed["ratio"] is None and facts.speed["inputs"] == "made up"
    shares = [found.time_share or 0.0 for found in facts.layers.values()]
    assert all(share > 0 for share in shares)
    assert sum(shares) + facts.speed["other_nodes_share"] == pytest.approx(1)
    for found in facts.layers.values():
        assert found.measured_loss is None and found.codebook_histogram is not None


def test_another_float_model_is_not_compared(packed_lenet: Path, models: Path) -> None:
    other = load_model(models / "resnet_digits.onnx")

    facts = examine(read_packed(packed_lenet), RunFacts(), reference=Reference(other), timed=False)

    assert "have no weight of their name and shape" in facts.not_measured["float weights"]
    assert all(f.weight_sqnr_db is None for f in facts.layers.values())


def test_equalised_weights_are_not_compared(packed_lenet: Path, models: Path) -> None:
    packed = read_packed(packed_lenet)
    packed = replace(packed, metadata={**packed.metadata, "afpq.equalized": "yes"})

    facts = examine(
        packed,
        RunFacts(),
        reference=Reference(load_model(models / "lenet5_digits.onnx")),
        timed=False,
    )

    assert "equalisation moved factors" in facts.not_measured["float weights"]
    assert facts.layers["/9/Gemm"].weight_sqnr_db is None


def test_speed_is_left_out_with_the_reason_where_inputs_cannot_be_made_up(tmp_path: Path) -> None:
    nodes = [
        graphs.node("Reshape", "x shape", "r"),
        graphs.node("MatMul", "r w", "y"),
    ]
    constants = {"w": graphs.constant(16, 32), "shape": np.array([-1, 16], np.int64)}
    path = graphs.write(tmp_path, graphs.build(nodes, {"x": ["n", 24]}, constants))
    afpq.quantize(path, bits=8).save(tmp_path / "packed.onnx")

    facts = examine(read_packed(tmp_path / "packed.onnx"), RunFacts())

    assert facts.speed is None
    assert "cannot run the model on this input" in facts.not_measured["speed"]


def test_what_fails_is_left_out_with_the_reason(
    packed_lenet: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ModelError("too large")

    monkeypatch.setattr("afpq._examine.compare", fail)
    model = load_model(models / "lenet5_digits.onnx")
    data = open_data(models / "digits_evaluation.npz", model.inputs, limit=8)

    facts = examine(
        read_packed(packed_lenet), RunFacts(), reference=Reference(model, data), timed=False
    )

    assert facts.not_measured == {"SQNR of outputs of layers": "too large"}
    assert facts.layers["/9/Gemm"].measured_loss is not None
