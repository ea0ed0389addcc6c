"""Emulated training: layers against torch and the definition, optimizer, loss scaling, recipes."""

import copy
import doctest
import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from afpq import floats
from afpq.errors import FormatError, ModelError
from afpq.floats import FloatFormat, round_to

torch = pytest.importorskip("torch")

from torch import Tensor, nn  # noqa: E402

import afpq.train  # noqa: E402
from afpq._train_round import multiply  # noqa: E402
from afpq.train import (  # noqa: E402
    RECIPES,
    BackOff,
    ConstantScale,
    LogMax,
    LossScale,
    Operands,
    Recipe,
    Rounding,
    ScaleState,
    convert,
    gallus2018,
    optimizer,
    round_tensor,
)

E4M3 = FloatFormat(4, 3, exponent_bias=11)
E5M2 = FloatFormat(5, 2, reserved_codes=4, saturate=False)
E6M9 = FloatFormat(6, 9, reserved_codes=1, subnormals=False)
FP8 = Rounding(E4M3)
SUMS = Rounding(E6M9)


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    torch.manual_seed(0)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def layers() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, (3, 2), groups=2, dilation=(1, 2), padding="same", bias=False),
        nn.Flatten(2),
        nn.Conv1d(8, 4, 5, stride=3, padding=2, padding_mode="circular"),
        nn.Flatten(),
        nn.Linear(88, 6),
    )


def gradients(net: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    y = net(x)
    (y * torch.arange(1.0, y.numel() + 1).reshape(y.shape)).sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in net.parameters())]


def test_without_a_recipe_layers_are_those_of_torch() -> None:
    net, x = layers(), torch.randn(2, 3, 15, 16)
    other = convert(copy.deepcopy(net), RECIPES["float32"])
    for found, expected in zip(gradients(other, x), gradients(net, x)):
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_rounded_sums_of_enough_bits_are_those_of_torch() -> None:
    """All three products of every kind of layer go through the emulated accumulator."""
    net, x = layers(), torch.randn(2, 3, 15, 16)
    fine = Recipe(accumulator=Rounding(FloatFormat(8, 10, reserved_codes=1024)), chunk=16)
    other = convert(copy.deepcopy(net), fine)
    for found, expected in zip(gradients(other, x), gradients(net, x)):
        # At most 16 sums of a chunk and 6 of chunks, each within 2^-11 of the sum so far.
        assert float((found - expected).norm() / expected.norm()) < 22 * 2**-11


def test_conv3d_runs_rounded_but_not_with_rounded_sums() -> None:
    net = nn.Conv3d(2, 3, 2)
    recipe = Recipe(operands=Operands(FP8, FP8, FP8))
    assert convert(net, recipe)(torch.randn(1, 2, 4, 4, 4)).shape == (1, 3, 3, 3, 3)
    with pytest.raises(ModelError, match="not emulated for Conv3d"):
        convert(nn.Sequential(nn.Conv3d(2, 3, 2)), replace(recipe, accumulator=SUMS))


def test_products_read_rounded_operands() -> None:
    recipe = Recipe(
        operands=Operands(FP8, Rounding(FloatFormat(3, 2)), Rounding(FloatFormat(5, 1))),
        gradients=Rounding(FloatFormat(5, 0)),
    )
    net = convert(nn.Linear(20, 7, bias=False), recipe)
    x = torch.randn(9, 20, requires_grad=True)
    errors = torch.randn(9, 7)
    y = net(x)
    y.backward(errors)
    w8, x6, e7 = (
        torch.from_numpy(round_to(t.detach().numpy(), fmt))
        for t, fmt in [
            (net.weight, E4M3),
            (x, FloatFormat(3, 2)),
            (errors, FloatFormat(5, 1)),
        ]
    )
    assert torch.equal(y, x6 @ w8.T)
    assert torch.equal(x.grad, e7 @ w8)
    expected = round_to((e7.T @ x6).numpy(), FloatFormat(5, 0))
    assert np.array_equal(net.weight.grad.numpy(), expected)


def test_sums_of_a_layer_are_those_of_the_definition() -> None:
    recipe = Recipe(operands=Operands(FP8, FP8, FP8), accumulator=SUMS, chunk=8)
    net = convert(nn.Conv2d(3, 4, 3, padding=1, bias=False), recipe)
    x = round_tensor(torch.randn(2, 3, 5, 5), E4M3)
    windows = nn.functional.unfold(x, 3, padding=1).permute(1, 0, 2).reshape(27, 50)
    weight = round_tensor(net.weight, E4M3).reshape(4, 27)
    expected = floats.multiply_rounded(weight.numpy(), windows.numpy(), E6M9, 8)
    found = net(x).detach().permute(1, 0, 2, 3).reshape(4, 50)
    assert np.array_equal(found.numpy(), expected)


@pytest.mark.parametrize("stochastic", [False, True])
def test_tensors_of_any_layout_are_rounded(stochastic: bool) -> None:
    x = torch.randn(4, 6, 5, 3)
    seed = 3 if stochastic else None
    for layout in (
        x,
        x.to(memory_format=torch.channels_last),
        x[:, ::2],
        x.transpose(0, 3),
        x.sum(),
        x[:0],
    ):
        found = round_tensor(layout, E4M3, seed=seed)
        numbers = layout.detach().numpy()
        assert found.shape == layout.shape
        if stochastic:
            below = np.abs(numbers) / 8 + float(E4M3.smallest)
            assert (np.abs(found.numpy() - numbers) <= below).all()
        else:
            assert np.array_equal(found.numpy(), round_to(numbers, E4M3))


def test_other_types_are_refused() -> None:
    with pytest.raises(FormatError, match=r"float32, not in torch\.float16"):
        round_tensor(torch.zeros(3, dtype=torch.float16), E4M3)


def test_products_without_accumulator_are_those_of_torch() -> None:
    a, b = torch.randn(3, 5), torch.randn(5, 2)
    assert torch.equal(multiply(a, b, None, 64), a @ b)


def test_first_last_and_exempt_layers_have_their_own_operands() -> None:
    first, last = Operands(weights=FP8), Operands(errors=FP8)
    recipe = Recipe(
        operands=Operands(FP8, FP8, FP8), first=first, last=last, exempt=("2",), gradients=FP8
    )
    net = nn.Sequential(*(nn.Linear(3, 3) for _ in range(5)))
    kept = net[2]
    names = list(net.state_dict())
    net = convert(net, recipe)
    assert list(net.state_dict()) == names
    assert [type(layer).__name__ for layer in net] == ["RoundedLinear"] * 2 + ["Linear"] + [
        "RoundedLinear"
    ] * 2
    assert [net[i].operands for i in (0, 1, 3, 4)] == [
        first,
        recipe.operands,
        recipe.operands,
        last,
    ]
    assert net[2].weight is kept.weight
    assert "Rounding" in repr(net)


def test_converting_again_replaces_the_recipe() -> None:
    net = convert(nn.Sequential(nn.Linear(4, 4)), Recipe(operands=Operands(FP8, FP8, FP8)))
    x = torch.randn(2, 4)
    rounded = net(x)
    again = convert(net, RECIPES["float32"])
    assert torch.allclose(again(x), nn.functional.linear(x, net[0].weight, net[0].bias))
    assert not torch.equal(rounded, again(x))


def test_a_layer_in_two_places_is_one_layer() -> None:
    net = nn.ModuleDict({"a": nn.Linear(3, 3)})
    net["b"] = net["a"]
    net = convert(net, Recipe(operands=Operands(FP8, FP8, FP8)))
    assert net["a"] is net["b"] and type(net["a"]).__name__ == "RoundedLinear"


def test_modules_without_layers_are_refused() -> None:
    with pytest.raises(ModelError, match="no Linear or Conv layer"):
        convert(nn.Sequential(nn.ReLU()), RECIPES["hfp8"])


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_train(name: str) -> None:
    x = torch.randn(256, 8)
    y = (x[:, 0] * x[:, 1] > 0).long()
    net = convert(nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 2)), RECIPES[name])
    opt = optimizer(torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9), RECIPES[name])
    for _ in range(150):
        opt.zero_grad()
        loss = nn.functional.cross_entropy(net(x), y)
        opt.backward(loss)
        opt.step()
    assert float(loss.detach()) < 0.25


def test_the_same_seed_gives_the_same_training() -> None:
    def trained(threads: int) -> Tensor:
        torch.set_num_threads(threads)
        torch.manual_seed(5)
        net = convert(nn.Sequential(nn.Linear(300, 500)), RECIPES["mellempudi2019"])
        opt = optimizer(torch.optim.SGD(net.parameters(), lr=0.1), RECIPES["mellempudi2019"])
        for _ in range(3):
            opt.zero_grad()
            opt.backward(net(torch.ones(1, 300)).square().mean())
            opt.step()
        return net[0].weight.detach().clone()

    assert torch.equal(trained(1), trained(2))


def one_weight(value: float) -> nn.Parameter:
    return nn.Parameter(torch.full((1000, 1), value))


def test_updates_vanish_to_nearest_and_survive_stochastically() -> None:
    """Steps of a thousandth of the distance between numbers: the mean moves only if rounding is stochastic."""
    moved = {}
    for stochastic in (False, True):
        p = one_weight(1.0)
        opt = optimizer(torch.optim.SGD([p], lr=1.0), gallus2018(E4M3, stochastic=stochastic))
        for _ in range(100):
            p.grad = torch.full_like(p, -0.125 / 1000)
            opt.step()
        moved[stochastic] = float(p.detach().mean()) - 1
    assert moved[False] == 0
    assert moved[True] == pytest.approx(100 * 0.125 / 1000, rel=0.15)


def test_a_residual_keeps_what_eight_bits_lose() -> None:
    recipe = RECIPES["hfp8"]
    p = one_weight(1.0)
    opt = optimizer(torch.optim.SGD([p], lr=1.0), recipe)
    for _ in range(100):
        p.grad = torch.full_like(p, -0.125 / 1000) * opt.scale
        opt.step()
    assert float(p.detach().mean()) == pytest.approx(1 + 100 * 0.125 / 1000, rel=1e-3)
    small = round_tensor(p, E4M3)
    assert torch.equal(p - small, round_tensor(p - small, E6M9))


def test_state_and_parameters_are_numbers_of_their_formats() -> None:
    recipe = RECIPES["wang2018"]
    for kind in (torch.optim.SGD, torch.optim.Adam):
        p = nn.Parameter(torch.randn(50, 3))
        inner = kind([p], lr=0.1, **({"momentum": 0.9} if kind is torch.optim.SGD else {}))
        opt = optimizer(inner, recipe)
        p.grad = torch.randn(50, 3) * opt.scale
        assert opt.step()
        tensors = [t for t in inner.state[p].values() if isinstance(t, Tensor) and t.ndim]
        assert tensors
        for t in (p.detach(), *tensors):
            assert torch.equal(t, round_tensor(t, E6M9))


def test_overflows_skip_the_step_and_lower_the_scale() -> None:
    p = nn.Parameter(torch.ones(3))
    opt = optimizer(torch.optim.SGD([p], lr=1.0), Recipe(loss_scale=BackOff(initial=8.0)))
    p.grad = torch.tensor([1.0, math.inf, 0.0])
    assert not opt.step()
    assert torch.equal(p.detach(), torch.ones(3)) and opt.scale == 4.0 and opt.skipped == 1
    opt.zero_grad()
    opt.backward(p.sum())
    assert torch.equal(p.grad, torch.full((3,), 4.0))
    assert opt.step()
    assert torch.equal(p.grad, torch.ones(3)) and torch.equal(p.detach(), torch.zeros(3))
    saved = opt.state_dict()
    again = optimizer(torch.optim.SGD([p], lr=1.0), opt.recipe)
    again.load_state_dict(saved)
    assert (again.scale, again.skipped) == (4.0, 1)
    assert again.param_groups[0]["lr"] == 1.0


def scales(scaler: LossScale, largest: list[float]) -> list[float]:
    state = scaler.start()
    result = [state.scale]
    for value in largest:
        state = scaler.next(state, value)
        result.append(state.scale)
    return result


@pytest.mark.parametrize(
    ("scaler", "largest", "expected"),
    [
        (ConstantScale(7.0), [1.0, math.inf], [7, 7, 7]),
        (BackOff(16.0, interval=2), [1, 1, 1, math.nan, 1], [16, 16, 32, 32, 16, 16]),
        (BackOff(16.0, floor=((0, 8.0),)), [math.inf] * 3, [16, 8, 8, 8]),
        (BackOff(1.0, floor=((0, 1.0), (2, 64.0))), [1, 1, math.inf, 1], [1, 1, 64, 64, 64]),
        (BackOff(16.0, interval=1, ceiling=32.0), [1, 1, 1], [16, 32, 32, 32]),
        (LogMax(max=1024.0, deviations=3.0, initial=5.0), [4.0, 4.0], [5, 256, 256]),
        (LogMax(initial=8.0), [math.inf, 0.0], [8, 4, 4]),
    ],
)
def test_scales_follow_their_rules(
    scaler: LossScale, largest: list[float], expected: list[float]
) -> None:
    assert scales(scaler, largest) == pytest.approx(expected)


def test_log_max_leaves_room_for_the_spread() -> None:
    rng = np.random.default_rng(0)
    largest = [float(2 ** (1.5 * z - 10)) for z in rng.standard_normal(2000)]
    found = math.log2(scales(LogMax(max=2.0**15, deviations=2.0), largest)[-1])
    assert found == pytest.approx(15 + 10 - 2 * 1.5, abs=1.0)


def test_states_are_plain_numbers() -> None:
    assert BackOff().start() == ScaleState(65536.0)


@pytest.mark.parametrize(
    "thing", [FloatFormat, afpq.train.convert, afpq.train.optimizer, afpq.train.round_tensor]
)
def test_examples_run(thing: object) -> None:
    test = doctest.DocTestFinder().find(thing, globs={"afpq": afpq})[0]
    assert test.examples
    assert doctest.DocTestRunner().run(test).failed == 0
