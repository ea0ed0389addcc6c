"""What a sweep finds: points, the curves they form, and the map of one network with its plateaus."""

import math
from dataclasses import asdict, dataclass
from typing import Any

from afpq.formats import AfpFormat

__all__ = ["Curve", "Joint", "Point", "Sweep"]

TOLERANCE = 0.01


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


def _rank(point: Point) -> tuple[float, float, int]:
    quality = -math.inf if point.sqnr_db is None else point.sqnr_db
    if point.kl is not None:
        quality = -point.kl
    return quality, point.score, -point.exponent_bias


def _plain(point: Point) -> dict[str, Any]:
    fields = asdict(point)
    if fields["sqnr_db"] is not None and not math.isfinite(fields["sqnr_db"]):
        fields["sqnr_db"] = None
    return fields
