"""Both forms of a packed network: from a module to its ONNX file, and from the packed file to the packed module."""

import math
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.utils import _pytree

from afpq._torch_data import Samples, example_of, read_samples
from afpq._torch_export import (
    Example,
    Exported,
    export,
    float_copy,
    fold_batch_norm,
    replace_modules,
)
from afpq._torch_layers import Attributes, Packed, PackedModule, pack_layer
from afpq.errors import ModelError
from afpq.graph import Model, load_model
from afpq.packed import PackedLayer, describe_packed
from afpq.quantize import QuantizedModel

__all__ = [
    "Source",
    "TorchResult",
    "changed_constants",
    "copy_constants",
    "exported",
    "owned_layers",
    "pair_up",
]

_MAX_ERROR = (
    0.1  # between both results, of the outputs' norm: far above rounding, far below a wrong layer
)


@dataclass(frozen=True, eq=False)
class TorchResult:
    """Both forms of one quantized network, and what there is to know about how they came to be."""

    model: QuantizedModel
    module: nn.Module
    notes: tuple[str, ...]  # weights that stay float and why, and layers with several places


@dataclass(frozen=True, eq=False)
class Source:
    """A float module and what it was exported as."""

    module: nn.Module  # a copy, batch norm folded
    names: Exported
    model: Model
    samples: Samples
    arguments: dict[str, Tensor]  # of one call


@contextmanager
def exported(
    module: nn.Module, data: object, dynamic_shapes: object, limit: int | None
) -> Iterator[Source]:
    """Exports a copy of a module; the ONNX file is there as long as the context is open.

    Raises:
        ModelError: torch cannot export the module, or nothing in it can be packed.
        DataError: the data does not fit the module's forward.
        RuntimeUnavailableError: onnxscript is missing.
    """
    samples = read_samples(module, data, limit)
    arrays, axes = example_of(samples, limit)
    arguments = {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}
    automatic = {name: dict.fromkeys(found, torch.export.Dim.AUTO) for name, found in axes.items()}
    example = Example(arguments, automatic if dynamic_shapes is None else dynamic_shapes)
    copied = fold_batch_norm(float_copy(module), example)
    with tempfile.TemporaryDirectory(prefix="afpq-") as folder:
        names = export(copied, example, Path(folder) / f"{type(module).__name__}.onnx")
        if not names.owners:
            reasons = "; ".join(names.left_float.values()) or "it has no Linear, Conv or Embedding"
            raise ModelError(f"nothing of {type(module).__name__} can be packed: {reasons}")
        yield Source(copied, names, load_model(names.path), samples, arguments)


def pair_up(source: Source, model: QuantizedModel) -> TorchResult:
    """Both forms of a packed model; the source's module becomes the packed one.

    Raises:
        ModelError: what afpq changed cannot be brought back into the module, or both forms differ.
    """
    ir.external_data.load_to_model(model.packed)
    layers = owned_layers(model, source.names)
    notes = [*source.names.left_float.values(), *_share_places(model, layers)]
    result = _with_packed(source.module, owned_layers(model, source.names))
    copy_constants(result, source.model, model)
    _compare(model, result, source.arguments)
    return TorchResult(model, result, tuple(notes))


def owned_layers(model: QuantizedModel, exported: Exported) -> dict[str, list[PackedLayer]]:
    """Packed layers by the path of their module; several where a module is called more than once."""
    result: dict[str, list[PackedLayer]] = {}
    for layer in describe_packed(model.packed, exported.path, 0).layers:
        if layer.name not in exported.owners:
            why = exported.left_float.get(layer.name, "it belongs to no module")
            raise ModelError(f"the plan packs {layer.name!r}, which the torch module cannot: {why}")
        result.setdefault(exported.owners[layer.name], []).append(layer)
    return result


def _share_places(model: QuantizedModel, layers: Mapping[str, list[PackedLayer]]) -> list[str]:
    """Gives all places of a layer one bias and one way to round activations, which is all that a module can have."""
    notes = []
    for path, places in layers.items():
        static = {(place.activation_format, place.activation_scale) for place in places}
        biases = [_bias_of(place) for place in places]
        if len(static) > 1:
            for place in places:
                place.node.attributes.pop("activation_format", None)
                place.node.attributes.pop("activation_scale", None)
            notes.append(f"{path} is called {len(places)} times: it rounds activations by the row")
        given = [b for b in biases if b is not None]
        if len({b.tobytes() for b in given}) > 1 or 0 < len(given) < len(places):
            mean = (sum(b.astype(np.float64) for b in given) / len(places)).astype(np.float32)
            name = f"{places[0].name}.bias.shared"
            value = ir.val(name, const_value=ir.Tensor(mean, name=name))
            model.packed.graph.register_initializer(value)
            for place in places:
                if len(place.node.inputs) < 4:
                    place.node.resize_inputs(4)
                place.node.replace_input_with(3, value)
            notes.append(
                f"{path} is called {len(places)} times: its bias is the mean of those for its places"
            )
    if notes:
        for name, value in list(model.packed.graph.initializers.items()):
            if not value.uses() and not value.is_graph_output():
                del model.packed.graph.initializers[name]
        model.facts = replace(model.facts, accuracy=None)  # it was measured before
    return notes


def _bias_of(layer: PackedLayer) -> Any:
    operand = layer.node.inputs[3] if len(layer.node.inputs) > 3 else None
    if layer.op not in ("MatMul", "Conv") or operand is None or operand.const_value is None:
        return None
    return operand.const_value.numpy()


def _with_packed(module: nn.Module, layers: Mapping[str, list[PackedLayer]]) -> nn.Module:
    """The module with its layers replaced; those with one stored tensor share it."""
    owners: dict[str, tuple[str, PackedModule]] = {}
    found: dict[nn.Module, nn.Module] = {}
    for path, part in module.named_modules():
        if path not in layers:
            continue
        layer = layers[path][0]
        shares, owner = owners.get(layer.weight_name, (None, None))
        attributes = Attributes(
            format=str(layer.format),
            n=layer.n,
            k=layer.k,
            group_size=layer.group_size,
            activations=layer.activations or "a16",
            activation_format=str(layer.activation_format or ""),
            activation_scale=layer.activation_scale or 0.0,
            shares=shares,
        )
        bias = _bias_of(layer)
        packed = Packed(
            attributes,
            None if owner else torch.from_numpy(np.array(layer.packed)),
            None if owner else _scale_tensor(layer),
            None if bias is None else torch.from_numpy(np.array(bias)),
            owner,
        )
        new = pack_layer(part, packed)
        found[part] = new
        owners.setdefault(layer.weight_name, (path, new))
    return replace_modules(module, found)


def _scale_tensor(layer: PackedLayer) -> Tensor:
    stored = np.array(layer.stored_scale)
    if stored.dtype == np.int8:
        return torch.from_numpy(stored)
    return torch.from_numpy(stored.view(np.int16)).view(torch.bfloat16)


def changed_constants(source: Model, model: QuantizedModel) -> dict[str, npt.NDArray[Any]]:
    """Initializers that are neither new nor what they were, by name."""
    before = source.ir.graph.initializers
    found: dict[str, npt.NDArray[Any]] = {}
    for name, value in model.packed.graph.initializers.items():
        ours = all(node.domain == "afpq" for node, _ in value.uses())
        if ours or value.const_value is None:
            continue
        new = value.const_value.numpy()
        old = before[name].const_value if name in before else None
        if old is None or not np.array_equal(old.numpy(), new, equal_nan=True):
            found[name] = new
    return found


def copy_constants(module: nn.Module, source: Model, model: QuantizedModel) -> None:
    """Gives parameters and buffers the values that the packed model has in their place, where it changed them."""
    targets: dict[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
    targets |= dict(module.named_buffers(remove_duplicate=False))
    for name, new in changed_constants(source, model).items():
        if name not in targets or targets[name].shape != new.shape:
            raise ModelError(
                f"afpq changed the constant {name!r}, which is no parameter or buffer of the module"
            )
        with torch.no_grad():
            targets[name].copy_(torch.from_numpy(np.array(new)))


def _compare(model: QuantizedModel, module: nn.Module, arguments: Mapping[str, Tensor]) -> None:
    """Runs both forms once: a layer in the wrong place would show.

    Raises:
        ModelError: they differ by more than the order of additions explains.
    """
    session = model.session()
    wanted = {entry.name for entry in session.get_inputs()}
    expected = session.run(None, {n: t.numpy() for n, t in arguments.items() if n in wanted})
    with torch.no_grad():
        outputs = [y for y in _pytree.tree_leaves(module(**arguments)) if isinstance(y, Tensor)]
    if len(outputs) != len(expected):
        raise ModelError(f"the module has {len(outputs)} outputs, its ONNX model {len(expected)}")
    for number, (y, z) in enumerate(zip(outputs, expected, strict=True)):
        difference = np.abs(y.numpy().astype(np.float64) - z)
        if y.is_floating_point() and np.isfinite(difference).any():
            finite = np.isfinite(difference)
            error = math.sqrt(float((difference[finite] ** 2).sum()))
            if error > _MAX_ERROR * math.sqrt(float((z[finite].astype(np.float64) ** 2).sum())):
                raise ModelError(
                    f"output {number} of the torch module is not that of the ONNX model: "
                    f"they differ by {error:.3g} (root of summed squares)"
                )
