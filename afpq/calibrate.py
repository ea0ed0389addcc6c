"""Folds a stream of samples through the float network into statistics of every layer's input.

For each product a layer computes, `mean` and `second_moment` average the float that the weight is multiplied by, over
all output positions of all samples: for a convolution per (tap, channel), with the zeros of the padding counted; for a
matrix product per k over all leading axes. The expected squared error of an output is then a weighted sum of squared
weight errors. Sums are float64 and batches are merged in order; the network runs on one thread and the folding of
whole batches is spread over the others, so results do not depend on the number of threads.
"""

import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from afpq._array_files import load_npz
from afpq._feeds import Feed
from afpq._layer import conv_extent
from afpq.data import Data, open_data
from afpq.errors import DataError
from afpq.graph import ConvSpec, Layer, Model, load_model
from afpq.runtime import FloatModel

__all__ = ["HISTOGRAM_LOWEST", "Stats", "TensorStats", "calibrate", "passes"]

Floats = npt.NDArray[np.float64]
Progress = Callable[[str, int, int], None]  # stage, samples done, samples in all

HISTOGRAM_BINS = 64
HISTOGRAM_LOWEST = -40  # bin i counts HISTOGRAM_LOWEST + i <= log2|x| < HISTOGRAM_LOWEST + i + 1
FETCH_BYTES = 64 << 20  # activations fetched at once
MAX_WORKERS = 3  # so many folded batches may wait: about 256 MB in all
MAX_BATCH = 256
CHUNK = 1 << 16  # elements converted to float64 at once
STATS_VERSION = 1


@dataclass(frozen=True, eq=False)
class TensorStats:
    """What reached one layer; row g of `mean` and `second_moment` belongs to the channels of group g."""

    count: int  # output positions that each entry averages
    mean: Floats = field(repr=False)  # [groups, k] in the layer's stored order
    second_moment: Floats = field(repr=False)  # [groups, k]
    low: float
    high: float
    histogram: npt.NDArray[np.int64] = field(repr=False)  # [64] of log2|x|; the ends take the rest


@dataclass(frozen=True, eq=False)
class Stats:
    """Statistics by layer name; gather and unpack layers have none.

    Example:
        >>> stats = afpq.calibrate("models/lenet5_digits.onnx", "models/digits_calibration.npz", limit=32)
        >>> "/0/Conv" in stats, "no such layer" in stats
        (True, False)
    """

    layers: Mapping[str, TensorStats]
    num_samples: int
    data_hash: str

    def __getitem__(self, name: str) -> TensorStats:
        return self.layers[name]

    def __contains__(self, name: object) -> bool:
        return name in self.layers

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def get(self, name: str) -> TensorStats | None:
        """The statistics of a layer, None if it has none."""
        return self.layers.get(name)

    def save(self, path: str | Path) -> None:
        """Writes an `.npz`; equal statistics give equal bytes."""
        keys = list(self.layers)
        values = list(self.layers.values())
        meta = {
            "version": STATS_VERSION,
            "num_samples": self.num_samples,
            "data_hash": self.data_hash,
            "layers": keys,
            "count": [s.count for s in values],
            "low": [s.low for s in values],
            "high": [s.high for s in values],
        }
        arrays: dict[str, npt.NDArray[Any]] = {"meta": np.array(json.dumps(meta, sort_keys=True))}
        for index, stats in enumerate(values):
            arrays[f"mean.{index}"] = stats.mean
            arrays[f"second_moment.{index}"] = stats.second_moment
            arrays[f"histogram.{index}"] = stats.histogram
        temporary = Path(f"{path}.part")
        try:
            with temporary.open("wb") as stream:
                np.savez(stream, allow_pickle=False, **arrays)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | Path) -> "Stats":
        """Reads what `save` wrote.

        Raises:
            DataError: the file is not one.
        """
        arrays = load_npz(Path(path))
        try:
            meta = json.loads(str(arrays["meta"]))
            if meta["version"] != STATS_VERSION:
                raise DataError(f"{path} has statistics of version {meta['version']}, not 1")
            layers = {
                name: TensorStats(
                    meta["count"][index],
                    np.array(arrays[f"mean.{index}"]),
                    np.array(arrays[f"second_moment.{index}"]),
                    meta["low"][index],
                    meta["high"][index],
                    np.array(arrays[f"histogram.{index}"]),
                )
                for index, name in enumerate(meta["layers"])
            }
            return cls(layers, meta["num_samples"], meta["data_hash"])
        except (KeyError, IndexError, TypeError, json.JSONDecodeError) as error:
            raise DataError(f"{path} holds no statistics of afpq") from error


def calibrate(
    model: Model | str | Path,
    data: object,
    *,
    preprocess: str | None = None,
    limit: int | None = None,
    threads: int = 0,
    progress: Progress | None = None,
) -> Stats:
    """Runs the float network over the data (a `Data`, or anything `open_data` takes).

    Memory stays bounded whatever the number of samples; networks whose activations for one sample are too large
    are run several times. threads 0 means all cores.

    Raises:
        DataError: the data does not fit the model, or a layer meets NaN or infinity.
        ModelError: the model cannot be read or run.

    Example:
        >>> stats = afpq.calibrate("models/lenet5_digits.onnx", "models/digits_calibration.npz", limit=32)
        >>> stats.num_samples
        32
    """
    if not isinstance(model, Model):
        model = load_model(model)
    opened = open_data(data, model.inputs, preprocess=preprocess, limit=limit)
    views = _views(model.layers)
    tensors = list(dict.fromkeys(view.tensor for view in views))
    network = FloatModel(model, threads=1)
    planned = passes(network, opened, tensors)
    folded: dict[str, _Fold] = {}
    done, total = 0, opened.num_samples * len(planned)
    workers = min(threads or os.cpu_count() or 1, MAX_WORKERS)
    with ThreadPoolExecutor(workers) as pool:
        for names, size in planned:
            jobs = ((feed, network.run(feed, names)) for feed in opened.batches(size))
            for fold, count in _in_order(pool, workers, jobs, names, views, opened):
                _merge(folded, fold)
                done += count
                if progress is not None:
                    progress("calibrate", min(done, total), total)
    layers = {
        layer.name: view.finish(folded[view.tensor], layer)
        for view in views
        for layer in view.layers
    }
    ordered = {layer.name: layers[layer.name] for layer in model.layers if layer.name in layers}
    return Stats(ordered, opened.num_samples, opened.fingerprint())


@dataclass(frozen=True)
class _Sums:
    """Sums over positions, [k] or [channels, *taps]; of values and of squares."""

    count: int
    values: Floats
    squares: Floats


@dataclass(frozen=True)
class _View:
    """One way of reading a tensor, shared by all layers that read it so."""

    tensor: str
    k_axis: int
    conv: ConvSpec | None
    layers: tuple[Layer, ...]

    def finish(self, fold: "_Fold", layer: Layer) -> TensorStats:
        sums = fold.sums[self.k_axis, self.conv]
        mean, second = (
            _stored_order(part / max(sums.count, 1), layer.groups)
            for part in (sums.values, sums.squares)
        )
        return TensorStats(sums.count, mean, second, fold.low, fold.high, fold.histogram)


@dataclass
class _Fold:
    """Everything that is kept of one tensor."""

    low: float
    high: float
    histogram: npt.NDArray[np.int64]
    sums: dict[tuple[int, ConvSpec | None], _Sums]


def _views(layers: Sequence[Layer]) -> list[_View]:
    found: dict[tuple[str, int, ConvSpec | None], list[Layer]] = {}
    for layer in layers:
        if layer.kind in ("matmul", "conv") and layer.input_name is not None:
            axis = -1 if layer.k_axis is None else layer.k_axis
            found.setdefault((layer.input_name, axis, layer.conv), []).append(layer)
    return [_View(*key, tuple(group)) for key, group in found.items()]


def passes(network: FloatModel, data: Data, tensors: list[str]) -> list[tuple[list[str], int]]:
    """The tensors to fetch together and how many samples at once, from the sizes of the first unit."""
    if not tensors:
        return []
    samples = data.source.samples_per_unit
    outputs = network.run(next(data.batches(1)), tensors)
    found: list[tuple[list[str], int]] = []
    for name, array in zip(tensors, outputs, strict=True):
        if not found or found[-1][1] + array.nbytes > FETCH_BYTES:
            found.append(([], 0))
        names, used = found[-1]
        found[-1] = ([*names, name], used + array.nbytes)
    return [
        (names, min(MAX_BATCH, samples * max(1, FETCH_BYTES // max(used, 1))))
        for names, used in found
    ]


def _in_order(
    pool: ThreadPoolExecutor,
    workers: int,
    jobs: Iterator[tuple[Feed, list[npt.NDArray[Any]]]],
    names: list[str],
    views: list[_View],
    data: Data,
) -> Iterator[tuple[dict[str, _Fold], int]]:
    """Folds batches on the pool while the next one runs, at most `workers` waiting; results in order."""
    waiting: deque[tuple[Future[dict[str, _Fold]], int]] = deque()
    for feed, outputs in jobs:
        waiting.append((pool.submit(_fold_batch, feed, names, outputs, views), data.count(feed)))
        if len(waiting) >= workers:
            future, number = waiting.popleft()
            yield future.result(), number
    for future, number in waiting:
        yield future.result(), number


def _fold_batch(
    feed: Feed, names: list[str], outputs: list[npt.NDArray[Any]], views: list[_View]
) -> dict[str, _Fold]:
    result = {}
    for name, array in zip(names, outputs, strict=True):
        own = [view for view in views if view.tensor == name]
        low, high = (float(array.min()), float(array.max())) if array.size else (0.0, 0.0)
        if not np.isfinite([low, high]).all():
            raise DataError(_not_finite(feed, own[0]))
        sums: dict[tuple[int, ConvSpec | None], _Sums] = {}
        batch = _sum_batch(array) if any(view.conv is not None for view in own) else None
        for view in own:
            if view.conv is None or batch is None:
                sums[view.k_axis, None] = _sum_rows(array, view.k_axis)
            else:
                sums[view.k_axis, view.conv] = _sum_taps(batch, view.conv)
        result[name] = _Fold(low, high, _histogram(array), sums)
    return result


def _not_finite(feed: Feed, view: _View) -> str:
    for name, array in feed.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            return f"the data holds NaN or infinity in input {name!r}"
    return f"layer {view.layers[0].name!r} gets NaN or infinity in its input {view.tensor!r}"


def _merge(folded: dict[str, _Fold], new: Mapping[str, _Fold]) -> None:
    for name, fold in new.items():
        if name not in folded:
            folded[name] = fold
            continue
        old = folded[name]
        old.low, old.high = min(old.low, fold.low), max(old.high, fold.high)
        old.histogram = old.histogram + fold.histogram
        for key, sums in fold.sums.items():
            before = old.sums[key]
            old.sums[key] = _Sums(
                before.count + sums.count,
                before.values + sums.values,
                before.squares + sums.squares,
            )


def _sum_batch(array: npt.NDArray[Any]) -> _Sums:
    """Sums over the first axis: [channels, *spatial]."""
    values = np.zeros(array.shape[1:], np.float64)
    squares = np.zeros(array.shape[1:], np.float64)
    for sample in array:
        wide = sample.astype(np.float64)
        values += wide
        np.square(wide, out=wide)
        squares += wide
    return _Sums(len(array), values, squares)


def _sum_rows(array: npt.NDArray[Any], k_axis: int) -> _Sums:
    """Sums over all axes but `k_axis`: [k]."""
    rows = np.moveaxis(array, k_axis, -1).reshape(-1, array.shape[k_axis])
    values, squares = np.zeros(rows.shape[1], np.float64), np.zeros(rows.shape[1], np.float64)
    step = max(1, CHUNK // max(rows.shape[1], 1))
    for start in range(0, len(rows), step):
        wide = rows[start : start + step].astype(np.float64)
        values += wide.sum(axis=0)
        np.square(wide, out=wide)
        squares += wide.sum(axis=0)
    return _Sums(len(rows), values, squares)


def _sum_taps(batch: _Sums, conv: ConvSpec) -> _Sums:
    """Sums over the positions that each tap meets: [channels, *taps]; padding adds zeros."""
    values, squares, count = batch.values, batch.squares, batch.count
    for axis in range(values.ndim - 1, 0, -1):
        positions, slices = _tap_slices(values.shape[axis], conv, axis - 1)
        count *= positions
        values = _sum_slices(values, axis, slices)
        squares = _sum_slices(squares, axis, slices)
    return _Sums(count, values, squares)


def _sum_slices(array: Floats, axis: int, slices: list[slice]) -> Floats:
    moved = np.moveaxis(array, axis, 0)  # a view
    return np.stack([moved[part].sum(axis=0) for part in slices], axis=axis)


def _tap_slices(size: int, conv: ConvSpec, axis: int) -> tuple[int, list[slice]]:
    """How many output positions an axis has, and the elements that each tap meets inside the input."""
    stride, dilation = conv.strides[axis], conv.dilations[axis]
    extent = conv_extent(size, conv, axis)
    positions, begin = extent.positions, extent.begin
    slices = []
    for tap in range(conv.kernel_shape[axis]):
        offset = tap * dilation - begin  # position p meets element p * stride + offset
        first = max(0, -(offset // stride))
        last = min(positions - 1, (size - 1 - offset) // stride)
        low = first * stride + offset
        slices.append(slice(low, last * stride + offset + 1, stride) if last >= first else slice(0))
    return positions, slices


def _stored_order(means: Floats, groups: int) -> Floats:
    """[k], or [channels, *taps] with the taps first: [groups, k]."""
    if means.ndim == 1:
        return means.reshape(groups, -1)
    by_tap = means.reshape(groups, means.shape[0] // groups, -1).transpose(0, 2, 1)
    return np.ascontiguousarray(by_tap.reshape(groups, -1))


def _histogram(array: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """Counts of floor(log2|x|) from the exponent field of float32; zeros (and subnormals) are left out."""
    counts = np.zeros(256, np.int64)
    flat = array.reshape(-1)
    for start in range(0, flat.size, CHUNK):
        part = np.ascontiguousarray(flat[start : start + CHUNK], np.float32)
        fields = (part.view(np.uint32) >> np.uint32(23)) & np.uint32(255)
        counts += np.bincount(fields, minlength=256)
    bins = np.clip(np.arange(1, 256) - 127 - HISTOGRAM_LOWEST, 0, HISTOGRAM_BINS - 1)
    result = np.zeros(HISTOGRAM_BINS, np.int64)
    np.add.at(result, bins, counts[1:])
    return result
