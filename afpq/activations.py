"""Chooses a static format and scale for every activation tensor that integer products read.

Rows of each tensor are drawn from the calibration samples. An error of an element counts as much as the weights that
multiply its channel: the sum over all readers of their squares, which makes the sum an expected squared error of the
layers' outputs. The scale is searched over that error, not taken from the maximum: rare outliers are clipped where
that costs less than coarse steps for all else.

A static format must serve all samples, and has one sign for both of a skewed tensor's sides; the range of each row (of
a convolution: each sample) adapts. A tensor whose static error would be more than `WORSE` times the dynamic one, one
bit of resolution, gets none, and its layers round it by its own range, as they do without calibration.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from afpq._chain import find_residuals
from afpq._shapes import with_shapes
from afpq.calibrate import Stats, passes
from afpq.data import Data
from afpq.formats import AfpFormat, all_formats
from afpq.graph import Layer, Model, takes_bytes
from afpq.plan import ActivationEntry, Option, Plan, allocate
from afpq.rounding import best_scale
from afpq.runtime import FloatModel

__all__ = ["WORSE", "added_tensors", "allocate_activations", "choose_activations"]

# All integers of a byte. Every other format that fits one has a part of them, and can only lose at the same scale;
# exponents pay in fewer bits, see `allocate_activations`.
_SIGNED = AfpFormat(0, 7)
_UNSIGNED = AfpFormat(1, 7, signed=False)
_WIDTHS = range(3, 9)  # of mixed widths
WORSE = 4.0

_SAMPLES = 64
_VALUES = 1 << 16  # of one tensor and one way to read it
_FEWEST_ROWS = 16
_LEVELS = 255  # steps of a dynamic range

Floats = npt.NDArray[np.float32]
Progress = Callable[[str, int, int], None]
Readers = Mapping[str, Sequence[Layer]]


def choose_activations(
    model: Model,
    plan: Plan,
    stats: Stats,
    data: Data,
    *,
    kind: str = "real",
    threads: int = 0,
    progress: Progress | None = None,
) -> tuple[ActivationEntry, ...]:
    """The entries of a plan's `activations`, all of 8 bits, in the order in which the tensors are read.

    Tensors that convolutions read, or add to what they make, are passed on as bytes (`rewrite`). Tensors that
    calibration never saw negative take an unsigned format. `kind` says which scales are allowed, as for
    weights. The same arguments give the same entries, whatever `threads` is.

    Raises:
        ModelError: the model cannot be run.
    """
    formats = {entry.weight_name: entry.format for entry in plan.entries}
    readers: dict[str, list[Layer]] = {}
    convs: set[str] = set()
    for layer in model.layers:
        fmt = formats.get(layer.weight_name)
        if layer.input_name is not None and fmt is not None and takes_bytes(layer, fmt):
            readers.setdefault(layer.input_name, []).append(layer)
            if layer.kind == "conv":
                convs.add(layer.output_name)
    for tensor in added_tensors(model, convs):
        readers.setdefault(tensor, [])
    chosen: dict[str, ActivationEntry] = {}
    for done, (tensor, drawn) in enumerate(_drawn(model, readers, data), 1):
        allowed = _SIGNED if _sees_negative(readers[tensor], stats) else _UNSIGNED
        entry, error = drawn.best(tensor, [allowed], kind, threads)
        if error <= WORSE * drawn.dynamic_error:
            chosen[tensor] = entry
        if progress is not None:
            progress("activations", done, len(readers))
    return tuple(chosen[tensor] for tensor in readers if tensor in chosen)


def allocate_activations(
    model: Model,
    plan: Plan,
    stats: Stats,
    data: Data,
    *,
    bits: float,
    kind: str = "real",
    threads: int = 0,
    progress: Progress | None = None,
) -> tuple[tuple[ActivationEntry, ...], float]:
    """Formats of 3 to 8 bits for every tensor that a quantized product reads, and their mean bits per element.

    The mean does not exceed `bits`; the sum of the entries' errors is the least within that.

    Raises:
        ModelError: the model cannot be run.
        PlanError: `bits` is below 3.
    """
    quantized = {entry.weight_name for entry in plan.entries if entry.format is not None}
    readers: dict[str, list[Layer]] = {}
    for layer in model.layers:
        if layer.input_name is not None and layer.weight_name in quantized:
            readers.setdefault(layer.input_name, []).append(layer)
    found: dict[str, list[ActivationEntry]] = {}
    elements: dict[str, int] = {}
    for done, (tensor, drawn) in enumerate(_drawn(model, readers, data), 1):
        signed = _sees_negative(readers[tensor], stats)
        widths = [[f for f in all_formats(signed) if f.bits == b] for b in _WIDTHS]
        usable = [[f for f in formats if f.fits_activations] for formats in widths]
        found[tensor] = [drawn.best(tensor, formats, kind, threads)[0] for formats in usable]
        elements[tensor] = drawn.elements
        if progress is not None:
            progress("activations", done, len(readers))
    options = [
        [Option(entry.format.bits * elements[tensor], entry.error or 0.0) for entry in entries]
        for tensor, entries in found.items()
    ]
    total = max(sum(elements.values()), 1)
    picked = allocate(options, int(bits * total))
    entries = tuple(found[t][choice] for t, choice in zip(found, picked, strict=True))
    return entries, sum(e.format.bits * elements[e.tensor] for e in entries) / total


def added_tensors(model: Model, convs: Set[str] | None = None) -> list[str]:
    """Tensors that are added to what a convolution makes, one of `convs` (output names; all, if None)."""
    if convs is None:
        convs = {layer.output_name for layer in model.layers if layer.kind == "conv"}
    graph = with_shapes(model.ir.clone()).graph
    return [residual.other.name or "" for residual in find_residuals(graph, convs)]


def _sees_negative(layers: Sequence[Layer], stats: Stats) -> bool:
    """Whether a tensor that these layers read was negative; unknown, and so true, of one that none reads."""
    return not layers or any(
        layer.name not in stats or stats[layer.name].low < 0 for layer in layers
    )


@dataclass
class _Drawn:
    """Values of one tensor, how much the squared error of each counts, and how dynamic rounding does on them."""

    values: list[Floats] = field(default_factory=list)
    energies: list[Floats] = field(default_factory=list)
    dynamic_error: float = 0.0
    elements: int = 0  # of the whole tensor, over all samples

    def add(self, rows: Floats, low: Floats, high: Floats, energy: Floats) -> None:
        """Rows [r, channels] with the range of each, [r, 1], and what each channel counts, [channels]."""
        self.values.append(rows.reshape(-1))
        self.energies.append(np.broadcast_to(energy, rows.shape).reshape(-1))
        wide = rows.astype(np.float64)
        self.dynamic_error += float((energy * (_dynamic(wide, low, high) - wide) ** 2).sum())

    def best(
        self, tensor: str, formats: Sequence[AfpFormat], kind: str, threads: int
    ) -> tuple[ActivationEntry, float]:
        """The format and scale with the least error, and that error."""
        values, energies = np.concatenate(self.values), np.concatenate(self.energies)
        counts = energies > 0  # the largest of the others must not set the scales that are tried
        values, energies = values[None, counts], energies[None, counts]
        signal = float((energies * values.astype(np.float64) ** 2).sum())
        found = []
        for fmt in formats:
            scale, errors = best_scale(
                values,
                fmt,
                energies,
                kind=kind,
                granularity="per_tensor",
                num_threads=threads,
            )
            found.append((float(errors[0]), fmt, float(scale[0])))
        error, fmt, step = min(found, key=lambda item: item[0])
        share = error / signal if signal > 0 else 0.0
        return ActivationEntry(tensor, fmt, step, share), error


def _drawn(model: Model, readers: Readers, data: Data) -> Iterable[tuple[str, _Drawn]]:
    """Tensors with what was drawn of them; only those of one pass are held at once."""
    network = FloatModel(model, threads=1)
    samples = data.take(_SAMPLES)
    for names, size in passes(network, samples, list(readers)):
        drawn = {name: _Drawn() for name in names}
        ways = {name: _ways(readers[name]) for name in names}
        for number, feed in enumerate(samples.batches(size)):
            share = samples.count(feed) / samples.num_samples
            for name, array in zip(names, network.run(feed, names), strict=True):
                drawn[name].elements += array.size
                for axis, energy in ways[name]:
                    rows, low, high = _draw(array, axis, share, seed=number)
                    drawn[name].add(rows, low, high, energy)
        yield from drawn.items()


def _ways(layers: Sequence[Layer]) -> list[tuple[int | None, Floats]]:
    """Axes along which layers read a tensor (None: the channels of planes), and what the channels count there.

    A tensor that none reads is added to another: all its channels count the same.
    """
    found: dict[int | None, list[Layer]] = {}
    for layer in layers:
        axis = -1 if layer.k_axis is None else layer.k_axis
        found.setdefault(None if layer.conv is not None else axis, []).append(layer)
    ways: list[tuple[int | None, Floats]] = [(axis, _energy(way)) for axis, way in found.items()]
    return ways or [(None, np.ones(1, np.float32))]


def _draw(
    array: npt.NDArray[Any], axis: int | None, share: float, seed: int
) -> tuple[Floats, Floats, Floats]:
    """Some rows [r, channels] of a batch, and the range (with 0) that dynamic rounding gives each, [r, 1]."""
    if axis is None:
        planes = array.reshape(len(array), array.shape[1], -1)
        positions, channels = len(array) * planes.shape[2], array.shape[1]
    else:
        matrix = np.moveaxis(array, axis, -1)
        matrix = matrix.reshape(-1, matrix.shape[-1])
        positions, channels = matrix.shape
    wanted = max(_FEWEST_ROWS, _VALUES // max(channels, 1))
    count = min(positions, max(1, round(wanted * share)))
    picked = np.random.default_rng(seed).choice(positions, count, replace=False)
    if axis is None:
        sample, position = np.divmod(picked, planes.shape[2])
        rows, owners = planes[sample, :, position], array.reshape(len(array), -1)
        low, high = owners.min(axis=1)[sample], owners.max(axis=1)[sample]
    else:
        rows = matrix[picked]
        low, high = rows.min(axis=1), rows.max(axis=1)
    low, high = np.minimum(low, 0), np.maximum(high, 0)
    return rows.astype(np.float32), low[:, None], high[:, None]


def _dynamic(rows: npt.NDArray[np.float64], low: Floats, high: Floats) -> npt.NDArray[np.float64]:
    """Rows as `a8` without a format reads them (docs/specification.md, "Arithmetic")."""
    scale = (high.astype(np.float64) - low) / _LEVELS
    scale = np.where(scale > 0, scale, 1.0)
    zero = np.rint(-low / scale)
    q = np.clip(np.rint(rows / scale) + zero, 0, _LEVELS)
    return np.asarray((q - zero) * scale)


def _energy(layers: Sequence[Layer]) -> Floats:
    """The sum over the layers' outputs and taps of the squared weights of each channel: [channels]."""
    total = np.sum([_channel_energy(layer) for layer in layers], axis=0)
    return np.asarray(total, np.float32)


def _channel_energy(layer: Layer) -> npt.NDArray[np.float64]:
    squares = layer.weight.astype(np.float64) ** 2
    if layer.conv is None:
        return np.asarray(squares.sum(axis=0))
    taps = int(np.prod(layer.conv.kernel_shape))
    by_group = squares.reshape(layer.groups, layer.n // layer.groups, taps, layer.k // taps)
    return np.asarray(by_group.sum(axis=(1, 2)).reshape(-1))
