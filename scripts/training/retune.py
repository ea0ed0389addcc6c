"""A trained ResNet-20 in 8-bit floats, before and after its batch-norm statistics are estimated again."""

from pathlib import Path

import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, nn

import afpq.train
from afpq.train import FloatFormat, Operands, Recipe, Rounding

from .nets import ResNet20
from .tasks import BLACK, DATA, cifar, shifted

MODEL = DATA.parent / "models" / "cifar10" / "resnet20-bn.onnx"
_PARTS = {"gamma": "weight", "beta": "bias", "mean": "running_mean", "var": "running_var"}


def _key(name: str) -> str:
    """The key of `state_dict` for an initializer: layer2.1.bn1.gamma is blocks.4.bn1.weight."""
    path, _, part = name.rpartition(".")
    if path.startswith("layer"):
        layer, block, rest = path.split(".", 2)
        path = f"blocks.{3 * (int(layer[5:]) - 1) + int(block)}.{rest}"
    return f"{path}.{_PARTS.get(part, part)}"


def trained(path: Path = MODEL) -> ResNet20:
    """The network of an ONNX file with live BatchNormalization."""
    net = ResNet20()
    state = net.state_dict()
    for tensor in onnx.load(path).graph.initializer:
        if _key(tensor.name) in state:
            state[_key(tensor.name)] = torch.from_numpy(numpy_helper.to_array(tensor).copy())
    net.load_state_dict(state)
    return net.eval().to(memory_format=torch.channels_last)


@torch.no_grad()
def re_estimate(net: nn.Module, images: Tensor, batch: int = 250) -> None:
    """Means and variances of batch norm from `images`, seen by the network as it now is; nothing else changes."""
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean over all batches
    net.train()
    for part in images.split(batch):
        net(part)
    net.eval()


@torch.no_grad()
def _logits(net: nn.Module, images: Tensor) -> Tensor:
    return torch.cat([net(part) for part in images.split(500)])


def table() -> str:
    """Top-1 and KL divergence to float32 on the test images; statistics from the training images."""
    if not MODEL.exists():
        return "(no trained network at hand)"
    images, labels = cifar("test")
    torch.manual_seed(0)
    training = shifted(cifar("train")[0], BLACK)  # as the network was trained
    reference = _logits(trained(), images)

    def row(name: str, logits: Tensor) -> str:
        top1 = 100 * float((logits.argmax(1) == labels).float().mean())
        log_p, log_q = reference.log_softmax(1), logits.log_softmax(1)
        kl = float((log_p.exp() * (log_p - log_q)).sum(1).mean())
        return f"| {name} | {top1:.2f} | {kl:.4f} |"

    lines = ["| weights and activations | top-1 % | KL to float32 |", "|---|---|---|"]
    for name, fmt in [
        ("float32", None),
        ("1-4-3, bias 11", FloatFormat(4, 3, exponent_bias=11)),
        ("1-5-2", FloatFormat(5, 2)),
    ]:
        small = Rounding(fmt) if fmt else None
        net = afpq.train.convert(trained(), Recipe(operands=Operands(small, small)))
        before = _logits(net, images)
        re_estimate(net, training)
        lines.append(row(name, before))
        lines.append(row(f"{name}, batch norm re-estimated", _logits(net, images)))
    return "\n".join(lines)
