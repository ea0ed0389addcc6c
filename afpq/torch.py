"""The torch door: a module becomes a packed ONNX model and, bit for bit the same, a packed torch module.

    import afpq.torch

    result = afpq.torch.quantize(module, loader, bits=4.5)
    result.model.save("packed.onnx")
    y = result.module(x)
    torch.save(result.module.state_dict(), "packed.pt")  # or safetensors' save_file: plain tensors all
    again = afpq.torch.load(module, torch.load("packed.pt"))

`quantize` exports a copy of the module, lets `afpq.quantize` do its work, and puts `AfpLinear`, `AfpConv` and
`AfpEmbedding` in the places of the layers that were packed. All else of the module is as it was, except that batch norm
is folded into the layer before it, and that constants which afpq changed are changed here too. The layers give the
same bits in both forms; what lies between them is computed by torch here and by onnxruntime there.
"""

import glob
import inspect
import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from afpq.errors import ModelError, RuntimeUnavailableError

try:
    import torch
except ImportError as error:
    raise RuntimeUnavailableError(
        "afpq.torch needs torch, which is missing: pip install 'afpq[torch]'"
    ) from error

from torch import Tensor, nn
from torch.utils import _pytree

from afpq._torch_data import example_of, read_samples
from afpq._torch_export import (
    BATCH_NORMS,
    Example,
    Exported,
    export,
    float_copy,
    fold_batch_norm,
    replace_modules,
)
from afpq._torch_layers import (
    AfpConv,
    AfpEmbedding,
    AfpLinear,
    Attributes,
    Packed,
    PackedModule,
    kind_of,
    pack_layer,
)
from afpq.graph import Model, load_model
from afpq.packed import PackedLayer, describe_packed
from afpq.quantize import QuantizedModel
from afpq.quantize import quantize as quantize_model

__all__ = [
    "AfpConv",
    "AfpEmbedding",
    "AfpLinear",
    "TorchResult",
    "load",
    "quantize",
]

_OWN_OPTIONS = {"model", "data", "stats", "bits", "preprocess", "chain"}
_MAX_ERROR = (
    0.1  # between both results, of the outputs' norm: far above rounding, far below a wrong layer
)


@dataclass(frozen=True, eq=False)
class TorchResult:
    """Both forms of one quantized network, and what there is to know about how they came to be."""

    model: QuantizedModel
    module: nn.Module
    notes: tuple[str, ...]  # weights that stay float and why, and layers with several places


def quantize(
    module: nn.Module,
    data: object,
    *,
    bits: float | None = None,
    dynamic_shapes: object = None,
    **options: Any,
) -> TorchResult:
    """Quantizes the weights of a module's Linear, Conv and Embedding layers; the module itself is not changed.

    `data` holds samples for calibration: a tensor, a tuple of tensors or a dictionary by argument names with all
    samples along the first axis, an .npz file, or anything that yields batches, such as a DataLoader. A batch is a
    tensor, a tuple of arguments or a dictionary; `labels` may come along (as a key, or after the last argument).
    `options` are those of `afpq.quantize`; the patterns of `include`, `exclude` and `overrides` match paths of
    modules, such as `encoder.*`. Open axes are the first one and those in which batches differ; `dynamic_shapes`, by
    argument as `torch.export` takes it, says it otherwise.

    What has to stay float in either form is named in `notes`: weights that are read without calling their layer
    (such as those of `nn.MultiheadAttention`), and those of other kinds of layers. Layers that are called several times
    have one bias, the mean of what was found for their places.

    Example:
        >>> import torch, afpq.torch
        >>> layers = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8))
        >>> result = afpq.torch.quantize(layers, torch.randn(64, 32), bits=6)
        >>> result.module(torch.randn(5, 32)).shape
        torch.Size([5, 8])

    Raises:
        ModelError: torch cannot export the module, nothing in it can be packed, or what changed cannot be brought back.
        DataError: the data does not fit the module's forward.
        PlanError: the budget is impossible, or a pattern matches nothing.
        RuntimeUnavailableError: onnxscript is missing.
    """
    _check_options(options)
    limit = options.get("samples")
    samples = read_samples(module, data, limit)
    arrays, axes = example_of(samples, limit)
    arguments = {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}
    automatic = {name: dict.fromkeys(found, torch.export.Dim.AUTO) for name, found in axes.items()}
    example = Example(arguments, automatic if dynamic_shapes is None else dynamic_shapes)
    copied = fold_batch_norm(float_copy(module), example)
    with tempfile.TemporaryDirectory(prefix="afpq-") as folder:
        exported = export(copied, example, Path(folder) / f"{type(module).__name__}.onnx")
        if not exported.owners:
            reasons = (
                "; ".join(exported.left_float.values()) or "it has no Linear, Conv or Embedding"
            )
            raise ModelError(f"nothing of {type(module).__name__} can be packed: {reasons}")
        if options.get("plan") is None:
            names = [glob.escape(name) for name in exported.left_float]
            options["exclude"] = (*options.get("exclude", ()), *names)
        source = load_model(exported.path)
        # Modules pass floats to each other, and the file is to give the same bits.
        model = quantize_model(source, data=samples.for_afpq(), bits=bits, chain=False, **options)
        ir.external_data.load_to_model(model.packed)
        layers = _owned_layers(model, exported)
        notes = [*exported.left_float.values(), *_share_places(model, layers)]
        result = _with_packed(copied, _owned_layers(model, exported))
        _copy_constants(result, source, model)
    _compare(model, result, arguments)
    return TorchResult(model, result, tuple(notes))


def load(module: nn.Module, state_dict: Mapping[str, Tensor]) -> nn.Module:
    """Rebuilds a packed module from the float one (whose weights do not matter) and `state_dict()` of the packed one.

    Example:
        >>> import torch, afpq.torch
        >>> float_module = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.ReLU())
        >>> result = afpq.torch.quantize(float_module, torch.randn(64, 32), bits=6)
        >>> again = afpq.torch.load(float_module, result.module.state_dict())
        >>> x = torch.randn(5, 32)
        >>> bool((again(x) == result.module(x)).all())
        True

    Raises:
        ModelError: the state is not one of this module, packed.
    """
    result = float_copy(module)
    found: dict[nn.Module, nn.Module] = {}
    places: dict[str, PackedModule] = {}
    for path, part in result.named_modules():
        prefix = f"{path}." if path else ""
        text = state_dict.get(f"{prefix}attributes")
        if text is None or text.dtype != torch.uint8:
            # Batch norm that was folded left nothing in the state.
            if isinstance(part, BATCH_NORMS) and part.state_dict():
                if not any(name.startswith(prefix) for name in state_dict):
                    found[part] = nn.Identity()
            continue
        places[path] = found[part] = _from_state(path, part, state_dict, text, places)
    if not places:
        raise ModelError(
            "the state has no packed layer: is it one of a module that afpq.torch packed?"
        )
    result = replace_modules(result, found)
    try:
        result.load_state_dict(state_dict)
    except RuntimeError as error:
        raise ModelError(f"the state does not fit {type(module).__name__}: {error}") from error
    return result


def _from_state(
    path: str,
    part: nn.Module,
    state: Mapping[str, Tensor],
    text: Tensor,
    places: Mapping[str, PackedModule],
) -> PackedModule:
    prefix = f"{path}." if path else ""
    attributes = Attributes.from_tensor(text)
    owner = None
    if attributes.shares is not None:
        owner = places.get(attributes.shares)
        if owner is None:
            raise ModelError(
                f"{path}: the state lacks {attributes.shares!r}, whose weight it shares"
            )
    if kind_of(part) is None:
        raise ModelError(
            f"{path} is packed in the state, and a {type(part).__name__} in the module"
        )
    own = {name: state.get(prefix + name) for name in ("codes", "scale", "bias")}
    if owner is None and (own["codes"] is None or own["scale"] is None):
        raise ModelError(f"{path}: the state lacks its codes or scales")
    try:
        return pack_layer(part, Packed(attributes, **own, owner=owner))
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from error


def _check_options(options: Mapping[str, Any]) -> None:
    known = set(inspect.signature(quantize_model).parameters) - _OWN_OPTIONS
    for name in options:
        if name not in known:
            raise TypeError(
                f"afpq.torch.quantize has no option {name!r}; it has {', '.join(sorted(known))}"
            )


def _owned_layers(model: QuantizedModel, exported: Exported) -> dict[str, list[PackedLayer]]:
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


def _copy_constants(module: nn.Module, source: Model, model: QuantizedModel) -> None:
    """Gives parameters and buffers the values that the packed model has in their place, where it changed them."""
    before = source.ir.graph.initializers
    targets: dict[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
    targets |= dict(module.named_buffers(remove_duplicate=False))
    for name, value in model.packed.graph.initializers.items():
        ours = all(node.domain == "afpq" for node, _ in value.uses())
        if ours or value.const_value is None:
            continue
        new = value.const_value.numpy()
        old = before[name].const_value if name in before else None
        if old is not None and np.array_equal(old.numpy(), new, equal_nan=True):
            continue
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
