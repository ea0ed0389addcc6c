"""The three training tasks: one function each, from a recipe, a seed and a number of epochs to a result.

Data comes from the folder that AFPQ_TRAINING_DATA names (mnist/, cifar10/, tinystories/ with train.npz and test.npz,
any number of images: full CIFAR-10, with --epochs 200), else from ../shared/data. Where there is none, MNIST is
scikit-learn's 1797 handwritten digits at 28 x 28, and the other tasks are left out. Images and texts that are measured
are never trained on. A GPU is used where there is one, but for rounded sums, which the processor computes.
"""

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import LambdaLR

import afpq.train
from afpq.train import Recipe, RoundedOptimizer

from .nets import ResNet20, Transformer, lenet5

_SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
DATA = Path(os.environ.get("AFPQ_TRAINING_DATA") or _SHARED)
_EVALUATION_BATCH = 500
_LEAST_IMAGES = 20_000  # of an epoch: fewer digits are seen several times
_MEAN = torch.tensor([0.485, 0.456, 0.406]).reshape(3, 1, 1)
_DEVIATION = torch.tensor([0.229, 0.224, 0.225]).reshape(3, 1, 1)
BLACK = -_MEAN / _DEVIATION


@dataclass(frozen=True)
class Outcome:
    value: float  # in the unit of the task
    final_loss: float  # of the last epoch's training
    skipped: int  # steps
    scale: float  # at the end


@dataclass(frozen=True)
class Task:
    name: str
    unit: str
    higher_is_better: bool
    epochs: int
    run: Callable[[Recipe, int, int], Outcome]
    available: Callable[[], bool]


torch.backends.cudnn.allow_tf32 = False  # float32 is float32 on a GPU too


def device_of(recipe: Recipe) -> torch.device:
    gpu = recipe.accumulator is None and torch.cuda.is_available()
    return torch.device("cuda" if gpu else "cpu")


def _batches(size: int, batch: int, epochs: int) -> Iterator[tuple[bool, Tensor]]:
    """Shuffled indices, the last incomplete batch of an epoch left out, and whether the last epoch has begun."""
    for epoch in range(epochs):
        order = torch.randperm(size)
        for begin in range(0, size - batch + 1, batch):
            yield epoch == epochs - 1, order[begin : begin + batch]


def _train(
    loss_of: Callable[[Tensor], Tensor],
    optimizer: RoundedOptimizer,
    size: int,
    batch: int,
    epochs: int,
    warmup: int = 0,
) -> float:
    """Trains with a rate that rises for `warmup` steps, then falls like a cosine; the mean loss of the last epoch."""
    steps = epochs * (size // batch)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup))

    schedule = LambdaLR(optimizer.inner, factor)
    last = []
    for is_last, indices in _batches(size, batch, epochs):
        optimizer.zero_grad()
        loss = loss_of(indices)
        optimizer.backward(loss)
        if optimizer.step():
            schedule.step()
        if is_last:
            last.append(float(loss.detach()))
        if not math.isfinite(float(loss.detach())):
            return math.nan
    return float(np.mean(last))


@torch.no_grad()
def _top1(net: nn.Module, images: Tensor, labels: Tensor) -> float:
    net.eval()
    right = 0
    for begin in range(0, len(images), _EVALUATION_BATCH):
        part = slice(begin, begin + _EVALUATION_BATCH)
        right += int((net(images[part]).argmax(1) == labels[part]).sum())
    return 100 * right / len(images)


def _mnist() -> tuple[Tensor, ...]:
    if (DATA / "mnist").is_dir():
        found = []
        for part in ("train", "test"):
            with np.load(DATA / "mnist" / f"{part}.npz") as file:
                images = torch.from_numpy(file["images"]).float().unsqueeze(1)
                found += [(images - 33.3) / 78.6, torch.from_numpy(file["labels"]).long()]
        return tuple(found)
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    images = functional.interpolate(images, (28, 28), mode="bilinear")
    images, labels = (images - images.mean()) / images.std(), torch.tensor(digits.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, test = order[:1300], order[1300:]
    return images[train], labels[train], images[test], labels[test]


def run_mnist(recipe: Recipe, seed: int, epochs: int, rate: float = 0.02) -> Outcome:
    torch.manual_seed(seed)
    device = device_of(recipe)
    images, labels, test_images, test_labels = (t.to(device) for t in _mnist())
    net = afpq.train.convert(lenet5().to(device), recipe)
    optimizer = afpq.train.optimizer(SGD(net.parameters(), lr=rate, momentum=0.9), recipe)

    def loss_of(indices: Tensor) -> Tensor:
        return functional.cross_entropy(net(images[indices]), labels[indices])

    passes = epochs * max(1, _LEAST_IMAGES // len(images))
    final = _train(loss_of, optimizer, len(images), 64, passes)
    top1 = _top1(net, test_images, test_labels)
    return Outcome(top1, final, optimizer.skipped, optimizer.scale)


def cifar(part: str) -> tuple[Tensor, Tensor]:
    """Normalised images [samples, 3, 32, 32] and labels of `train` (5000) or `test` (4000)."""
    with np.load(DATA / "cifar10" / f"{part}.npz") as file:
        images = torch.from_numpy(file["images"]).permute(0, 3, 1, 2).float() / 255
        labels = torch.from_numpy(file["labels"]).long()
    return ((images - _MEAN) / _DEVIATION).to(memory_format=torch.channels_last), labels


def shifted(images: Tensor, border: Tensor | float = 0.0) -> Tensor:
    """Images moved by up to 4 pixels, each second one mirrored; `border` comes in from outside."""
    padded = functional.pad(images - border, (4, 4, 4, 4)) + border
    dy, dx = torch.randint(0, 9, (2, len(images)))
    flip = (torch.rand(len(images)) < 0.5).to(images.device)
    rows = [
        padded[i, :, y : y + 32, x : x + 32] for i, (y, x) in enumerate(zip(dy, dx, strict=True))
    ]
    moved = torch.stack(rows)
    return torch.where(flip.reshape(-1, 1, 1, 1), moved.flip(3), moved)


def run_cifar(recipe: Recipe, seed: int, epochs: int, rate: float = 0.1) -> Outcome:
    torch.manual_seed(seed)
    device = device_of(recipe)
    images, labels, test_images, test_labels = (
        t.to(device) for part in ("train", "test") for t in cifar(part)
    )
    net = ResNet20().to(device, memory_format=torch.channels_last)
    net = afpq.train.convert(net, recipe)
    inner = SGD(net.parameters(), lr=rate, momentum=0.9, weight_decay=5e-4)
    optimizer = afpq.train.optimizer(inner, recipe)

    def loss_of(indices: Tensor) -> Tensor:
        x = shifted(images[indices]).contiguous(memory_format=torch.channels_last)
        return functional.cross_entropy(net(x), labels[indices])

    final = _train(loss_of, optimizer, len(images), 128, epochs, warmup=40)
    return Outcome(_top1(net, test_images, test_labels), final, optimizer.skipped, optimizer.scale)


def run_stories(recipe: Recipe, seed: int, epochs: int) -> Outcome:
    """Nats per token of the last 35 of 195 windows of 256 tokens, after training on the first 160."""
    torch.manual_seed(seed)
    with np.load(DATA / "tinystories" / "text.npz") as file:
        ids = torch.from_numpy(file["ids"].astype(np.int64)).to(device_of(recipe))
    train, test = ids[:160], ids[160:]
    net = afpq.train.convert(Transformer(512, 256).to(ids.device), recipe)
    optimizer = afpq.train.optimizer(Adam(net.parameters(), lr=2e-3, eps=1e-8), recipe)

    def nats(windows: Tensor) -> Tensor:
        logits = net(windows[:, :-1])
        return functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())

    final = _train(lambda indices: nats(train[indices]), optimizer, len(train), 8, epochs, 20)
    net.eval()
    with torch.no_grad():
        return Outcome(float(nats(test)), final, optimizer.skipped, optimizer.scale)


_HAS_CIFAR = (DATA / "cifar10").is_dir

# "small steps": those that weights of 16 bits lose, unless rounding is stochastic.
TASKS = {
    task.name: task
    for task in (
        Task("mnist", "top-1 %", True, 3, run_mnist, lambda: True),
        Task("mnist_small_steps", "top-1 %", True, 3, partial(run_mnist, rate=1e-3), lambda: True),
        Task("cifar10", "top-1 %", True, 12, run_cifar, _HAS_CIFAR),
        Task("cifar10_small_steps", "top-1 %", True, 12, partial(run_cifar, rate=3e-3), _HAS_CIFAR),
        Task("stories", "nats/token", False, 12, run_stories, (DATA / "tinystories").is_dir),
    )
}
