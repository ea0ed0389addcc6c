"""A quantized matrix whose rounding is being learned: offsets within the neighbouring codes, and scales."""

import numpy as np
from torch import Tensor, zeros_like

from afpq._torch_graph import as_tensor
from afpq.formats import AfpFormat, codebook, round_scale
from afpq.packing import PackedTensor
from afpq.rounding import fake_quantize_rows, quantize_tensor

__all__ = ["LearnedWeight"]


class LearnedWeight:
    """A quantized matrix [n, k] and what is learned of it."""

    def __init__(self, tensor: PackedTensor, kind: str) -> None:
        self.format: AfpFormat = tensor.format
        self.kind = kind
        self.start = as_tensor(np.array(tensor.scale, np.float32))[:, None]
        self.integers = as_tensor(tensor.decode()) / self.start
        self._lower, self._upper, self.step = _neighbours(self.integers, self.format)
        self.offset = zeros_like(self.integers)
        self.log_scale = zeros_like(self.start)

    @property
    def scale(self) -> Tensor:
        return self.start * self.log_scale.exp()

    @property
    def exact(self) -> Tensor:
        """What is rounded, in units of the weight."""
        return (self.integers + self.offset * self.step) * self.start

    def value(self) -> Tensor:
        """[n, k] what the network computes with."""
        scale = self.scale.reshape(-1).numpy()
        return as_tensor(fake_quantize_rows(self.exact.numpy(), self.format, scale))

    def set_gradients(self, value: Tensor, of_value: Tensor) -> None:
        """From `value` and its gradients, straight through the rounding."""
        inside = self.exact.abs() <= self.format.max_integer * self.scale
        self.offset.grad = of_value * inside * self.step * self.start
        # The last sum is over a few thousand numbers at most: one thread adds them.
        of_scale = (of_value * (value - self.exact * inside)).sum(1, keepdim=True)
        self.log_scale.grad = of_scale if len(self.start) > 1 else of_scale.sum(0, keepdim=True)

    def stay_near(self) -> None:
        """Keeps offsets within the neighbouring codes."""
        reach = [(end - self.integers) / self.step for end in (self._lower, self._upper)]
        self.offset.clamp_(*reach)

    def stored(self) -> PackedTensor:
        scale = round_scale(self.format, self.scale.reshape(-1).numpy(), self.kind)
        return quantize_tensor(self.exact.numpy(), self.format, scale, kind=self.kind)


def _neighbours(integers: Tensor, fmt: AfpFormat) -> tuple[Tensor, Tensor, Tensor]:
    """For integers of a format those before and after them, themselves at the ends, and the mean distance to these."""
    known = np.unique(codebook(fmt))
    place = np.searchsorted(known, integers.numpy())
    before, after = np.maximum(place - 1, 0), np.minimum(place + 1, len(known) - 1)
    lower, upper = known[before].astype(np.float32), known[after].astype(np.float32)
    steps = (upper - lower) / (after - before).astype(np.float32)
    return as_tensor(lower), as_tensor(upper), as_tensor(steps)
