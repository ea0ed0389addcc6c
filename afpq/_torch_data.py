"""Calibration data of torch programs: any of its usual forms as feeds, keyed by the arguments of `forward`.

A tensor or array, a tuple of them, a dictionary or an .npz file holds all samples along the first axis. Anything else
is iterated, and each item is one batch: a tensor, a tuple or list of positional arguments, or a dictionary of
arguments. `labels` may be a key of a dictionary, or come after the last argument of a tuple. Arguments are tensors or
arrays.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from afpq._array_files import load_npz
from afpq._sources import repeatable
from afpq.errors import DataError

__all__ = ["Samples", "example_of", "read_samples"]

Array = npt.NDArray[Any]
Feed = dict[str, Array]
_LABELS = "labels"


@dataclass(frozen=True)
class Samples:
    """Data bound to a module: `passes()` starts again from the first batch; `whole` is all samples in one."""

    passes: Callable[[], Iterator[Feed]]
    whole: bool

    def for_afpq(self) -> object:
        """The data as `afpq.quantize` takes it."""
        return next(self.passes()) if self.whole else self.passes


def read_samples(module: nn.Module, data: object, limit: int | None) -> Samples:
    """Opens data for a module; the first `limit` samples of what cannot start again are kept in memory.

    Raises:
        DataError: the data is of another kind, or a batch does not fit the module's forward.
    """
    bind = _Binder(module)
    if isinstance(data, str | Path):
        if Path(data).suffix != ".npz" or not Path(data).is_file():
            raise DataError(f"{data} is no .npz file; other data is tensors, or yields them")
        data = load_npz(Path(data))
    if isinstance(data, Tensor | np.ndarray | tuple | Mapping):
        feed = bind(data, "the data")
        return Samples(lambda: iter([feed]), whole=True)
    if not callable(data) and not isinstance(data, Iterable):
        raise DataError(f"the data is a {type(data).__name__}, which yields no batches")
    start = data if callable(data) else repeatable(data, limit)

    def passes() -> Iterator[Feed]:
        for number, item in enumerate(start()):
            yield bind(item, f"batch {number} of the data")

    return Samples(passes, whole=False)


def example_of(samples: Samples, limit: int | None) -> tuple[Feed, dict[str, set[int]]]:
    """One batch to trace a module with, and the axes of each argument that are open.

    Open is what differs between batches, and the first axis where all arguments have the same one: the samples.

    Raises:
        DataError: there are no batches, or an argument has another number of axes or type in some.
    """
    feeds: list[Feed] = []
    largest: Feed = {}
    seen = 0
    for number, item in enumerate(samples.passes()):
        feed = {name: a[:2] if samples.whole else a for name, a in item.items() if name != _LABELS}
        _check_alike(feeds[0] if feeds else feed, feed, f"batch {number} of the data")
        feeds.append({name: np.broadcast_to(a.dtype.type(0), a.shape) for name, a in feed.items()})
        if _size(feed) > _size(largest) or not largest:
            largest = feed
        seen += max((len(a) for a in feed.values() if a.ndim), default=1)
        if limit is not None and seen >= limit:
            break
    if not feeds:
        raise DataError("the data yields no batches")
    open_axes = {
        name: {
            axis for f in feeds for axis in range(a.ndim) if f[name].shape[axis] != a.shape[axis]
        }
        for name, a in feeds[0].items()
    }
    firsts = {a.shape[:1] for a in largest.values()}
    if len(firsts) == 1 and firsts != {()}:
        open_axes = {name: axes | {0} for name, axes in open_axes.items()}
        if firsts == {(1,)}:  # an axis of one is taken for one that is always one
            largest = {name: np.repeat(a, 2, axis=0) for name, a in largest.items()}
    return largest, open_axes


class _Binder:
    """Items as feeds: arguments by name, in the order of the signature, and `labels`."""

    def __init__(self, module: nn.Module) -> None:
        self._signature = inspect.signature(module.forward)
        self._name = type(module).__name__
        for parameter in self._signature.parameters.values():
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.POSITIONAL_ONLY):
                raise DataError(
                    f"forward of {self._name} takes {parameter}: wrap it in a module whose arguments have names"
                )

    def __call__(self, item: object, where: str) -> Feed:
        found, labels = self._arguments(item, where)
        feed: Feed = {}
        for name, value in found.items():
            if value is None:
                continue
            feed[name] = _array(value, f"{where}: argument {name!r}")
        if not feed:
            raise DataError(f"{where} has no arguments")
        if labels is not None:
            feed[_LABELS] = _array(labels, f"{where}: {_LABELS}")
        return feed

    def _arguments(self, item: object, where: str) -> tuple[dict[str, Any], object]:
        if isinstance(item, Mapping):
            given = {str(name): value for name, value in item.items()}
            labels = None if _LABELS in self._signature.parameters else given.pop(_LABELS, None)
            return self._bind((), given, where), labels
        values = tuple(item) if isinstance(item, tuple | list) else (item,)
        try:
            return self._bind(values, {}, where), None
        except DataError:
            last = values[-1] if len(values) > 1 else None
            if isinstance(last, Tensor | np.ndarray) and _is_labels(last):
                return self._bind(values[:-1], {}, where), last
            raise

    def _bind(self, args: tuple[Any, ...], kwargs: dict[str, Any], where: str) -> dict[str, Any]:
        try:
            bound = self._signature.bind(*args, **kwargs)
        except TypeError as error:
            raise DataError(
                f"{where} does not fit forward{self._signature} of {self._name}: {error}"
            ) from error
        result: dict[str, Any] = {}
        for name, value in bound.arguments.items():
            variable = self._signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD
            result.update(value if variable else {name: value})
        return result


def _array(value: object, what: str) -> Array:
    if isinstance(value, np.ndarray):
        return value
    if not isinstance(value, Tensor):
        raise DataError(f"{what} is a {type(value).__name__}, not a tensor")
    try:
        array: Array = value.detach().cpu().numpy()
    except TypeError as error:  # bfloat16 and the like
        raise DataError(f"{what} is {value.dtype}, which NumPy does not have") from error
    return array


def _is_labels(value: Tensor | Array) -> bool:
    array = _array(value, _LABELS)
    return array.ndim == 1 and array.dtype.kind in "iu"


def _check_alike(first: Feed, feed: Feed, where: str) -> None:
    if list(first) != list(feed):
        raise DataError(
            f"{where} has the arguments {', '.join(feed)}, the first {', '.join(first)}"
        )
    for name, array in feed.items():
        before = first[name]
        if (before.ndim, before.dtype) != (array.ndim, array.dtype):
            raise DataError(
                f"{where}: argument {name!r} is {array.dtype} {list(array.shape)}, "
                f"in the first batch {before.dtype} {list(before.shape)}"
            )


def _size(feed: Feed) -> int:
    return sum(array.size for array in feed.values())
