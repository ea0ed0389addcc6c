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

import zlib
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from afpq.errors import FormatError
from afpq.formats import AfpFormat, decode, exponent_bias_of

__all__ = ["TILE_N", "PackedTensor", "pack", "packed_bytes", "store_scale", "unpack"]

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


def store_scale(
    fmt: AfpFormat, scale: npt.NDArray[np.float32], kind: str
) -> npt.NDArray[np.uint16] | npt.NDArray[np.int8]:
    """Scales as they are written, same shape: bfloat16 bits in uint16 (`real`) or exponent biases in int8 (`integer`).

    Raises:
        FormatError: a scale is not one that can be stored (see `formats.round_scale`), or the kind does not exist.
    """
    if not (np.isfinite(scale).all() and (scale > 0).all()):
        raise FormatError("scales must be positive finite numbers")
    if kind == "real":
        bits = np.ascontiguousarray(scale, np.float32).view(np.uint32)
        if (bits & 0xFFFF).any():
            raise FormatError("a real scale is not a bfloat16 number")
        return (bits >> 16).astype(np.uint16)
    if kind == "integer":
        bias = exponent_bias_of(fmt, scale)
        stored = np.clip(np.rint(bias), -128, 127).astype(np.int8)
        if (stored != bias).any():
            raise FormatError(
                "an integer scale is not a power of two with an exponent_bias in -128..127"
            )
        return stored
    raise FormatError(f"exponent bias kind {kind!r} is not one of real, integer")


@dataclass(frozen=True, eq=False)
class PackedTensor:
    """A weight matrix [n, k] as it is stored: packed codes and the scale of each channel, tensor or group.

    `scale` is float32 [n] (per_channel), [1] (per_tensor) or [num_groups, n] (per_group, `group_size` steps of k each);
    `kind` tells how it is stored: "real" as bfloat16, "integer" as an int8 exponent bias.

    Raises:
        FormatError: the codes or the scales do not have the size that n and k ask for.
    """

    format: AfpFormat
    n: int
    k: int
    data: npt.NDArray[np.uint8] = field(repr=False)  # [packed_bytes]
    scale: npt.NDArray[np.float32] = field(repr=False)
    kind: str = "real"
    group_size: int = 0

    def __post_init__(self) -> None:
        if self.kind not in ("real", "integer"):
            raise FormatError(f"exponent bias kind {self.kind!r} is not one of real, integer")
        expected = packed_bytes(self.n, self.k, self.format.bits)
        if self.data.shape != (expected,):
            raise FormatError(
                f"packed data of [{self.n}, {self.k}] at {self.format.bits} bits has {expected} bytes, "
                f"got shape {self.data.shape}"
            )
        shapes: list[tuple[int, ...]] = [(self.n,), (1,)]
        if self.group_size:
            shapes = [(-(-self.k // self.group_size), self.n)]
        if self.scale.shape not in shapes:
            raise FormatError(f"scale of shape {self.scale.shape} is not one of {shapes}")

    @property
    def granularity(self) -> str:
        """`per_channel`, `per_tensor` or `per_group`."""
        if self.group_size:
            return "per_group"
        return "per_channel" if self.scale.shape == (self.n,) else "per_tensor"

    @property
    def storage_bits(self) -> int:
        """Bits on disk: codes with their padding, and scales."""
        return 8 * self.data.size + (16 if self.kind == "real" else 8) * self.scale.size

    def stored_scale(self) -> npt.NDArray[np.uint16] | npt.NDArray[np.int8]:
        """The scales as they are written (see `store_scale`)."""
        return store_scale(self.format, self.scale, self.kind)

    def checksum(self) -> str:
        """CRC-32 of the codes followed by the stored scales (little-endian): 8 hexadecimal digits."""
        scale = self.stored_scale()
        stored = scale.astype(scale.dtype.newbyteorder("<")).tobytes()
        return f"{zlib.crc32(stored, zlib.crc32(self.data.tobytes())):08x}"

    def decode(self) -> npt.NDArray[np.float32]:
        """The values: float32 [n, k]."""
        if self.group_size:
            scale = np.repeat(self.scale, self.group_size, axis=0)[: self.k].T
        else:
            scale = self.scale.reshape(-1, 1)
        return decode(unpack(self.data, self.n, self.k, self.format.bits), self.format, scale)
