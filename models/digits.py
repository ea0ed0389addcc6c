"""What both training scripts share: the images, the training loop, the export.

The images are scikit-learn's `load_digits`: 1797 real handwritten digits of 8x8 pixels, 17 grey levels. They are
enlarged to 28x28 (bilinear) and rounded back to 17 levels in 0..1. Every fifth image is held out. The networks
themselves are in `train_lenet5.py` and `train_resnet.py`.
"""

from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

FOLDER = Path(__file__).parent
IMAGE_SIZE = 28
GREY_LEVELS = 16
NUM_CALIBRATION = 128
BATCH = 32
EPOCHS = 40
OPSET = 17


def load_images() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images and labels, held-out images and labels: float32 [N, 1, 28, 28] in 0..1, int64 [N]."""
    digits = load_digits()
    small = torch.tensor(digits.images, dtype=torch.float32)[:, None]
    large = nn.functional.interpolate(small, size=IMAGE_SIZE, mode="bilinear", align_corners=False)
    images = large.round() / GREY_LEVELS
    labels = torch.tensor(digits.target, dtype=torch.int64)
    held_out = torch.arange(len(labels)) % 5 == 0
    return images[~held_out], labels[~held_out], images[held_out], labels[held_out]


def save_images(folder: Path = FOLDER) -> None:
    """Writes `digits_calibration.npz` (from the training part) and `digits_evaluation.npz` (held out).

    The keys are the models' input name and `labels`, so the files go straight into `--calib` and `--data`.
    """
    train_x, train_y, test_x, test_y = load_images()
    chosen = torch.arange(NUM_CALIBRATION) * len(train_y) // NUM_CALIBRATION
    for name, x, y in [
        ("calibration", train_x[chosen], train_y[chosen]),
        ("evaluation", test_x, test_y),
    ]:
        np.savez_compressed(folder / f"digits_{name}.npz", input=x.numpy(), labels=y.numpy())


def train(model: nn.Module, *, epochs: int = EPOCHS) -> float:
    """Trains in place with shifts of up to two pixels as augmentation; returns the held-out accuracy."""
    train_x, train_y, test_x, test_y = load_images()
    generator = torch.Generator().manual_seed(0)
    steps = -(-len(train_y) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=epochs * steps)
    model.train()
    for _ in range(epochs):
        order = torch.randperm(len(train_y), generator=generator)
        for batch in order.split(BATCH):
            shift = torch.randint(-2, 3, (2,), generator=generator).tolist()
            images = torch.roll(train_x[batch], shift, dims=(2, 3))
            loss = nn.functional.cross_entropy(model(images), train_y[batch], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()
    with torch.no_grad():
        return float((model(test_x).argmax(1) == test_y).float().mean())


def export(model: nn.Module, path: Path, *, fold_batch_norm: bool = True) -> None:
    """Writes ONNX: input `input` [batch, 1, 28, 28], output `logits` [batch, 10].

    With `fold_batch_norm` false the BatchNormalization nodes stay in the graph, in their inference form.
    """
    # TrainingMode.PRESERVE keeps the exporter from folding; the model is in eval mode, so the nodes are inference ones.
    mode = torch.onnx.TrainingMode.EVAL if fold_batch_norm else torch.onnx.TrainingMode.PRESERVE
    torch.onnx.export(
        model,
        (torch.zeros(1, 1, IMAGE_SIZE, IMAGE_SIZE),),
        str(path),
        input_names=["input"],
        output_names=["logits"],
        dynamic_axes={"input": {0: "batch"}, "logits": {0: "batch"}},
        opset_version=OPSET,
        do_constant_folding=fold_batch_norm,
        training=mode,
        dynamo=False,
    )


def begin() -> None:
    """Makes a run repeatable: one thread, fixed seed, deterministic algorithms."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
