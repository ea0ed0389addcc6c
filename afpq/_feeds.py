"""A model's inputs, and the checks and casts that make arrays fit them.

How samples become batches follows from the inputs' first axes alone (`Batching`): all of them open
- any number of samples at once; all fixed to the same number - exactly so many; anything else (a
scalar input, a batch that is not the first axis) - one sample is one complete feed.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from afpq.errors import DataError

__all__ = [
    "Array",
    "Batching",
    "Dim",
    "Feed",
    "Input",
    "as_inputs",
    "batching_of",
    "cast",
    "check_dtype",
    "check_keys",
    "check_shape",
    "fit_item",
    "named",
    "show_shape",
]

Array = npt.NDArray[Any]
Feed = dict[str, Array]
Dim = int | str | None

_ORT_TYPES = {"float": "float32", "double": "float64"}


class Input(NamedTuple):
    """One input of a model: fixed axes are integers, open ones names or None."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[Dim, ...]


@dataclass(frozen=True)
class Batching:
    """`kind` is "any", "fixed" or "feed"; a unit is what is never split: `size` samples."""

    kind: str
    size: int = 1


def as_inputs(inputs: Iterable[Any]) -> tuple[Input, ...]:
    """Inputs given as (name, dtype, shape), objects with these attributes, or onnxruntime's.

    Raises:
        DataError: there are none, or one has a type without NumPy equivalent.
    """
    result = tuple(_as_input(entry) for entry in inputs)
    if not result:
        raise DataError("the model has no inputs, so no data fits it")
    return result


def _as_input(entry: Any) -> Input:
    if isinstance(entry, tuple):
        name, dtype, shape = entry
    else:
        name, shape = entry.name, entry.shape
        dtype = entry.dtype if hasattr(entry, "dtype") else entry.type
    if isinstance(dtype, str) and dtype.startswith("tensor("):
        text = dtype.removeprefix("tensor(").removesuffix(")")
        dtype = _ORT_TYPES.get(text, text)
    elif hasattr(dtype, "numpy"):
        dtype = dtype.numpy()
    try:
        known = np.dtype(dtype)
    except TypeError as error:
        raise DataError(f"input {name!r} has type {dtype}, which is not supported") from error
    if known.kind not in "fiub":
        raise DataError(f"input {name!r} has type {dtype}, which is not supported")
    if shape is None:
        raise DataError(f"input {name!r} has an unknown number of axes, so no data can be checked")
    return Input(str(name), known, tuple(shape))


def batching_of(inputs: tuple[Input, ...]) -> Batching:
    """How samples become batches for these inputs (see the module's head)."""
    first = [entry.shape[0] if entry.shape else "scalar" for entry in inputs]
    fixed = {dim for dim in first if isinstance(dim, int) and dim > 0}
    if not fixed and all(entry.shape for entry in inputs):
        return Batching("any")
    if len(fixed) == 1 and all(isinstance(dim, int) for dim in first):
        return Batching("fixed", fixed.pop())
    return Batching("feed")


def show_shape(shape: Iterable[Dim]) -> str:
    """`[N, 3, 224, 224]`, an open axis without a name as `?`."""
    return f"[{', '.join('?' if dim is None else str(dim) for dim in shape)}]"


def check_shape(shape: tuple[int, ...], expected: tuple[Dim, ...], name: str, where: str) -> None:
    """Compares the rank and the fixed axes.

    Raises:
        DataError: they differ.
    """
    fits = len(shape) == len(expected) and all(
        not isinstance(want, int) or got == want for got, want in zip(shape, expected, strict=True)
    )
    if not fits:
        raise DataError(
            f"{where}: input {name!r} has shape {show_shape(shape)}, "
            f"the model expects {show_shape(expected)}"
        )


def check_dtype(dtype: np.dtype[Any], entry: Input, where: str) -> None:
    """Allows casts that keep the meaning: between floats, between integers, from bool to integers.

    Raises:
        DataError: any other difference.
    """
    want, got = entry.dtype.kind, dtype.kind
    if dtype == entry.dtype or (want, got) in {("f", "f"), *((w, g) for w in "iu" for g in "iub")}:
        return
    hint = ""
    if want == "f" and dtype == np.uint8:
        hint = "; if these are images, name their preprocessing, such as imagenet-torchvision"
    elif want == "f" and got in "iub":
        hint = "; convert it to float as the network expects it"
    raise DataError(
        f"{where}: input {entry.name!r} has type {dtype}, the model expects {entry.dtype}{hint}"
    )


def cast(array: Array, entry: Input, where: str) -> Array:
    """The array in the input's type, C-contiguous; the types were checked before.

    Raises:
        DataError: a value does not fit the smaller type.
    """
    if array.dtype == entry.dtype:
        return np.ascontiguousarray(array).reshape(array.shape)
    with np.errstate(over="ignore"):
        result = np.ascontiguousarray(array, dtype=entry.dtype).reshape(array.shape)
    if entry.dtype.kind == "f":
        lost = not bool((np.isfinite(result) | ~np.isfinite(array)).all())
    else:
        limits = np.iinfo(entry.dtype)
        lost = array.dtype.kind in "iu" and array.size > 0
        lost = lost and not limits.min <= int(array.min()) <= int(array.max()) <= limits.max
    if lost:
        raise DataError(f"{where}: input {entry.name!r} has values beyond {entry.dtype}")
    return result


def named(item: Any, inputs: tuple[Input, ...], where: str) -> Mapping[Any, Any]:
    """One batch as a user yields it by the names of the inputs: a dict, arrays in their order, or the only array.

    An array more than there are inputs has the labels; so a DataLoader of torch yields them.

    Raises:
        DataError: it is none of these.
    """
    if isinstance(item, Mapping):
        return item
    names = [entry.name for entry in inputs]
    arrays = item if isinstance(item, tuple | list) else [item]
    if len(arrays) - len(names) in (0, 1) and all(hasattr(a, "__array__") for a in arrays):
        return dict(zip([*names, "labels"], arrays, strict=False))
    raise DataError(
        f"{where} is a {type(item).__name__}; it must be a dict of arrays with the keys "
        f"{', '.join(names)}, or these arrays in this order"
        + (", or one array" if len(inputs) == 1 else "")
    )


def fit_item(item: Mapping[Any, Any], inputs: tuple[Input, ...], where: str) -> Feed:
    """One batch by the names of the inputs (`named`) as a feed.

    Raises:
        DataError: keys, types or shapes do not fit the model.
    """
    names = [entry.name for entry in inputs]
    check_keys([str(key) for key in item], names, where)
    feed = {}
    for entry in inputs:
        array = np.asarray(item[entry.name])
        check_dtype(array.dtype, entry, where)
        check_shape(array.shape, entry.shape, entry.name, where)
        feed[entry.name] = cast(array, entry, where)
    if batching_of(inputs).kind == "any" and len({len(array) for array in feed.values()}) > 1:
        counts = ", ".join(f"{len(feed[name])} of {name}" for name in names)
        raise DataError(f"{where}: inputs have different numbers of samples: {counts}")
    return feed


def check_keys(found: list[str], names: list[str], where: str) -> None:
    """Demands exactly the input names; `labels` may come along.

    Raises:
        DataError: a key is missing or unknown.
    """
    extra = [key for key in found if key not in names and key != "labels"]
    if extra or not set(names) <= set(found):
        raise DataError(
            f"{where} has the keys {', '.join(found) or '(none)'}; "
            f"the model expects {', '.join(names)} (and labels, if there are any)"
        )
