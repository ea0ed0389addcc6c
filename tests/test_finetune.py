"""Fine-tuning: weights leave their codes, formats stay, and what is packed is what was trained."""

import copy
import doctest
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnxscript")

from torch import Tensor, nn  # noqa: E402

import afpq.torch  # noqa: E402
from afpq.errors import ModelError  # noqa: E402
from afpq.train import finetune  # noqa: E402
from afpq.verify import verify  # noqa: E402


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    torch.manual_seed(0)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def blobs(size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Four classes around the corners of a square, in 16 dimensions."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 4, (size,), generator=generator)
    centres = torch.randn(4, 16, generator=torch.Generator().manual_seed(9))
    return centres[labels] + 0.9 * torch.randn(size, 16, generator=generator), labels


@pytest.fixture(scope="module")
def classifier() -> nn.Module:
    torch.manual_seed(1)
    net = nn.Sequential(
        nn.Linear(16, 48), nn.BatchNorm1d(48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 4)
    )  # fmt: skip
    opt = torch.optim.Adam(net.parameters(), lr=3e-3)
    x, y = blobs(2000, 0)
    for _ in range(200):
        opt.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        opt.step()
    return net.eval()


def divergence(net: nn.Module, other: nn.Module) -> float:
    x, _ = blobs(2000, 2)
    with torch.no_grad():
        p, q = (m(x).log_softmax(1) for m in (net, other))
    return float((p.exp() * (p - q)).sum(1).mean())


def test_fine_tuning_regains_what_two_bits_lose(classifier: nn.Module, tmp_path: Path) -> None:
    x, y = blobs(2000, 0)
    overrides = {"*": "e0m1"}
    start = afpq.torch.quantize(classifier, x[:200], overrides=overrides, mode="quick")
    plan = start.model.plan
    tuned = finetune(
        classifier, plan, (x, y), steps=1000, rate=1e-2, mode="quick", validation=blobs(500, 3)
    )  # fmt: skip
    before, after = (divergence(classifier, r.module) for r in (start, tuned))
    assert after < 0.5 * before
    assert tuned.model.plan == plan
    path = tmp_path / "tuned.onnx"
    tuned.model.save(path)
    assert all(finding.passed for finding in verify(path))
    session = afpq.load(path).session(threads=1)
    inputs = blobs(50, 4)[0]
    (found,) = session.run(None, {session.get_inputs()[0].name: inputs.numpy()})
    with torch.no_grad():
        expected = tuned.module(inputs).numpy()
    assert np.allclose(found, expected, atol=1e-5)


def test_fine_tuning_takes_a_loss_and_batches(classifier: nn.Module) -> None:
    x, y = blobs(640, 0)
    plan = afpq.torch.quantize(classifier, x, bits=3, mode="quick").model.plan
    seen = []

    def loss(outputs: Tensor, labels: Tensor | None) -> Tensor:
        assert labels is not None
        seen.append(len(labels))
        return nn.functional.cross_entropy(outputs, labels)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        yield from zip(x.split(64), y.split(64))

    finetune(classifier, plan, batches, loss=loss, steps=12, mode="quick")
    assert seen == [64] * 12


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_fine_tuning_runs_where_the_module_is(classifier: nn.Module) -> None:
    x, y = blobs(2000, 0)
    plan = afpq.torch.quantize(
        classifier, x[:200], overrides={"*": "e0m1"}, mode="quick"
    ).model.plan
    places, nets = set(), (classifier, copy.deepcopy(classifier).cuda())

    def loss(outputs: Tensor, labels: Tensor | None) -> Tensor:
        assert labels is not None and labels.device == outputs.device
        places.add(outputs.device.type)
        return nn.functional.cross_entropy(outputs, labels)

    start = afpq.torch.quantize(classifier, x[:200], plan=plan, mode="quick")
    before = divergence(classifier, start.module)
    for net in nets:
        for given in (None, loss):
            tuned = finetune(net, plan, (x, y), loss=given, steps=400, rate=1e-2, mode="quick")
            assert divergence(classifier, tuned.module) < 0.9 * before
            assert {p.device.type for p in tuned.module.parameters()} <= {"cpu"}
    assert places == {"cpu", "cuda"}
    assert {p.device.type for p in nets[1].parameters()} == {"cuda"}  # which is not changed


def test_validation_never_returns_worse_than_the_start(classifier: nn.Module) -> None:
    x, y = blobs(400, 0)
    start = afpq.torch.quantize(classifier, x, bits=4, mode="quick")
    plan = start.model.plan
    wild = finetune(
        classifier, plan, (x, y), rate=5.0, steps=16, mode="quick", validation=blobs(500, 3)
    )
    assert divergence(classifier, wild.module) <= 1.1 * divergence(classifier, start.module)


def test_a_loss_that_is_not_finite_is_refused(classifier: nn.Module) -> None:
    x, _ = blobs(400, 0)
    plan = afpq.torch.quantize(classifier, x, bits=4, mode="quick").model.plan
    with pytest.raises(ModelError, match="loss of step 0 is nan"):
        finetune(classifier, plan, x, loss=lambda out, _: out.sum() * math.nan, mode="quick")


def test_tied_weights_stay_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(40, 24)
            self.middle = nn.Linear(24, 24)
            self.logits = nn.Linear(24, 40, bias=False)
            self.logits.weight = self.embed.weight

        def forward(self, tokens: Tensor) -> Tensor:
            return self.logits(self.middle(self.embed(tokens)).relu())

    net = Tied()
    tokens = torch.randint(0, 40, (64, 6))
    plan = afpq.torch.quantize(net, tokens, bits=4, mode="quick").model.plan
    tuned = finetune(net, plan, tokens, steps=5, mode="quick")
    assert torch.equal(tuned.module.embed.weight, tuned.module.logits.weight)


def test_the_example_runs() -> None:
    test = doctest.DocTestFinder().find(finetune, globs={"afpq": afpq})[0]
    assert test.examples
    assert doctest.DocTestRunner().run(test).failed == 0


def test_shuffled_batches_calibrate_alike_in_every_pass(classifier: nn.Module) -> None:
    """The start must be as good as that of fixed data: passes of calibration read the same samples."""
    x, y = blobs(2000, 0)
    plan = afpq.torch.quantize(classifier, x[:512], bits=3, mode="quick").model.plan
    passes = []

    def batches() -> Iterator[Tensor]:
        order = torch.randperm(len(x))
        passes.append(order)
        yield from x[order].split(64)

    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(x, y), batch_size=64, shuffle=True
    )
    fixed = finetune(classifier, plan, x[:512], steps=1, rate=0.0)
    for data in (batches, loader):
        start = finetune(classifier, plan, data, steps=1, rate=0.0)
        assert divergence(classifier, start.module) < 3 * divergence(classifier, fixed.module)
    finetune(classifier, plan, batches, steps=70)
    assert not torch.equal(passes[-1], passes[-2])
