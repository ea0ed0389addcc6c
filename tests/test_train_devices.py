"""Emulated training on other devices, by torch's operators: against the kernels of the processor."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest

from afpq import floats
from afpq.floats import FloatFormat

torch = pytest.importorskip("torch")

from test_train import E4M3, E5M2, E6M9, layers, seeded  # noqa: E402, F401
from torch import Tensor  # noqa: E402

from afpq._train_round import _round_anywhere  # noqa: E402
from afpq.train import RECIPES, convert, optimizer, round_tensor  # noqa: E402

DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
    ),
]
ANYWHERE = [
    E4M3,
    E5M2,
    E6M9,
    FloatFormat(4, 0),
    FloatFormat(0, 7),
    FloatFormat(8, 7, reserved_codes=128, saturate=False),  # its step has no reciprocal in float32
    FloatFormat(5, 10, exponent_bias=140),  # and these are float32's own subnormals
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("fmt", ANYWHERE, ids=str)
def test_other_devices_round_as_the_processor_does(fmt: FloatFormat, device: str) -> None:
    x = torch.cat([torch.randn(5000) * 10.0**e for e in range(-44, 38, 2)])
    x = torch.cat([x, torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan])])
    found = _round_anywhere(x.to(device), fmt, None).cpu()
    expected = round_tensor(x, fmt)
    assert torch.equal(found.nan_to_num(7), expected.nan_to_num(7))
    assert torch.equal(found.signbit(), expected.signbit())
    drawn = _round_anywhere(x.to(device), fmt, 1).cpu()
    values = torch.from_numpy(floats.float_magnitudes(fmt)[:-1].astype(np.float32))
    ends = torch.tensor([fmt.max if fmt.saturate else math.inf])
    kept = drawn[~drawn.isnan()].abs()
    assert torch.isin(kept, torch.cat([values, ends])).all()
    low, high = values[len(values) // 2 :][:2].tolist()
    middle = torch.full((100_000,), low + 0.25 * (high - low), device=device)
    share = (_round_anywhere(middle, fmt, 5).double().cpu().mean() - low) / (high - low)
    assert float(share) == pytest.approx(0.25, abs=5e-3)


@pytest.mark.parametrize("device", DEVICES)
def test_other_devices_train_as_the_processor_does(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps of all kinds of layers, weights in 16 bits: the same operands, float32 sums in the device's order."""
    recipe = replace(RECIPES["hfp8"], accumulator=None)
    x, start = torch.randn(2, 3, 15, 16), layers()

    def trained(place: str) -> list[Tensor]:
        net = convert(copy.deepcopy(start), recipe).to(place)
        opt = optimizer(torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9), recipe)
        for _ in range(3):
            opt.zero_grad()
            opt.backward(net(x.to(place)).square().mean())
            assert opt.step()
        return [p.detach() for p in net.parameters()]

    expected = trained("cpu")
    monkeypatch.setattr(
        "afpq._train_round.round_tensor",
        lambda x, fmt, seed: _round_anywhere(x.detach(), fmt, seed),
    )
    for one, other, before in zip(expected, trained(device), start.parameters()):
        assert other.device.type == device
        moved = float((one - before.detach()).norm())
        assert moved > 0 and float((one - other.cpu()).norm()) < 0.05 * moved
