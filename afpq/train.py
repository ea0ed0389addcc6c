"""Training in emulated small floats: the systems of five papers as recipes of one mechanism, and fine-tuning.

    import afpq.train

    recipe = afpq.train.RECIPES["hfp8"]
    net = afpq.train.convert(net, recipe)
    opt = afpq.train.optimizer(torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9), recipe)
    for x, y in loader:
        opt.zero_grad()
        opt.backward(loss(net(x), y))
        opt.step()

A `Recipe` says which format every role has: weights, activations and errors as products read them, weight gradients,
partial sums, what the optimizer keeps. Tensors are float32 throughout and hold numbers of these formats; `afpq.floats`
is the definition. Nothing gets faster by it: it shows what a format costs before there is hardware for it.
"""

from afpq.errors import RuntimeUnavailableError

try:
    import torch  # noqa: F401
except ImportError as error:
    raise RuntimeUnavailableError(
        "afpq.train needs torch, which is missing: pip install 'afpq[torch]'"
    ) from error

from afpq._finetune import finetune
from afpq._loss_scale import BackOff, ConstantScale, LogMax, LossScale, ScaleState
from afpq._recipe import RECIPES, Operands, Recipe, Rounding, gallus2018
from afpq._train_layers import RoundedConv, RoundedLayer, RoundedLinear, convert
from afpq._train_optimizer import RoundedOptimizer, optimizer
from afpq._train_round import round_tensor
from afpq.floats import FloatFormat

__all__ = [
    "RECIPES",
    "BackOff",
    "ConstantScale",
    "FloatFormat",
    "LogMax",
    "LossScale",
    "Operands",
    "Recipe",
    "RoundedConv",
    "RoundedLayer",
    "RoundedLinear",
    "RoundedOptimizer",
    "Rounding",
    "ScaleState",
    "convert",
    "finetune",
    "gallus2018",
    "optimizer",
    "round_tensor",
]
