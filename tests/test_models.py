"""The models that ship in `models/`: what models/README.md says of them is true."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest

NAMES = ["lenet5_digits.onnx", "resnet_digits.onnx", "resnet_digits-bn.onnx"]
MAX_BYTES = 1_000_000


def run(path: Path, images: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(["logits"], {"input": images})[0])


def op_types(path: Path) -> list[str]:
    return [node.op_type for node in onnx.load(path).graph.node]


def stated_correct(models: Path, name: str) -> int:
    """The number of held-out images that the README says the float model gets right."""
    row = re.search(
        rf"^\| `{re.escape(name)}` .*?(\d+) of 360", (models / "README.md").read_text(), re.M
    )
    assert row is not None, f"models/README.md says nothing of {name}"
    return int(row.group(1))


@pytest.mark.parametrize("name", NAMES)
def test_model_has_the_stated_accuracy(models: Path, name: str) -> None:
    with np.load(models / "digits_evaluation.npz") as data:
        logits = run(models / name, data["input"])
        correct = int((logits.argmax(axis=1) == data["labels"]).sum())
    assert len(logits) == 360
    # Another processor may decide one image on the border differently.
    assert abs(correct - stated_correct(models, name)) <= 1


@pytest.mark.parametrize("name", NAMES)
def test_model_is_small_and_takes_any_batch(models: Path, name: str) -> None:
    path = models / name
    assert path.stat().st_size < MAX_BYTES
    assert run(path, np.zeros((3, 1, 28, 28), np.float32)).shape == (3, 10)


def test_batch_norm_is_kept_in_one_file_and_folded_in_the_other(models: Path) -> None:
    assert op_types(models / "resnet_digits-bn.onnx").count("BatchNormalization") == 9
    assert "BatchNormalization" not in op_types(models / "resnet_digits.onnx")


def test_lenet5_has_no_batch_norm(models: Path) -> None:
    assert "BatchNormalization" not in op_types(models / "lenet5_digits.onnx")


def test_both_residual_networks_compute_the_same(models: Path) -> None:
    with np.load(models / "digits_evaluation.npz") as data:
        images = data["input"]
    folded, live = (run(models / name, images) for name in NAMES[1:])
    np.testing.assert_allclose(folded, live, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("name", "count"), [("calibration", 128), ("evaluation", 360)])
def test_images_fit_the_models(models: Path, name: str, count: int) -> None:
    with np.load(models / f"digits_{name}.npz") as data:
        assert data["input"].shape == (count, 1, 28, 28)
        assert data["input"].dtype == np.float32
        assert data["input"].min() == 0
        assert data["input"].max() == 1
        assert set(data["labels"]) == set(range(10))


def test_no_calibration_image_is_in_the_evaluation_set(models: Path) -> None:
    with (
        np.load(models / "digits_calibration.npz") as calibration,
        np.load(models / "digits_evaluation.npz") as evaluation,
    ):
        seen = {image.tobytes() for image in calibration["input"]}
        assert not any(image.tobytes() in seen for image in evaluation["input"])


@pytest.mark.slow
@pytest.mark.parametrize("script", ["train_lenet5", "train_resnet"])
def test_training_scripts_run(models: Path, tmp_path: Path, script: str) -> None:
    for module in ("torch", "sklearn"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"needs {module}")
    command = [
        sys.executable,
        str(models / f"{script}.py"),
        "--epochs",
        "1",
        "--output",
        str(tmp_path),
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    written = sorted(tmp_path.glob("*.onnx"))
    assert written
    for path in written:
        assert op_types(path) == op_types(models / path.name)
