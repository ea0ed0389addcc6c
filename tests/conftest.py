"""What tests of several modules share."""

from pathlib import Path

import pytest

from afpq import _core

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
