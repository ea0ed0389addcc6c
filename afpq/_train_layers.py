"""Linear and Conv layers whose three products read rounded operands and sum in a small accumulator."""

from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from afpq._recipe import Operands, Recipe, Rounding
from afpq._torch_export import replace_modules
from afpq._train_round import check_float, multiply, rounded
from afpq.errors import ModelError

__all__ = ["RoundedConv", "RoundedLayer", "RoundedLinear", "convert"]

_CONV = (functional.conv1d, functional.conv2d, functional.conv3d)


class RoundedLayer(nn.Module):
    """What both kinds have: the operands of the layer's place, and the recipe."""

    operands: Operands
    recipe: Recipe

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.operands}"


class RoundedLinear(RoundedLayer, nn.Linear):
    """`nn.Linear` in a recipe's numbers."""

    def forward(self, input: Tensor) -> Tensor:
        y: Tensor = _Linear.apply(input, self.weight, self.operands, self.recipe)  # type: ignore[no-untyped-call]
        return y if self.bias is None else y + self.bias


class RoundedConv(RoundedLayer):
    """`nn.Conv1d`, `nn.Conv2d` or `nn.Conv3d` in a recipe's numbers: mixed into a class of theirs."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        conv: Any = self
        padding = conv.padding
        if conv.padding_mode != "zeros" or isinstance(padding, str):
            mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
            input = functional.pad(input, conv._reversed_padding_repeated_twice, mode)
            padding = (0,) * len(conv.stride)
        place = conv.stride, padding, conv.dilation, conv.groups
        y: Tensor = _Conv.apply(input, weight, place, self.operands, self.recipe)  # type: ignore[no-untyped-call]
        return y if bias is None else y + bias.reshape(-1, *(1,) * len(conv.stride))


class _RoundedConv1d(RoundedConv, nn.Conv1d):
    pass


class _RoundedConv2d(RoundedConv, nn.Conv2d):
    pass


class _RoundedConv3d(RoundedConv, nn.Conv3d):
    pass


_KINDS: dict[type[nn.Module], type[RoundedLayer]] = {
    nn.Linear: RoundedLinear,
    nn.Conv1d: _RoundedConv1d,
    nn.Conv2d: _RoundedConv2d,
    nn.Conv3d: _RoundedConv3d,
}


def convert(module: nn.Module, recipe: Recipe) -> nn.Module:
    """Puts a recipe's layers into the places of the Linear and Conv layers of a module, and returns the module.

    Parameters, hooks and the keys of `state_dict` stay, so optimizers may be made before or after. A module that is
    itself such a layer comes back as a new one with the same parameters. Layers of subclasses and products of two
    activations stay as they are; converting again replaces the recipe.

    Example:
        >>> import torch, afpq.train
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
        >>> net = afpq.train.convert(net, afpq.train.RECIPES["hfp8"])
        >>> net(torch.randn(4, 8)).sum().backward()

    Raises:
        ModelError: there is no such layer, or the recipe's accumulator cannot be emulated for one.
    """
    bases = {made: kind for kind, made in _KINDS.items()}
    layers = [
        (path, layer)
        for path, layer in module.named_modules()
        if type(layer) in _KINDS or type(layer) in bases
    ]
    if not layers:
        raise ModelError("no Linear or Conv layer to convert")
    found: dict[nn.Module, nn.Module] = {}
    for place, (path, layer) in enumerate(layers):
        kind: type[nn.Module] = bases.get(type(layer), type(layer))
        operands = recipe.operands
        if place == 0 and recipe.first is not None:
            operands = recipe.first
        elif place == len(layers) - 1 and recipe.last is not None:
            operands = recipe.last
        keep = any(fnmatchcase(path, pattern) for pattern in recipe.exempt)
        if recipe.accumulator is not None and kind is nn.Conv3d and not keep:
            raise ModelError(f"{path}: rounded sums are not emulated for Conv3d")
        wanted = kind if keep else _KINDS[kind]
        found[layer] = new = wanted.__new__(wanted)
        new.__dict__.update(layer.__dict__)
        if not keep:
            new.__dict__.update(operands=operands, recipe=recipe)
    return replace_modules(module, found)


class _Linear(torch.autograd.Function):
    """y = x w^T with x [.., k] and w [n, k]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, operands: Operands, recipe: Recipe) -> Tensor:
        check_float(x)
        x, weight = rounded(x, operands.activations), rounded(weight, operands.weights)
        ctx.save_for_backward(x, weight)
        ctx.errors, ctx.recipe = operands.errors, recipe
        y = multiply(x.reshape(-1, x.shape[-1]), weight.T, recipe.accumulator, recipe.chunk)
        return y.reshape(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        recipe: Recipe = ctx.recipe
        errors = rounded(grads[0], ctx.errors).reshape(-1, weight.shape[0])
        sums = recipe.accumulator, recipe.chunk
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = multiply(errors, weight, *sums).reshape(x.shape)
        if ctx.needs_input_grad[1]:
            dw = multiply(errors.T, x.reshape(-1, x.shape[-1]), *sums)
            dw = rounded(dw, recipe.gradients)
        return dx, dw, None, None


class _Conv(torch.autograd.Function):
    """y = x * w with x [samples, channels, ..] and w [n, channels / groups, ..]; place: strides, pads, .., groups."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, place: Any, operands: Operands, recipe: Recipe
    ) -> Tensor:
        check_float(x)
        x, weight = rounded(x, operands.activations), rounded(weight, operands.weights)
        ctx.save_for_backward(x, weight)
        ctx.place, ctx.errors, ctx.recipe = place, operands.errors, recipe
        if recipe.accumulator is not None:
            return _summed_forward(x, weight, place, recipe.accumulator, recipe.chunk)
        return _CONV[weight.ndim - 3](x, weight, None, *place)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        recipe: Recipe = ctx.recipe
        errors = rounded(grads[0], ctx.errors)
        needs = ctx.needs_input_grad[:2]
        if recipe.accumulator is not None:
            sums = recipe.accumulator, recipe.chunk
            dx = _summed_input_gradient(errors, x, weight, ctx.place, *sums) if needs[0] else None
            dw = _summed_weight_gradient(errors, x, weight, ctx.place, *sums) if needs[1] else None
        else:
            strides, pads, dilations, groups = ctx.place
            dx, dw, _ = torch.ops.aten.convolution_backward(
                errors,
                x,
                weight,
                None,
                strides,
                pads,
                dilations,
                False,
                [0] * len(strides),
                groups,
                [*needs, False],
            )
        if dw is not None:
            dw = rounded(dw, recipe.gradients)
        return dx, dw, None, None, None


# Products with rounded sums, over the windows of an image: [channels * taps, samples * positions]. A signal is an image
# of height 1.


def _plane(x: Tensor) -> Tensor:
    return x.unsqueeze(2) if x.ndim == 3 else x


def _pair(values: tuple[int, ...], other: int) -> tuple[int, ...]:
    return (other, *values) if len(values) == 1 else values


def _plane_place(place: Any) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int]:
    strides, pads, dilations, groups = place
    return _pair(strides, 1), _pair(pads, 0), _pair(dilations, 1), groups


def _windows(
    x: Tensor,
    kernel: tuple[int, ...],
    strides: tuple[int, ...],
    pads: tuple[int, ...],
    dilations: tuple[int, ...],
) -> Tensor:
    """[channels * taps, samples * positions], channels first."""
    found = functional.unfold(x, kernel, dilations, pads, strides)
    return found.permute(1, 0, 2).reshape(found.shape[1], -1)


def _summed_forward(
    x: Tensor, weight: Tensor, place: Any, accumulator: Rounding, chunk: int
) -> Tensor:
    shape = _output_shape(x, weight, place)
    x, w = _plane(x), _plane(weight)
    strides, pads, dilations, groups = _plane_place(place)
    parts = [
        multiply(
            ws.reshape(ws.shape[0], -1),
            _windows(xs, tuple(w.shape[2:]), strides, pads, dilations),
            accumulator,
            chunk,
        )
        for xs, ws in zip(x.chunk(groups, 1), w.chunk(groups, 0), strict=True)
    ]
    y = torch.cat(parts).reshape(w.shape[0], x.shape[0], -1)
    return y.permute(1, 0, 2).reshape(shape)


def _output_shape(x: Tensor, weight: Tensor, place: Any) -> tuple[int, ...]:
    strides, pads, dilations, _ = place
    extents = (
        (size + 2 * pad - dilation * (taps - 1) - 1) // stride + 1
        for size, taps, stride, pad, dilation in zip(
            x.shape[2:], weight.shape[2:], strides, pads, dilations, strict=True
        )
    )
    return (x.shape[0], weight.shape[0], *extents)


def _summed_weight_gradient(
    errors: Tensor, x: Tensor, weight: Tensor, place: Any, accumulator: Rounding, chunk: int
) -> Tensor:
    """Sums run over samples, then positions."""
    x, w, errors = _plane(x), _plane(weight), _plane(errors)
    strides, pads, dilations, groups = _plane_place(place)
    parts = [
        multiply(
            es.transpose(0, 1).reshape(es.shape[1], -1),
            _windows(xs, tuple(w.shape[2:]), strides, pads, dilations).T,
            accumulator,
            chunk,
        )
        for xs, es in zip(x.chunk(groups, 1), errors.chunk(groups, 1), strict=True)
    ]
    return torch.cat(parts).reshape(weight.shape)


def _summed_input_gradient(
    errors: Tensor, x: Tensor, weight: Tensor, place: Any, accumulator: Rounding, chunk: int
) -> Tensor:
    """A convolution of the errors, apart by the strides, with the taps turned around: one sum for each element of x."""
    shape = x.shape
    x, w, errors = _plane(x), _plane(weight), _plane(errors)
    strides, pads, dilations, groups = _plane_place(place)
    kernel = tuple(w.shape[2:])
    reach = [d * (t - 1) for d, t in zip(dilations, kernel, strict=True)]
    sizes = [size + r for size, r in zip(x.shape[2:], reach, strict=True)]
    spread = errors.new_zeros(
        *errors.shape[:2], *(s + 2 * p for s, p in zip(sizes, pads, strict=True))
    )
    rows, columns = (
        slice(r, r + stride * (count - 1) + 1, stride)
        for r, stride, count in zip(reach, strides, errors.shape[2:], strict=True)
    )
    spread[:, :, rows, columns] = errors
    spread = spread[:, :, pads[0] : pads[0] + sizes[0], pads[1] : pads[1] + sizes[1]]
    parts = [
        multiply(
            ws.transpose(0, 1).flip(2, 3).reshape(ws.shape[1], -1),
            _windows(es, kernel, (1, 1), (0, 0), dilations),
            accumulator,
            chunk,
        )
        for es, ws in zip(spread.chunk(groups, 1), w.chunk(groups, 0), strict=True)
    ]
    dx = torch.cat(parts).reshape(x.shape[1], x.shape[0], -1)
    return dx.permute(1, 0, 2).reshape(shape)
