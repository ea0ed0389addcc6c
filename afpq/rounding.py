"""From a float weight [n, k] to a packed tensor: the scales with the least error, and the nearest codes.

The heavy loops are native and proven equal to `formats`; results do not depend on the number of threads. Which format
a layer gets is decided in `search`.
"""

import os

import numpy as np
import numpy.typing as npt

from afpq import _core
from afpq.errors import FormatError
from afpq.formats import AfpFormat, decode, magnitudes, round_scale
from afpq.packing import TILE_N, PackedTensor, pack, packed_bytes

__all__ = [
    "GRANULARITIES",
    "KINDS",
    "best_scale",
    "fake_quantize_rows",
    "quantize_tensor",
    "scale_bits",
]

KINDS = ("real", "integer")
GRANULARITIES = ("per_channel", "per_tensor")

# The per-tensor grid, in units of "the maximum fits": far enough down to leave an outlier of a hundred times the rest
# behind. Per channel the native search has its own.
_FACTORS = 1.06 * 0.97 ** np.arange(160)
# Smaller scales are not tried once the error is so many times the best: what is clipped costs more with every step.
_HOPELESS = 4.0
_CHUNK_CODES = 1 << 24


def scale_bits(kind: str) -> int:
    """Stored bits of one scale: a bfloat16 (`real`) or an int8 exponent bias (`integer`)."""
    _check_choice("exponent bias kind", kind, KINDS)
    return 16 if kind == "real" else 8


def best_scale(
    weight: npt.NDArray[np.float32],
    fmt: AfpFormat,
    energy: npt.NDArray[np.floating] | None = None,
    *,
    kind: str = "real",
    granularity: str = "per_channel",
    num_threads: int = 0,
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float64]]:
    """Chooses storable scales by weighted squared error; values beyond the largest one saturate.

    Args:
        weight: [n, k], finite.
        fmt: the format that the weight is rounded to.
        energy: how much each squared error counts, [rows, k], where `rows` divides n and row r of the weight uses
            row r * rows // n; None counts every error 1.
        kind: `real` scales are bfloat16 numbers, `integer` ones are powers of two.
        granularity: `per_channel` chooses a scale for every row, `per_tensor` one for all.
        num_threads: 0 means one per core; the result is the same for any number.

    Returns:
        The scales, float32 [n] or [1], and the weighted squared error of every row, float64 [n].

    Raises:
        FormatError: a weight or an energy is not finite, an energy is negative, a shape does not fit, or `kind` or
            `granularity` is unknown.
    """
    _check_choice("exponent bias kind", kind, KINDS)
    _check_choice("granularity", granularity, GRANULARITIES)
    weight = _check_weight(weight)
    unit, scaled = _unit_energy(weight, energy)
    threads = num_threads or os.cpu_count() or 1
    if granularity == "per_channel":
        scale, error = _core.search_scales(weight, scaled, str(fmt), kind, threads)
    else:
        scale, error = _best_common_scale(weight, fmt, scaled, kind, threads)
    return scale, error * unit


def quantize_tensor(
    weight: npt.NDArray[np.float32],
    fmt: AfpFormat,
    scale: npt.NDArray[np.float32],
    *,
    kind: str = "real",
    num_threads: int = 0,
) -> PackedTensor:
    """Rounds a weight [n, k] to the nearest codes and packs them; `scale` is [n] or [1].

    Raises:
        FormatError: a weight is not finite, or a scale cannot be stored as `kind` asks.
    """
    _check_choice("exponent bias kind", kind, KINDS)
    weight = _check_weight(weight)
    scale = _check_scale(scale, fmt, kind, len(weight))
    threads = num_threads or os.cpu_count() or 1
    codes = _core.encode_rows(weight, str(fmt), scale, threads)
    n, k = weight.shape
    data = np.empty(packed_bytes(n, k, fmt.bits), np.uint8)
    # `pack` needs eight bytes a code; blocks of rows pack independently, so a large tensor goes in pieces.
    rows = max(_CHUNK_CODES // max(k, 1) // TILE_N, 1) * TILE_N
    for start in range(0, n, rows):
        piece = pack(codes[start : start + rows], fmt.bits)
        first = packed_bytes(start, k, fmt.bits)
        data[first : first + piece.size] = piece
    return PackedTensor(fmt, n, k, data, scale, kind)


def fake_quantize_rows(
    weight: npt.NDArray[np.float32],
    fmt: AfpFormat,
    scale: npt.NDArray[np.float32],
    *,
    num_threads: int = 0,
) -> npt.NDArray[np.float32]:
    """`formats.fake_quantize` of a weight [n, k] with scales [n] or [1], at native speed."""
    weight = _check_weight(weight)
    threads = num_threads or os.cpu_count() or 1
    scale = np.ascontiguousarray(scale, np.float32)
    return decode(_core.encode_rows(weight, str(fmt), scale, threads), fmt, scale[:, None])


def _best_common_scale(
    weight: npt.NDArray[np.float32],
    fmt: AfpFormat,
    energy: npt.NDArray[np.float32] | None,
    kind: str,
    threads: int,
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float64]]:
    largest = float(np.abs(weight).max(initial=0.0) if fmt.signed else weight.max(initial=0.0))
    wanted = largest / int(magnitudes(fmt)[-1]) * _FACTORS if largest > 0 else np.ones(1)
    limits = np.finfo(np.float32)
    wanted = np.clip(wanted, limits.tiny, 0.5 * limits.max / int(magnitudes(fmt)[-1]))
    # Every scale once, the largest first: ties go to the one that clips least.
    scales = np.unique(round_scale(fmt, wanted, kind))[::-1]
    best: npt.NDArray[np.float64] | None = None
    for scale in scales:
        error = _core.scale_errors(weight, energy, str(fmt), np.array([scale]), threads)
        if best is None or error.sum() < best.sum():
            best, chosen = error, scale
        elif error.sum() > _HOPELESS * best.sum():
            break
    assert best is not None
    return np.array([chosen], np.float32), best


def _unit_energy(
    weight: npt.NDArray[np.float32], energy: npt.NDArray[np.floating] | None
) -> tuple[float, npt.NDArray[np.float32] | None]:
    # The native search adds in float32: energies are brought to at most 1.
    if energy is None:
        return 1.0, None
    n, k = weight.shape
    if energy.ndim != 2 or energy.shape[1] != k or not len(energy) or n % len(energy):
        raise FormatError(f"energy {list(energy.shape)} does not fit a weight {[n, k]}")
    largest = float(energy.max(initial=0.0))
    if not (np.isfinite(largest) and energy.min(initial=0.0) >= 0):
        raise FormatError("energies must be finite and not negative")
    unit = largest if largest > 0 else 1.0
    return unit, np.ascontiguousarray(energy / unit, np.float32)


def _check_weight(weight: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    weight = np.ascontiguousarray(weight, np.float32)
    if weight.ndim != 2:
        raise FormatError(f"a weight must be a matrix [n, k], got {weight.ndim} axes")
    if not np.isfinite(weight).all():
        raise FormatError("weights to quantize must be finite, got NaN or infinity")
    return weight


def _check_scale(
    scale: npt.NDArray[np.float32], fmt: AfpFormat, kind: str, n: int
) -> npt.NDArray[np.float32]:
    scale = np.ascontiguousarray(scale, np.float32)
    if scale.shape not in ((n,), (1,)):
        raise FormatError(f"a weight of {n} channels has {n} scales or 1, got {list(scale.shape)}")
    if not (np.isfinite(scale).all() and (scale > 0).all()):
        raise FormatError("scales must be positive finite numbers")
    if not np.array_equal(scale, round_scale(fmt, scale, kind)):
        raise FormatError(
            f"a scale cannot be stored as kind {kind!r}; pass it to round_scale first"
        )
    return scale


def _check_choice(what: str, got: str, choices: tuple[str, ...]) -> None:
    if got not in choices:
        raise FormatError(f"{what} {got!r} is not one of {', '.join(choices)}")
