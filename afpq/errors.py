"""Every error afpq raises on purpose.

AfpqError
 |- FormatError(ValueError)      a number format, scale or code that does not exist
 |- PlanError(ValueError)        a plan, budget or layer pattern that cannot be followed
 |- ModelError(ValueError)       an ONNX model that cannot be read, quantized or written
 |   |- NaNError                  a model whose output is NaN
 |- DataError(ValueError)        calibration or evaluation data that does not fit the model
 |- JournalError(ValueError)     a journal of another run, or one that cannot be used
 |- RuntimeUnavailableError      a native library or an optional dependency is missing

A message says what is wrong, with which thing (by name), and what would be right.
"""

__all__ = [
    "AfpqError",
    "DataError",
    "FormatError",
    "JournalError",
    "ModelError",
    "NaNError",
    "PlanError",
    "RuntimeUnavailableError",
]


class AfpqError(Exception):
    """Base of every error afpq raises on purpose; the CLI prints it as one line and exits 1."""


class FormatError(AfpqError, ValueError):
    """A number format, scale or code that does not exist."""


class PlanError(AfpqError, ValueError):
    """A plan, budget or layer pattern that cannot be followed."""


class ModelError(AfpqError, ValueError):
    """An ONNX model that cannot be read, quantized or written."""


class NaNError(ModelError):
    """A model whose output is NaN on the samples it was given."""


class DataError(AfpqError, ValueError):
    """Calibration or evaluation data that does not fit the model."""


class JournalError(AfpqError, ValueError):
    """A journal that belongs to another run, is in use, or cannot be read or written."""


class RuntimeUnavailableError(AfpqError):
    """A native library or an optional dependency is missing or cannot be loaded."""
