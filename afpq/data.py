"""Calibration and evaluation data, checked against a model's inputs before anything heavy starts.

`open_data` reads any of

    data.npz            keys are the model's input names, the first axis the samples; an extra key
                        `labels` gives the classes
    a folder of images  .jpg .jpeg .png .bmp .webp, also in sub-folders, with a preprocess
                        specification; a file labels.csv (columns file,label) gives the classes
    a folder of .npy    model with one input: files directly inside; else one sub-folder for each
                        input, with the same file names. A file is a batch, or one sample without
                        batch axis; labels.csv as above
    module:function     a function without parameters that yields dicts of arrays, batch axis first
    Python objects      a dict of arrays, an array, an iterable (a DataLoader of torch, too) or
                        function yielding batches: dicts, or arrays in the order of the inputs,
                        the labels last if there are any

Only what is needed is held in memory, except generators, which cannot start again. Sequence lengths
may differ from batch to batch where the data comes in batches. Order and splits are deterministic.
"""

import csv
import hashlib
import importlib
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from afpq._array_files import load_npy, load_npz, npy_items
from afpq._feeds import Feed, Input, as_inputs
from afpq._sources import (
    Labels,
    Source,
    Units,
    array_source,
    image_source,
    item_source,
    repeatable,
)
from afpq.errors import AfpqError, DataError
from afpq.preprocess import PRESETS, Preprocess, complete, parse_preprocess

__all__ = ["Data", "open_data"]

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp"})
FINGERPRINT_SAMPLES = 64


@dataclass(frozen=True)
class Data:
    """Samples that fit a model's inputs, read again on every pass; made by `open_data`."""

    inputs: tuple[Input, ...]
    source: Source
    units: Units
    preprocess: Preprocess | None = None  # as it was applied, complete

    @property
    def names(self) -> tuple[str, ...]:
        """The keys of every batch."""
        return tuple(entry.name for entry in self.inputs)

    @property
    def num_samples(self) -> int:
        return len(self.units) * self.source.samples_per_unit

    def count(self, feed: Feed) -> int:
        """How many samples a feed of `batches` holds."""
        if self.source.batching.kind == "any":
            return len(feed[self.inputs[0].name])
        return self.source.samples_per_unit

    @property
    def labels(self) -> Labels | None:
        """The class of every sample in the order of `batches`, None if the data has none."""
        if self.source.labels is None:
            return None
        return self.source.labels.reshape(-1, self.source.samples_per_unit)[self.units].reshape(-1)

    def batches(self, size: int = 32) -> Iterator[Feed]:
        """Feeds of at most `size` samples; where the model fixes their number, of that many."""
        yield from self.source.read(self.units, max(1, size // self.source.samples_per_unit))

    def split(self, held_out: float | int) -> tuple["Data", "Data"]:
        """Two parts: the rest, and about `held_out` samples (a fraction if below 1), spread evenly.

        Raises:
            DataError: a part would be empty.
        """
        wanted = held_out * self.num_samples if held_out < 1 else held_out
        count = max(1, round(wanted / self.source.samples_per_unit))
        if held_out <= 0 or count >= len(self.units):
            raise DataError(f"cannot hold out {held_out} of {self.num_samples} samples")
        chosen = np.zeros(len(self.units), bool)
        chosen[_spread(len(self.units), count)] = True
        return replace(self, units=self.units[~chosen]), replace(self, units=self.units[chosen])

    def take(self, num_samples: int) -> "Data":
        """At most so many samples, spread evenly over the data; at least as many as the model takes at once."""
        count = max(num_samples // self.source.samples_per_unit, 1)
        if count >= len(self.units):
            return self
        return replace(self, units=self.units[_spread(len(self.units), count)])

    def fingerprint(self, num_units: int | None = FINGERPRINT_SAMPLES) -> str:
        """sha256 over the number of samples and the content of the first 64, or all (None), hexadecimal."""
        digest = hashlib.sha256(f"{self.num_samples}".encode())
        head = replace(self, units=self.units[:num_units])
        for feed in head.batches(1):
            for name, array in sorted(feed.items()):
                digest.update(f"|{name} {array.dtype} {array.shape}|".encode())
                digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()


def open_data(
    src: object,
    inputs: Iterable[Any],
    *,
    preprocess: str | Preprocess | None = None,
    limit: int | None = None,
) -> Data:
    """Opens data (see the module's head) for a model with these inputs.

    `limit` takes that many samples: spread evenly where samples can be picked, the first ones where
    they come in batches. `preprocess` is for images only (see `afpq.preprocess`).

    Raises:
        DataError: the data cannot be read, is empty or does not fit the model.
        RuntimeUnavailableError: images need Pillow, which is missing.

    Example:
        >>> import onnxruntime
        >>> session = onnxruntime.InferenceSession("models/lenet5_digits.onnx")
        >>> data = afpq.open_data("models/digits_calibration.npz", session.get_inputs(), limit=100)
        >>> data.num_samples, data.names
        (100, ('input',))
    """
    if isinstance(src, Data):
        return _limited(src, limit)
    if limit is not None and limit < 1:
        raise DataError(f"a limit of {limit} samples leaves no data")
    entries = as_inputs(inputs)
    spec = parse_preprocess(preprocess) if isinstance(preprocess, str) else preprocess
    if spec is not None:
        if len(entries) != 1:
            names = ", ".join(entry.name for entry in entries)
            raise DataError(f"images and preprocessing are for models with one input, not {names}")
        spec = complete(spec, entries[0].shape, entries[0].name)
    source, spec = _open_source(src, entries, spec, limit)
    data = Data(entries, source, np.arange(source.num_units, dtype=np.int64), spec)
    return _limited(data, limit)


def _limited(data: Data, limit: int | None) -> Data:
    if limit is None:
        return data
    if limit < data.source.samples_per_unit:
        raise DataError(
            f"{limit} samples are fewer than the {data.source.samples_per_unit} "
            "that the model takes at once"
        )
    return data.take(limit)


def _open_source(
    src: object, inputs: tuple[Input, ...], spec: Preprocess | None, limit: int | None
) -> tuple[Source, Preprocess | None]:
    if isinstance(src, str | Path):
        path = Path(src)
        if path.is_dir():
            return _open_folder(path, inputs, spec)
        if path.is_file():
            return _open_file(path, inputs, spec), spec
        if isinstance(src, str) and re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", src):
            _refuse_preprocess(spec, src)
            return _open_items(_import_function(src), inputs, limit, src), None
        raise DataError(
            f"{src} does not exist; data is an .npz file, a folder of images or .npy files, "
            "or module:function"
        )
    if isinstance(src, Mapping):
        arrays = {str(key): np.asarray(value) for key, value in src.items()}
        return array_source(arrays, inputs, spec, "the data"), spec
    if hasattr(src, "__array__"):
        array = _only_input(np.asarray(src), inputs, "the data")
        return array_source(array, inputs, spec, "the data"), spec
    _refuse_preprocess(spec, "the data")
    return _open_items(src, inputs, limit, "the data"), None


def _open_file(path: Path, inputs: tuple[Input, ...], spec: Preprocess | None) -> Source:
    if path.suffix == ".npz":
        return array_source(load_npz(path), inputs, spec, str(path))
    if path.suffix == ".npy":
        arrays = _only_input(load_npy(path), inputs, str(path))
        return array_source(arrays, inputs, spec, str(path))
    raise DataError(f"{path} is neither an .npz nor an .npy file")


def _only_input(
    array: npt.NDArray[Any], inputs: tuple[Input, ...], where: str
) -> dict[str, npt.NDArray[Any]]:
    if len(inputs) != 1:
        names = ", ".join(entry.name for entry in inputs)
        raise DataError(f"{where} is one array, but the model has the inputs {names}")
    return {inputs[0].name: array}


def _open_items(src: object, inputs: tuple[Input, ...], limit: int | None, where: str) -> Source:
    if callable(src):
        return item_source(_caller(src, where), inputs, limit, where)
    if not isinstance(src, Iterable):
        raise DataError(f"{where} is a {type(src).__name__}, which yields no batches")
    return item_source(repeatable(src, limit), inputs, limit, where)


def _caller(function: Callable[[], Any], where: str) -> Callable[[], Iterator[Any]]:
    def items() -> Iterator[Any]:
        try:
            yield from function()
        except AfpqError:
            raise
        except Exception as error:
            raise DataError(f"{where} failed: {type(error).__name__}: {error}") from error

    return items


def _import_function(text: str) -> Callable[[], Any]:
    module_name, name = text.split(":")
    here = str(Path.cwd())
    added = here not in sys.path
    if added:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise DataError(
            f"cannot import {module_name!r} of {text}: {type(error).__name__}: {error}"
        ) from error
    finally:
        if added and here in sys.path:
            sys.path.remove(here)
    function = getattr(module, name, None)
    if not callable(function):
        names = [key for key, value in vars(module).items() if callable(value) and key[0] != "_"]
        raise DataError(
            f"module {module_name!r} has no function {name!r}; it has {', '.join(names) or 'none'}"
        )
    return function  # type: ignore[no-any-return]


def _open_folder(
    folder: Path, inputs: tuple[Input, ...], spec: Preprocess | None
) -> tuple[Source, Preprocess | None]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    images = [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES]
    arrays = [path for path in files if path.suffix == ".npy"]
    if images and arrays:
        raise DataError(
            f"{folder} has {len(images)} images and {len(arrays)} .npy files; keep one kind"
        )
    if not images and not arrays:
        kinds = " ".join(sorted(IMAGE_SUFFIXES))
        raise DataError(f"{folder} has no images ({kinds}) and no .npy files")
    if arrays:
        _refuse_preprocess(spec, str(folder))
        return _npy_source(folder, arrays, inputs), None
    if spec is None:
        raise DataError(
            f"{folder} holds images: name their preprocessing, one of {', '.join(PRESETS)} "
            "or resize=256,crop=224,mean=0.485/0.456/0.406,..."
        )
    labels = _read_labels(folder, images)
    return image_source(images, inputs[0], spec, labels, str(folder)), spec


def _npy_source(folder: Path, files: list[Path], inputs: tuple[Input, ...]) -> Source:
    names = [entry.name for entry in inputs]
    if len(inputs) == 1 and not (folder / names[0]).is_dir():
        chosen = {names[0]: [path for path in files if path.parent == folder]}
    else:
        found = sorted({path.parent.relative_to(folder).as_posix() for path in files})
        if found != sorted(names):
            raise DataError(
                f"{folder} has .npy files in the sub-folders {', '.join(found)}; "
                f"the model expects one for each input: {', '.join(names)}"
            )
        chosen = {name: [p for p in files if p.parent == folder / name] for name in names}
        stems = {name: [path.name for path in paths] for name, paths in chosen.items()}
        for name in names[1:]:
            if stems[name] != stems[names[0]]:
                raise DataError(f"{folder}: {names[0]} and {name} do not have the same file names")
    first = chosen[names[0]]
    if not first:
        raise DataError(f"{folder} has no .npy files directly inside or in {names[0]}")
    labels = _read_labels(folder, first)
    return item_source(lambda: npy_items(chosen, inputs), inputs, None, str(folder), labels)


def _read_labels(folder: Path, files: list[Path]) -> Labels | None:
    path = folder / "labels.csv"
    if not path.is_file():
        return None
    try:
        with path.open(newline="", encoding="utf-8") as stream:
            rows = [(row["file"], int(row["label"])) for row in csv.DictReader(stream)]
    except (KeyError, ValueError, TypeError) as error:
        raise DataError(f"{path} needs the columns file,label with integer labels") from error
    labels = dict(rows)
    result = []
    for file in files:
        label = labels.get(file.relative_to(folder).as_posix(), labels.get(file.name))
        if label is None:
            raise DataError(f"{path} has no row for {file.name}")
        result.append(label)
    return np.array(result, np.int64)


def _refuse_preprocess(spec: Preprocess | None, where: str) -> None:
    if spec is not None:
        raise DataError(f"{where} holds no images, so it takes no preprocessing")


def _spread(total: int, count: int) -> Units:
    """`count` different positions of 0..total-1, evenly spread, in order."""
    return ((np.arange(count, dtype=np.int64) * 2 + 1) * total) // (2 * count)
