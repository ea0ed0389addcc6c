"""The static format of one activation tensor, as the plan holds it."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from afpq._fields import Fields, rounded
from afpq.errors import FormatError, PlanError
from afpq.formats import AfpFormat, round_scale

__all__ = ["ActivationEntry", "read_activation"]

_LOWEST, _HIGHEST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class ActivationEntry:
    """How every layer that reads `tensor` rounds it: to the nearest `I * scale` of the format.

    Raises:
        PlanError: the format's integers do not fit a byte, or the scale is no normal bfloat16 number above 0.
    """

    tensor: str
    format: AfpFormat
    scale: float
    error: float | None = None  # expected: squared error over squared values, None if not known

    def __post_init__(self) -> None:
        where = f"plan activation {self.tensor!r}"
        if not self.format.fits_activations:
            raise PlanError(
                f"{where}: format {self.format} has no mantissa, or integers beyond a byte "
                "(127 with a sign, 255 without); write e0m7, e2m4, ue1m7 or ue2m5"
            )
        _check_range(where, self.scale)
        if self.scale != float(round_scale(self.format, self.scale, "real")):
            raise PlanError(f"{where}: scale {self.scale!r} is not a bfloat16 number")

    def fields(self) -> dict[str, Any]:
        """The entry as a JSON object."""
        return {
            "tensor": self.tensor,
            "format": str(self.format),
            "scale": self.scale,
            "error": rounded(self.error),
        }


def read_activation(index: int, item: object) -> ActivationEntry:
    """Reads `fields`; a scale that was typed in is rounded to one that can be stored.

    Raises:
        PlanError: a field is missing, unknown or out of range.
    """
    if not isinstance(item, dict):
        raise PlanError(f"plan activation {index} is not a JSON object")
    fields = Fields(f"plan activation {index}", item)
    tensor = fields.text("tensor")
    fields.where = f"plan activation {tensor!r}"
    fields.only("tensor", "format", "scale", "error")
    try:
        fmt = AfpFormat.parse(fields.text("format"))
    except FormatError as error:
        raise PlanError(f"{fields.where}: {error}") from error
    scale = fields.number("scale", optional=False)
    assert scale is not None
    _check_range(fields.where, scale)
    stored = float(round_scale(fmt, scale, "real"))
    known = fields.number("error", optional=True) if stored == scale else None
    return ActivationEntry(tensor, fmt, stored, known)


def _check_range(where: str, scale: float) -> None:
    if not _LOWEST <= scale <= _HIGHEST:
        raise PlanError(
            f"{where}: scale {scale!r} is not in the range {_LOWEST:.8g}..{_HIGHEST:.8g} "
            "of normal float32 numbers"
        )
