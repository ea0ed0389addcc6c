"""What tests of several modules share."""

import shutil
from pathlib import Path

import graphs
import pytest
from onnx import TensorProto

from afpq import _core
from afpq.calibrate import Stats, calibrate
from afpq.data import Data, open_data
from afpq.graph import Model, load_model

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real models and data beside the repository; tests that need it skip without it."""
    folder = ROOT.parent / "shared"
    if not (folder / "models").is_dir():
        pytest.skip("needs the folder of real models and data")
    return folder


@pytest.fixture(scope="session")
def models() -> Path:
    """The folder of the small models that ship with the project."""
    return ROOT / "models"


@pytest.fixture(params=_core.kernels.isa_names())
def isa(request: pytest.FixtureRequest) -> str:
    """Every instruction set that this machine can run, one after another."""
    return str(request.param)


@pytest.fixture(scope="session")
def packed_lenet(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LeNet-5 at 4 bits, planned without data."""
    import afpq

    out = tmp_path_factory.mktemp("packed") / "lenet5.afpq.onnx"
    afpq.quantize(models / "lenet5_digits.onnx", bits=4).save(out)
    return out


@pytest.fixture
def lenet(models: Path, tmp_path: Path) -> Path:
    """A float model in a folder of its own, to see what else appears there."""
    folder = tmp_path / "work"
    folder.mkdir()
    return Path(shutil.copy(models / "lenet5_digits.onnx", folder / "lenet.onnx"))


@pytest.fixture
def calibration(models: Path) -> Path:
    return models / "digits_calibration.npz"


@pytest.fixture(scope="session")
def lenet_model(models: Path) -> Model:
    """LeNet-5, loaded."""
    return load_model(models / "lenet5_digits.onnx")


@pytest.fixture(scope="session")
def lenet_data(models: Path, lenet_model: Model) -> Data:
    """Samples to calibrate it on."""
    return open_data(models / "digits_calibration.npz", lenet_model.inputs)


@pytest.fixture(scope="session")
def lenet_stats(lenet_model: Model, lenet_data: Data) -> Stats:
    """The statistics of its layers on them."""
    return calibrate(lenet_model, lenet_data)


@pytest.fixture
def tied(tmp_path: Path) -> Model:
    """A language model in one line: an embedding table that is the output matrix too."""
    nodes = [
        graphs.node("Gather", "table ids", "x", name="embed"),
        graphs.node("Tanh", "x", "h"),
        graphs.node("Transpose", "table", "table_t", perm=[1, 0]),
        graphs.node("MatMul", "h table_t", "logits", name="head"),
    ]
    inputs, outputs = {"ids": (["B", "S"], TensorProto.INT64)}, {"logits": ["B", "S", 50]}
    model = graphs.build(nodes, inputs, {"table": graphs.constant(50, 16)}, outputs)
    return load_model(graphs.write(tmp_path, model, "tied.onnx"))
