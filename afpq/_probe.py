"""Made-up inputs: enough to see that a model runs, and to time it."""

from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from afpq.errors import DataError

__all__ = ["Feeds", "random_feeds"]

Feeds = dict[str, npt.NDArray[Any]]

_OPEN_AXIS = 64  # extent of a dynamic axis that is not the first
_NUMPY_TYPES: dict[str, type[np.generic]] = {
    "tensor(bool)": np.bool_,
    "tensor(double)": np.float64,
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int32)": np.int32,
    "tensor(int64)": np.int64,
    "tensor(uint8)": np.uint8,
}


def random_feeds(model: ort.InferenceSession, batch: int = 1, *, seed: int = 0) -> Feeds:
    """An input of the right shapes: normal floats, ones elsewhere; open axes are `batch` (the first) or 64.

    Raises:
        DataError: an input is neither a number nor a truth value.
    """
    rng = np.random.default_rng(seed)
    feeds: Feeds = {}
    for info in model.get_inputs():
        shape = [
            d if isinstance(d, int) and d > 0 else (_OPEN_AXIS if axis else batch)
            for axis, d in enumerate(info.shape)
        ]
        dtype = _NUMPY_TYPES.get(info.type)
        if dtype is None:
            raise DataError(
                f"input {info.name!r} is {info.type}, which cannot be made up; give data"
            )
        if np.issubdtype(dtype, np.floating):
            feeds[info.name] = rng.standard_normal(shape).astype(dtype)
        else:
            feeds[info.name] = np.ones(shape, dtype)
    return feeds
