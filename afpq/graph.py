"""A float ONNX model and the layers in it that can be quantized.

`load_model` reads, checks and looks; nothing in the graph is changed (only opsets before 11 are converted and local
functions inlined). Editing is in `rewrite`, running in `runtime`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy.typing as npt
import onnx_ir

from afpq._find import find_layers
from afpq._fold import set_constants
from afpq._layer import (
    ConvSpec,
    Layer,
    Skipped,
    TensorInfo,
    original_layout,
    reads_bytes,
    takes_bytes,
)
from afpq._load import read_model
from afpq.errors import ModelError

__all__ = [
    "ConvSpec",
    "Layer",
    "Model",
    "Skipped",
    "TensorInfo",
    "load_model",
    "original_layout",
    "reads_bytes",
    "takes_bytes",
    "with_constants",
    "with_graph",
]


@dataclass(frozen=True, eq=False)
class Model:
    """A float model, its layers in the order of the nodes, and the weights that have to stay float."""

    path: Path
    layers: tuple[Layer, ...]
    skipped: tuple[Skipped, ...]
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    ir: onnx_ir.Model = field(repr=False)

    @property
    def num_weights(self) -> int:
        """Weights that can be quantized, shared ones once."""
        return sum(layer.num_weights for layer in self.tensors().values())

    @property
    def float_weight_bytes(self) -> int:
        """Bytes of those weights in the float model."""
        size = {"float32": 4, "float16": 2}
        return sum(layer.num_weights * size[layer.dtype] for layer in self.tensors().values())

    def tensors(self) -> dict[str, Layer]:
        """The first layer of every stored tensor."""
        result: dict[str, Layer] = {}
        for layer in self.layers:
            result.setdefault(layer.weight_name, layer)
        return result

    def layer(self, name: str) -> Layer:
        """The layer of this name.

        Raises:
            ModelError: there is none.
        """
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise ModelError(f"{self.path}: no layer is called {name!r}")


def load_model(path: str | Path) -> Model:
    """Reads a float ONNX model and finds its layers.

    Raises:
        ModelError: the file or its external data is missing, damaged or too old to convert; a weight holds NaN or
            infinity; or the model is already quantized.
    """
    path = Path(path)
    model = read_model(path)
    layers, skipped = find_layers(path, model)
    constants = model.graph.initializers
    return Model(
        path=path,
        layers=layers,
        skipped=skipped,
        inputs=tuple(_info(v) for v in model.graph.inputs if v.name not in constants),
        outputs=tuple(_info(v) for v in model.graph.outputs),
        ir=model,
    )


def with_constants(model: Model, constants: Mapping[str, npt.NDArray[Any]]) -> Model:
    """A copy of a model with other values of some initializers (by name, same shapes).

    Raises:
        ModelError: a weight or a bias is not finite any more.
    """
    changed = model.ir.clone()
    set_constants(changed.graph, constants)
    return with_graph(model, changed)


def with_graph(model: Model, changed: onnx_ir.Model) -> Model:
    """The same model with another graph of the same inputs and outputs.

    Raises:
        ModelError: a weight or a bias is not finite.
    """
    layers, skipped = find_layers(model.path, changed)
    return replace(model, layers=layers, skipped=skipped, ir=changed)


def _info(value: onnx_ir.Value) -> TensorInfo:
    shape = None
    if value.shape is not None:
        shape = tuple(d if isinstance(d, int) else d.value for d in value.shape)
    dtype = "unknown"
    if value.dtype is not None:
        dtype = "str" if value.dtype == onnx_ir.DataType.STRING else str(value.dtype.numpy())
    return TensorInfo(value.name or "", dtype, shape)
