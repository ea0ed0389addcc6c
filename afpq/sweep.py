"""Maps accuracy over formats and exponent biases: one of each for all weights, or for all that layers read.

It is the study of Noune et al. 2022 ("8-bit Numerical Formats for Deep Neural Networks", arXiv 2206.02915) for
inference: a format has one exponent bias for the whole network, and the range of biases over which accuracy holds, the
plateau, tells how much the format forgives. Weights are rounded to nearest with activations in float32, and the
reverse; biases and all other operators stay float32. Activations are the inputs of matrix products and convolutions,
the network's inputs too.

The reference runs once over the samples. Every point of the weights is the same serialized graph with other arrays
handed over: starting a session takes little beside a pass over the samples, and weights that were inputs would keep
the runtime from arranging them for its kernels. Points of the activations share one session a format, whose scale is
an input, and the point of both subjects shares its graph.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from afpq import _metrics
from afpq._rounder import round_inputs
from afpq._sweep_map import Curve, Joint, Point, Sweep
from afpq.data import Data, open_data
from afpq.errors import FormatError, ModelError, NaNError, PlanError
from afpq.evaluate import OutputComparison, compare_output
from afpq.formats import AfpFormat, all_formats, exponent_bias_of, scale_of
from afpq.graph import Layer, Model, TensorInfo, load_model
from afpq.rounding import fake_quantize_rows
from afpq.runtime import FloatModel, Simulation

__all__ = ["SUBJECTS", "Curve", "Joint", "Point", "Sweep", "distinct_formats", "sweep"]

SUBJECTS = ("weights", "activations")

_BATCH = 8  # the values of wide layers stay in caches, which the rounding of activations needs
_SCALE = "afpq.activation_scale"
# A curve goes from where one step is as large as the largest value of a typical tensor (nearly all becomes 0) to where
# the largest value of the format is a sixteenth of that (nearly all saturates).
_CLIPPED = 16.0

Array = npt.NDArray[Any]
Feed = dict[str, Array]
Progress = Callable[[str, int, int], None]


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
    classification counts, or else the first. Activations skip formats without a mantissa. Curves come in the order of
    `SUBJECTS`. The same arguments give the same map, on one machine and with one version of onnxruntime.

    Raises:
        ModelError: the model cannot be read or run, or has nothing (activations: nothing in float32) to round.
        DataError: the data does not fit the model.
        FormatError: a format is unsigned, or none is left.
        PlanError: a subject is not one of `SUBJECTS`.
    """
    wanted = _wanted(formats, subjects)
    loaded = model if isinstance(model, Model) else load_model(model)
    _check_model(loaded, [subject for subject, _ in wanted])
    study = _Study(loaded, threads)
    study.read(data, preprocess, samples)
    plans = [(subject, fmt, study.biases(subject, fmt)) for subject, fmt in wanted]
    pairs = [fmt for subject, fmt in wanted if subject != "weights" and ("weights", fmt) in wanted]
    total, done = sum(len(biases) for _, _, biases in plans) + len(pairs), 0
    curves, joint = [], []

    def step() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress("sweep", done, total)

    best: dict[tuple[str, AfpFormat], int] = {}
    for subject, fmt, biases in plans:
        network = study.network(subject, fmt)
        points = []
        for point in study.points(network, subject, fmt, biases):
            points.append(point)
            step()
        curves.append(Curve(subject, fmt, tuple(points)))
        best[subject, fmt] = curves[-1].best.exponent_bias
        if subject == "activations" and fmt in pairs:
            joint.append(study.joint(network, fmt, best["weights", fmt], best[subject, fmt]))
            step()
    return Sweep(
        model=study.model.path.name,
        metric=study.metric,
        num_samples=study.num_samples,
        float_score=study.float_score,
        float_stderr=study.float_stderr,
        curves=tuple(curves),
        joint=tuple(joint),
    )


def _wanted(formats: Sequence[AfpFormat], subjects: Sequence[str]) -> list[tuple[str, AfpFormat]]:
    """Subject and format of every curve."""
    for fmt in formats:
        if not fmt.signed:
            raise FormatError(f"format {fmt} is unsigned; a sweep takes signed formats")
    for subject in subjects or ("",):
        if subject not in SUBJECTS:
            raise PlanError(f"sweep subject {subject!r} is not one of {', '.join(SUBJECTS)}")
    found = [
        (subject, fmt)
        for subject in SUBJECTS
        for fmt in dict.fromkeys(formats)
        if subject in subjects and (subject == "weights" or fmt.mantissa_bits > 0)
    ]
    if not found:
        given = ", ".join(map(str, formats)) or "none was given"
        raise FormatError(f"no format to sweep ({given}): activations need one with a mantissa")
    return found


def _check_model(model: Model, subjects: Sequence[str]) -> None:
    if not model.layers:
        raise ModelError(f"{model.path}: has no weights to round")
    if "activations" not in subjects:
        return
    readers = _readers(model)
    if not readers:
        raise ModelError(
            f"{model.path}: has no matrix product or convolution, so no activations to round; "
            "sweep the weights alone"
        )
    for layer in readers:
        if layer.dtype != "float32":
            raise ModelError(
                f"{model.path}: layer {layer.name!r} has {layer.dtype} weights; activations can be "
                "rounded only where layers take float32: sweep the weights alone"
            )


class _Study:
    """The float network, its outputs on the samples, and how a rounded one scores against them."""

    def __init__(self, model: Model, threads: int) -> None:
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
                self._position = names.index(self._output)
                self._sizes["activations"] = self._activation_size(feed)
            self._batches.append((feed, outputs[self._output], labels))
        self.num_samples = opened.num_samples
        same = ((reference, reference, labels) for _, reference, labels in self._batches)
        try:
            own = compare_output(self._output, same)
        except NaNError as error:
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

    def network(self, subject: str, fmt: AfpFormat) -> FloatModel:
        """The network whose weights or whose scale of activations the points of a curve set."""
        if subject == "weights":
            return self._float
        return FloatModel(_rounding(self.model, fmt), threads=self._threads)

    def points(
        self, network: FloatModel, subject: str, fmt: AfpFormat, biases: Sequence[int]
    ) -> Iterator[Point]:
        if subject == "weights":
            for bias in biases:
                yield self._point(bias, network.simulate(self._rounded(fmt, bias)))
            return
        started = network.simulate({})
        for bias in biases:
            yield self._point(bias, started, _scale_of(fmt, bias))

    def joint(
        self, network: FloatModel, fmt: AfpFormat, weight_bias: int, activation_bias: int
    ) -> Joint:
        """The point of both; `network` is that of the activations."""
        started = network.simulate(self._rounded(fmt, weight_bias))
        point = self._point(weight_bias, started, _scale_of(fmt, activation_bias))
        return Joint(fmt, weight_bias, activation_bias, point)

    def _rounded(self, fmt: AfpFormat, bias: int) -> dict[str, npt.NDArray[np.float32]]:
        scale = scale_of(fmt, [bias])
        return {
            name: fake_quantize_rows(weight, fmt, scale, num_threads=self._threads)
            for name, weight in self._weights.items()
        }

    def _point(self, bias: int, started: Simulation, extra: Feed | None = None) -> Point:
        pairs = (
            (reference, started.run(feed | (extra or {}))[self._position], labels)
            for feed, reference, labels in self._batches
        )
        try:
            found = compare_output(self._output, pairs)
        except NaNError:
            return Point(bias, 0.0, None, None)
        return Point(bias, _number(found, self.metric), found.kl, found.sqnr_db)

    def _activation_size(self, feed: Feed) -> float:
        names = list(dict.fromkeys(layer.input_name for layer in _readers(self.model)))
        return _typical(self._float.run(feed, [name for name in names if name is not None]))


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


def _scale_of(fmt: AfpFormat, bias: int) -> Feed:
    return {_SCALE: np.asarray(scale_of(fmt, bias))}


def _rounding(model: Model, fmt: AfpFormat) -> Model:
    """The model with everything that products read rounded to the format; the scale is one more input."""
    clone = model.ir.clone()
    graph, nodes = clone.graph, list(clone.graph)
    scale = ir.val(_SCALE, dtype=ir.DataType.FLOAT, shape=[])
    graph.inputs.append(scale)
    readers = _readers(model)
    round_inputs(graph, ((nodes[r.node_index], int(r.is_left), fmt, scale) for r in readers))
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
