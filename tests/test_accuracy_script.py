"""The scripts that measure accuracy: their numbers against plain ones, and runs from end to end."""

import json
import subprocess
import sys
import tracemalloc
from importlib.util import find_spec
from pathlib import Path

import graphs
import numpy as np
import pytest

from afpq.data import open_data

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
sys.path.insert(0, str(SCRIPTS))

from accuracy.cases import cases, cifar, sentence_batches  # noqa: E402
from accuracy.metrics import measure  # noqa: E402


def logits(*shape: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_a_language_model_is_judged_by_the_tokens_that_came() -> None:
    ids = np.array([[1, 2, 0], [2, 2, 1]])
    data = open_data({"input_ids": ids}, [("input_ids", np.int64, ("n", "s"))])
    output = logits(2, 3, 4, seed=0)

    result = measure("tokens", lambda feed: output, [output], data, None)

    p = np.exp(output) / np.exp(output).sum(-1, keepdims=True)
    came = [p[0, 0, 2], p[0, 1, 0], p[1, 0, 2], p[1, 1, 1]]
    assert result["perplexity"] == pytest.approx(np.exp(-np.log(came).mean()))
    assert (result["agreement"], result["kl"]) == (1, pytest.approx(0, abs=1e-12))


def test_classes_are_judged_by_labels() -> None:
    data = open_data({"x": np.zeros((30, 1), np.float32)}, [("x", np.float32, ("n", 1))])
    output = logits(30, 10, seed=1)
    parts = [output[:20], output[20:]]
    queue = iter([-part for part in parts])

    result = measure("classes", lambda feed: next(queue), parts, data, output.argmin(1))

    assert (result["top1"], result["top5"]) == (1, 1)
    assert result["sqnr_db"] == pytest.approx(-6.02, abs=0.01)  # the error is twice the signal


def test_sentences_are_judged_by_the_order_of_their_similarities() -> None:
    rng = np.random.default_rng(2)
    arrays = {"len_a": rng.integers(2, 6, 40), "len_b": rng.integers(2, 6, 40)}
    arrays |= {f"ids_{side}": rng.integers(1, 9, (40, 6)) for side in "ab"}
    batches = sentence_batches(arrays, np.arange(40))
    inputs = [(name, np.int64, ("n", "s")) for name in batches[0]]
    data = open_data(batches, inputs)
    table = logits(9, 4, seed=3)

    def run(feed: dict) -> np.ndarray:
        # Beyond a sentence's end there is something that must not count.
        return table[feed["input_ids"]] + 100.0 * (1 - feed["attention_mask"][..., None])

    def embed(side: str, pair: int) -> np.ndarray:
        ids = arrays[f"ids_{side}"][pair, : arrays[f"len_{side}"][pair]]
        mean = table[ids].mean(0)
        return mean / np.linalg.norm(mean)

    similarity = np.array([embed("a", pair) @ embed("b", pair) for pair in range(40)])
    reference = [run(feed) for feed in batches]
    assert measure("sentences", run, reference, data, np.exp(similarity)) == {
        "sqnr_db": pytest.approx(330, abs=40),
        "cosine": pytest.approx(1),
        "spearman": pytest.approx(1),
    }


def test_images_are_cut_before_they_are_converted(tmp_path: Path) -> None:
    images = np.random.default_rng(4).integers(0, 256, (2000, 32, 32, 3), np.uint8)
    np.savez(tmp_path / "train.npz", images=images, labels=np.arange(2000))
    whole = cifar(tmp_path / "train.npz")

    tracemalloc.start()
    part = cifar(tmp_path / "train.npz", 20)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert whole["input"].shape == (2000, 3, 32, 32)
    np.testing.assert_array_equal(part["input"], whole["input"][:20])
    np.testing.assert_array_equal(part["labels"], np.arange(20))
    assert peak < whole["input"].nbytes / 2


def test_a_network_is_loaded_when_it_is_its_turn(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()  # and nothing in it

    found = cases(tmp_path, tmp_path)

    assert list(found)[:2] == ["resnet_digits", "resnet20_cifar10"] and len(found) == 7
    assert found["resnet_digits"]().name == "resnet_digits"
    with pytest.raises(FileNotFoundError, match=r"cifar10.train\.npz"):
        found["resnet20_cifar10"]()


@pytest.mark.skipif(
    find_spec("onnxruntime.quantization.matmul_nbits_quantizer") is None,
    reason="the baselines of the script are tools of newer runtimes",
)
def test_the_script_measures_the_shipped_network(tmp_path: Path) -> None:
    command = [sys.executable, SCRIPTS / "bench_accuracy", "--only", "resnet_digits"]
    command += ["--methods", "int", "ort-nbits", "--bits", "4", "--samples", "40"]
    command += ["--results", tmp_path, "--materials", tmp_path]

    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "accuracy.json").read_text())["rows"]
    assert [row["method"] for row in rows[:3]] == ["float32", "int", "int"]
    assert [round(row["bits_per_weight"]) for row in rows[:3]] == [32, 8, 4]
    assert all(row["agreement"] > 0.9 for row in rows[:3])
    text = (tmp_path / "accuracy.md").read_text()
    assert text.count("- resnet_digits, ort-nbits: the network has no MatMul") == 1

    first = rows
    command[command.index("int") : command.index("--bits")] = ["gaussian-limit"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "accuracy.json").read_text())["rows"]
    # What was measured before stays, what was measured again is there once, and the limit is a limit.
    assert [r["method"] for r in rows].count("float32") == 1
    assert [r for r in rows if r["method"] == "int"] == [r for r in first if r["method"] == "int"]
    plain, limit = (
        next(r["kl"] for r in rows if r["method"] == m and round(r["bits_per_weight"]) == 4)
        for m in ("int", "gaussian-limit")
    )
    assert 0 < limit < plain


def test_the_sweep_script_writes_what_it_finds(tmp_path: Path) -> None:
    nodes = [graphs.node("Flatten", "input", "f"), graphs.node("MatMul", "f w", "y")]
    weight = graphs.constant(3072, 10)
    model = graphs.build(nodes, {"input": ["n", 3, 32, 32]}, {"w": weight}, {"y": ["n", 10]})
    for folder in ("models/cifar10", "data/cifar10"):
        (tmp_path / folder).mkdir(parents=True)
    graphs.write(tmp_path / "models/cifar10", model, "resnet20.onnx")
    images = np.random.default_rng(5).integers(0, 256, (24, 32, 32, 3), np.uint8)
    np.savez(tmp_path / "data/cifar10/test.npz", images=images, labels=np.arange(24) % 10)
    command = [sys.executable, SCRIPTS / "bench_sweep", "--materials", tmp_path]
    command += ["--results", tmp_path / "out", "--samples", 12, "--threads", 1]

    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
    assert "resnet20.onnx: top-1 over 12 samples" in done.stdout
    found = json.loads((tmp_path / "out/sweep.json").read_text())
    assert len({curve["format"] for curve in found["curves"]}) == 8
    text = (tmp_path / "out/sweep.md").read_text()
    assert "Written by `scripts/bench_sweep --samples 12`: `afpq sweep` for ResNet-20" in text
    assert (tmp_path / "out/sweep.svg").read_text().startswith("<svg ")
