"""Files of arrays: `.npy` files are opened when they are needed, uncompressed arrays of an `.npz` memory-mapped."""

import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from afpq._feeds import Array, Feed, Input, batching_of
from afpq.errors import DataError

__all__ = ["load_npy", "load_npz", "npy_items"]


def load_npz(path: Path) -> dict[str, Array]:
    """The arrays of an `.npz`; uncompressed ones are memory-mapped.

    Raises:
        DataError: the file is not a readable `.npz`.
    """
    try:
        with zipfile.ZipFile(path) as files:
            return {
                name.removesuffix(".npy"): _member(path, files, name) for name in files.namelist()
            }
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path} is not a readable .npz file of plain arrays: {error}") from error


def _member(path: Path, files: zipfile.ZipFile, name: str) -> Array:
    if files.getinfo(name).compress_type == zipfile.ZIP_STORED:
        return _map_member(path, files, name)
    with files.open(name) as stream:
        array: Array = np.lib.format.read_array(stream, allow_pickle=False)
    return array


def _map_member(path: Path, files: zipfile.ZipFile, name: str) -> Array:
    info = files.getinfo(name)
    with path.open("rb") as stream:
        # The local header's name and extra field may differ in size from the directory's.
        stream.seek(info.header_offset + 26)
        sizes = np.frombuffer(stream.read(4), "<u2")
        stream.seek(info.header_offset + 30 + int(sizes.sum()))
        first = np.lib.format.read_magic(stream) == (1, 0)
        read = np.lib.format.read_array_header_1_0 if first else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(stream)
        if dtype.hasobject:
            raise ValueError(f"{name} holds Python objects")
        if stream.tell() + dtype.itemsize * int(np.prod(shape)) > path.stat().st_size:
            raise ValueError(f"{name} is truncated")
        if not np.prod(shape):
            return np.zeros(shape, dtype)
        return np.memmap(path, dtype, "r", stream.tell(), shape, "F" if fortran else "C")


def npy_items(files: Mapping[str, list[Path]], inputs: tuple[Input, ...]) -> Iterator[Feed]:
    """Opens `.npy` files one after the other; a file of one sample may leave out the batch axis.

    Raises:
        DataError: a file cannot be read.
    """
    count = len(next(iter(files.values())))
    for index in range(count):
        item = {}
        for entry in inputs:
            array = load_npy(files[entry.name][index])
            if array.ndim == len(entry.shape) - 1 and batching_of(inputs).kind != "feed":
                array = array[None]
            item[entry.name] = array
        yield item


def load_npy(path: Path) -> Array:
    """A memory-mapped `.npy` file.

    Raises:
        DataError: the file is not a readable `.npy`.
    """
    try:
        array: object = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path} is not a readable .npy file: {error}") from error
    if not isinstance(array, np.ndarray):
        raise DataError(f"{path} is not a .npy file, it holds several arrays")
    return array
