"""Typed reading of JSON objects, with errors that say where; and how plans write numbers."""

import difflib
import math
from collections.abc import Iterable, Mapping
from typing import Any

from afpq.errors import PlanError

__all__ = ["Fields", "nearest", "rounded"]


class Fields:
    """Typed access to a JSON object; `where` names it in errors."""

    def __init__(self, where: str, values: Mapping[str, Any]) -> None:
        self.where, self._values = where, values

    def only(self, *names: str) -> None:
        unknown = sorted(set(self._values) - set(names))
        if unknown:
            raise PlanError(
                f"{self.where}: unknown field {unknown[0]!r}{nearest(unknown[0], names)}"
            )

    def get(self, name: str) -> Any:
        if name not in self._values:
            raise PlanError(f"{self.where}: field {name!r} is missing")
        return self._values[name]

    def items(self, name: str) -> list[Any]:
        value = self.get(name)
        if not isinstance(value, list):
            raise PlanError(f"{self.where}: {name} is not a list")
        return value

    def text(self, name: str) -> str:
        value = self.get(name)
        if not isinstance(value, str) or not value:
            raise PlanError(f"{self.where}: {name} {value!r} is not a text")
        return value

    def integer(self, name: str) -> int:
        value = self.get(name)
        if not isinstance(value, int) or isinstance(value, bool):
            raise PlanError(f"{self.where}: {name} {value!r} is not an integer")
        return value

    def number(self, name: str, *, optional: bool) -> float | None:
        value = self._values.get(name) if optional else self.get(name)
        if value is None and optional:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise PlanError(f"{self.where}: {name} {value!r} is not a number")
        try:
            number = float(value)
        except OverflowError:  # an integer beyond every float
            raise PlanError(f"{self.where}: {name} is an integer beyond all floats") from None
        if not (math.isfinite(number) and number >= 0):
            raise PlanError(f"{self.where}: {name} {value!r} is not a finite number of at least 0")
        return number


def rounded(value: float | None) -> float | None:
    # Nine digits: more than any loss means, and short enough to be the same after every round trip.
    return None if value is None else float(f"{value:.9g}")


def nearest(name: str, names: Iterable[str]) -> str:
    choices = list(dict.fromkeys(names))
    near = difflib.get_close_matches(name.strip("*?"), choices, 3, 0.5)
    if not near:
        near = choices[:3] + (["..."] if len(choices) > 3 else [])
    return f"; nearest: {', '.join(near)}" if near else ""
