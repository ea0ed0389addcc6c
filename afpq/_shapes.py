"""Shapes of the tensors between nodes."""

import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

__all__ = ["same_shape", "with_shapes"]


def with_shapes(model: ir.Model) -> ir.Model:
    """The model with the shapes of intermediate tensors filled in as far as they can be inferred; changes it."""
    try:
        return ShapeInferencePass(check_type=False, strict_mode=False)(model).model
    except Exception:  # inference fails on graphs that run; what is unknown stays unknown
        return model


def same_shape(a: ir.Value, b: ir.Value) -> bool:
    """Whether two shapes are known and equal."""
    if a.shape is None or b.shape is None or len(a.shape) != len(b.shape):
        return False
    dims = zip(a.shape, b.shape, strict=True)
    return all(x == y and (isinstance(x, int) or x.value is not None) for x, y in dims)
