"""Inputs of models and samples for them, for tests of data."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from afpq.data import Data

VECTOR = [("x", "float32", ("N", 4))]
IMAGE = [("input", "float32", ("N", 3, 8, 8))]
TOKENS = [("ids", "int64", ("batch", "seq")), ("mask", "int64", ("batch", "seq"))]
FIXED = [("x", "float32", (2, 4))]
FEEDS = [("x", "float32", (1, 4)), ("state", "float32", (2, 1, 3)), ("rate", "int64", ())]


def vectors(count: int) -> npt.NDArray[np.float32]:
    return np.arange(count * 4, dtype=np.float32).reshape(count, 4)


def joined(data: Data, name: str, size: int = 32) -> npt.NDArray[Any]:
    return np.concatenate([feed[name] for feed in data.batches(size)])


def write_images(folder: Path, count: int, size: int = 8) -> list[npt.NDArray[np.uint8]]:
    folder.mkdir(exist_ok=True)
    images = []
    for index in range(count):
        image = np.full((size, size, 3), index, np.uint8)
        Image.fromarray(image).save(folder / f"{index:03}.png")
        images.append(image)
    return images


def token_batches(*sizes: tuple[int, int]) -> list[dict[str, npt.NDArray[np.int64]]]:
    return [
        {"ids": np.full(size, index), "mask": np.ones(size, np.int64)}
        for index, size in enumerate(sizes)
    ]
