"""Packed models for other runtimes: the operators of the domain `afpq` replaced by standard ONNX.

    export("digits.onnx", to="qdq").save("digits_qdq.onnx")

`float` keeps the rounded weights in float32. `qdq` keeps them as codes of ONNX's small types with DequantizeLinear:
each stored tensor in the smallest type that holds all its values exactly. `qonnx` marks float32 weights with the
operators FloatQuant and IntQuant of QONNX. Rounding of activations is no part of an export: its layers read float32.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import onnx_ir as ir

from afpq._operand import (
    QONNX,
    Operand,
    Placement,
    dequantized,
    placement,
    plain,
    quant_node,
)
from afpq._opset import opset_of, raise_opset
from afpq._runnable import Need, check_by_onnx, missing_here
from afpq._standard import Fitted, fit
from afpq._unpacker import TensorKey, Unpacker, shared_layers
from afpq._written import save_checked, try_file
from afpq.errors import AfpqError, ModelError
from afpq.packed import (
    DOMAIN,
    PackedLayer,
    PackedModel,
    checksum,
    describe_packed,
    read_packed,
)
from afpq.packing import unpack
from afpq.quantize import QuantizedModel

__all__ = ["INEXACT", "TARGETS", "ExportedLayer", "ExportedModel", "export"]

TARGETS = ("float", "qdq", "qonnx")
INEXACT = ("error", "nearest")

_FUSED = (
    "onnxruntime may compute DequantizeLinear and MatMul at once and round activations to 8 bits; the session option "
    "session.qdq_matmulnbits_accuracy_level = 1 keeps float32"
)
_KEPT_METADATA = ("afpq.version", "afpq.plan_hash")


@dataclass(frozen=True)
class ExportedLayer:
    """What became of one packed layer. `shared_with` names the first layer that reads the same stored tensor."""

    name: str
    op: str
    format: str
    type: str  # float32, a type of ONNX (int8, float8e4m3fn, ..), FloatQuant or IntQuant
    sqnr_db: (
        float | None
    )  # of the weights after conversion; None where they are exactly the packed ones
    nbytes: int  # weights and scales
    packed_bytes: int  # codes and scales before
    shared_with: str | None = None

    @property
    def exact(self) -> bool:
        """Whether the weights are the packed ones, bit for bit."""
        return self.sqnr_db is None


@dataclass(eq=False)
class ExportedModel:
    """A packed model in standard ONNX, in memory. `notes` says what a user has to know, a sentence each."""

    graph: ir.Model = field(repr=False)
    to: str
    layers: tuple[ExportedLayer, ...]
    opset: int
    notes: tuple[str, ...]
    missing: str = field(default="", repr=False)  # why the installed onnxruntime cannot run it
    checks: dict[str, Any] = field(default_factory=dict)  # what `save` found

    @property
    def tensors(self) -> tuple[ExportedLayer, ...]:
        """One layer for each stored tensor."""
        return tuple(layer for layer in self.layers if layer.shared_with is None)

    def save(self, path: str | Path) -> int:
        """Writes the file, loads it and runs it once, and only then gives it its name; returns its bytes.

        Where the installed onnxruntime lacks an operator or a type, onnx checks the file instead; `checks` tells.

        Raises:
            ModelError: it cannot be written, or does not load. Nothing is left behind then.
        """
        size, self.checks = save_checked(self.graph, Path(path), self._check)
        return size

    def _check(self, path: Path) -> dict[str, Any]:
        if not self.missing:
            return try_file(path, None, ops=False)
        check_by_onnx(path)
        return {"loaded": False, "run_once": f"no: {self.missing}"}


def export(model: str | Path | QuantizedModel, *, to: str, inexact: str = "error") -> ExportedModel:
    """Replaces every afpq operator by standard ONNX; names, shared tensors and subgraphs stay. `model` is not changed.

    With `to` qdq and a tensor that no standard type holds exactly, `inexact` says whether that is an error or the type
    with the least error is taken. The opset is raised where a type needs it.

    Raises:
        ModelError: the file is not a packed model, is damaged, or holds values that no type has; names the layers.
        ValueError: `to` or `inexact` is none of the choices.
    """
    if to not in TARGETS:
        raise ValueError(f"to {to!r} is not one of {', '.join(TARGETS)}")
    if inexact not in INEXACT:
        raise ValueError(f"inexact {inexact!r} is not one of {', '.join(INEXACT)}")
    packed = _open(model)
    tensors = shared_layers(packed.layers)
    for layers in tensors.values():
        _check_tensor(packed, layers)
    fitted = _fit_all(packed, tensors, inexact) if to == "qdq" else {}
    needs = tuple(dict.fromkeys(Need.of(tensors[key][0], fits) for key, fits in fitted.items()))
    before = opset_of(packed.graph)
    opset = max([before, *(need.opset for need in needs)])
    if needs:
        graph = raise_opset(packed.graph, opset)
        packed = describe_packed(graph, packed.path, packed.file_bytes)
    notes = _notes(packed.layers, needs, before)
    rows = _replace_all(packed, fitted, to)
    _describe(packed.graph, to)
    return ExportedModel(packed.graph, to, rows, opset, notes, missing_here(to, needs, opset))


def _open(model: str | Path | QuantizedModel) -> PackedModel:
    if isinstance(model, QuantizedModel):
        path = Path("the model") if model.path is None else model.path
        return describe_packed(model.packed.clone(), path, 0)
    return read_packed(model)


def _check_tensor(packed: PackedModel, layers: list[PackedLayer]) -> None:
    """Refuses a stored tensor that is damaged or does not have the size that its readers say."""
    for layer in layers:
        expected, found = packed.checksums.get(layer.weight_name), checksum(layer)
        shape = (-(-layer.k // layer.group_size), layer.n) if layer.group_size else (layer.n,)
        try:
            if expected not in (None, found):
                raise ModelError(f"its tensor is damaged: checksum {found}, not {expected}")
            if layer.stored_scale.shape not in ((shape,) if layer.group_size else (shape, (1,))):
                raise ModelError(f"its scale has shape {layer.stored_scale.shape}, not {shape}")
            unpack(layer.packed, layer.n, layer.k, layer.format.bits)
            placement(layer)
        except AfpqError as error:
            raise ModelError(f"{packed.path}: layer {layer.name!r}: {error}") from error


def _fit_all(
    packed: PackedModel, tensors: Mapping[TensorKey, list[PackedLayer]], inexact: str
) -> dict[TensorKey, Fitted]:
    fitted: dict[TensorKey, Fitted] = {}
    wrong = []
    for key, layers in tensors.items():
        fits = fit(layers[0], nearest=inexact == "nearest")
        if fits is None:
            wrong.append(f"{layers[0].name!r} ({layers[0].format})")
        else:
            fitted[key] = fits
    if wrong:
        raise ModelError(
            f"{packed.path}: no standard type holds all values of layer{'s' * (len(wrong) > 1)} "
            f"{', '.join(wrong)}; inexact nearest takes the nearest type and reports the error, "
            "float and qonnx keep the values"
        )
    return fitted


def _replace_all(
    packed: PackedModel, fitted: Mapping[TensorKey, Fitted], to: str
) -> tuple[ExportedLayer, ...]:
    unpacker = Unpacker(packed.graph.graph)
    rows: dict[int, ExportedLayer] = {}
    for key, layers in shared_layers(packed.layers).items():
        fits = fitted.get(key)
        operand = unpacker.replace(layers, partial(_operand, fits=fits, to=to))
        for layer in layers:
            rows[id(layer)] = ExportedLayer(
                name=layer.name,
                op=layer.op,
                format=str(layer.format),
                type=fits.type.name if fits else operand.op_type or "float32",
                sqnr_db=fits.sqnr_db if fits else None,
                nbytes=operand.storage_bytes,
                packed_bytes=layer.storage_bytes,
                shared_with=None if layer is layers[0] else layers[0].name,
            )
    return tuple(rows[id(layer)] for layer in packed.layers)


def _operand(layer: PackedLayer, where: Placement, *, fits: Fitted | None, to: str) -> Operand:
    if fits is not None:
        return dequantized(layer, where, fits)
    return quant_node(layer, where) if to == "qonnx" else plain(layer, where)


def _notes(
    layers: tuple[PackedLayer, ...], needs: tuple[Need, ...], before: int
) -> tuple[str, ...]:
    notes = []
    rounded = Counter(layer.input_format for layer in layers)
    kinds = [f"{n} x {kind}" for kind, n in rounded.items() if kind not in ("", "f32", "a16")]
    if kinds:
        notes.append(
            f"rounding of activations is not part of the export ({', '.join(kinds)}): layers read float32"
        )
    newer = [need for need in needs if need.opset > before]
    if newer:
        opset = max(need.opset for need in newer)
        notes.append(f"opset raised from {before} to {opset}, for {', '.join(map(str, newer))}")
    if any(need.type.is_integer for need in needs) and any(x.op == "MatMul" for x in layers):
        notes.append(_FUSED)
    return tuple(notes)


def _describe(graph: ir.Model, to: str) -> None:
    """The header of a standard model."""
    graph.graph.opset_imports.pop(DOMAIN, None)
    if to == "qonnx":
        graph.graph.opset_imports[QONNX] = 1
    for key in list(graph.metadata_props):
        if key.startswith("afpq.") and key not in _KEPT_METADATA:
            del graph.metadata_props[key]
    graph.metadata_props["afpq.export"] = to
