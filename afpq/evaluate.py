"""Compares two models on the same data: accuracy, agreement, KL divergence, SQNR, cosine, per output and per layer.

Everything is streamed: only sums are kept of the outputs. Errors that come with a number are standard errors, binomial
for shares. What an output means (`kind`) is found in the reference's first batch, see `_metrics.output_kind`.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime as ort

from afpq import _metrics
from afpq.data import open_data
from afpq.errors import ModelError
from afpq.packed import DOMAIN, file_bytes, read_ir
from afpq.runtime import session

__all__ = ["Comparison", "LayerComparison", "OutputComparison", "compare", "compare_output"]

Array = npt.NDArray[Any]
Progress = Callable[[str, int, int], None]  # stage, samples done, samples in all
Source: TypeAlias = str | Path | ort.InferenceSession

BATCH = 16
BATCH_WITH_LAYERS = 2  # all layers' outputs of both models are held at once


@dataclass(frozen=True)
class OutputComparison:
    """One output; None where a number has no meaning for its `kind`.

    `num_rows` counts decisions: samples of a classifier, tokens of a language model. top1 and top5 need labels.
    """

    name: str
    kind: (
        str  # distribution, logits, values, integers, or varying (shapes differ between the models)
    )
    num_rows: int
    top1_reference: float | None = None
    top1: float | None = None
    top1_stderr: float | None = None
    top1_lost: int | None = None  # rows that only the reference gets right
    top1_gained: int | None = None  # rows that only the quantized model gets right
    top5_reference: float | None = None
    top5: float | None = None
    agreement: float | None = (
        None  # share of rows with the same best class (integers: of equal elements)
    )
    agreement_stderr: float | None = None
    kl: float | None = None  # KL(reference || quantized), mean over rows, nats
    kl_stderr: float | None = None
    cosine: float | None = None  # mean over samples
    cosine_min: float | None = None
    relative_error: float | None = None  # energy of the error over that of the reference, of values
    relative_error_stderr: float | None = None
    sqnr_db: float | None = None  # infinity if equal
    note: str = ""  # why a number is missing that could be expected


@dataclass(frozen=True)
class LayerComparison:
    """The output of one packed layer (with what is fused into it) against the same tensor of the reference."""

    name: str
    output_name: str
    sqnr_db: float


@dataclass(frozen=True)
class Comparison:
    """Two models on the same data."""

    num_samples: int
    outputs: tuple[OutputComparison, ...]
    layers: tuple[LayerComparison, ...]
    reference_bytes: int | None  # None for a session: no file is known
    quantized_bytes: int | None
    preprocess: str | None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; an infinite SQNR (equal outputs) is None."""
        return {key: _plain(value) for key, value in asdict(self).items()}


def compare(
    reference: Source,
    quantized: Source,
    data: object,
    *,
    preprocess: str | None = None,
    limit: int | None = None,
    layers: bool = False,
    threads: int = 0,
    progress: Progress | None = None,
) -> Comparison:
    """Runs both models (files or sessions) over the data (a `Data`, or anything `open_data` takes).

    `layers` also compares the output of every packed layer; it needs files.

    Raises:
        ModelError: a model cannot be run, the two do not have the same outputs, or one gives NaN.
        DataError: the data does not fit the reference.
    """
    tensors = _layer_tensors(reference, quantized) if layers else {}
    extra = list(tensors.values())
    first, names = _open(reference, extra, threads)
    second, others = _open(quantized, extra, threads)
    for name in names:
        if name not in others:
            found = ", ".join(others)
            raise ModelError(f"the quantized model has no output {name!r}; it has {found}")
    fetched = list(dict.fromkeys(names + extra))
    opened = open_data(data, first.get_inputs(), preprocess=preprocess, limit=limit)
    outputs = {name: _Tally(name) for name in names}
    inner = {name: _Energy() for name in extra}
    done = 0
    for feed in opened.batches(BATCH_WITH_LAYERS if layers else BATCH):
        count = opened.count(feed)
        labels = None if opened.labels is None else opened.labels[done : done + count]
        results = _run(first, fetched, feed), _run(second, fetched, feed)
        for name, a, b in zip(fetched, *results, strict=True):
            if name in outputs:
                outputs[name].add(a, b, labels)
            if name in inner:
                inner[name].add(a, b)
        done += count
        if progress is not None:
            progress("compare", done, opened.num_samples)
    return Comparison(
        num_samples=done,
        outputs=tuple(tally.result() for tally in outputs.values()),
        layers=tuple(
            LayerComparison(layer, name, inner[name].sqnr_db()) for layer, name in tensors.items()
        ),
        reference_bytes=_bytes(reference),
        quantized_bytes=_bytes(quantized),
        preprocess=None if opened.preprocess is None else str(opened.preprocess),
    )


def compare_output(
    name: str, batches: Iterable[tuple[Array, Array, npt.NDArray[np.int64] | None]]
) -> OutputComparison:
    """The numbers of one output from batches of (reference, other, labels of the samples or None).

    Raises:
        ModelError: an output holds NaN.
    """
    tally = _Tally(name)
    for reference, other, labels in batches:
        tally.add(reference, other, labels)
    return tally.result()


@dataclass
class _Energy:
    """Sums of squares of a tensor and of its error; elements that are not finite in both are left out."""

    signal: float = 0.0
    noise: float = 0.0

    def add(self, reference: Array, other: Array) -> None:
        if reference.shape != other.shape:
            self.noise = math.nan
            return
        a, b = reference.astype(np.float64).reshape(-1), other.astype(np.float64).reshape(-1)
        finite = np.isfinite(a) & np.isfinite(b)
        if not finite.all():
            a, b = a[finite], b[finite]
        self.signal += float(np.square(a).sum())
        self.noise += float(np.square(a - b).sum())

    def sqnr_db(self) -> float:
        return _metrics.sqnr_db(self.signal, self.noise)


@dataclass
class _Mean:
    """Running mean with its standard error."""

    count: int = 0
    total: float = 0.0
    squares: float = 0.0
    low: float = math.inf

    def add(self, values: Array) -> None:
        wide = np.asarray(values, np.float64)
        self.count += wide.size
        self.total += float(wide.sum())
        self.squares += float(np.square(wide).sum())
        self.low = min(self.low, float(wide.min(initial=math.inf)))

    @property
    def mean(self) -> float | None:
        return self.total / self.count if self.count else None

    @property
    def hits(self) -> int | None:
        """How many were true, of a share."""
        return round(self.total) if self.count else None

    @property
    def stderr(self) -> float | None:
        """Of a share this is the binomial sqrt(p (1 - p) / n)."""
        if not self.count:
            return None
        mean = self.total / self.count
        return math.sqrt(max(self.squares / self.count - mean * mean, 0.0) / self.count)


@dataclass
class _Ratio:
    """The ratio of two sums over samples, with its standard error (first order, samples independent)."""

    count: int = 0
    sums: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros(2))  # above, below
    products: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros((2, 2)))

    def add(self, above: Array, below: Array) -> None:
        both = np.stack((above, below)).astype(np.float64)  # [2, samples]
        self.count += both.shape[1]
        self.sums += both.sum(1)
        self.products += both @ both.T

    @property
    def value(self) -> float | None:
        return float(self.sums[0] / self.sums[1]) if self.sums[1] > 0 else None

    @property
    def stderr(self) -> float | None:
        if self.value is None or self.count < 2:
            return None
        weights = np.array([1.0, -self.value])
        spread = max(float(weights @ self.products @ weights), 0.0)
        return math.sqrt(spread * self.count / (self.count - 1)) / float(self.sums[1])


@dataclass
class _Tally:
    """What is kept of one output."""

    name: str
    kind: str = ""
    energy: _Energy = field(default_factory=_Energy)
    error: _Ratio = field(default_factory=_Ratio)
    means: dict[str, _Mean] = field(default_factory=dict)
    num_rows: int = 0
    note: str = ""

    def add(self, reference: Array, other: Array, labels: npt.NDArray[np.int64] | None) -> None:
        self.kind = self.kind or _metrics.output_kind(self.name, reference)
        if reference.shape != other.shape or reference.dtype.kind not in "fiub":
            self.kind = "varying"
        if self.kind == "varying":
            return
        if self.kind == "integers":
            self.num_rows += reference.size
            self._mean("agreement").add(reference == other)
            return
        self._check(reference, other)
        self.energy.add(reference, other)
        a, b = _metrics.as_rows(reference, self.kind), _metrics.as_rows(other, self.kind)
        self.num_rows += len(a)
        if self.kind == "values":
            self._mean("cosine").add(_metrics.cosines(a, b))
            wide = a.astype(np.float64)
            self.error.add(np.square(wide - b).sum(1), np.square(wide).sum(1))
            return
        self._mean("agreement").add(a.argmax(-1) == b.argmax(-1))
        self._mean("kl").add(_metrics.kl_divergence(a, b, self.kind))
        if labels is not None and len(labels) == len(a):
            self._add_labels(a, b, labels)

    def _add_labels(self, a: Array, b: Array, labels: npt.NDArray[np.int64]) -> None:
        beyond = labels[(labels < 0) | (labels >= a.shape[1])]
        if len(beyond) and not self.note:
            self.note = f"no accuracy: label {beyond[0]} is not one of {a.shape[1]} classes"
            self.means = {key: mean for key, mean in self.means.items() if key[:3] != "top"}
        if self.note:
            return
        ranks = {
            "reference": _metrics.label_ranks(a, labels),
            "quantized": _metrics.label_ranks(b, labels),
        }
        for key, found in ranks.items():
            self._mean(f"top1 {key}").add(found < 1)
            if a.shape[1] > 5:
                self._mean(f"top5 {key}").add(found < 5)
        right, still_right = (found < 1 for found in ranks.values())
        self._mean("top1 lost").add(right & ~still_right)
        self._mean("top1 gained").add(still_right & ~right)

    def _check(self, reference: Array, other: Array) -> None:
        for which, array in (("reference", reference), ("quantized model", other)):
            if np.isnan(array).any():
                raise ModelError(f"the {which} gives NaN in output {self.name!r}")

    def _mean(self, key: str) -> _Mean:
        return self.means.setdefault(key, _Mean())

    def result(self) -> OutputComparison:
        none = _Mean()
        get = {key: self.means.get(key, none) for key in _MEANS}
        sqnr = self.energy.sqnr_db() if self.kind in ("distribution", "logits", "values") else None
        cosine = get["cosine"]
        return OutputComparison(
            name=self.name,
            kind=self.kind,
            num_rows=0 if self.kind == "varying" else self.num_rows,
            top1_reference=get["top1 reference"].mean,
            top1=get["top1 quantized"].mean,
            top1_stderr=get["top1 quantized"].stderr,
            top1_lost=get["top1 lost"].hits,
            top1_gained=get["top1 gained"].hits,
            top5_reference=get["top5 reference"].mean,
            top5=get["top5 quantized"].mean,
            agreement=get["agreement"].mean,
            agreement_stderr=get["agreement"].stderr,
            kl=get["kl"].mean,
            kl_stderr=get["kl"].stderr,
            cosine=cosine.mean,
            cosine_min=cosine.low if cosine.count else None,
            relative_error=self.error.value,
            relative_error_stderr=self.error.stderr,
            sqnr_db=sqnr,
            note=self.note,
        )


_MEANS = (
    "top1 reference",
    "top1 quantized",
    "top1 lost",
    "top1 gained",
    "top5 reference",
    "top5 quantized",
    "agreement",
    "kl",
    "cosine",
)


def _open(model: Source, extra: list[str], threads: int) -> tuple[ort.InferenceSession, list[str]]:
    """A session that can give the tensors `extra` too, and the names of the model's own outputs."""
    if isinstance(model, ort.InferenceSession) or not extra:
        opened = session(model, threads=threads) if isinstance(model, str | Path) else model
        return opened, [output.name for output in opened.get_outputs()]
    graph = read_ir(model)
    names = [output.name or "" for output in graph.graph.outputs]
    values = {value.name: value for node in graph.graph for value in node.outputs}
    graph.graph.outputs.extend(values[name] for name in extra if name not in names)
    try:
        loaded = ir.external_data.load_to_model(graph)
        content = ir.to_proto(loaded).SerializeToString()
    except ValueError as error:  # protobuf's limit
        raise ModelError(f"{model}: layers can be compared only in models below 2 GB") from error
    return session(content, threads=threads), names


def _layer_tensors(reference: Source, quantized: Source) -> dict[str, str]:
    """Packed layers by name and the tensor each writes, where the reference has a tensor of that name."""
    if isinstance(reference, ort.InferenceSession) or isinstance(quantized, ort.InferenceSession):
        raise ModelError("layers can be compared only between model files, not sessions")
    known = {value.name for node in read_ir(reference).graph for value in node.outputs}
    result = {}
    for node in read_ir(quantized).graph:
        name = node.outputs[0].name if node.outputs else None
        if node.domain == DOMAIN and node.op_type != "Unpack" and name in known:
            result[node.name or str(name)] = str(name)
    return result


def _run(model: ort.InferenceSession, names: list[str], feed: Mapping[str, Array]) -> list[Array]:
    taken = {entry.name for entry in model.get_inputs()}
    if not taken <= set(feed):
        raise ModelError(
            f"the models have different inputs: {', '.join(sorted(taken))} and {', '.join(feed)}"
        )
    try:
        return list(model.run(names, {name: feed[name] for name in taken}))
    except Exception as error:  # onnxruntime has a kind of its own for every status
        raise ModelError(
            f"onnxruntime cannot run the model: {' '.join(str(error).split())}"
        ) from error


def _bytes(model: Source) -> int | None:
    return None if isinstance(model, ort.InferenceSession) else file_bytes(model)


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
