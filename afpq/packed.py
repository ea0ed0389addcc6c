"""Reads what a packed model holds: its layers, their formats and codes, and the tensors that stayed float.

`read_packed` opens the file, `weight_values` decodes a layer by the definition in `formats`. Nothing is executed here.
"""

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from afpq._layer import is_planar
from afpq.errors import FormatError, ModelError
from afpq.formats import AfpFormat, decode, scale_of
from afpq.packing import unpack

__all__ = [
    "DOMAIN",
    "WITHOUT_WEIGHT",
    "FloatTensor",
    "PackedLayer",
    "PackedModel",
    "checksum",
    "describe_packed",
    "file_bytes",
    "is_packed",
    "model_files",
    "read_ir",
    "read_packed",
    "scale_columns",
    "scale_values",
    "weight_values",
]

DOMAIN = "afpq"
SPEC_VERSION = "1"
WITHOUT_WEIGHT = ("MaxPoolU8",)  # operators of the domain that are no layers


@dataclass(frozen=True)
class PackedLayer:
    """One node of the domain `afpq`. Layers with equal `weight_name` share one stored tensor."""

    name: str
    op: str  # MatMul, Conv (ConvU8 too), Gather, Unpack
    format: AfpFormat
    n: int
    k: int
    group_size: int
    groups: int  # of a convolution, else 1
    activations: str | None
    weight_name: str
    scale_name: str
    output_name: str
    packed: npt.NDArray[np.uint8] = field(repr=False)
    stored_scale: npt.NDArray[np.generic] = field(
        repr=False
    )  # bfloat16 scales or int8 exponent biases
    node: ir.Node = field(repr=False, compare=False)
    activation_format: AfpFormat | None = (
        None  # static: the input is rounded to I * activation_scale
    )
    activation_scale: float | None = None
    output_format: AfpFormat | None = None  # the output is bytes, I + zero, of this format
    output_scale: float | None = None
    adds_residual: bool = False  # before the output is clipped

    @property
    def kind(self) -> str:
        return "integer" if self.stored_scale.dtype == np.int8 else "real"

    @property
    def granularity(self) -> str:
        if self.group_size:
            return f"per_group:{self.group_size}"
        return "per_tensor" if self.stored_scale.size == 1 and self.n > 1 else "per_channel"

    @property
    def num_weights(self) -> int:
        return self.n * self.k

    @property
    def storage_bytes(self) -> int:
        """Codes and scales."""
        return int(self.packed.nbytes + self.stored_scale.nbytes)

    @property
    def bias(self) -> npt.NDArray[np.float32] | None:
        """The layer's bias [n], if it has one."""
        position = 3 if self.op in ("MatMul", "Conv") else len(self.node.inputs)
        value = self.node.inputs[position] if len(self.node.inputs) > position else None
        constant = None if value is None else value.const_value
        return None if constant is None else constant.numpy().reshape(-1)

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.storage_bytes / self.num_weights

    @property
    def input_format(self) -> str:
        """How kernels read the layer's input: a static format, `a16`, `a8` or `f32`; empty where there is none."""
        if self.activations is None:
            return ""
        if self.kernel not in ("byte", "pair"):
            return "f32"
        return self.activations if self.activation_format is None else str(self.activation_format)

    @property
    def kernel(self) -> str:
        """How the weights are executed: the kernel class, or the name of the path that replaces it."""
        if self.op == "Unpack":
            return "unpack"
        if self.op == "Gather":
            return "rows"
        if self.activations == "f32":
            return "float"
        if self.op == "Conv":
            kernel_shape = self.node.attributes["kernel_shape"].value
            static = self.activation_format is not None
            if is_planar(self.n, self.k, self.groups, kernel_shape, static):
                return "planar"
        return self.format.kernel_class

    @property
    def remark(self) -> str:
        """Why the layer does not run on integer dot products; empty when it does."""
        return {
            "unpack": "no kernel for this operator: unpacked to float when the model loads or runs",
            "float": "float activations were asked for",
            "planar": "too few channels for dot products: float multiply-add on integer codes",
            "wide": f"{self.format} spans more than 16 bits: float multiply-add",
        }.get(self.kernel, "")


@dataclass(frozen=True)
class FloatTensor:
    """A float constant of two or more axes that is not packed."""

    name: str
    shape: tuple[int, ...]
    nbytes: int
    used_by: str


@dataclass(frozen=True)
class PackedModel:
    """A packed file, opened."""

    path: Path
    layers: tuple[PackedLayer, ...]
    floats: tuple[FloatTensor, ...]
    metadata: dict[str, str]
    file_bytes: int
    graph: ir.Model = field(repr=False, compare=False)

    def tensors(self) -> dict[str, PackedLayer]:
        """One layer for each stored tensor, in file order."""
        result: dict[str, PackedLayer] = {}
        for layer in self.layers:
            result.setdefault(layer.weight_name, layer)
        return result

    @property
    def checksums(self) -> dict[str, str]:
        try:
            result = json.loads(self.metadata.get("afpq.checksums", "{}"))
        except json.JSONDecodeError:
            result = None
        if not isinstance(result, dict):
            raise ModelError(f"{self.path}: metadata afpq.checksums is not a JSON object")
        return {str(k): str(v) for k, v in result.items()}


def read_ir(path: str | Path) -> ir.Model:
    """Opens an ONNX file.

    Raises:
        ModelError: the file does not exist, is a directory, or is not an ONNX model.
    """
    path = Path(path)
    if not path.exists():
        raise ModelError(f"{path}: no such file")
    if path.is_dir():
        raise ModelError(f"{path}: is a directory, not an ONNX file")
    try:
        model = ir.load(path)
    except Exception as error:  # protobuf and onnx-ir raise many kinds
        raise ModelError(f"{path}: not an ONNX model, or cut short") from error
    if not len(model.graph) and not model.graph.outputs:
        raise ModelError(f"{path}: not an ONNX model, or cut short")
    return model


def is_packed(model: ir.Model) -> bool:
    """Whether the file was written by afpq."""
    return "afpq.spec_version" in model.metadata_props or any(
        node.domain == DOMAIN for node in model.graph.all_nodes()
    )


def read_packed(path: str | Path) -> PackedModel:
    """Opens a packed model and checks that every afpq node is complete.

    Raises:
        ModelError: the file cannot be read, is not packed by afpq, or a node of it is malformed.
    """
    path = Path(path)
    model = read_ir(path)
    return describe_packed(model, path, file_bytes(path, model))


def describe_packed(model: ir.Model, path: Path, num_bytes: int) -> PackedModel:
    """The same for a model in memory; `path` is for messages.

    Raises:
        ModelError: the model is not packed by afpq, or a node of it is malformed.
    """
    if not is_packed(model):
        raise ModelError(f"{path}: not a packed model (no operator of the domain afpq)")
    version = model.metadata_props.get("afpq.spec_version", SPEC_VERSION)
    if version != SPEC_VERSION:
        raise ModelError(
            f"{path}: file format version {version}, this afpq reads version {SPEC_VERSION}"
        )
    nodes = [n for n in model.graph.all_nodes() if n.domain == DOMAIN]
    layers = tuple(_layer(path, n) for n in nodes if n.op_type not in WITHOUT_WEIGHT)
    return PackedModel(
        path=path,
        layers=layers,
        floats=_floats(model),
        metadata=dict(model.metadata_props),
        file_bytes=num_bytes,
        graph=model,
    )


def file_bytes(path: str | Path, model: ir.Model | None = None) -> int:
    """Bytes on disk: the file and the external data files that its tensors lie in."""
    return sum(f.stat().st_size for f in model_files(path, model))


def model_files(path: str | Path, model: ir.Model | None = None) -> list[Path]:
    """The file of a model and, by name, those that its tensors lie in."""
    path = Path(path)
    model = read_ir(path) if model is None else model
    tensors = _initializers(model).values()
    outside = {str(t.location) for t in tensors if isinstance(t, ir.ExternalTensor)}
    return [path, *(path.parent / name for name in sorted(outside))]


def weight_values(layer: PackedLayer) -> npt.NDArray[np.float32]:
    """The weights of a layer by the definition: float32 [n, k]."""
    codes = unpack(layer.packed, layer.n, layer.k, layer.format.bits)
    return decode(codes, layer.format, scale_columns(layer))


def scale_columns(layer: PackedLayer) -> npt.NDArray[np.float32]:
    """The scale of every weight of a layer: float32 [n, k], or [n, 1] where a channel has one."""
    scale = scale_values(layer)
    if layer.group_size:
        return np.asarray(np.repeat(scale, layer.group_size, axis=0)[: layer.k].T)
    return np.broadcast_to(scale.reshape(-1, 1), (layer.n, 1))


def scale_values(layer: PackedLayer) -> npt.NDArray[np.float32]:
    """What one unit of I is worth: float32, in the shape of the stored scales."""
    if layer.kind == "integer":
        return scale_of(layer.format, layer.stored_scale)
    return layer.stored_scale.astype(np.float32)


def checksum(layer: PackedLayer) -> str:
    """CRC-32 of the packed bytes followed by the scale bytes, eight hexadecimal digits."""
    first = zlib.crc32(layer.packed.tobytes())
    return f"{zlib.crc32(np.ascontiguousarray(layer.stored_scale).tobytes(), first):08x}"


def _initializers(model: ir.Model) -> dict[str, ir.TensorProtocol]:
    graphs = [model.graph, *model.graph.subgraphs()]
    return {
        name: value.const_value
        for graph in graphs
        for name, value in graph.initializers.items()
        if value.const_value is not None
    }


def _format(where: str, attributes: Mapping[str, Any], name: str) -> AfpFormat:
    try:
        return AfpFormat.parse(str(attributes[name]))
    except FormatError as error:
        raise ModelError(f"{where}: attribute {name}: {error}") from error


def _static(
    where: str, attributes: Mapping[str, Any], name: str
) -> tuple[AfpFormat, float] | tuple[None, None]:
    """The format and scale in attributes NAME_format and NAME_scale, which both may be missing."""
    if f"{name}_format" not in attributes:
        return None, None
    if f"{name}_scale" not in attributes:
        raise ModelError(f"{where}: attribute {name}_scale is missing")
    return _format(where, attributes, f"{name}_format"), float(attributes[f"{name}_scale"])


def _layer(path: Path, node: ir.Node) -> PackedLayer:
    where = f"{path}: node {node.name!r} (afpq {node.op_type})"
    attributes = {name: value.value for name, value in node.attributes.items()}
    for name in ("format", "n", "k"):
        if name not in attributes:
            raise ModelError(f"{where}: attribute {name} is missing")
    first = 0 if node.op_type in ("Gather", "Unpack") else 1
    operands = [v.const_value if v is not None else None for v in node.inputs[first : first + 2]]
    if len(operands) < 2 or operands[0] is None or operands[1] is None:
        raise ModelError(f"{where}: weight and scale must be initializers")
    try:
        packed, scale = operands[0].numpy(), operands[1].numpy()
    except Exception as error:  # external data that is missing or too short
        raise ModelError(f"{where}: its weight cannot be read: {error}") from error
    activations = attributes.get("activations", "a16") if first else None
    activation = _static(where, attributes, "activation")
    output = _static(where, attributes, "output")
    return PackedLayer(
        name=node.name or f"{node.op_type}({node.outputs[0].name})",
        op="Conv" if node.op_type == "ConvU8" else node.op_type,
        format=_format(where, attributes, "format"),
        n=int(attributes["n"]),
        k=int(attributes["k"]),
        group_size=int(attributes.get("group_size", 0)),
        groups=int(attributes.get("group", 1)),
        activations=activations,
        weight_name=operands[0].name or "",
        scale_name=operands[1].name or "",
        output_name=node.outputs[0].name or "",
        packed=packed,
        stored_scale=scale,
        node=node,
        activation_format=activation[0],
        activation_scale=activation[1],
        output_format=output[0],
        output_scale=output[1],
        adds_residual=len(node.inputs) > 4 and node.inputs[4] is not None,
    )


def _floats(model: ir.Model) -> tuple[FloatTensor, ...]:
    users: dict[str, str] = {}
    for node in model.graph.all_nodes():
        for value in node.inputs:
            if value is not None and value.name:
                users.setdefault(value.name, node.op_type)
    floats = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)
    return tuple(
        FloatTensor(name, tuple(t.shape.numpy()), t.nbytes, users.get(name, ""))
        for name, t in _initializers(model).items()
        if t.dtype in floats and len(t.shape.numpy()) > 1
    )
