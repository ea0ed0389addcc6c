"""Trained networks in 8-bit floats, before and after their batch-norm statistics are estimated again."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnxruntime as ort
import torch
from torch import Tensor, nn

import afpq.train
from afpq.train import FloatFormat, Operands, Recipe, Rounding

from .onnx_net import OnnxNet
from .tasks import BLACK, DATA, cifar, device_of, shifted

MODELS = DATA.parent / "models"
RESNET20 = MODELS / "cifar10" / "resnet20-bn.onnx"
MOBILENETV2 = MODELS / "imagenet" / "mobilenetv2_tv.onnx"
_BATCH = 100
_FORMATS = {
    "float32": None,
    "1-4-3, bias 11": FloatFormat(4, 3, exponent_bias=11),
    "1-5-2": FloatFormat(5, 2),
}


@dataclass(frozen=True)
class _Case:
    net: OnnxNet
    training: Tensor  # images
    images: Tensor
    labels: Tensor


def _resnet20() -> _Case:
    torch.manual_seed(0)
    training = shifted(cifar("train")[0], BLACK)  # as the network was trained
    return _Case(OnnxNet(RESNET20), training, *cifar("test"))


def _mobilenetv2() -> _Case:
    """Batch norm was folded: it is put back, with the statistics of the images that will re-estimate it."""
    net, training = OnnxNet(MOBILENETV2), _photographs("calibration")[0]
    net.unfold(training)
    return _Case(net, training, *_photographs("evaluation"))


def _photographs(part: str) -> tuple[Tensor, Tensor]:
    """Images as MobileNetV2 takes them, and labels."""
    inputs = ort.InferenceSession(MOBILENETV2).get_inputs()
    data = afpq.open_data(DATA / "imagenet" / part, inputs, preprocess="imagenet-torchvision")
    images = np.concatenate([feed[data.names[0]] for feed in data.batches()])
    return torch.from_numpy(images), torch.from_numpy(data.labels)


def _on(device: torch.device, case: _Case) -> _Case:
    tensors = (t.to(device) for t in (case.training, case.images, case.labels))
    return _Case(case.net.to(device), *tensors)


NETWORKS: dict[str, tuple[Callable[[], bool], Callable[[], _Case]]] = {
    "ResNet-20": (RESNET20.exists, _resnet20),
    "MobileNetV2": (MOBILENETV2.exists, _mobilenetv2),
}


def _norms(net: nn.Module) -> list[nn.BatchNorm2d]:
    return [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]


@torch.no_grad()
def re_estimate(net: nn.Module, images: Tensor) -> None:
    """Means and variances of batch norm from `images`, seen by the network as it now is; nothing else changes."""
    for norm in _norms(net):
        norm.reset_running_stats()
        norm.momentum = None  # the mean over all batches
    net.train()
    for part in images.split(_BATCH):
        net(part)
    net.eval()


@torch.no_grad()
def _logits(net: nn.Module, images: Tensor) -> Tensor:
    return torch.cat([net(part) for part in images.split(_BATCH)])


@torch.no_grad()
def _outputs(net: nn.Module, images: Tensor) -> list[Tensor]:
    """What every batch norm of the network returns, [images, channels, height, width]."""
    found: list[Tensor] = []
    hooks = [
        norm.register_forward_hook(lambda _module, _inputs, y: found.append(y))
        for norm in _norms(net)
    ]
    net(images)
    for hook in hooks:
        hook.remove()
    return found


def share_of_statistics(exact: Tensor, rounded: Tensor) -> float:
    """How much of the squared error of a layer [samples, channels, h, w] goes when each channel gets its mean and
    deviation back: all that batch norm can mend. Between 0 and 1, or a little below 0 where it does harm."""
    variance, mean = torch.var_mean(exact, (0, 2, 3), correction=0, keepdim=True)
    seen_variance, seen_mean = torch.var_mean(rounded, (0, 2, 3), correction=0, keepdim=True)
    mended = (rounded - seen_mean) * (variance / (seen_variance + 1e-12)).sqrt() + mean
    return 1 - float((mended - exact).square().sum() / (rounded - exact).square().sum())


def rows(name: str) -> list[str]:
    """Top-1 and KL divergence to float32 on images kept aside, before and after; statistics from training images."""
    available, make = NETWORKS[name]
    if not available():
        return [f"| {name} | (no trained network at hand) | | | |"]
    case = _on(device_of(Recipe()), make())
    reference = _logits(case.net, case.images)
    exact = _outputs(case.net, case.training[:_BATCH])
    lines = []
    for title, fmt in _FORMATS.items():
        small = Rounding(fmt) if fmt else None
        net = afpq.train.convert(copy.deepcopy(case.net), Recipe(operands=Operands(small, small)))
        for again in (False, True):
            if again:
                re_estimate(net, case.training)
            logits = _logits(net, case.images)
            top1 = 100 * float((logits.argmax(1) == case.labels).float().mean())
            log_p, log_q = reference.log_softmax(1), logits.log_softmax(1)
            divergence = float((log_p.exp() * (log_p - log_q)).sum(1).mean())
            share = "" if fmt is None else f"{100 * _mean_share(exact, net, case):.1f}"
            stage = ", re-estimated" if again else ""
            lines.append(
                f"| {name} | {title}{stage} | {top1:.2f} | {max(0.0, divergence):.4f} | {share} |"
            )
    return lines


def _mean_share(exact: list[Tensor], net: nn.Module, case: _Case) -> float:
    rounded = _outputs(net, case.training[:_BATCH])
    return float(np.mean([share_of_statistics(*p) for p in zip(exact, rounded, strict=True)]))


def table() -> str:
    lines = [
        "| network | weights and activations | top-1 % | KL to float32 | "
        "% of the layers' error in means and deviations |",
        "|---|---|---|---|---|",
    ]
    for name in NETWORKS:
        lines += rows(name)
    return "\n".join(lines)
