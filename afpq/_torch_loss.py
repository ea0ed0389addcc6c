"""The loss of a quantized network beside the float one, as torch computes it."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from afpq._judge import LOWEST_PROBABILITY, Objective, num_classes

__all__ = ["mean_loss", "output_loss"]


def output_loss(objective: Objective, got: Sequence[Tensor], wanted: Sequence[Tensor]) -> Tensor:
    """KL divergence of the one output, or squared error over signal, averaged over the outputs of the objective.

    `got` and `wanted` begin with the outputs of the objective, in its order.
    """
    if objective.name == "kl":
        p, q = (_log_probabilities(x[0], objective.is_distribution) for x in (wanted, got))
        return functional.kl_div(q, p, log_target=True, reduction="batchmean")
    count = len(objective.outputs)
    return mean_loss(
        [
            (a - b).square().sum() / b.square().sum().clamp(min=1e-30)
            for a, b in zip(got[:count], wanted[:count], strict=True)
        ]
    )


def mean_loss(losses: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(losses)).mean() if losses else torch.zeros(())


def _log_probabilities(x: Tensor, is_distribution: bool) -> Tensor:
    rows = x.reshape(-1, num_classes(x.shape))
    if not is_distribution:
        return rows.log_softmax(-1)
    clamped = rows.clamp(min=LOWEST_PROBABILITY)
    return (clamped / clamped.sum(-1, keepdim=True)).log()
