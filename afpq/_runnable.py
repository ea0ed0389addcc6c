"""What exported models ask of a runtime, whether the installed onnxruntime has it, and onnx's checker where not."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort

from afpq._operand import QONNX
from afpq._opset import raise_opset
from afpq._standard import Fitted, StandardType
from afpq.errors import ModelError
from afpq.packed import PackedLayer
from afpq.runtime import session

__all__ = ["Need", "check_by_onnx", "missing_here"]

_BLOCK_OPSET = 21  # DequantizeLinear with block_size


@dataclass(frozen=True)
class Need:
    """A kind of DequantizeLinear: of which type, and whether its scales are those of groups."""

    type: StandardType
    by_group: bool

    @classmethod
    def of(cls, layer: PackedLayer, fitted: Fitted) -> "Need":
        """What a layer needs whose tensor has this type."""
        return cls(fitted.type, layer.group_size > 0)

    @property
    def opset(self) -> int:
        """The first that has it."""
        return max(self.type.opset, _BLOCK_OPSET) if self.by_group else self.type.opset

    def __str__(self) -> str:
        return f"{self.type.name} by groups" if self.by_group else self.type.name


def missing_here(to: str, needs: Iterable[Need], opset: int) -> str:
    """What the installed onnxruntime cannot run of an export; empty if nothing."""
    if to == "qonnx":
        return f"onnxruntime has no operators of {QONNX}"
    lacking = [str(need) for need in dict.fromkeys(needs) if not _runs(need, opset)]
    if not lacking:
        return ""
    return f"onnxruntime {ort.__version__} does not run DequantizeLinear of {', '.join(lacking)}"


def check_by_onnx(path: Path) -> None:
    """Checks operators, attributes and order of nodes by onnx's checker.

    It wants types of outputs, which runtimes do without, and external data in the working directory: outputs get a
    type, and external tensors become inputs.

    Raises:
        ModelError: something is not as the standard has it.
    """
    proto = onnx.load(path, load_external_data=False)
    for tensor in [t for t in proto.graph.initializer if t.external_data]:
        info = onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
        proto.graph.input.append(info)
        proto.graph.initializer.remove(tensor)
    for value in proto.graph.output:
        if not value.type.tensor_type.HasField("shape"):
            kind = value.type.tensor_type.elem_type or onnx.TensorProto.FLOAT
            value.CopyFrom(onnx.helper.make_tensor_value_info(value.name, kind, []))
    try:
        onnx.checker.check_model(proto)
    except onnx.checker.ValidationError as error:
        message = " ".join(str(error).split())
        raise ModelError(f"onnx refuses the exported model: {message}") from error


def _runs(need: Need, opset: int) -> bool:
    """Whether the installed onnxruntime loads a DequantizeLinear of this kind."""
    codes = ir.tensor(np.zeros((16, 2), need.type.dtype), name="codes")
    scale = ir.tensor(np.ones((1, 2) if need.by_group else (2,), np.float32), name="scale")
    inputs = [ir.val("codes", const_value=codes), ir.val("scale", const_value=scale)]
    fields = {"axis": 0, "block_size": 16} if need.by_group else {"axis": 1}
    node = ir.node("DequantizeLinear", inputs, fields)
    output = node.outputs[0]
    output.name, output.type, output.shape = (
        "y",
        ir.TensorType(ir.DataType.FLOAT),
        ir.Shape([16, 2]),
    )
    opsets = {"": opset}
    graph = ir.Graph(
        [], [output], nodes=[node], initializers=inputs, opset_imports=opsets, name="g"
    )
    model = raise_opset(ir.Model(graph, ir_version=8), opset)
    try:
        session(ir.to_proto(model).SerializeToString(), ops=False)
    except ModelError:
        return False
    return True
