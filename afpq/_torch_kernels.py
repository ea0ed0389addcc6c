"""The kernels as torch operators `torch.ops.afpq.*`: `linear`, `conv`, `embedding` and `unpack`, on the processor.

They are functions of plain tensors, so `torch.compile` and `torch.export` carry them like any other operator. `codes`
and `scale` are what a packed file stores (README, "Packed layout"); `sums` is what `column_sums` made of the codes,
once. The kernels read codes where they lie and write into the memory of the result. There is no gradient.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from afpq import _core
from afpq._layer import is_planar
from afpq.formats import AfpFormat, scale_of

__all__ = ["column_sums", "conv_extents"]

_FEW_PRODUCTS = 1 << 21  # are done before more threads would have started
_INFINITY = math.inf
_FORMAT = "str format, int n, int k"
_ACTIVATIONS = "str activations, str activation_format, float activation_scale"
_parsed = lru_cache(AfpFormat.parse)


def column_sums(
    codes: Tensor,
    fmt: str,
    n: int,
    k: int,
    group_size: int,
    activations: str,
    *,
    kernel: Sequence[int] = (),
    groups: int = 1,
    static: bool = False,
) -> Tensor:
    """The sums of I over k that zero points of activations are multiplied by: int32 [planes, segments * padded n + 2].

    Empty where nothing is rounded to integers. `kernel` and `groups` are those of a convolution; `static` says that
    its input has a static format.
    """
    multiple = 1
    if activations == "f32" or (kernel and is_planar(n, k, groups, kernel, static)):
        return torch.zeros(0, 0, dtype=torch.int32)
    channels = k // math.prod(kernel)
    if kernel and channels % 4 == 0:
        multiple = channels // 4
    isa = _core.kernels.active_isa()
    sums = _core.column_sums(isa, codes.numpy(), fmt, n, k, group_size, multiple)
    return torch.from_numpy(sums)


def conv_extents(
    size: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> list[int]:
    """Output positions along each spatial axis; `padding` holds the zeros before each axis, then those after each."""
    rank = len(kernel)
    return [
        (size[i] + padding[i] + padding[i + rank] - (kernel[i] - 1) * dilation[i] - 1) // stride[i]
        + 1
        for i in range(rank)
    ]


@torch.library.custom_op(
    "afpq::linear",
    mutates_args=(),
    device_types="cpu",
    schema=f"(Tensor x, Tensor codes, Tensor scale, Tensor sums, Tensor? bias, {_FORMAT}, int group_size, "
    f"{_ACTIVATIONS}) -> Tensor",
)
def _linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    sums: Tensor,
    bias: Tensor | None,
    format: str,
    n: int,
    k: int,
    group_size: int,
    activations: str,
    activation_format: str,
    activation_scale: float,
) -> Tensor:
    rows = _floats(x, "x").reshape(-1, k) if x.shape[-1] == k else _refuse_width(x, k)
    y = x.new_empty((*x.shape[:-1], n))
    _core.matmul(
        isa=_core.kernels.active_isa(),
        threads=_threads(y.numel() * k),
        lhs=rows.numpy(),
        data=codes.numpy(),
        format=format,
        n=n,
        k=k,
        scales=_scales(scale, format),
        group_size=group_size,
        bias=None if bias is None else _floats(bias, "bias").numpy(),
        activations=activations,
        low=-_INFINITY,
        high=_INFINITY,
        activation_format=activation_format,
        activation_scale=activation_scale,
        sums=sums.numpy() if sums.numel() else None,
        out=y.numpy(),
    )
    return y


@_linear.register_fake
def _(x: Tensor, *rest: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], rest[5]))


@torch.library.custom_op(
    "afpq::conv",
    mutates_args=(),
    device_types="cpu",
    schema=f"(Tensor x, Tensor codes, Tensor scale, Tensor sums, Tensor? bias, {_FORMAT}, int[] kernel, int[] stride, "
    f"int[] padding, int[] dilation, int groups, {_ACTIVATIONS}) -> Tensor",
)
def _conv(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    sums: Tensor,
    bias: Tensor | None,
    format: str,
    n: int,
    k: int,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activations: str,
    activation_format: str,
    activation_scale: float,
) -> Tensor:
    rank, channels = len(kernel), k // math.prod(kernel) * groups
    if x.dim() != rank + 2 or x.shape[1] != channels:
        raise ValueError(
            f"x has shape {list(x.shape)}, needs {rank + 2} axes with {channels} channels"
        )
    extents = conv_extents(x.shape[2:], kernel, stride, padding, dilation)
    if min(extents) < 1:
        raise ValueError(
            f"x has shape {list(x.shape)}, smaller than the kernel {list(kernel)} with its dilation"
        )
    y = x.new_empty((x.shape[0], n, *extents))
    ones = [1] * (3 - rank)
    _core.conv(
        isa=_core.kernels.active_isa(),
        threads=_threads(y.numel() * (k + 1)),
        x=_floats(x, "x").reshape(*x.shape[:2], *ones, *x.shape[2:]).numpy(),
        data=codes.numpy(),
        format=format,
        n=n,
        k=k,
        scales=_scales(scale, format),
        bias=None if bias is None else _floats(bias, "bias").numpy(),
        activations=activations,
        low=-_INFINITY,
        high=_INFINITY,
        groups=groups,
        kernel=ones + list(kernel),
        strides=ones + list(stride),
        dilations=ones + list(dilation),
        pads=[0] * (3 - rank) + list(padding[:rank]),
        extent=ones + extents,
        activation_format=activation_format,
        activation_scale=activation_scale,
        sums=sums.numpy() if sums.numel() else None,
        out=y.numpy(),
    )
    return y


@_conv.register_fake
def _(x: Tensor, *rest: Any) -> Tensor:
    n, kernel, stride, padding, dilation = rest[5], *rest[7:11]
    return x.new_empty(
        (x.shape[0], n, *conv_extents(x.shape[2:], kernel, stride, padding, dilation))
    )


@torch.library.custom_op(
    "afpq::embedding",
    mutates_args=(),
    device_types="cpu",
    schema=f"(Tensor indices, Tensor codes, Tensor scale, {_FORMAT}) -> Tensor",
)
def _embedding(
    indices: Tensor, codes: Tensor, scale: Tensor, format: str, n: int, k: int
) -> Tensor:
    if indices.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"indices are {indices.dtype}, not int64 or int32")
    y = torch.empty((*indices.shape, k))
    _core.gather(
        threads=_threads(y.numel()),
        indices=indices.to(torch.int64).reshape(-1).contiguous().numpy(),
        data=codes.numpy(),
        format=format,
        n=n,
        k=k,
        scales=_scales(scale, format),
        out=y.numpy(),
    )
    return y


@_embedding.register_fake
def _(indices: Tensor, *rest: Any) -> Tensor:
    return indices.new_empty((*indices.shape, rest[4]), dtype=torch.float32)


@torch.library.custom_op(
    "afpq::unpack",
    mutates_args=(),
    device_types="cpu",
    schema=f"(Tensor codes, Tensor scale, {_FORMAT}, int group_size) -> Tensor",
)
def _unpack(codes: Tensor, scale: Tensor, format: str, n: int, k: int, group_size: int) -> Tensor:
    y = torch.empty((n, k))
    _core.unpack(codes.numpy(), format, n, k, _scales(scale, format), group_size, out=y.numpy())
    return y


@_unpack.register_fake
def _(codes: Tensor, *rest: Any) -> Tensor:
    return codes.new_empty((rest[2], rest[3]), dtype=torch.float32)


def _floats(x: Tensor, name: str) -> Tensor:
    if x.dtype != torch.float32:
        raise ValueError(f"{name} is {x.dtype}, not float32")
    return x.detach().contiguous()


def _refuse_width(x: Tensor, k: int) -> Tensor:
    raise ValueError(f"x has shape {list(x.shape)}, its last axis must be k = {k}")


def _scales(scale: Tensor, format: str) -> npt.NDArray[np.float32]:
    """Scales of either kind as float32, in the shape they are stored in."""
    if scale.dtype == torch.int8:
        return scale_of(_parsed(format), scale.numpy())
    values: npt.NDArray[np.float32] = scale.to(torch.float32).numpy()
    return values


def _threads(products: int) -> int:
    return 1 if products < _FEW_PRODUCTS else torch.get_num_threads()
