"""What is kept of an output while two models run: sums, from which all metrics follow."""

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from afpq import _metrics
from afpq.errors import NaNError

__all__ = ["Energy", "OutputComparison", "Tally"]

Array = npt.NDArray[Any]


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


@dataclass
class Energy:
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
class Tally:
    """What is kept of one output."""

    name: str
    kind: str = ""
    energy: Energy = field(default_factory=Energy)
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
                raise NaNError(f"the {which} gives NaN in output {self.name!r}")

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
