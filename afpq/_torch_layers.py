"""The packed layers as torch modules: buffers that hold what the file stores, and a call of a kernel.

Buffers of a layer, which are all of its state: `codes` (uint8 [packed bytes]) and `scale` (bfloat16 or int8) as in the
packed file, `bias` (float32 [n], where there is one), and `attributes`, the ONNX node's attributes as JSON text in a
uint8 tensor. A layer that shares its weight has an owner instead of codes and scale of its own. What kernels need
besides is made again whenever a state is loaded.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from afpq import _torch_kernels
from afpq.errors import AfpqError, ModelError
from afpq.formats import AfpFormat
from afpq.packing import packed_bytes

__all__ = [
    "AfpConv",
    "AfpEmbedding",
    "AfpLinear",
    "Attributes",
    "Packed",
    "PackedModule",
    "kind_of",
    "pack_layer",
]

_OWN = ("codes", "scale", "bias", "attributes")


@dataclass(frozen=True)
class Attributes:
    """What the ONNX node says of a layer, and the path of the module whose weight it shares, if it does."""

    format: str
    n: int
    k: int
    group_size: int = 0
    activations: str = "a16"
    activation_format: str = ""
    activation_scale: float = 0.0
    bias: bool = False
    shares: str | None = None

    def to_tensor(self) -> Tensor:
        """JSON text, one byte a character: uint8."""
        text = json.dumps(asdict(self), separators=(",", ":"), sort_keys=True)
        return torch.tensor(list(text.encode()), dtype=torch.uint8)

    @classmethod
    def from_tensor(cls, text: Tensor) -> "Attributes":
        """The inverse.

        Raises:
            ModelError: the text is not what `to_tensor` writes.
        """
        try:
            found = json.loads(bytes(text.tolist()))
            if set(found) != {field.name for field in fields(cls)}:
                raise ValueError
            result = cls(**found)
            AfpFormat.parse(result.format)
        except (ValueError, TypeError, AfpqError) as error:
            raise ModelError("attributes are not those of a packed layer") from error
        return result


@dataclass(frozen=True)
class Packed:
    """One layer's part of a packed model, as tensors; without codes and scale where it shares the owner's."""

    attributes: Attributes
    codes: Tensor | None
    scale: Tensor | None
    bias: Tensor | None
    owner: "PackedModule | None" = None


class PackedModule(nn.Module):
    """What the three packed layers have in common: their state."""

    attributes: Tensor
    bias: Tensor | None
    sums: Tensor

    def __init__(self, shape: tuple[int, int], packed: Packed) -> None:
        super().__init__()
        self._shape = shape
        # In a tuple: the owner is a module of its own place, not a child of this one.
        self._owner = (packed.owner,)
        if packed.owner is None:
            self.register_buffer("codes", packed.codes)
            self.register_buffer("scale", packed.scale)
        self.register_buffer("bias", packed.bias)
        self.register_buffer("attributes", packed.attributes.to_tensor())
        self.register_buffer("sums", torch.zeros(0, 0, dtype=torch.int32), persistent=False)

    @property
    def weight(self) -> Tensor:
        """The weight as the float layer has it, decoded at every access: float32. For other readers than this layer."""
        a = self.fields
        codes, scale = self.stored()
        matrix: Tensor = torch.ops.afpq.unpack(codes, scale, a.format, a.n, a.k, a.group_size)
        return self._as_weight(matrix)

    def stored(self) -> tuple[Tensor, Tensor]:
        """Codes and scales, the owner's where they are shared."""
        source = self._owner[0] or self
        return source.codes, source.scale  # type: ignore[return-value]  # buffers

    def extra_repr(self) -> str:
        a = self.fields
        static = f", {a.activation_format} * {a.activation_scale:g}" if a.activation_format else ""
        shares = "" if a.shares is None else f", weight of {a.shares!r}"
        return f"{a.n}, {a.k}, {a.format}, {a.activations}{static}, bias={a.bias}{shares}"

    def _as_weight(self, matrix: Tensor) -> Tensor:
        return matrix

    def _column_sums(self) -> Tensor:
        return torch.zeros(0, 0, dtype=torch.int32)

    def _read(self) -> None:
        """Takes attributes from their buffer, and makes what follows from the codes."""
        self.fields = Attributes.from_tensor(self.attributes)
        a, (codes, scale) = self.fields, self.stored()
        if (a.n, a.k) != self._shape:
            raise ModelError(f"the weight is [{a.n}, {a.k}], the layer needs {list(self._shape)}")
        size = packed_bytes(a.n, a.k, AfpFormat.parse(a.format).bits)
        if codes.dtype != torch.uint8 or codes.shape != (size,):
            raise ModelError(f"codes are {codes.dtype} {list(codes.shape)}, not uint8 [{size}]")
        if scale.dtype not in (torch.bfloat16, torch.int8):
            raise ModelError(f"scales are {scale.dtype}, not bfloat16 or int8")
        rows = -(-a.k // a.group_size) if a.group_size else 1
        allowed = [(rows, a.n)] if a.group_size else [(a.n,), (1,)]
        if tuple(scale.shape) not in allowed:
            raise ModelError(f"scales have shape {list(scale.shape)}, not {list(allowed[0])}")
        if (self.bias is not None) != a.bias or (a.bias and self.bias.shape != (a.n,)):  # type: ignore[union-attr]
            raise ModelError(f"the bias does not fit the attributes: bias={a.bias}, n={a.n}")
        self.sums = self._column_sums()

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        # Another format has other sizes: the buffers become what the state holds.
        for name in _OWN:
            found = state_dict.get(prefix + name)
            if isinstance(found, Tensor) and (name in self._buffers):
                self._buffers[name] = torch.empty_like(found, device="cpu")
        if prefix + "bias" not in state_dict and prefix + "attributes" in state_dict:
            self._buffers["bias"] = None
        super()._load_from_state_dict(state_dict, prefix, *rest)
        missing, errors = rest[2], rest[4]
        if not any(name.startswith(prefix) for name in missing):
            try:
                self._read()
            except ModelError as error:
                errors.append(f"{prefix.removesuffix('.')}: {error}")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedModule":
        # `module.half()` and the like are for floats; bytes that stand for numbers stay what they are.
        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(move, recurse)  # type: ignore[no-untyped-call]
        return self


class AfpLinear(PackedModule):
    """`nn.Linear` on packed weights: input [..., k] -> [..., n], of the input's type."""

    def __init__(self, layer: nn.Linear, packed: Packed) -> None:
        super().__init__((layer.out_features, layer.in_features), packed)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self._read()

    def forward(self, input: Tensor) -> Tensor:
        a = self.fields
        codes, scale = self.stored()
        y: Tensor = torch.ops.afpq.linear(
            input.to(torch.float32), codes, scale, self.sums, self.bias, a.format, a.n, a.k, a.group_size,
            a.activations, a.activation_format, a.activation_scale,
        )  # fmt: skip
        return y.to(input.dtype)

    def _column_sums(self) -> Tensor:
        a = self.fields
        codes = self.stored()[0]
        return _torch_kernels.column_sums(codes, a.format, a.n, a.k, a.group_size, a.activations)


class AfpConv(PackedModule):
    """`nn.Conv1d`, `nn.Conv2d` or `nn.Conv3d` on packed weights: input [N, C, ...] (or without N) -> [N, n, ...]."""

    def __init__(self, layer: "Convolution", packed: Packed) -> None:
        products = layer.in_channels // layer.groups * math.prod(layer.kernel_size)
        super().__init__((layer.out_channels, products), packed)
        self.in_channels, self.out_channels = layer.in_channels, layer.out_channels
        self.kernel_size, self.stride = tuple(layer.kernel_size), tuple(layer.stride)
        self.dilation, self.groups = tuple(layer.dilation), layer.groups
        self.padding_mode = layer.padding_mode
        ends = _paddings(layer)
        self.padding = tuple(p[0] for p in ends) + tuple(p[1] for p in ends)
        self._read()

    def forward(self, input: Tensor) -> Tensor:
        a, rank = self.fields, len(self.kernel_size)
        codes, scale = self.stored()
        single = input.dim() == rank + 1
        batch = input[None] if single else input
        padding = self.padding
        if self.padding_mode != "zeros":
            ends = [padding[i + side * rank] for i in reversed(range(rank)) for side in (0, 1)]
            batch = nn.functional.pad(batch, ends, mode=self.padding_mode)
            padding = (0,) * (2 * rank)
        y: Tensor = torch.ops.afpq.conv(
            batch.to(torch.float32), codes, scale, self.sums, self.bias, a.format, a.n, a.k,
            self.kernel_size, self.stride, padding, self.dilation, self.groups,
            a.activations, a.activation_format, a.activation_scale,
        )  # fmt: skip
        y = y.to(input.dtype)
        return y[0] if single else y

    def _as_weight(self, matrix: Tensor) -> Tensor:
        channels = self.in_channels // self.groups
        return matrix.reshape(self.out_channels, *self.kernel_size, channels).movedim(-1, 1)

    def _column_sums(self) -> Tensor:
        a, codes = self.fields, self.stored()[0]
        return _torch_kernels.column_sums(
            codes, a.format, a.n, a.k, 0, a.activations,
            kernel=self.kernel_size, groups=self.groups, static=bool(a.activation_format),
        )  # fmt: skip


class AfpEmbedding(PackedModule):
    """`nn.Embedding` on a packed table: input of any shape -> input.shape + [k], of the float table's type."""

    def __init__(self, layer: nn.Embedding, packed: Packed) -> None:
        super().__init__((layer.num_embeddings, layer.embedding_dim), packed)
        self.num_embeddings, self.embedding_dim = layer.num_embeddings, layer.embedding_dim
        self.padding_idx = layer.padding_idx
        self._dtype = layer.weight.dtype
        self._read()

    def forward(self, input: Tensor) -> Tensor:
        a = self.fields
        codes, scale = self.stored()
        y: Tensor = torch.ops.afpq.embedding(input, codes, scale, a.format, a.n, a.k)
        return y.to(self._dtype)


class Convolution(Protocol):
    """What `nn.Conv1d` to `nn.Conv3d` have in common."""

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: str | tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    padding_mode: Literal["zeros", "reflect", "replicate", "circular"]


def kind_of(module: nn.Module) -> str | None:
    """`matmul`, `conv` or `gather` for layers that have a packed form, else None.

    Sub-classes count if they inherit `forward`.
    """
    alike = type(module).forward
    if isinstance(module, nn.Linear) and alike is nn.Linear.forward:
        return "matmul"
    if isinstance(module, nn.Embedding) and alike is nn.Embedding.forward:
        return "gather" if module.max_norm is None else None
    for conv in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
        if isinstance(module, conv) and alike is conv.forward:
            return "conv"
    return None


def pack_layer(layer: nn.Module, packed: Packed) -> PackedModule:
    """The packed form of a float layer for which `kind_of` has a name.

    Raises:
        ModelError: the packed weight does not fit the layer.
    """
    packed = replace(packed, attributes=replace(packed.attributes, bias=packed.bias is not None))
    if isinstance(layer, nn.Linear):
        return AfpLinear(layer, packed)
    if isinstance(layer, nn.Embedding):
        return AfpEmbedding(layer, packed)
    return AfpConv(layer, packed)  # type: ignore[arg-type]  # a Convolution


def _paddings(layer: Convolution) -> list[tuple[int, int]]:
    """Zeros (or what padding_mode says) before and after each spatial axis."""
    rank = len(layer.kernel_size)
    if layer.padding == "valid":
        return [(0, 0)] * rank
    if layer.padding == "same":
        total = [layer.dilation[i] * (layer.kernel_size[i] - 1) for i in range(rank)]
        return [(t // 2, t - t // 2) for t in total]
    return [(int(p), int(p)) for p in layer.padding]
