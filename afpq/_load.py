"""Reads an ONNX file into onnx-ir and refuses, with the reason, what afpq cannot start from.

Weights stay where they are: external data is mapped, not read. Opsets before 11 are converted, local functions inlined.
"""

from collections.abc import Iterable
from pathlib import Path

import onnx
import onnx.inliner
import onnx.version_converter
import onnx_ir as ir

from afpq.errors import ModelError

OLDEST_OPSET = 11
CONVERTED_OPSET = 13
CONVERTED_IR_VERSION = 8

_QUANTIZED_OPS = frozenset(
    {
        "BlockDequantizeLinear",
        "ConvInteger",
        "DequantizeBFP",
        "DequantizeLinear",
        "DynamicQuantizeLSTM",
        "DynamicQuantizeLinear",
        "DynamicQuantizeMatMul",
        "GatherBlockQuantized",
        "MatMulBnb4",
        "MatMulFpQ4",
        "MatMulInteger",
        "MatMulInteger16",
        "MatMulIntegerToFloat",
        "MatMulNBits",
        "QAttention",
        "QEmbedLayerNormalization",
        "QGemm",
        "QMoE",
        "QOrderedMatMul",
        "QuantizeBFP",
        "QuantizeLinear",
    }
)


def read_model(path: Path) -> ir.Model:
    """The checked model, opset 11 or newer, without local functions.

    Raises:
        ModelError: the file or its external data is missing or damaged, or the model is already quantized.
    """
    proto = _parse(path)
    if proto.functions:
        proto = onnx.inliner.inline_local_functions(proto)
    proto = _convert(path, proto)
    _check_sparse(path, proto.graph)
    try:
        model = ir.from_proto(proto)
        ir.external_data.set_base_dir(model.graph, path.resolve().parent)
    except Exception as error:  # onnx-ir raises many kinds for a malformed graph
        raise ModelError(f"{path}: the graph is malformed: {_first_line(error)}") from error
    _check_not_quantized(path, model)
    _check_external_data(path, model)
    return model


def _parse(path: Path) -> onnx.ModelProto:
    if not path.exists():
        raise ModelError(f"{path}: no such file")
    if path.is_dir():
        raise ModelError(f"{path}: is a directory, not an ONNX file")
    proto = onnx.ModelProto()
    if path.stat().st_size >= 2**31:
        raise ModelError(f"{path}: 2 GB or more in one file; save it with external data")
    try:
        proto.ParseFromString(path.read_bytes())
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from error
    except Exception as error:  # protobuf has a kind of its own
        raise ModelError(f"{path}: not an ONNX model, or cut short") from error
    if proto.ir_version <= 0 or not (proto.graph.node or proto.graph.output):
        raise ModelError(f"{path}: not an ONNX model, or cut short")
    return proto


def _convert(path: Path, proto: onnx.ModelProto) -> onnx.ModelProto:
    opset = next((o.version for o in proto.opset_import if o.domain in ("", "ai.onnx")), None)
    if opset is not None and opset < OLDEST_OPSET:
        try:
            proto = onnx.version_converter.convert_version(proto, CONVERTED_OPSET)
        except Exception as error:  # the converter raises bare RuntimeError and its own kinds
            raise ModelError(
                f"{path}: opset {opset} is older than {OLDEST_OPSET} and cannot be converted "
                f"({_first_line(error)}); export the model with opset {CONVERTED_OPSET} or newer"
            ) from error
        proto.ir_version = max(proto.ir_version, CONVERTED_IR_VERSION)
        return _without_constant_inputs(proto)
    if proto.ir_version < 4:  # such files have to list every initializer as an input
        proto.ir_version = CONVERTED_IR_VERSION
        return _without_constant_inputs(proto)
    return proto


def _without_constant_inputs(proto: onnx.ModelProto) -> onnx.ModelProto:
    constants = {tensor.name for tensor in proto.graph.initializer}
    inputs = [value for value in proto.graph.input if value.name not in constants]
    del proto.graph.input[:]
    proto.graph.input.extend(inputs)
    return proto


def _check_sparse(path: Path, graph: onnx.GraphProto) -> None:
    if graph.sparse_initializer:
        name = graph.sparse_initializer[0].values.name
        raise ModelError(f"{path}: sparse initializer {name!r}: store it as a dense tensor")


def _check_not_quantized(path: Path, model: ir.Model) -> None:
    for node in model.graph.all_nodes():
        quantized = node.op_type in _QUANTIZED_OPS or node.op_type.startswith("QLinear")
        if quantized or node.domain == "afpq":
            domain = f"{node.domain}." if node.domain else ""
            raise ModelError(
                f"{path}: already quantized (node {node.name!r} is {domain}{node.op_type}); "
                "start from the float model"
            )


def _check_external_data(path: Path, model: ir.Model) -> None:
    for tensor in _tensors(model):
        if not isinstance(tensor, ir.ExternalTensor):
            continue
        file = Path(tensor.path)
        if not file.is_file():
            raise ModelError(
                f"{path}: tensor {tensor.name!r} lies in {tensor.location!s}, "
                f"which is not beside the model ({file})"
            )
        end = (tensor.offset or 0) + (tensor.length if tensor.length is not None else tensor.nbytes)
        if end > file.stat().st_size or (tensor.length or tensor.nbytes) < tensor.nbytes:
            raise ModelError(
                f"{path}: tensor {tensor.name!r} needs {end} bytes of {tensor.location!s}, "
                f"which has {file.stat().st_size}: cut short"
            )


def _tensors(model: ir.Model) -> Iterable[ir.TensorProtocol]:
    for graph in (model.graph, *model.graph.subgraphs()):
        for value in graph.initializers.values():
            if value.const_value is not None:
                yield value.const_value
    for node in model.graph.all_nodes():
        for attr in node.attributes.values():
            if attr.type == ir.AttributeType.TENSOR and not attr.is_ref():
                yield attr.value


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
