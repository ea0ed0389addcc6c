"""The stored layout of codes: one for disk, memory and every kernel.

A weight is a matrix of codes [n, k]: n output channels (or table rows), k products each. It is cut into tiles of
16 channels x 4 k; n is padded to a multiple of 16 and k to a multiple of 4 with zero codes. Tiles follow one another
along k, then along n. Inside a tile the code of (channel c, step j) has index 4*c + j; the codes are written LSB
first, code after code, so a tile takes 64 codes * bits / 8 = 8 * bits bytes:

    byte      0        1        2 ...                      e.g. 5 bits, channel 0 has codes a b c d, channel 1 e f ..
    bits   76543210 76543210 76543210
           bbbaaaaa edddddcc ...      (b continues in byte 1, and so on: a plain little-endian bit stream)

For a convolution k = tap * channels_per_group + channel with taps in row-major order, so channel-last activations are
read in order; in a depthwise one channels_per_group is 1. Nothing is repacked at load.
"""

import numpy as np
import numpy.typing as npt

from afpq.errors import FormatError

__all__ = ["pack", "packed_bytes", "unpack"]

TILE_N = 16
TILE_K = 4


def packed_bytes(n: int, k: int, bits: int) -> int:
    """Bytes that `pack` writes for codes [n, k]."""
    return -(-n // TILE_N) * -(-k // TILE_K) * 8 * bits


def pack(codes: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.uint8]:
    """Packs codes [n, k], each below 2^bits, into the tile layout: uint8 [packed_bytes].

    Raises:
        FormatError: the codes are not a matrix, or one does not fit into `bits`.
    """
    if codes.ndim != 2:
        raise FormatError(f"codes must be a matrix [n, k], got {codes.ndim} axes")
    if codes.size and int(codes.max()) >> bits:
        raise FormatError(f"code {int(codes.max())} does not fit into {bits} bits")
    n, k = codes.shape
    blocks, steps = -(-n // TILE_N), -(-k // TILE_K)
    padded = np.zeros((blocks * TILE_N, steps * TILE_K), np.uint8)
    padded[:n, :k] = codes
    tiles = padded.reshape(blocks, TILE_N, steps, TILE_K).transpose(0, 2, 1, 3)
    stream = np.unpackbits(tiles.reshape(-1, 1), axis=1, count=bits, bitorder="little")
    return np.packbits(stream.reshape(-1), bitorder="little")


def unpack(data: npt.NDArray[np.uint8], n: int, k: int, bits: int) -> npt.NDArray[np.uint8]:
    """The inverse of `pack`: uint8 codes [n, k].

    Raises:
        FormatError: `data` does not have `packed_bytes(n, k, bits)` bytes.
    """
    expected = packed_bytes(n, k, bits)
    if data.shape != (expected,):
        raise FormatError(
            f"packed data of [{n}, {k}] at {bits} bits has {expected} bytes, got shape {data.shape}"
        )
    blocks, steps = -(-n // TILE_N), -(-k // TILE_K)
    stream = np.unpackbits(data, bitorder="little").reshape(-1, bits)
    codes = np.packbits(stream, axis=1, bitorder="little")
    tiles = codes.reshape(blocks, steps, TILE_N, TILE_K).transpose(0, 2, 1, 3)
    return np.ascontiguousarray(tiles.reshape(blocks * TILE_N, steps * TILE_K)[:n, :k])
