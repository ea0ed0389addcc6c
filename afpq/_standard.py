"""ONNX's own small number types, and how the integers of a packed tensor fit into one of them.

A code stands for I * scale. A type holds it exactly if there is a power of two r with I * r among the type's values for
all codes of one scale: then (I * r) * (scale / r) is the same product, rounded the same way. Every scale has an r of
its own. Where no type does, the nearest one is the type with the least squared error; int8 may then have any r.
Infinities and NaN are not among the values: the top codes of float8e4m3fn and float8e5m2 hold no weight.
"""

from dataclasses import dataclass, field
from functools import cache

import ml_dtypes
import numpy as np
import numpy.typing as npt

from afpq._metrics import sqnr_db
from afpq.formats import AfpFormat, codebook, magnitudes
from afpq.packed import PackedLayer, scale_values
from afpq.packing import unpack

__all__ = ["TYPES", "Fitted", "StandardType", "fit"]

Array = npt.NDArray[np.generic]
Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]

_EXPONENTS = tuple(range(-44, 21))  # of r: from e5m2's largest I on int4 to float8's whole range


@dataclass(frozen=True)
class StandardType:
    """An element type of ONNX. `opset` is the first whose DequantizeLinear takes it with a scale per channel."""

    name: str
    bits: int
    opset: int
    dtype: np.dtype[np.generic] = field(compare=False)

    @property
    def is_integer(self) -> bool:
        return self.name.startswith("int")


# In order of preference: small types first, integers (which more runtimes have) before floats of their width.
TYPES = (
    StandardType("int4", 4, 21, np.dtype(ml_dtypes.int4)),
    StandardType("float4e2m1", 4, 23, np.dtype(ml_dtypes.float4_e2m1fn)),
    StandardType("int8", 8, 13, np.dtype(np.int8)),
    StandardType("float8e4m3fn", 8, 19, np.dtype(ml_dtypes.float8_e4m3fn)),
    StandardType("float8e5m2", 8, 19, np.dtype(ml_dtypes.float8_e5m2)),
)


@dataclass(frozen=True, eq=False)
class Fitted:
    """A packed tensor in a standard type: the weights are `codes` * `scale`."""

    type: StandardType
    codes: Array = field(repr=False)  # [n, k], of the type
    scale: Floats = field(repr=False)  # as the packed tensor's: [n], [1] or [groups, n]
    exact: bool
    sqnr_db: float | None  # of the weights; None if exact

    @property
    def storage_bytes(self) -> int:
        """Codes and scales."""
        return -(-self.codes.size * self.type.bits // 8) + self.scale.nbytes


def fit(layer: PackedLayer, *, nearest: bool = False) -> Fitted | None:
    """The smallest type that holds every weight of a layer; if none does, the nearest one or None."""
    codes = unpack(layer.packed, layer.n, layer.k, layer.format.bits)
    scale = scale_values(layer)
    slots = _slots(layer)
    counts = _counts(codes, slots, scale.size, layer.format)
    for kind in TYPES:
        ratios, error = _choose(kind, layer.format, counts, scale)
        if not error.any():
            return _encode(layer, kind, codes, scale, ratios, slots)
    if not nearest:
        return None
    energy = scale.reshape(-1).astype(np.float64) ** 2
    trials = [
        (kind, *_choose(kind, layer.format, counts, scale, any_ratio=kind.is_integer))
        for kind in TYPES
        if kind.bits == 8
    ]
    kind, ratios, _ = min(trials, key=lambda trial: float(trial[2] @ energy))
    return _encode(layer, kind, codes, scale, ratios, slots)


def _slots(layer: PackedLayer) -> npt.NDArray[np.intp]:
    """Which scale each weight has, as an index into the flattened scales: [n, k] or [n, 1]."""
    rows = np.arange(layer.n)[:, None]
    if layer.group_size:
        return np.asarray(np.arange(layer.k)[None] // layer.group_size * layer.n + rows)
    return rows if layer.stored_scale.size > 1 else np.zeros_like(rows)


def _counts(
    codes: npt.NDArray[np.uint8], slots: npt.NDArray[np.intp], num_scales: int, fmt: AfpFormat
) -> Doubles:
    """How often every magnitude occurs under every scale: [num_scales, num_magnitudes]."""
    cells = slots * fmt.num_magnitudes + (codes & (fmt.num_magnitudes - 1))
    counts = np.bincount(cells.reshape(-1), minlength=num_scales * fmt.num_magnitudes)
    return counts.reshape(num_scales, fmt.num_magnitudes).astype(np.float64)


def _choose(
    kind: StandardType, fmt: AfpFormat, counts: Doubles, scale: Floats, *, any_ratio: bool = False
) -> tuple[Doubles, Doubles]:
    """The best r for every scale, and the squared error that it leaves, in units of the scale: two [num_scales]."""
    ratios, table = _errors(kind, fmt, any_ratio)
    error = counts @ table.T
    wanted = scale.reshape(-1, 1).astype(np.float64) / ratios
    with np.errstate(over="ignore", under="ignore"):
        scales = wanted.astype(np.float32)
    usable = (scales >= np.finfo(np.float32).tiny) | (scales == wanted)  # a subnormal may be exact
    error[~(usable & np.isfinite(scales))] = np.inf
    best = error.argmin(axis=1)
    return ratios[best], error[np.arange(len(best)), best]


@cache
def _errors(kind: StandardType, fmt: AfpFormat, any_ratio: bool) -> tuple[Doubles, Doubles]:
    """Values of r in order of preference, and the squared error of every magnitude: [ratios], [ratios, magnitudes]."""
    integers = magnitudes(fmt).astype(np.float64)
    ratios = np.exp2(np.array(_EXPONENTS, np.float64))
    if any_ratio:  # the largest integer of a row may become the type's
        ratios = np.concatenate([ratios, _levels(kind)[-1] / integers[1:]])
    table = np.array(
        [(_round(kind, integers * r).astype(np.float64) / r - integers) for r in ratios]
    )
    squares = table**2
    # What suits most of the format first, so that most scales get the same r; then the smallest change.
    order = np.lexsort([np.abs(np.log2(ratios)), (squares != 0).sum(axis=1)])
    return ratios[order], squares[order]


@cache
def _levels(kind: StandardType) -> Doubles:
    """The finite values of a type that are not negative, increasing."""
    if kind.is_integer:
        return np.arange(2.0 ** (kind.bits - 1))
    values = np.arange(2 ** (kind.bits - 1), dtype=np.uint8).view(kind.dtype).astype(np.float64)
    return np.asarray(values[np.isfinite(values)])


def _round(kind: StandardType, values: Doubles) -> Array:
    """The nearest values of a type, ties to even, saturating."""
    largest = _levels(kind)[-1]
    clipped = np.clip(values, -largest, largest)
    if kind.is_integer:
        clipped = np.rint(clipped)
    return np.asarray(clipped.astype(np.float32).astype(kind.dtype))


def _encode(
    layer: PackedLayer,
    kind: StandardType,
    codes: npt.NDArray[np.uint8],
    scale: Floats,
    ratios: Doubles,
    slots: npt.NDArray[np.intp],
) -> Fitted:
    flat = scale.reshape(-1).astype(np.float64)
    new_scale = (flat / ratios).astype(np.float32)
    wanted = codebook(layer.format)[codes].astype(np.float64)
    stored = _round(kind, wanted * ratios[slots])
    before = wanted * flat[slots]
    after = stored.astype(np.float64) * new_scale.astype(np.float64)[slots]
    noise = float(((before - after) ** 2).sum())
    quality = sqnr_db(float((before**2).sum()), noise) if noise else None
    return Fitted(kind, stored, new_scale.reshape(scale.shape), noise == 0.0, quality)
