"""The scripts that reproduce training papers: their networks, tables and help, and a run on digits from end to end."""

import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / "scripts"
sys.path.insert(0, str(SCRIPTS))

from afpq.train import Recipe  # noqa: E402
from training import nets, runs, tasks  # noqa: E402

NAMES = sorted(path.name for path in SCRIPTS.glob("reproduce_*"))


def test_networks_give_what_their_tasks_want() -> None:
    assert nets.lenet5()(torch.zeros(2, 1, 28, 28)).shape == (2, 10)
    assert nets.ResNet20()(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert sum(p.numel() for p in nets.ResNet20().parameters()) == 269_722  # He et al. 2016
    assert nets.Transformer(50, 16)(torch.zeros(2, 16, dtype=torch.long)).shape == (2, 16, 50)


def test_a_transformer_does_not_see_what_is_to_come() -> None:
    net = nets.Transformer(50, 16).eval()
    tokens = torch.randint(0, 50, (1, 16))
    other = tokens.clone()
    other[0, 9:] = 0
    with torch.no_grad():
        assert torch.allclose(net(tokens)[0, :9], net(other)[0, :9], atol=1e-5)


def test_moved_images_have_their_border() -> None:
    torch.manual_seed(0)
    border = torch.tensor([1.0, 2.0, 3.0]).reshape(3, 1, 1)
    images = torch.zeros(50, 3, 32, 32)
    moved = tasks.shifted(images, border)
    for channel, value in enumerate(border.flatten().tolist()):
        assert set(moved[:, channel].unique().tolist()) == {0.0, value}


def test_tables_compare_with_float32_of_the_same_task(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [runs.Case("mnist", "float32", Recipe()), runs.Case("mnist", "other", Recipe())]
    found = {
        f"mnist/{name}/3 epochs/seed {seed}": {"value": value, "skipped": seed}
        for name, values in {"float32": (99.0, 98.0), "other": (97.0, 98.0)}.items()
        for seed, value in enumerate(values)
    }
    monkeypatch.delenv("AFPQ_TRAINING_DATA", raising=False)
    lines = runs.table({"runs": found}, cases, Namespace(epochs=None)).splitlines()
    assert lines[2] == "| mnist | 3 | float32 | 2 | 98.50 top-1 % | 0.71 | +0.00 | 1 |"
    assert lines[3] == "| mnist | 3 | other | 2 | 97.50 top-1 % | 0.71 | -1.00 | 1 |"


@pytest.mark.parametrize("name", NAMES)
def test_every_script_says_what_it_does(name: str) -> None:
    command = [sys.executable, str(SCRIPTS / name), "--help"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert f"scripts/{name}" in text and "results/training.md" in text


@pytest.mark.slow
@pytest.mark.parametrize("name", ["noune2022", "mellempudi2019"])
def test_recipes_learn_digits(name: str, tmp_path: Path) -> None:
    """In a process of its own, without shared data, as in a clone."""
    pytest.importorskip("sklearn")
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import torch; torch.set_num_threads(1)\n"
        "from training import tasks; from afpq.train import RECIPES; import json\n"
        "print(json.dumps(tasks.run_mnist(RECIPES[sys.argv[2]], 0, 1).__dict__))"
    )
    environment = {**os.environ, "AFPQ_TRAINING_DATA": str(tmp_path)}
    command = [sys.executable, "-c", code, str(SCRIPTS), name]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert json.loads(done.stdout)["value"] > 90
