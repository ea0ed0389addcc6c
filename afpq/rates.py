"""How fast each kind of weight format multiplies on a machine: `afpq doctor --measure` finds it, a search can weigh it.

A file of rates is JSON: `{"isa": "avx2", "rates": {"a8": {"e0m4": 89.1, ...}, "a16": {...}}}`, in 10^9 products a
second of one thread. One format stands for all that kernels treat alike: of its class, with integers up to its own.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from afpq.errors import PlanError
from afpq.formats import AfpFormat

__all__ = ["RATE_FORMATS", "RATE_MODES", "product_seconds", "rates_json", "read_rates"]

# Bytes up to 16, 32, 64 (sums of fewer and fewer products fit 16 bits) and beyond; two planes; float lanes.
RATE_FORMATS = ("e0m4", "e0m5", "e0m6", "e0m7", "e3m3", "e4m3")
RATE_MODES = ("a8", "a16")

Rates = Mapping[str, float]


def product_seconds(rates: Rates, fmt: AfpFormat) -> float:
    """Seconds of one product with a weight of format `fmt`, by the rates of one way to round activations.

    Example:
        >>> from afpq.rates import product_seconds
        >>> rates = {"e0m4": 80.0, "e0m5": 80.0, "e0m6": 40.0, "e0m7": 40.0, "e3m3": 20.0, "e4m3": 10.0}
        >>> round(1e9 * product_seconds(rates, afpq.AfpFormat.parse("e2m1")), 4)  # integers up to 12
        0.0125
    """
    same = [f for f in map(AfpFormat.parse, rates) if f.kernel_class == fmt.kernel_class]
    same.sort(key=lambda f: f.max_integer)
    fits = [f for f in same if f.max_integer >= fmt.max_integer]
    return 1e-9 / rates[str(fits[0] if fits else same[-1])]


def rates_json(isa: str, rates: Mapping[str, Rates]) -> str:
    """The text of a file of rates, those of each way to round activations."""
    return json.dumps({"isa": isa, "rates": rates}, indent=1) + "\n"


def read_rates(path: str | Path, activations: str) -> dict[str, float]:
    """The rates of one way to round activations.

    Raises:
        PlanError: the file cannot be read, or has no such rates.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise PlanError(f"{path}: cannot be read: {error.strerror}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise PlanError(f"{path}: not a file of rates: {error}") from error
    rates = found.get("rates") if isinstance(found, dict) else None
    if not isinstance(rates, dict):
        raise PlanError(
            f"{path}: not a file of rates: afpq doctor --measure --save-rates makes one"
        )
    if activations not in rates:
        raise PlanError(
            f"{path} has no rates of activations {activations!r}, only of {', '.join(rates)}"
        )
    return _checked(path, rates[activations])


def _checked(path: str | Path, rates: Any) -> dict[str, float]:
    if not isinstance(rates, dict) or set(rates) != set(RATE_FORMATS):
        raise PlanError(f"{path}: there must be a rate of each of {', '.join(RATE_FORMATS)}")
    for name, rate in rates.items():
        if not isinstance(rate, int | float) or not 0 < rate < math.inf:
            raise PlanError(f"{path}: the rate of {name} is {rate!r}, not a positive number")
    return {name: float(rates[name]) for name in RATE_FORMATS}
