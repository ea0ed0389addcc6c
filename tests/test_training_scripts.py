"""The scripts that reproduce training papers: their networks, tables and help, and a run on digits from end to end."""

import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import graphs
import numpy as np
import onnxruntime as ort
import pytest

torch = pytest.importorskip("torch")

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / "scripts"
sys.path.insert(0, str(SCRIPTS))

from afpq.train import RECIPES, Recipe  # noqa: E402
from training import nets, retune, runs, tasks  # noqa: E402
from training.onnx_net import OnnxNet  # noqa: E402

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


def _residual_network(folder: Path, with_norm: bool = True) -> Path:
    """Uneven padding, option-A shortcut, groups, a norm or its folded form, head: what the real networks have."""
    nodes = [
        graphs.node("Conv", "x w0 b0", "c0", pads=[0, 0, 1, 1], strides=[2, 2]),
        *(
            [graphs.node("BatchNormalization", "c0 g b m v", "n0", epsilon=1e-3)]
            if with_norm
            else []
        ),
        graphs.node("Clip", "n0 low high" if with_norm else "c0 low high", "r0"),
        graphs.node("Conv", "r0 w1", "c1", pads=[1, 1, 1, 1], group=4),
        graphs.node("Slice", "x begins ends axes steps", "s"),
        graphs.node("Pad", "s pads", "p"),
        graphs.node("Add", "c1 p", "a"),
        graphs.node("Relu", "a", "r1"),
        graphs.node("GlobalAveragePool", "r1", "pool"),
        graphs.node("Flatten", "pool", "flat"),
        graphs.node("Gemm", "flat w2 b2", "y", transB=1),
    ]
    values = {
        "w0": graphs.constant(8, 3, 3, 3),
        "b0": graphs.constant(8, seed=1),
        "w1": graphs.constant(8, 2, 3, 3, seed=2),
        "w2": graphs.constant(5, 8, seed=3),
        "b2": graphs.constant(5, seed=4),
        "low": np.float32(0).reshape(()),
        "high": np.float32(6).reshape(()),
        "begins": np.array([0, 0]),
        "ends": np.array([2**31, 2**31]),
        "axes": np.array([2, 3]),
        "steps": np.array([2, 2]),
        "pads": np.array([0, 2, 0, 0, 0, 3, 0, 0]),
    }
    if with_norm:
        values.update({name: graphs.constant(8, seed=5 + i) for i, name in enumerate("gbm")})
        values["v"] = graphs.constant(8, seed=9) ** 2 + 0.1
    model = graphs.build(nodes, {"x": ["n", 3, 12, 12]}, values, outputs={"y": ["n", 5]})
    return graphs.write(folder, model)


@pytest.mark.parametrize("with_norm", [True, False])
def test_onnx_networks_are_what_the_runtime_runs(tmp_path: Path, with_norm: bool) -> None:
    path = _residual_network(tmp_path, with_norm)
    net, images = OnnxNet(path), torch.randn(6, 3, 12, 12)
    (wanted,) = ort.InferenceSession(path).run(None, {"x": images.numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(net(images).numpy(), wanted, rtol=1e-4, atol=1e-4)
        norms = [m for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d)]
        net.unfold(images)
        unfolded = [m for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d)]
        assert (len(norms), len(unfolded)) == (1, 2) if with_norm else (0, 2)
        np.testing.assert_allclose(net(images).numpy(), wanted, rtol=1e-3, atol=1e-3)
        retune.re_estimate(net, images)  # what was unfolded has these statistics already
        if not with_norm:
            np.testing.assert_allclose(net(images).numpy(), wanted, rtol=0.02, atol=0.02)


def test_an_unknown_operator_is_named(tmp_path: Path) -> None:
    model = graphs.build([graphs.node("Softplus", "x", "y")], {"x": [1, 3]})
    with pytest.raises(ValueError, match="Softplus of 'y'"):
        OnnxNet(graphs.write(tmp_path, model))


def test_statistics_mend_shifts_and_scales_but_not_noise() -> None:
    torch.manual_seed(0)
    exact = torch.randn(8, 4, 16, 16)
    assert retune.share_of_statistics(exact, 1.2 * exact + 0.3) > 0.999
    assert abs(retune.share_of_statistics(exact, exact + 0.1 * torch.randn_like(exact))) < 0.02


def test_a_gpu_takes_what_has_no_rounded_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert tasks.device_of(RECIPES["noune2022"]).type == "cuda"
    assert tasks.device_of(RECIPES["hfp8"]).type == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tasks.device_of(RECIPES["noune2022"]).type == "cpu"


def test_tables_compare_with_float32_of_the_same_task(monkeypatch: pytest.MonkeyPatch) -> None:
    place = {"machine": "M", "isa": "scalar", "torch": "2", "commit": "c0ffee"}
    cases = [runs.Case("mnist", "float32", Recipe()), runs.Case("mnist", "other", Recipe())]
    found = {
        f"mnist/{name}/3 epochs/seed {seed}": {"value": value, "skipped": seed, **place}
        for name, values in {"float32": (99.0, 98.0), "other": (97.0, 98.0)}.items()
        for seed, value in enumerate(values)
    }
    monkeypatch.delenv("AFPQ_TRAINING_DATA", raising=False)
    found["mnist/other/3 epochs/seed 1"]["gpu"] = "G"
    lines = runs.table({"runs": found}, cases, Namespace(epochs=None)).splitlines()
    assert lines[2] == "| mnist | 3 | float32 | 2 | 98.50 top-1 % | 0.71 | +0.00 | 1 |"
    assert lines[3] == "| mnist | 3 | other | 2 | 97.50 top-1 % | 0.71 | -1.00 | 1 |"
    ran = [
        "Ran on M and G, scalar, torch 2, commit c0ffee.",
        "Ran on M, scalar, torch 2, commit c0ffee.",
    ]
    assert lines[4:] == ["", *ran]


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
