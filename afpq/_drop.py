"""How much of its metric a packed model loses, with a confidence interval: what `--max-drop` limits.

The metric follows from the data and the outputs, the first of these that there is:

    top1        labels        percentage points of top-1 accuracy lost; below 0 if it rises
    agreement   classes       percent of rows whose first class is another; of elements for outputs of integers
    error       other values  percent of the outputs' energy that the energy of the error makes up (1 % is 20 dB SQNR)

With several outputs the worst one of that kind counts. Intervals hold for independent rows: tokens of one text are not
quite, so for them the interval is too narrow.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["CONFIDENCE", "Drop", "drop_of", "share_interval"]

CONFIDENCE = 0.95
_Z = 1.959963984540054  # of a normal distribution, two sides

Output = Mapping[str, Any]  # the fields of `afpq.evaluate.OutputComparison`


@dataclass(frozen=True)
class Drop:
    """What was lost in percent, and the interval that holds the true number with `CONFIDENCE`."""

    metric: str  # top1, agreement or error
    output: str
    percent: float
    low: float
    high: float
    num_rows: int

    @property
    def text(self) -> str:
        """Such as `1.2 points of top-1 lost (95 %: -0.3 to 2.7; 300 rows)`."""
        unit = {
            "top1": "points of top-1 lost",
            "agreement": "% of first classes changed",
            "error": "% of the output's energy is error",
        }[self.metric]
        return (
            f"{self.percent:.3g} {unit} ({CONFIDENCE:.0%}: {self.low:.3g} to {self.high:.3g}; "
            f"{self.num_rows:,} rows)"
        )


def drop_of(outputs: Sequence[Output]) -> Drop | None:
    """The drop that a comparison shows; None if no output has any of the metrics."""
    for metric, key, measure in (
        ("top1", "top1_lost", _top1),
        ("agreement", "agreement", _disagreement),
        ("error", "relative_error", _error),
    ):
        drops = [
            Drop(metric, str(o["name"]), *measure(o), int(o["num_rows"]))
            for o in outputs
            if o[key] is not None and o["num_rows"]
        ]
        if drops:
            return max(drops, key=lambda drop: drop.percent)
    return None


def share_interval(count: int, rows: int) -> tuple[float, float]:
    """In percent, where a share of which `count` of `rows` were seen may lie: the interval of Wilson, 1927."""
    share = count / rows
    scale = 1 + _Z**2 / rows
    centre = (share + _Z**2 / (2 * rows)) / scale
    half = _Z * math.sqrt(share * (1 - share) / rows + (_Z / (2 * rows)) ** 2) / scale
    # At shares of 0 and 1 the bound is the share itself: rounding must not put it beside.
    percent = 100 * count / rows
    low, high = 100 * max(centre - half, 0.0), 100 * (centre + half)
    return min(low, percent), max(high, percent)


def _top1(output: Output) -> tuple[float, float, float]:
    """The difference of two paired shares, with the adjusted Wald interval of Agresti and Min, 2005.

    Half a row is added to each of the four cells: without it, no row changing would look like certainty.
    """
    rows, lost, gained = output["num_rows"], output["top1_lost"], output["top1_gained"]
    n, b, c = rows + 2, lost + 0.5, gained + 0.5
    centre = (b - c) / n
    half = _Z * math.sqrt(max(b + c - (b - c) ** 2 / n, 0.0)) / n
    return 100 * (lost - gained) / rows, 100 * (centre - half), 100 * (centre + half)


def _disagreement(output: Output) -> tuple[float, float, float]:
    n = output["num_rows"]
    changed = n - round(n * output["agreement"])  # an integer: 1 of 50 is 2 %, not a bit more
    low, high = share_interval(changed, n)
    return 100 * changed / n, low, high


def _error(output: Output) -> tuple[float, float, float]:
    """A ratio of sums with its normal interval; nothing is known of its spread from one sample."""
    share, stderr = output["relative_error"], output["relative_error_stderr"]
    half = math.inf if stderr is None else _Z * stderr
    return 100 * share, 100 * max(share - half, 0.0), 100 * (share + half)
