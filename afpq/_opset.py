"""Raises the opset of a graph, for types and attributes that older ones do not have."""

import onnx
import onnx.version_converter
import onnx_ir as ir
from onnx.helper import OP_SET_ID_VERSION_MAP

from afpq.errors import ModelError

__all__ = ["opset_of", "raise_opset"]

_LARGE = 1024  # bytes: no operator's conversion looks at constants of this size


def opset_of(model: ir.Model) -> int:
    """The version of ONNX's own operators that a model uses."""
    imports = model.graph.opset_imports
    return int(imports.get("", imports.get("ai.onnx", 1)))


def raise_opset(model: ir.Model, opset: int) -> ir.Model:
    """The model in an opset that is at least `opset`, and in an IR version that has it; `model` is not used again.

    Large constants do not go through the converter, so that they may have any size.

    Raises:
        ModelError: the installed onnx does not know the opset, or cannot convert the model.
    """
    if opset_of(model) < opset:
        if opset > onnx.defs.onnx_opset_version():
            raise ModelError(f"opset {opset} is needed, onnx {onnx.__version__} does not have it")
        model = _converted(model, opset)
    needed = OP_SET_ID_VERSION_MAP[("ai.onnx", opset)]
    model.ir_version = max(model.ir_version, needed)
    return model


def _converted(model: ir.Model, opset: int) -> ir.Model:
    graph, metadata = model.graph, dict(model.metadata_props)
    large: dict[str, ir.TensorProtocol] = {}
    for name, value in list(graph.initializers.items()):
        tensor = value.const_value
        if tensor is not None and tensor.nbytes > _LARGE and not value.is_graph_input():
            large[name] = tensor
            del graph.initializers[name]
            value.const_value = None
            value.type, value.shape = ir.TensorType(tensor.dtype), ir.Shape(tensor.shape.numpy())
            graph.inputs.append(value)
    before = opset_of(model)
    try:
        proto = onnx.version_converter.convert_version(ir.to_proto(model), opset)
    except Exception as error:  # the converter raises bare RuntimeError and its own kinds
        message = " ".join(str(error).split())
        raise ModelError(f"opset {before} cannot be raised to {opset}: {message}") from error
    result = ir.from_proto(proto)
    for value in list(result.graph.inputs):
        if value.name in large:
            result.graph.inputs.remove(value)
            value.type = value.shape = None
            value.const_value = large[value.name]
            result.graph.register_initializer(value)
    for node in result.graph.all_nodes():  # what the converter could infer
        for output in node.outputs:
            if not output.is_graph_output():
                output.type = output.shape = None
    result.metadata_props.update(metadata)
    return result
