"""The commands `inspect` and `diff`: what they show of weights, and of two models."""

import json
from pathlib import Path

import numpy as np
import pytest
from commands import error_of, run

from afpq._cli_inspect import _bars, _histogram
from afpq._tree import tree_lines
from afpq.packed import read_packed, weight_values


@pytest.fixture
def pair(lenet: Path, tmp_path: Path) -> tuple[Path, Path]:
    """LeNet with 4 and with 6 bits, one layer of the second left float."""
    a, b = tmp_path / "a.onnx", tmp_path / "b.onnx"
    assert run("quantize", lenet, "-o", a, "--bits", 4, "--layer", "/3/*=e2m1") == 0
    assert run("quantize", lenet, "-o", b, "--bits", 6, "--layer", "/3/*=e2m1",
               "--exclude", "/11/*") == 0  # fmt: skip
    return a, b


def test_a_histogram_counts_every_weight() -> None:
    weight = np.array([[-6, -6, 5.9, 0.1], [0.2, 0.3, -0.1, 3.1]], np.float32)

    found = _histogram(weight)

    assert found == {"limit": 6.0, "counts": [2, 0, 0, 0, 0, 1, 3, 0, 0, 1, 0, 1]}
    assert _bars(found) == "▆    ▃█  ▃ ▃"
    assert _bars(_histogram(np.zeros((2, 2), np.float32))) == "      █     "


def test_inspect_shows_histograms(
    lenet: Path, pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (lenet, pair[0]):
        capsys.readouterr()
        assert run("inspect", path, "--json") == 0
        layers = json.loads(capsys.readouterr().out)["layers"]
        assert all(sum(e["histogram"]["counts"]) == e["num_weights"] for e in layers)
        assert run("inspect", path) == 0
        assert "█" in capsys.readouterr().out


def test_a_tree_has_sums_where_names_branch(
    lenet: Path, pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    layers = [
        {"name": name, "weights": n}
        for n, name in enumerate(("stem", "a.0/conv", "a.0/norm.fc", "a.1/x/y", "a", "b/c"), 1)
    ]
    lines = list(
        tree_lines(
            layers, lambda e: f"{e['weights']}", lambda es: f"sum {sum(e['weights'] for e in es)}"
        )
    )
    assert lines == [
        ("stem", "1"), ("a.", "sum 9"), ("  0/", "sum 5"), ("    conv", "2"), ("    norm.fc", "3"),
        ("  1/x/y", "4"), ("a", "5"), ("b/c", "6"),
    ]  # fmt: skip

    for path, what in ((lenet, "5 layers, "), (pair[0], " bits: e2m")):
        capsys.readouterr()
        assert run("inspect", path, "--tree") == 0
        text = capsys.readouterr().out
        assert what in text and "Conv" in text


def test_diff_tells_layers_apart(
    pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert run("diff", *pair, "--json") == 0
    result = json.loads(capsys.readouterr().out)

    layers = {e["name"]: e for e in result["layers"]}
    assert layers["/3/Conv"]["same"] and layers["/3/Conv"]["sqnr_db"] is None
    assert layers["/11/Gemm"]["second"] is None and not layers["/11/Gemm"]["same"]
    a, b = (next(x for x in read_packed(path).layers if x.name == "/7/Gemm") for path in pair)
    x, y = weight_values(a).astype(float), weight_values(b).astype(float)
    expected = 10 * np.log10((x**2).sum() / ((x - y) ** 2).sum())
    assert layers["/7/Gemm"]["sqnr_db"] == pytest.approx(expected)
    assert [e["name"] for e in result["layers"] if e["same"]] == ["/0/Conv", "/3/Conv"]

    assert run("diff", *pair) == 0
    table = capsys.readouterr().out
    assert "LARGER" in table and "3 of 5 layers differ" in table


def test_diff_of_a_model_with_itself(
    pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert run("diff", pair[0], pair[0]) == 0
    out = capsys.readouterr().out
    assert "all 5 layers are stored alike" in out and "the same size" in out


def test_diff_needs_packed_models(
    lenet: Path, pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert run("diff", lenet, pair[0]) == 1
    assert "not a packed model" in error_of(capsys)
