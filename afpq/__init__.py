"""Adaptive floating-point post-training quantization: packed ONNX models that onnxruntime executes directly.

    import afpq

    stats = afpq.calibrate("model.onnx", data)
    plan = afpq.search("model.onnx", stats, bits=4.5)
    model = afpq.quantize("model.onnx", plan, stats)  # or one call: afpq.quantize("model.onnx", data=data, bits=4.5)
    model.save("out.onnx")
    model.report("report.md")
    session = model.session()  # an onnxruntime.InferenceSession

Names are imported when they are first used, so `import afpq` costs nothing.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from afpq.calibrate import Stats, calibrate
    from afpq.data import Data, open_data
    from afpq.errors import (
        AfpqError,
        DataError,
        FormatError,
        ModelError,
        PlanError,
        RuntimeUnavailableError,
    )
    from afpq.formats import AfpFormat
    from afpq.plan import Plan
    from afpq.quantize import QuantizedModel, load, quantize
    from afpq.runtime import ort_library_path
    from afpq.search import search

    __version__: str

__all__ = [
    "AfpFormat",
    "AfpqError",
    "Data",
    "DataError",
    "FormatError",
    "ModelError",
    "Plan",
    "PlanError",
    "QuantizedModel",
    "RuntimeUnavailableError",
    "Stats",
    "calibrate",
    "load",
    "open_data",
    "ort_library_path",
    "quantize",
    "search",
]

_HOME = {
    "AfpFormat": "formats",
    "AfpqError": "errors",
    "Data": "data",
    "DataError": "errors",
    "FormatError": "errors",
    "ModelError": "errors",
    "Plan": "plan",
    "PlanError": "errors",
    "QuantizedModel": "quantize",
    "RuntimeUnavailableError": "errors",
    "Stats": "calibrate",
    "calibrate": "calibrate",
    "load": "quantize",
    "open_data": "data",
    "ort_library_path": "runtime",
    "quantize": "quantize",
    "search": "search",
}


def __getattr__(name: str) -> object:
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("afpq")
        except PackageNotFoundError:  # a source tree that was never installed
            return "0+unknown"
    if name not in _HOME:
        raise AttributeError(f"module 'afpq' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"afpq.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


class _Package(ModuleType):
    """Keeps `afpq.quantize` the function: the import system would bind the submodule of the same name over it."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
