"""The optimizer's side of a recipe: loss scaling, and parameters and state kept in small floats."""

import math
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from afpq._loss_scale import ScaleState
from afpq._recipe import Recipe
from afpq._train_round import rounded

__all__ = ["RoundedOptimizer", "optimizer"]


class RoundedOptimizer:
    """A torch optimizer whose step unscales gradients, skips overflows, and rounds what it leaves behind.

    `scale` is that of the losses to come, `skipped` counts steps without effect. Schedulers take `inner`.
    """

    def __init__(self, inner: Optimizer, recipe: Recipe) -> None:
        self.inner = inner
        self.recipe = recipe
        self.skipped = 0
        self._state = recipe.loss_scale.start()
        with torch.no_grad():
            self._round_parameters()

    @property
    def scale(self) -> float:
        return self._state.scale

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.inner.param_groups

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of `loss` times the scale to those of the parameters."""
        (loss * self._state.scale).backward()  # type: ignore[no-untyped-call]

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.inner.zero_grad(set_to_none)

    @torch.no_grad()
    def step(self) -> bool:
        """Takes a step if no gradient overflowed; says whether it did. Gradients stay, unscaled."""
        largest = self._unscale()
        finite = math.isfinite(largest)
        if finite:
            self.inner.step()
            self._round_parameters()
            self._round_state()
        else:
            self.skipped += 1
        self._state = self.recipe.loss_scale.next(self._state, largest)
        return finite

    def state_dict(self) -> dict[str, Any]:
        return {
            "inner": self.inner.state_dict(),
            "loss_scale": asdict(self._state),
            "skipped": self.skipped,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.inner.load_state_dict(state["inner"])
        self._state = ScaleState(**state["loss_scale"])
        self.skipped = state["skipped"]

    def _parameters(self) -> Iterator[Tensor]:
        for group in self.inner.param_groups:
            yield from group["params"]

    def _unscale(self) -> float:
        """The greatest gradient without the scale; infinity or NaN if there is one."""
        grads = [p.grad for p in self._parameters() if p.grad is not None]
        if not grads:
            return 0.0
        if self._state.scale != 1.0:
            torch._foreach_mul_(grads, 1.0 / self._state.scale)
        return float(torch.stack([g.abs().amax() for g in grads if g.numel()]).amax())

    def _round_parameters(self) -> None:
        if self.recipe.master is None:
            return
        for p in self._parameters():
            if self.recipe.residual and p.ndim > 1:
                small = rounded(p, self.recipe.operands.weights)
                p.copy_(small + rounded(p - small, self.recipe.master))
            else:
                p.copy_(rounded(p, self.recipe.master))

    def _round_state(self) -> None:
        if self.recipe.state is None:
            return
        for p in self._parameters():
            for value in self.inner.state[p].values():
                if isinstance(value, Tensor) and value.shape == p.shape and value.ndim > 0:
                    value.copy_(rounded(value, self.recipe.state))


def optimizer(inner: Optimizer, recipe: Recipe) -> RoundedOptimizer:
    """Gives an optimizer, such as `torch.optim.SGD` or `torch.optim.Adam`, the update of a recipe.

    Parameters are rounded to the recipe's `master` now and after every step, tensors of the optimizer to `state` at the
    end of a step: the step itself computes in float32, so parameters see this step's momentum before it is rounded.

    Example:
        >>> import torch, afpq.train
        >>> recipe = afpq.train.RECIPES["wang2018"]
        >>> net = afpq.train.convert(torch.nn.Sequential(torch.nn.Linear(8, 2)), recipe)
        >>> opt = afpq.train.optimizer(torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9), recipe)
        >>> opt.zero_grad()
        >>> opt.backward(net(torch.ones(4, 8)).square().mean())
        >>> opt.step(), opt.scale
        (True, 1000.0)
    """
    return RoundedOptimizer(inner, recipe)
