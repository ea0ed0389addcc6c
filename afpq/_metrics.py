"""How far two outputs are apart: kind of output, agreement, KL divergence, SQNR, cosine."""

import math
import re
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = [
    "as_rows",
    "cosines",
    "kl_divergence",
    "label_ranks",
    "log_probabilities",
    "output_kind",
    "sqnr_db",
]

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]

_SUM_TOLERANCE = 1e-3  # of probabilities
_VALUES = re.compile(r"embed|hidden|pool|feature|state|box", re.IGNORECASE)
_CLASSES = re.compile(r"logit|prob|score|softmax|class", re.IGNORECASE)


def output_kind(name: str, array: Array) -> str:
    """What an output is, from its name, shape and content: "distribution", "logits", "values" or "integers".

    Rows (the last axis, trailing axes of one element dropped) that are probabilities are a distribution. Other
    outputs [n, classes] are logits unless their name says embedding, hidden, pool, feature, state or box; outputs
    with more axes are logits only if their name says so.
    """
    if array.dtype.kind != "f":
        return "integers"
    rows = _without_ones(array)
    if rows.ndim < 2 or rows.shape[-1] < 2 or not rows.size:
        return "values"
    sums = rows.sum(axis=-1, dtype=np.float64)
    if rows.min() >= 0 and bool((np.abs(sums - 1) < _SUM_TOLERANCE).all()):
        return "distribution"
    if _VALUES.search(name) or (rows.ndim > 2 and not _CLASSES.search(name)):
        return "values"
    return "logits"


def as_rows(array: Array, kind: str) -> Array:
    """The output as a matrix: [rows, classes] of a classifier, else one row a sample."""
    if kind in ("distribution", "logits"):
        return _without_ones(array).reshape(-1, _without_ones(array).shape[-1])
    return array.reshape(len(array), -1) if array.ndim > 1 else array.reshape(-1, 1)


def log_probabilities(rows: Array, kind: str) -> Floats:
    """log p of every class: [rows, classes]."""
    wide = rows.astype(np.float64)
    if kind == "distribution":
        with np.errstate(divide="ignore"):
            return np.asarray(np.log(wide / wide.sum(axis=-1, keepdims=True)), np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    return np.asarray(wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True)), np.float64)


def kl_divergence(reference: Array, other: Array, kind: str) -> Floats:
    """KL(reference || other) of every row, in nats; classes the reference excludes count nothing."""
    log_p, log_q = log_probabilities(reference, kind), log_probabilities(other, kind)
    p = np.exp(log_p)
    with np.errstate(invalid="ignore"):
        terms = np.where(p > 0, p * (log_p - log_q), 0.0)
    return np.asarray(terms.sum(axis=-1), np.float64)


def label_ranks(rows: Array, labels: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """How many classes come before the right one in each row; of equal scores the lower class comes first."""
    right = np.take_along_axis(rows, labels[:, None], axis=1)
    earlier = np.arange(rows.shape[1])[None] < labels[:, None]
    return np.asarray(((rows > right) | ((rows == right) & earlier)).sum(axis=1), np.int64)


def sqnr_db(signal: float, noise: float) -> float:
    """Signal-to-quantization-noise ratio of two energies in decibels; infinity without noise."""
    if noise == 0:
        return math.inf
    return -math.inf if signal == 0 else 10 * math.log10(signal / noise)


def cosines(reference: Array, other: Array) -> Floats:
    """Cosine of each pair of rows; 1 where both are zero, 0 where one is."""
    a, b = reference.astype(np.float64), other.astype(np.float64)
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    same = (a == b).all(axis=-1)
    dots = (a * b).sum(axis=-1)
    return np.asarray(np.where(norms > 0, dots / np.where(norms > 0, norms, 1), same), np.float64)


def _without_ones(array: Array) -> Array:
    """[n, c, 1, 1] -> [n, c]."""
    shape = array.shape
    while len(shape) > 2 and shape[-1] == 1:
        shape = shape[:-1]
    return array.reshape(shape)
