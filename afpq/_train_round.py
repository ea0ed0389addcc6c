"""Rounding of torch tensors: the kernels for those in the processor's memory, torch's operators for the others."""

import os

import torch
from torch import Tensor

from afpq import _core
from afpq._recipe import Rounding
from afpq.errors import FormatError
from afpq.floats import FloatFormat, kernel_numbers

__all__ = ["check_float", "multiply", "new_seed", "round_tensor", "rounded"]

_FEW = 1 << 17  # elements that are done before another thread would have started


def new_seed() -> int:
    """63 bits of torch's generator: `torch.manual_seed` makes runs repeatable, on any number of threads."""
    return int(torch.randint(0, 2**63 - 1, (), dtype=torch.int64))


def check_float(x: Tensor) -> None:
    if x.dtype != torch.float32:
        raise FormatError(f"emulated training computes in float32, not in {x.dtype}")


def rounded(x: Tensor, rounding: Rounding | None) -> Tensor:
    """`x`, rounded unless there is no rounding; a new tensor in the same order of memory, without gradient."""
    if rounding is None:
        return x.detach()
    return round_tensor(x, rounding.format, seed=new_seed() if rounding.stochastic else None)


def round_tensor(x: Tensor, format: FloatFormat, *, seed: int | None = None) -> Tensor:
    """A float32 tensor of numbers of a format, nearest to those of `x`, or with a seed stochastically rounded.

    Elements count in the order of memory. In the processor's memory bits depend on nothing but `x` and the seed; on
    other devices rounding to nearest gives the same bits, and stochastic rounding has the device's own random numbers.
    No gradient passes.

    Example:
        >>> import torch, afpq.train
        >>> fp8 = afpq.train.FloatFormat(4, 3, exponent_bias=11)
        >>> afpq.train.round_tensor(torch.tensor([0.3, 1.07, 100.0]), fp8)
        tensor([ 0.3125,  1.1250, 30.0000])

    Raises:
        FormatError: `x` is not float32.
    """
    check_float(x)
    x = x.detach()
    if x.device.type != "cpu":
        return _round_anywhere(x, format, seed)
    result = torch.empty_like(x)  # in the order of x where it is dense
    if result.stride() != x.stride():
        x = x.contiguous()
        result = torch.empty_like(x)
    flat = (x.numel(),), (1,)
    _core.round_values(
        _core.kernels.active_isa(),
        _threads(x.numel() // _FEW),
        kernel_numbers(format),
        seed,
        x.as_strided(*flat).numpy(),
        result.as_strided(*flat).numpy(),
    )
    return result


def _threads(useful: int) -> int:
    return max(1, min(torch.get_num_threads(), os.cpu_count() or 1, useful))


def _round_anywhere(x: Tensor, format: FloatFormat, seed: int | None) -> Tensor:
    """What csrc/train/kernels.inc does, in torch's operators."""
    limit, largest, overflow, step, dropped, flip = kernel_numbers(format)
    size = x.abs()
    u = size.view(torch.int32)
    mask = (1 << dropped) - 1
    # A tensor: by a number, a GPU multiplies with its reciprocal, and that of a tiny step is infinite.
    steps = (size / torch.full((), step, device=x.device)).clamp(max=2.0**22)
    if seed is None:
        high = u + (mask >> 1) + (((u >> dropped) ^ flip) & 1)
        steps = steps.round()
    else:
        generator = torch.Generator(x.device).manual_seed(seed)
        words = torch.randint(
            0, 2**31, x.shape, generator=generator, dtype=torch.int32, device=x.device
        )
        high = u + (words >> (31 - dropped))
        whole = steps.floor()
        part = ((steps - whole) * 2.0**31).to(torch.int64)
        steps = whole + (words.to(torch.int64) + part >= 2**31)
    normal = (high & ~mask).view(torch.float32)
    result = torch.where(size < limit, steps * step, normal)
    result = torch.where(result > largest, overflow, result)
    return torch.where(x.isnan(), x, result.copysign(x))


def multiply(lhs: Tensor, rhs: Tensor, accumulator: Rounding | None, chunk: int) -> Tensor:
    """lhs [m, k] * rhs [k, n], partial sums rounded (afpq.floats.multiply_rounded), or torch's own product."""
    if accumulator is None:
        return lhs @ rhs
    if lhs.device.type != "cpu":
        raise FormatError(
            f"rounded sums are computed on the processor, not on {lhs.device.type}: give a recipe without accumulator"
        )
    result = torch.empty(lhs.shape[0], rhs.shape[1])
    products = lhs.shape[0] * rhs.numel()
    _core.multiply_rounded(
        _core.kernels.active_isa(),
        _threads(products // _FEW),
        kernel_numbers(accumulator.format),
        new_seed() if accumulator.stochastic else None,
        chunk,
        lhs.contiguous().numpy(),
        rhs.contiguous().numpy(),
        result.numpy(),
    )
    return result
