"""What tests of drivers have in common: packed weights, rows as they are rounded, and formats of activations."""

import numpy as np

from afpq import _core
from afpq.formats import decode, encode, round_scale
from afpq.packing import pack

PLANES = {"f32": 0, "a8": 1, "a16": 2}
STATIC = [
    ("e0m7", 0.0234375),
    ("e2m4", 0.025),
    ("ue1m7", 0.015625),
    ("ue2m5", 0.0125),
    ("ue2m3", 0.1),
]


def quantized(rng, n, k, fmt, groups=1):
    weight = rng.standard_normal((n, k)).astype(np.float32)
    scale = round_scale(fmt, np.full((groups, n), 2.5 / fmt.max_integer), "real")
    scale *= np.exp2(rng.integers(-2, 3, (groups, n))).astype(np.float32)
    spread = np.repeat(scale.T, -(-k // groups), axis=1)[:, :k]
    codes = encode(weight, fmt, spread)
    return pack(codes, fmt.bits), scale, codes, decode(codes, fmt, spread).astype(np.float64)


def check_everywhere(run, exact, bound, threads=(1, 2)):
    """run(isa, threads) is within `bound` of `exact`, and the same bits everywhere."""
    first = None
    for isa in _core.kernels.isa_names():
        for number in threads:
            y = run(isa, number)
            assert (np.abs(y - exact) <= bound).all()
            first = y if first is None else first
            np.testing.assert_array_equal(y, first)


def rounded_rows(x, planes):
    """Rows as a8 or a16 sees them, from the recipe in csrc/drivers/gemm.h: float64 values."""
    if planes == 0:
        return x.astype(np.float64)
    levels = np.float32(255 if planes == 1 else 65535)
    low = np.minimum(x.min(1, keepdims=True), 0)
    high = np.maximum(x.max(1, keepdims=True), 0)
    scale = high / levels - low / levels
    inverse = np.float32(1) / scale
    zero = np.rint(-low * inverse)
    q = np.clip(np.rint(x * inverse) + zero, 0, levels)
    return (q.astype(np.float64) - zero) * scale
