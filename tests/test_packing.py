"""The stored layout, byte for byte."""

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from afpq.errors import FormatError
from afpq.packing import pack, packed_bytes, unpack

BITS = range(2, 9)


def reference_pack(codes: npt.NDArray[np.uint8], bits: int) -> bytes:
    """The layout in plain integers: tiles along k, then n; one little-endian stream a tile."""
    n, k = codes.shape
    out = b""
    for row in range(0, n, 16):
        for column in range(0, k, 4):
            stream = 0
            for channel in range(16):
                for step in range(4):
                    inside = row + channel < n and column + step < k
                    code = int(codes[row + channel, column + step]) if inside else 0
                    stream |= code << ((4 * channel + step) * bits)
            out += stream.to_bytes(8 * bits, "little")
    return out


@pytest.mark.parametrize("bits", BITS)
def test_one_full_tile_takes_eight_bytes_a_bit(bits: int) -> None:
    assert packed_bytes(16, 4, bits) == 8 * bits


@pytest.mark.parametrize(
    ("n", "k", "tiles"),
    [(0, 0, 0), (0, 9, 0), (1, 1, 1), (16, 4, 1), (17, 4, 2), (16, 5, 2), (17, 5, 4), (33, 9, 9)],
)
def test_sizes_are_padded_to_whole_tiles(n: int, k: int, tiles: int) -> None:
    assert packed_bytes(n, k, 5) == tiles * 40
    assert pack(np.zeros((n, k), np.uint8), 5).shape == (tiles * 40,)


def test_golden_five_bits() -> None:
    # Channel 0 holds a b c d = 1 2 3 4, channel 1 holds e f g h = 31 0 21 7; the rest is padding.
    #
    #   byte      0        1        2        3        4
    #   bits   bbbaaaaa edddddcc ...                          is, LSB first, the stream
    #          a=00001 b=00010 c=00011 d=00100 e=11111 f=00000 g=10101 h=00111
    #
    #   byte 0 = b[2:0] a      = 010 00001          = 0x41
    #   byte 1 = d[0] c b[4:3] = 0 00011 00         = 0x0C
    #   byte 2 = e[3:0] d[4:1] = 1111 0010          = 0xF2
    #   byte 3 = g[1:0] f e[4] = 01 00000 1         = 0x41
    #   byte 4 = h g[4:2]      = 00111 101          = 0x3D
    got = pack(np.array([[1, 2, 3, 4], [31, 0, 21, 7]], np.uint8), 5)
    assert got.tobytes() == bytes([0x41, 0x0C, 0xF2, 0x41, 0x3D]) + bytes(35)


def test_golden_four_bits_over_two_tiles_of_k() -> None:
    # n = 1, k = 6: the second tile holds steps 4 and 5, then padding. Two codes a byte, the first
    # in the low half.
    #
    #   tile 0: 1 2 | 3 4 | 0 ...      tile 1: 5 6 | 0 0 | 0 ...
    got = pack(np.array([[1, 2, 3, 4, 5, 6]], np.uint8), 4)
    assert got.tobytes() == bytes([0x21, 0x43]) + bytes(30) + bytes([0x65]) + bytes(31)


def test_golden_three_bits_over_two_blocks_of_channels() -> None:
    # n = 17, k = 1: channel c of the first tile starts at bit 3 * 4c = 12c; channel 16 opens the
    # second tile.
    #
    #   tile 0: channel 0 = 5 at bit 0, channel 1 = 7 at bit 12 (byte 1, bit 4),
    #           channel 15 = 1 at bit 180 (byte 22, bit 4)
    #   tile 1: channel 16 = 6 at bit 0
    codes = np.zeros((17, 1), np.uint8)
    codes[[0, 1, 15, 16], 0] = [5, 7, 1, 6]
    first = bytearray(24)
    first[0], first[1], first[22] = 0x05, 0x70, 0x10
    assert pack(codes, 3).tobytes() == bytes(first) + bytes([0x06]) + bytes(23)


def test_eight_bits_are_plain_bytes() -> None:
    codes = np.arange(64, dtype=np.uint8).reshape(16, 4)
    np.testing.assert_array_equal(pack(codes, 8), np.arange(64))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("n", [1, 15, 16, 17])
@pytest.mark.parametrize("k", [1, 3, 4, 5, 9])
def test_pack_equals_the_definition(bits: int, n: int, k: int) -> None:
    codes = np.random.default_rng([bits, n, k]).integers(0, 1 << bits, (n, k)).astype(np.uint8)
    assert pack(codes, bits).tobytes() == reference_pack(codes, bits)


@given(st.sampled_from(BITS), st.integers(0, 40), st.integers(0, 40), st.integers(0, 2**32))
def test_unpack_inverts_pack(bits: int, n: int, k: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 1 << bits, (n, k)).astype(np.uint8)
    data = pack(codes, bits)
    assert data.dtype == np.uint8
    assert data.shape == (packed_bytes(n, k, bits),)
    np.testing.assert_array_equal(unpack(data, n, k, bits), codes)


@given(st.sampled_from(BITS), st.integers(1, 200), st.integers(0, 2**32))
def test_every_position_has_its_own_bits(bits: int, k: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    codes = np.zeros((3, k), np.uint8)
    row, column = int(rng.integers(3)), int(rng.integers(k))
    codes[row, column] = (1 << bits) - 1
    assert int(np.unpackbits(pack(codes, bits)).sum()) == bits


def test_codes_that_are_too_wide_are_errors() -> None:
    with pytest.raises(FormatError, match="code 16 does not fit into 4 bits"):
        pack(np.array([[16]], np.uint8), 4)


def test_codes_that_are_no_matrix_are_errors() -> None:
    with pytest.raises(FormatError, match=r"codes must be a matrix \[n, k\], got 1 axes"):
        pack(np.zeros(4, np.uint8), 4)


def test_data_of_the_wrong_size_is_an_error() -> None:
    with pytest.raises(FormatError, match=r"\[2, 4\] at 5 bits has 40 bytes, got shape \(39,\)"):
        unpack(np.zeros(39, np.uint8), 2, 4, 5)
