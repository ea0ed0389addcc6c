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
from collections.abc import Mapping
from typing import Any

from afpq.errors import ModelError, RuntimeUnavailableError

try:
    import torch
except ImportError as error:
    raise RuntimeUnavailableError(
        "afpq.torch needs torch, which is missing: pip install 'afpq[torch]'"
    ) from error

from torch import Tensor, nn

from afpq._torch_export import BATCH_NORMS, float_copy, replace_modules
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
from afpq._torch_pair import TorchResult, exported, pair_up
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
    with exported(module, data, dynamic_shapes, options.get("samples")) as source:
        if options.get("plan") is None:
            names = [glob.escape(name) for name in source.names.left_float]
            options["exclude"] = (*options.get("exclude", ()), *names)
        feeds = source.samples.for_afpq()
        # Modules pass floats to each other, and the file is to give the same bits.
        model = quantize_model(source.model, data=feeds, bits=bits, chain=False, **options)
        return pair_up(source, model)


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
