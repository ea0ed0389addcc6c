"""Turns a float model into a packed one, and writes it.

Every chosen layer becomes one operator of the domain `afpq`, with its bias and the Relu or Clip behind it inside, and
weights become bytes. Whatever only served the replaced nodes goes, everything else stays as it was. The operators are
specified in docs/specification.md; `packed` reads them back.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from afpq import __version__
from afpq._activation_entry import ActivationEntry
from afpq._chain import add_residuals, pass_bytes
from afpq._emit import DOMAIN, Emitter, pack_scale
from afpq._fold import set_constants
from afpq._shapes import with_shapes
from afpq.errors import ModelError, PlanError
from afpq.graph import Model, takes_bytes
from afpq.packing import PackedTensor

__all__ = ["pack_scale", "rewrite", "save", "serialize"]

OPSET_VERSION = 1
SPEC_VERSION = "1"
ACTIVATIONS = ("a16", "a8", "f32")
EXTERNAL_DATA_BYTES = 2**31 - 2**24  # protobuf's limit, less the graph around the tensors


class PlanSummary(Protocol):
    """What of a plan is written into the file."""

    @property
    def plan_hash(self) -> str: ...

    @property
    def bits_per_weight(self) -> float: ...

    @property
    def activations(self) -> tuple[ActivationEntry, ...] | None: ...


def rewrite(
    model: Model,
    plan: PlanSummary,
    tensors: Mapping[str, PackedTensor],
    biases: Mapping[str, npt.NDArray[np.float32]] | None = None,
    *,
    constants: Mapping[str, npt.NDArray[np.float32]] | None = None,
    activations: str = "a16",
    chain: bool = True,
) -> ir.Model:
    """The packed model; layers whose weight_name is not in `tensors` stay float. `model` is not changed.

    `biases` ([n] by layer name) replace the layers' own, `constants` other initializers of the same shape, by name.
    With `activations` a8, the plan's static activation formats are written. With `chain` layers add residuals, and
    convolutions pass tensors to each other in these formats. The same arguments give the same bytes.

    Raises:
        PlanError: a name, a shape or the activation mode does not exist.
    """
    biases = {} if biases is None else biases
    _check(model, tensors, biases, activations)
    clone = model.ir.clone()
    set_constants(clone.graph, constants or {})
    static = {e.tensor: e for e in plan.activations or ()} if activations == "a8" else {}
    if chain:
        clone = with_shapes(clone)
    emitter = Emitter(clone.graph, tensors, activations, static)
    for layer in model.layers:
        if layer.weight_name in tensors:
            emitter.replace(layer, biases.get(layer.name))
    emitter.finish()
    if chain:
        if static:
            pass_bytes(clone.graph, static, _multiplying_bytes(model, tensors))
        add_residuals(clone.graph)
    _strip(clone)
    clone.graph.opset_imports[DOMAIN] = OPSET_VERSION
    clone.metadata_props.update(
        {
            "afpq.spec_version": SPEC_VERSION,
            "afpq.version": __version__,
            "afpq.plan_hash": plan.plan_hash,
            "afpq.checksums": json.dumps(emitter.checksums, separators=(",", ":"), sort_keys=True),
            "afpq.bits_per_weight": f"{plan.bits_per_weight:.4f}",
            "afpq.float_weight_bytes": str(model.float_weight_bytes),
        }
    )
    return clone


def serialize(packed: ir.Model) -> bytes:
    """The packed model as one block of bytes, weights included, as `save` would write it.

    Raises:
        ModelError: the model is larger than protobuf's 2 GB.
    """
    _load_tensors(packed)
    try:
        return bytes(ir.to_proto(packed).SerializeToString(deterministic=True))
    except ValueError as error:
        raise ModelError(
            "the packed model is larger than 2 GB; save it to a file instead"
        ) from error


def save(packed: ir.Model, path: str | Path, *, external_bytes: int = EXTERNAL_DATA_BYTES) -> int:
    """Writes the model; tensors go to PATH.data beside it if together they exceed `external_bytes`.

    Nothing is left behind on failure, and a file that is already there is replaced only once the new one is complete.

    Returns:
        Bytes written, external data included.

    Raises:
        ModelError: the file cannot be written.
    """
    path = Path(path)
    if path.is_dir():
        raise ModelError(f"{path}: is a directory, not a file to write")
    try:
        # A folder beside the target: the same file system, so that moving a file out of it is atomic.
        folder = Path(tempfile.mkdtemp(prefix=".afpq-", dir=path.parent))
    except OSError as error:
        raise ModelError(f"{path}: cannot be written: {error.strerror}") from error
    try:
        files = _write(packed, folder / path.name, external_bytes)
        size = sum(file.stat().st_size for file in files)
        for file in files:
            os.replace(file, path.parent / file.name)
        return size
    except OSError as error:
        raise ModelError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _multiplying_bytes(model: Model, tensors: Mapping[str, PackedTensor]) -> set[str]:
    """Names of the convolutions that multiply bytes if their input has a static format."""
    return {
        layer.name
        for layer in model.layers
        if layer.kind == "conv"
        and layer.weight_name in tensors
        and takes_bytes(layer, tensors[layer.weight_name].format)
    }


def _write(packed: ir.Model, file: Path, external_bytes: int) -> list[Path]:
    """Writes the model as `file`; returns all files in the order in which they have to be moved."""
    if sum(tensor.nbytes for tensor in _tensors(packed)) <= external_bytes:
        file.write_bytes(serialize(packed))
        return [file]
    data = f"{file.name}.data"
    ir.save(packed, file, format="protobuf", external_data=data)
    return [file.with_name(data), file]


def _tensors(model: ir.Model) -> list[ir.TensorProtocol]:
    graphs = (model.graph, *model.graph.subgraphs())
    values = (value for graph in graphs for value in graph.initializers.values())
    return [value.const_value for value in values if value.const_value is not None]


def _load_tensors(model: ir.Model) -> None:
    """Reads tensors that still lie in the source's external data: the new file may lie elsewhere."""
    for graph in (model.graph, *model.graph.subgraphs()):
        for value in graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                value.const_value = ir.Tensor(np.array(value.const_value.numpy()), name=value.name)


def _check(
    model: Model,
    tensors: Mapping[str, PackedTensor],
    biases: Mapping[str, npt.NDArray[np.float32]],
    activations: str,
) -> None:
    if activations not in ACTIVATIONS:
        raise PlanError(f"activations {activations!r} is not one of {', '.join(ACTIVATIONS)}")
    owners = model.tensors()
    for name, tensor in tensors.items():
        if name not in owners:
            raise PlanError(f"{model.path}: no weight is called {name!r}")
        if (tensor.n, tensor.k) != owners[name].weight.shape:
            raise PlanError(
                f"weight {name!r} is {list(owners[name].weight.shape)}, its packed tensor [{tensor.n}, {tensor.k}]"
            )
    if any(not tensor.format.signed for tensor in tensors.values()):
        raise PlanError("weights need a signed format")
    for layer in model.layers:
        if (
            layer.weight_name in tensors
            and tensors[layer.weight_name].group_size
            and layer.kind != "matmul"
        ):
            raise PlanError(f"layer {layer.name!r} ({layer.op_type}) cannot have a scale per group")
    layers = {layer.name: layer for layer in model.layers}
    for name, bias in biases.items():
        if name not in layers or layers[name].kind not in ("matmul", "conv"):
            raise PlanError(f"{model.path}: no layer {name!r} that can take a bias")
        if bias.shape != (layers[name].n,):
            raise PlanError(
                f"bias of layer {name!r} has shape {bias.shape}, not ({layers[name].n},)"
            )


def _strip(model: ir.Model) -> None:
    """Drops what only takes space: doc strings, exporter notes and the shapes of intermediate tensors."""
    model.doc_string = None
    for graph in (model.graph, *model.graph.subgraphs()):
        graph.doc_string = None
        graph.metadata_props.clear()
        for value in (*graph.inputs, *graph.outputs):
            value.doc_string = None
            value.metadata_props.clear()
        for value in graph.initializers.values():
            value.metadata_props.clear()
            if not value.is_graph_input() and not value.is_graph_output():
                value.type = value.shape = None
        for node in graph:
            node.doc_string = None
            node.metadata_props.clear()
            for value in node.outputs:
                if not value.is_graph_output():
                    value.type = value.shape = None
                    value.metadata_props.clear()
