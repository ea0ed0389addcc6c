"""What a training system does to its tensors: the formats of every role, loss scaling, and the published recipes."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from afpq._loss_scale import BackOff, ConstantScale, LossScale
from afpq.floats import FloatFormat

__all__ = ["RECIPES", "Operands", "Recipe", "Rounding", "gallus2018"]


@dataclass(frozen=True)
class Rounding:
    """A format and how numbers get into it: to nearest, ties to even, or stochastically."""

    format: FloatFormat
    stochastic: bool = False


@dataclass(frozen=True)
class Operands:
    """What the three products of a layer read; None is float32.

    Forward: activations * weights. Backward: errors * weights. Weight gradient: errors * activations. Errors are the
    gradients of the layer's outputs.
    """

    weights: Rounding | None = None
    activations: Rounding | None = None
    errors: Rounding | None = None


_NO_SCALING = ConstantScale()


@dataclass(frozen=True)
class Recipe:
    """A training system, to be emulated in float32: `afpq.train.convert` and `afpq.train.optimizer` carry it out.

    `operands` are those of every Linear and Conv layer; `first` and `last` replace them in the first and the last of
    these layers (in the order of `named_modules`), and layers whose path matches a glob of `exempt` stay as they are.
    `gradients` is for the weight gradients, as they come out of their product. `accumulator` is for the partial sums of
    all three products, in chunks of `chunk` (None: sums are float32, in torch's own order).

    `master` is what the optimizer keeps of the parameters, `state` of its own tensors, such as momentum. With
    `residual`, a weight is kept as its 8-bit value, rounded as in the forward product, and the rest in `master`.
    """

    operands: Operands = Operands()
    first: Operands | None = None
    last: Operands | None = None
    exempt: tuple[str, ...] = ()
    gradients: Rounding | None = None
    accumulator: Rounding | None = None
    chunk: int = 64
    master: Rounding | None = None
    state: Rounding | None = None
    residual: bool = False
    loss_scale: LossScale = _NO_SCALING


_E5M2 = FloatFormat(5, 2)  # every code is a number
_E5M2_IEEE = FloatFormat(5, 2, reserved_codes=4, saturate=False)
_E6M9 = FloatFormat(6, 9, reserved_codes=1, subnormals=False)  # "DLFloat"
_FLOAT16 = FloatFormat(5, 10, reserved_codes=1024, saturate=False)
_NEAREST_16 = Rounding(_E6M9)
_STOCHASTIC_16 = Rounding(_E6M9, stochastic=True)
_IN_16_BITS = Operands(_NEAREST_16, _NEAREST_16, _NEAREST_16)


def _wang2018() -> Recipe:
    fp8 = Rounding(_E5M2)
    return Recipe(
        operands=Operands(fp8, fp8, fp8),
        first=Operands(fp8, _NEAREST_16, fp8),
        last=_IN_16_BITS,
        gradients=_NEAREST_16,
        accumulator=_NEAREST_16,
        master=_STOCHASTIC_16,
        state=_STOCHASTIC_16,
        loss_scale=ConstantScale(1000.0),
    )


def _hfp8() -> Recipe:
    forward = Rounding(FloatFormat(4, 3, exponent_bias=11))
    return Recipe(
        operands=Operands(forward, forward, Rounding(_E5M2_IEEE)),
        first=_IN_16_BITS,
        last=_IN_16_BITS,
        gradients=Rounding(replace(_E6M9, saturate=False)),
        accumulator=Rounding(replace(_E6M9, saturate=False)),
        master=_NEAREST_16,
        residual=True,
        loss_scale=BackOff(),
    )


def _mellempudi2019() -> Recipe:
    fp8 = Rounding(_E5M2_IEEE)
    stochastic = Rounding(_E5M2_IEEE, stochastic=True)
    return Recipe(
        operands=Operands(fp8, fp8, stochastic),
        first=Operands(),
        last=Operands(),
        gradients=stochastic,
        master=Rounding(_FLOAT16, stochastic=True),
        loss_scale=BackOff(initial=8192.0, floor=((0, 1.0), (1000, 1024.0), (10000, 8192.0))),
    )


def _noune2022() -> Recipe:
    activations = Rounding(FloatFormat(4, 3, exponent_bias=10))
    weights = Rounding(FloatFormat(4, 3, exponent_bias=14))
    errors = Rounding(FloatFormat(5, 2, exponent_bias=15, saturate=False))
    return Recipe(
        operands=Operands(weights, activations, errors),
        first=Operands(weights, None, None),
        gradients=errors,
        loss_scale=BackOff(),
    )


def gallus2018(format: FloatFormat, *, stochastic: bool = False) -> Recipe:
    """Training whose only copy of every parameter has 8 bits (Gallus and Nannarelli 2018).

    The report does not say which 8: sweep `format`, and the rounding.
    """
    return Recipe(master=Rounding(format, stochastic))


RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {
        "float32": Recipe(),
        # Wang et al. 2018: operands 1-5-2, sums and updates 1-6-9, stochastic in the updates, loss scale 1000; images
        # and the last layer in 16 bits.
        "wang2018": _wang2018(),
        # Sun et al. 2019 (HFP8): 1-4-3 forward, whose bias of 4 counts from 7 (StableHLO's f8E4M3B11FNUZ cites it so),
        # 1-5-2 backward; sums and weight gradients 1-6-9; weights as 8 bits and a 16-bit residual.
        "hfp8": _hfp8(),
        # Mellempudi et al. 2019: e5m2 everywhere, gradients stochastic, master weights float16, back-off with a floor
        # that rises. The steps and heights of the floor are for runs of minutes, not the paper's.
        "mellempudi2019": _mellempudi2019(),
        # Noune et al. 2022, table of recommended biases, with loss scaling in place of a high gradient bias.
        "noune2022": _noune2022(),
    }
)
