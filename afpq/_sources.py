"""Where samples come from, behind one interface: arrays, images, files, Python iterables.

A source has `num_units` units of `samples_per_unit` samples each (see `_feeds.Batching`) and reads
any ascending choice of them as feeds that fit the model. Nothing is held that can be read again:
images are decoded when they are needed, and so are files of arrays (see `_array_files`).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from afpq._feeds import (
    Array,
    Batching,
    Feed,
    Input,
    batching_of,
    cast,
    check_dtype,
    check_keys,
    check_shape,
    fit_item,
    named,
)
from afpq.errors import DataError
from afpq.preprocess import Preprocess, preprocess_image, read_image

__all__ = [
    "ItemSource",
    "RowSource",
    "Source",
    "array_source",
    "image_source",
    "item_source",
]

Units = npt.NDArray[np.int64]
Labels = npt.NDArray[np.int64]


class Source(Protocol):
    """What `data.Data` needs; `labels` has one entry for each sample of each unit, in order."""

    @property
    def num_units(self) -> int: ...
    @property
    def samples_per_unit(self) -> int: ...
    @property
    def batching(self) -> Batching: ...
    @property
    def labels(self) -> Labels | None: ...
    def read(self, units: Units, units_per_feed: int) -> Iterator[Feed]:
        """The feeds of these units, in order, at most so many units in each."""
        ...


@dataclass(frozen=True)
class RowSource:
    """Samples that can be picked one by one: `read_rows[input](sample indices)` stacks them."""

    inputs: tuple[Input, ...]
    batching: Batching
    num_units: int
    read_rows: Mapping[str, Callable[[Units], Array]]
    labels: Labels | None
    where: str

    @property
    def samples_per_unit(self) -> int:
        return self.batching.size

    def read(self, units: Units, units_per_feed: int) -> Iterator[Feed]:
        step = units_per_feed if self.batching.kind == "any" else 1
        for start in range(0, len(units), step):
            part = units[start : start + step, None] * self.batching.size
            rows = (part + np.arange(self.batching.size)).reshape(-1)
            feed = {}
            for entry in self.inputs:
                array = self.read_rows[entry.name](rows)
                feed[entry.name] = cast(
                    array[0] if self.batching.kind == "feed" else array, entry, self.where
                )
            yield feed


@dataclass(frozen=True)
class ItemSource:
    """Batches that come in their own order: `open_items()` starts again from the first one.

    With an open batch axis the rows are the units, else the items.
    """

    inputs: tuple[Input, ...]
    batching: Batching
    rows_per_item: tuple[int, ...]
    open_items: Callable[[], Iterator[Any]]
    labels: Labels | None
    where: str

    @property
    def num_units(self) -> int:
        return sum(self.rows_per_item)

    @property
    def samples_per_unit(self) -> int:
        return self.batching.size

    def read(self, units: Units, units_per_feed: int) -> Iterator[Feed]:
        start = 0
        for index, (rows, item) in enumerate(zip(self.rows_per_item, self._items(), strict=False)):
            low, high = np.searchsorted(units, [start, start + rows])
            chosen = units[low:high] - start
            start += rows
            if not len(chosen):
                continue
            where = f"batch {index} of {self.where}"
            feed = fit_item(named(item, self.inputs, where), self.inputs, where)
            if self.batching.kind != "any":
                yield feed
                continue
            if len(next(iter(feed.values()))) != rows:
                raise DataError(
                    f"batch {index} of {self.where} changed its size between two passes"
                )
            for first in range(0, len(chosen), units_per_feed):
                part = chosen[first : first + units_per_feed]
                yield {name: np.ascontiguousarray(array[part]) for name, array in feed.items()}
        if start != self.num_units:
            raise DataError(f"{self.where} yields fewer batches on a second pass")

    def _items(self) -> Iterator[Any]:
        return self.open_items()


def array_source(
    arrays: Mapping[str, Array],
    inputs: tuple[Input, ...],
    spec: Preprocess | None,
    where: str,
) -> RowSource:
    """Arrays with samples along the first axis, keyed by input names, and perhaps `labels`.

    Samples of a model that takes complete feeds (`Batching`) have one axis more than the input.
    With a preprocess specification the arrays are uint8 images, [n, h, w, c], [n, c, h, w] or [n,
    h, w].

    Raises:
        DataError: keys, types or shapes do not fit the model.
    """
    names = [entry.name for entry in inputs]
    check_keys(list(arrays), names, where)
    batching = batching_of(inputs)
    rows = {name: len(arrays[name]) if arrays[name].ndim else 1 for name in names}
    num_rows = rows[names[0]]
    if len(set(rows.values())) > 1:
        counts = ", ".join(f"{count} of {name}" for name, count in rows.items())
        raise DataError(f"{where}: inputs have different numbers of samples: {counts}")
    labels = arrays["labels"] if "labels" in arrays and "labels" not in names else None
    if labels is not None:
        labels = check_labels(labels, num_rows, where)
    readers: dict[str, Callable[[Units], Array]] = {}
    for entry in inputs:
        array = arrays[entry.name]
        if spec is not None:
            readers[entry.name] = _pixel_reader(array, entry, spec, where)
            continue
        check_dtype(array.dtype, entry, where)
        feeds = batching.kind == "feed"
        tail = entry.shape if feeds else entry.shape[1:]
        check_shape(array.shape, ("samples" if feeds else "N", *tail), entry.name, where)
        readers[entry.name] = array.__getitem__
    return _row_source(inputs, num_rows, readers, labels, where)


def image_source(
    files: list[Path],
    entry: Input,
    spec: Preprocess,
    labels: Labels | None,
    where: str,
) -> RowSource:
    """Image files in order, decoded when they are read.

    Raises:
        DataError: an image cannot be read, or does not have the size that the model expects.
    """

    def read_one(row: int) -> Array:
        return preprocess_image(
            spec, read_image(files[row], spec.channels or "rgb"), str(files[row])
        )

    reader = _image_reader(read_one, entry, where, lambda row: str(files[row]))
    reader(np.zeros(1, np.int64))
    return _row_source((entry,), len(files), {entry.name: reader}, labels, where)


def item_source(
    open_items: Callable[[], Iterator[Any]],
    inputs: tuple[Input, ...],
    limit: int | None,
    where: str,
    labels: Labels | None = None,
) -> ItemSource:
    """Batches that Python code or files yield; one pass checks and counts them.

    Raises:
        DataError: a batch does not fit the model, or there is none.
    """
    batching = batching_of(inputs)
    rows: list[int] = []
    found: list[Array] = []
    for index, item in enumerate(open_items()):
        item = named(item, inputs, f"batch {index} of {where}")
        feed = fit_item(item, inputs, f"batch {index} of {where}")
        rows.append(len(next(iter(feed.values()))) if batching.kind == "any" else 1)
        if "labels" in item and "labels" not in feed:
            count = rows[-1] * batching.size
            found.append(
                check_labels(np.asarray(item["labels"]), count, f"batch {index} of {where}")
            )
        if limit is not None and sum(rows) * batching.size >= limit:
            break
    if not sum(rows):
        raise DataError(f"{where} yields no samples")
    if found and len(found) != len(rows):
        raise DataError(f"{where} yields labels in {len(found)} of {len(rows)} batches")
    if found:
        labels = np.concatenate(found)
    elif labels is not None and len(labels) != sum(rows) * batching.size:
        raise DataError(f"{where} has {len(labels)} labels for {sum(rows)} samples")
    return ItemSource(inputs, batching, tuple(rows), open_items, labels, where)


def check_labels(labels: Array, num_rows: int, where: str) -> Labels:
    """Class indices, one a sample.

    Raises:
        DataError: they are not.
    """
    if labels.shape != (num_rows,) or labels.dtype.kind not in "iu":
        raise DataError(
            f"{where}: labels must be {num_rows} integers, one a sample, "
            f"got {labels.dtype} of shape {list(labels.shape)}"
        )
    return labels.astype(np.int64)


def _row_source(
    inputs: tuple[Input, ...],
    num_rows: int,
    readers: Mapping[str, Callable[[Units], Array]],
    labels: Labels | None,
    where: str,
) -> RowSource:
    batching = batching_of(inputs)
    num_units = num_rows // batching.size
    if not num_units:
        raise DataError(
            f"{where} has {num_rows} samples; "
            + (f"the model takes {batching.size} at once" if num_rows else "at least one is needed")
        )
    if labels is not None:
        labels = labels[: num_units * batching.size]
    return RowSource(inputs, batching, num_units, readers, labels, where)


def _pixel_reader(
    array: Array, entry: Input, spec: Preprocess, where: str
) -> Callable[[Units], Array]:
    if array.dtype != np.uint8:
        raise DataError(
            f"{where}: input {entry.name!r} has type {array.dtype}; "
            "preprocessing is for uint8 images, leave it out for arrays the network can take"
        )
    if array.ndim == 4 and array.shape[3] not in (1, 3) and array.shape[1] in (1, 3):
        array = array.transpose(0, 2, 3, 1)
    if array.ndim == 3:
        array = array[..., None]
    if array.ndim != 4 or array.shape[3] not in (1, 3):
        raise DataError(
            f"{where}: input {entry.name!r} has shape {list(array.shape)}; images are "
            "[n, h, w, 3], [n, h, w, 1], [n, 3, h, w], [n, 1, h, w] or [n, h, w]"
        )

    def read_one(row: int) -> Array:
        return preprocess_image(spec, np.asarray(array[row]), f"image {row} of {where}")

    reader = _image_reader(read_one, entry, where, lambda row: f"image {row} of {where}")
    if len(array):
        reader(np.zeros(1, np.int64))
    return reader


def _image_reader(
    read_one: Callable[[int], Array], entry: Input, where: str, name: Callable[[int], str]
) -> Callable[[Units], Array]:
    check = partial(check_shape, expected=("N", *entry.shape[1:]), name=entry.name)

    def read(rows: Units) -> Array:
        images = [read_one(int(row)) for row in rows]
        for row, image in zip(rows, images, strict=True):
            check((len(rows), *image.shape), where=name(int(row)))
            if image.shape != images[0].shape:
                raise DataError(
                    f"{name(int(row))} has another size than {name(int(rows[0]))}; "
                    "add resize= or crop= to the preprocessing"
                )
        stacked: Array = np.stack(images)
        if entry.dtype.kind in "iu":  # a network that preprocesses by itself takes bytes
            stacked = np.asarray(np.rint(stacked), np.int64)
        return stacked

    return read


def repeatable(items: Iterable[Any], limit: int | None) -> Callable[[], Iterator[Any]]:
    """A function that starts the iteration again; what cannot is kept in memory.

    That is a generator, and a DataLoader of torch that shuffles: each of its passes has another order. At most `limit`
    items are taken: one item has at least one sample.
    """
    sampler = getattr(items, "sampler", None)
    shuffles = sampler is not None and type(sampler).__name__ != "SequentialSampler"
    if iter(items) is not items and not shuffles:
        return lambda: iter(items)
    kept = []
    for item in items:
        kept.append(item)
        if limit is not None and len(kept) >= limit:
            break
    return lambda: iter(kept)
