"""Says what of afpq works on this machine: versions, native code, the custom-op library, a small computation.

A check never raises; what failed is in its text, with what to do.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from afpq.errors import AfpqError
from afpq.formats import AfpFormat
from afpq.packed import PackedLayer
from afpq.report import environment

__all__ = ["Check", "doctor"]


@dataclass(frozen=True)
class Check:
    """One line of the diagnosis."""

    name: str
    passed: bool
    detail: str


def doctor() -> list[Check]:
    """Every check, in the order in which one builds on another."""
    versions = environment()
    checks = [Check(name, True, str(value)) for name, value in versions.items() if name != "isa"]
    checks += [
        _attempt("native extension", _check_core),
        _attempt("instruction sets", _check_isa),
        _attempt("images (Pillow)", _check_pillow, needed=False),
        _attempt("custom-op library", _check_library),
        _attempt("self-test", _check_products),
    ]
    return checks


def _attempt(name: str, check: Callable[[], str], *, needed: bool = True) -> Check:
    try:
        return Check(name, True, check())
    except (AfpqError, ImportError, ValueError) as error:
        text = " ".join(str(error).split())
        return Check(name, not needed, text if needed else f"not available: {text}")


def _check_core() -> str:
    from afpq import _core

    return Path(_core.__file__ or "").name


def _check_isa() -> str:
    from afpq._core import kernels

    forced = os.environ.get("AFPQ_ISA")
    how = "forced by AFPQ_ISA" if forced else "the best here"
    return f"{kernels.active_isa()} ({how}; supported: {', '.join(kernels.isa_names())})"


def _check_pillow() -> str:
    import PIL

    return f"{PIL.__version__}"


def _check_library() -> str:
    from afpq.runtime import ort_library_path, session

    path = ort_library_path()
    session(_identity_model())
    return f"{Path(path).name} loads in onnxruntime"


def _check_products() -> str:
    """A matrix product and the decoder in one format of each kernel class."""
    from afpq.verify import check_decode, check_run

    formats = [AfpFormat.parse(text) for text in ("e2m1", "e2m2", "e3m3", "e5m2")]
    for fmt in formats:
        layer = _layer(fmt)
        check_decode(layer)
        check_run(layer)
    return f"{', '.join(map(str, formats))} run as defined"


def _layer(fmt: AfpFormat) -> PackedLayer:
    from afpq.rewrite import pack_scale
    from afpq.rounding import best_scale, quantize_tensor

    weight = np.random.default_rng(0).standard_normal((20, 50)).astype(np.float32)
    scale, _ = best_scale(weight, fmt)
    tensor = quantize_tensor(weight, fmt, scale)
    stored = pack_scale(fmt, tensor.scale, tensor.kind, name="scale")
    values = [
        ir.val("weight", const_value=ir.Tensor(tensor.data, name="weight")),
        ir.val("scale", const_value=stored),
    ]
    fields: dict[str, Any] = {"format": str(fmt), "n": tensor.n, "k": tensor.k}
    node = ir.node("MatMul", [ir.val("x"), *values], fields, domain="afpq", name=f"{fmt}")
    return PackedLayer(
        name=f"{fmt}",
        op="MatMul",
        format=fmt,
        n=tensor.n,
        k=tensor.k,
        group_size=0,
        groups=1,
        activations="a16",
        weight_name="weight",
        scale_name="scale",
        output_name="y",
        packed=tensor.data,
        stored_scale=stored.numpy(),
        node=node,
    )


def _identity_model() -> bytes:
    x = ir.val("x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([1]))
    node = ir.node("Identity", [x])
    node.outputs[0].name = "y"
    node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph([x], node.outputs, nodes=[node], opset_imports={"": 17}, name="identity")
    return bytes(ir.to_proto(ir.Model(graph, ir_version=8)).SerializeToString())
