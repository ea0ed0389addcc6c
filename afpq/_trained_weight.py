"""Weights and biases of a packed layer while they are trained: parametrizations that compute with what is stored."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from afpq._train_round import round_tensor
from afpq.floats import FloatFormat
from afpq.formats import AfpFormat, round_scale
from afpq.packed import PackedLayer, scale_values
from afpq.packing import PackedTensor
from afpq.rounding import quantize_tensor

__all__ = ["TrainedBias", "TrainedWeight"]


class TrainedWeight(nn.Module):
    """A weight in its format: a parametrization from the float weight to what is stored."""

    start: Tensor

    def __init__(self, layer: PackedLayer, weight: Tensor) -> None:
        super().__init__()
        self.format, self.kind = layer.format, layer.kind
        self.is_conv = weight.ndim > 2
        scale = torch.from_numpy(np.array(scale_values(layer), np.float32))
        self.register_buffer("start", scale.reshape(-1, *(1,) * (weight.ndim - 1)))
        self.log_scale = nn.Parameter(torch.zeros_like(self.start), self.kind == "real")

    @property
    def scale(self) -> Tensor:
        """As it is stored; gradients pass through its rounding."""
        exact = self.start * self.log_scale.exp()
        stored = round_scale(self.format, exact.detach().cpu().numpy(), self.kind)
        return exact + (torch.from_numpy(stored).to(exact.device) - exact).detach()

    def forward(self, units: Tensor) -> Tensor:
        """The weight as it is stored, from the float weight in units of the scales that it started with."""
        scale = self.scale.expand_as(units)
        value: Tensor = _Rounded.apply(units * self.start, scale, self.format)  # type: ignore[no-untyped-call]
        return value

    def stored(self, units: Tensor) -> PackedTensor:
        """What is packed of it."""
        value = self(units).detach()
        matrix = value.movedim(1, -1).reshape(len(value), -1) if self.is_conv else value
        scale = self.scale.detach().reshape(-1).numpy()
        return quantize_tensor(matrix.numpy(), self.format, scale, kind=self.kind)


class TrainedBias(nn.Module):
    """A bias, from its shift in units of what its channel's outputs are like: the norm of the channel's weights."""

    start: Tensor
    unit: Tensor

    def __init__(self, start: Tensor, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("start", start)
        self.register_buffer("unit", weight.flatten(1).norm(dim=1))

    def forward(self, shift: Tensor) -> Tensor:
        return self.start + shift * self.unit


class _Rounded(torch.autograd.Function):
    """round(weight / scale) * scale, straight through."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, scale: Tensor, format: AfpFormat) -> Tensor:
        exact = weight / scale
        integers = round_tensor(exact, _integers(format))
        inside = exact.abs() <= format.max_integer
        ctx.save_for_backward(inside, integers - exact * inside)
        return integers * scale

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        inside, of_scale = ctx.saved_tensors
        return grads[0] * inside, grads[0] * of_scale, None


def _integers(fmt: AfpFormat) -> FloatFormat:
    """The format whose numbers are the I of another."""
    return FloatFormat(fmt.exponent_bits, fmt.mantissa_bits, exponent_bias=1 - fmt.mantissa_bits)
