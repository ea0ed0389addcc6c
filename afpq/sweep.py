"""Maps accuracy over formats and exponent biases: one of each for all weights, or for all that layers read.

It is the study of Noune et al. 2022 ("8-bit Numerical Formats for Deep Neural Networks", arXiv 2206.02915) for
inference: a format has one exponent bias for the whole network, and the range of biases over which accuracy holds, the
plateau, tells how much the format forgives. Weights are rounded to nearest with activations in float32, and the
reverse; biases and all other operators stay float32. Activations are the inputs of matrix products and convolutions,
the network's inputs too.

The reference runs once. Every point of the weights is the same serialized graph with other arrays handed over:
starting a session takes little beside a pass over the samples, and weights that were inputs would keep the runtime
from arranging them for its kernels. Points of the activations share one session a format, whose scale is an input.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from afpq import _metrics
from afpq._rounder import Rounder
from afpq.data import Data, open_data
from afpq.errors import FormatError, ModelError
from afpq.evaluate import OutputComparison, compare_output
from afpq.formats import AfpFormat, all_formats, exponent_bias_of, scale_of
from afpq.graph import Layer, Model, TensorInfo, load_model
from afpq.rounding import fake_quantize_rows
from afpq.runtime import FloatModel

__all__ = ["SUBJECTS", "Curve", "Joint", "Point", "Sweep", "distinct_formats", "sweep"]

SUBJECTS = ("weights", "activations")
TOLERANCE = 0.01

_BATCH = 8  # the values of wide layers stay in caches, which the rounding of activations needs
_SCALE = "afpq.activation_scale"
# A curve goes from where one step is as large as the largest value of a typical tensor (nearly all becomes 0) to where
# the largest value of the format is a sixteenth of that (nearly all saturates).
_CLIPPED = 16.0

Array = npt.NDArray[Any]
Feed = dict[str, Array]
Run = Callable[[Feed], Array]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Point:
    """The network with one exponent bias; None where the outputs have no such number, or one of them is NaN."""

    exponent_bias: int
    score: float  # of the sweep's metric; 0 if an output is NaN
    kl: float | None  # KL(float || rounded), mean over rows, nats
    sqnr_db: float | None  # of the output; infinity if equal


@dataclass(frozen=True)
class Curve:
    """All exponent biases of one format, ascending, for `weights` or `activations`."""

    subject: str
    format: AfpFormat
    points: tuple[Point, ...]

    @property
    def best(self) -> Point:
        """The point of the least KL divergence, or of the highest SQNR where the output is no classification.

        Both vary less by chance than the score of a few samples, which decides ties; then the least bias does.
        """
        return max(self.points, key=_rank)


@dataclass(frozen=True)
class Joint:
    """Weights and activations rounded at once, each with the best bias of its own curve."""

    format: AfpFormat
    weight_bias: int
    activation_bias: int
    point: Point  # its exponent_bias is that of the weights


@dataclass(frozen=True)
class Sweep:
    """The map of one network."""

    model: str  # file name
    metric: str  # what `score` is: top1, agreement or cosine, of 1
    num_samples: int
    float_score: float
    float_stderr: float | None  # standard error of a share
    curves: tuple[Curve, ...]
    joint: tuple[Joint, ...]  # empty unless both subjects were swept

    def plateau(self, curve: Curve, tolerance: float = TOLERANCE) -> tuple[int, int]:
        """First and last of the biases around the best one, without a gap, that score within `tolerance` of it.

        A best point that is by chance above the float network counts like that.
        """
        points, best = curve.points, curve.best
        enough = min(best.score, self.float_score) - tolerance
        first = last = points.index(best)
        while first > 0 and points[first - 1].score >= enough:
            first -= 1
        while last + 1 < len(points) and points[last + 1].score >= enough:
            last += 1
        return points[first].exponent_bias, points[last].exponent_bias

    def to_dict(self, tolerance: float = TOLERANCE) -> dict[str, Any]:
        """Plain data for JSON; an infinite SQNR is None."""
        curves = [
            {
                "subject": curve.subject,
                "format": str(curve.format),
                "best_exponent_bias": curve.best.exponent_bias,
                "plateau": list(self.plateau(curve, tolerance)),
                "points": [_plain(point) for point in curve.points],
            }
            for curve in self.curves
        ]
        head = {name: getattr(self, name) for name in _HEAD}
        joint = [
            {
                "format": str(entry.format),
                "weight_bias": entry.weight_bias,
                "activation_bias": entry.activation_bias,
                **_plain(entry.point),
            }
            for entry in self.joint
        ]
        return head | {"tolerance": tolerance, "curves": curves, "joint": joint}


_HEAD = ("model", "metric", "num_samples", "float_score", "float_stderr")


def distinct_formats(bits: int) -> tuple[AfpFormat, ...]:
    """The signed formats of so many bits, without e1: its values are those of e0 with one mantissa bit more."""
    return tuple(fmt for fmt in all_formats() if fmt.bits == bits and fmt.exponent_bits != 1)


def sweep(
    model: str | Path | Model,
    data: object,
    *,
    formats: Sequence[AfpFormat] = distinct_formats(8),
    subjects: Sequence[str] = SUBJECTS,
    preprocess: str | None = None,
    samples: int | None = None,
    threads: int = 0,
    progress: Progress | None = None,
) -> Sweep:
    """Scores every format and exponent bias on the data: top-1 if it has labels, else agreement with the float network.

    An output that is no classification is scored by its mean cosine. Of several outputs the first that is a
    classification counts, or else the first. Activations skip formats without a mantissa. The same arguments give the
    same map, on one machine and with one version of onnxruntime.

    Raises:
        ModelError: the model cannot be read or run, has nothing to round, or has float16 activations to round.
        DataError: the data does not fit the model.
        FormatError: a format is unsigned.
    """
    for fmt in formats:
        if not fmt.signed:
            raise FormatError(f"format {fmt} is unsigned; a sweep takes signed formats")
    study = _Study(model if isinstance(model, Model) else load_model(model), threads)
    study.read(data, preprocess, samples)
    plans = [
        (subject, fmt, study.biases(subject, fmt))
        for subject in subjects
        for fmt in formats
        if subject == "weights" or fmt.mantissa_bits > 0
    ]
    rounded = {(subject, fmt) for subject, fmt, _ in plans}
    pairs = [fmt for fmt in formats if {(subject, fmt) for subject in SUBJECTS} <= rounded]
    total, done = sum(len(biases) for _, _, biases in plans) + len(pairs), 0
    curves, joint = [], []
    for subject, fmt, biases in plans:
        points = []
        for point in study.points(subject, fmt, biases):
            points.append(point)
            done += 1
            if progress is not None:
                progress("sweep", done, total)
        curves.append(Curve(subject, fmt, tuple(points)))
    best = {(curve.subject, curve.format): curve.best.exponent_bias for curve in curves}
    for fmt in pairs:
        joint.append(study.joint(fmt, best["weights", fmt], best["activations", fmt]))
        done += 1
        if progress is not None:
            progress("sweep", done, total)
    return Sweep(
        model=study.model.path.name,
        metric=study.metric,
        num_samples=study.num_samples,
        float_score=study.float_score,
        float_stderr=study.float_stderr,
        curves=tuple(curves),
        joint=tuple(joint),
    )


class _Study:
    """The float network, its outputs on the samples, and how a rounded one scores against them."""

    def __init__(self, model: Model, threads: int) -> None:
        if not model.layers:
            raise ModelError(f"{model.path}: has no weights to round")
        self.model, self._threads = model, threads
        self._float = FloatModel(model, threads=threads)
        self._weights = {name: layer.weight for name, layer in model.tensors().items()}
        self._sizes: dict[str, float] = {"weights": _typical(self._weights.values())}

    def read(self, data: object, preprocess: str | None, samples: int | None) -> None:
        opened = open_data(data, self.model.inputs, preprocess=preprocess, limit=samples)
        names = [output.name for output in self.model.outputs]
        self._batches: list[tuple[Feed, Array, npt.NDArray[np.int64] | None]] = []
        for feed, labels in _labelled(opened):
            outputs = dict(zip(names, self._float.run(feed), strict=True))
            if not self._batches:
                self._output = _scored(outputs)
                self._sizes["activations"] = self._activation_size(feed)
            self._batches.append((feed, outputs[self._output], labels))
        self.num_samples = opened.num_samples
        try:
            own = self._compare(self._float_run)
        except _NotANumber as error:
            raise ModelError(
                f"{self.model.path}: gives NaN in output {self._output!r} on this data"
            ) from error
        labelled = own.top1 is not None
        self.metric = "top1" if labelled else "agreement" if own.agreement is not None else "cosine"
        self.float_score, self.float_stderr = _number(own, self.metric), own.top1_stderr

    def biases(self, subject: str, fmt: AfpFormat) -> range:
        """The exponent biases of a curve."""
        size = self._sizes[subject]
        first = math.floor(float(exponent_bias_of(fmt, size)))
        last = math.ceil(float(exponent_bias_of(fmt, size / _CLIPPED / fmt.max_integer)))
        return range(first, last + 1)

    def points(self, subject: str, fmt: AfpFormat, biases: Sequence[int]) -> Iterator[Point]:
        if subject == "weights":
            for bias in biases:
                yield self._point(bias, self._simulation(self._float, fmt, bias))
            return
        network = FloatModel(_rounding(self.model, fmt), threads=self._threads)
        for bias in biases:
            extra = {_SCALE: np.asarray(scale_of(fmt, bias))}

            def run(feed: Feed, extra: Feed = extra) -> Array:
                return network.run(feed | extra, [self._output])[0]

            yield self._point(bias, run)

    def joint(self, fmt: AfpFormat, weight_bias: int, activation_bias: int) -> Joint:
        network = FloatModel(_rounding(self.model, fmt), threads=self._threads)
        extra = {_SCALE: np.asarray(scale_of(fmt, activation_bias))}
        run = self._simulation(network, fmt, weight_bias, extra)
        return Joint(fmt, weight_bias, activation_bias, self._point(weight_bias, run))

    def _simulation(
        self, network: FloatModel, fmt: AfpFormat, bias: int, extra: Feed | None = None
    ) -> Run:
        scale = scale_of(fmt, [bias])
        rounded = {
            name: fake_quantize_rows(weight, fmt, scale, num_threads=self._threads)
            for name, weight in self._weights.items()
        }
        started = network.simulate(rounded)
        position = [output.name for output in self.model.outputs].index(self._output)
        return lambda feed: started.run(feed | (extra or {}))[position]

    def _float_run(self, feed: Feed) -> Array:
        return self._float.run(feed, [self._output])[0]

    def _point(self, bias: int, run: Run) -> Point:
        try:
            found = self._compare(run)
        except _NotANumber:
            return Point(bias, 0.0, None, None)
        return Point(bias, _number(found, self.metric), found.kl, found.sqnr_db)

    def _compare(self, run: Run) -> OutputComparison:
        def pairs() -> Iterator[tuple[Array, Array, npt.NDArray[np.int64] | None]]:
            for feed, reference, labels in self._batches:
                output = run(feed)
                if np.isnan(output).any():
                    raise _NotANumber
                yield reference, output, labels

        return compare_output(self._output, pairs())

    def _activation_size(self, feed: Feed) -> float:
        names = list(dict.fromkeys(layer.input_name for layer in _readers(self.model)))
        return _typical(self._float.run(feed, [name for name in names if name is not None]))


class _NotANumber(Exception):
    """A rounded network gave NaN."""


def _rank(point: Point) -> tuple[float, float, int]:
    quality = -math.inf if point.sqnr_db is None else point.sqnr_db
    if point.kl is not None:
        quality = -point.kl
    return quality, point.score, -point.exponent_bias


def _labelled(data: Data) -> Iterator[tuple[Feed, npt.NDArray[np.int64] | None]]:
    labels, done = data.labels, 0
    for feed in data.batches(_BATCH):
        count = data.count(feed)
        yield dict(feed), None if labels is None else labels[done : done + count]
        done += count


def _scored(outputs: Feed) -> str:
    """The first output that is a classification, or else the first."""
    kinds = {name: _metrics.output_kind(name, array) for name, array in outputs.items()}
    classes = [name for name, kind in kinds.items() if kind in ("logits", "distribution")]
    return (classes or list(kinds))[0]


def _number(found: OutputComparison, metric: str) -> float:
    value = getattr(found, metric)
    if value is None:
        raise ModelError(f"output {found.name!r} ({found.kind}) has no {metric} to sweep")
    return float(value)


def _typical(arrays: Any) -> float:
    """The median over tensors of their largest magnitude; tensors of zeros do not count."""
    largest = [float(np.abs(array).max(initial=0.0)) for array in arrays]
    return float(np.median([size for size in largest if size > 0] or [1.0]))


def _readers(model: Model) -> list[Layer]:
    return [layer for layer in model.layers if layer.kind in ("matmul", "conv")]


def _rounding(model: Model, fmt: AfpFormat) -> Model:
    """The model with everything that products read rounded to the format; the scale is one more input."""
    readers = _readers(model)
    if not readers or any(layer.dtype != "float32" for layer in readers):
        raise ModelError(f"{model.path}: activations can be rounded only where layers take float32")
    clone = model.ir.clone()
    graph, nodes = clone.graph, list(clone.graph)
    scale = ir.val(_SCALE, dtype=ir.DataType.FLOAT, shape=[])
    graph.inputs.append(scale)
    rounded: dict[ir.Value, ir.Value] = {}
    for layer in readers:
        node = nodes[layer.node_index]
        position = 1 if layer.is_left else 0
        value = node.inputs[position]
        assert value is not None
        if value not in rounded:
            rounder = Rounder(graph, f"afpq.rounded.{len(rounded)}")
            rounded[value] = rounder.round(value, fmt, scale)
            graph.insert_before(node, rounder.nodes)
        node.replace_input_with(position, rounded[value])
    places = {node: place for place, node in enumerate(graph)}
    layers = tuple(
        replace(
            layer,
            node_index=places[nodes[layer.node_index]],
            add_index=None if layer.add_index is None else places[nodes[layer.add_index]],
        )
        for layer in model.layers
    )
    inputs = (*model.inputs, TensorInfo(_SCALE, "float32", ()))
    return replace(model, ir=clone, layers=layers, inputs=inputs)


def _plain(point: Point) -> dict[str, Any]:
    fields = asdict(point)
    if fields["sqnr_db"] is not None and not math.isfinite(fields["sqnr_db"]):
        fields["sqnr_db"] = None
    return fields
