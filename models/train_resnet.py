"""Trains a small residual network with batch norm on handwritten digits and writes it twice.

`resnet_digits.onnx` has batch norm folded into the convolutions; `resnet_digits-bn.onnx` keeps the
BatchNormalization nodes. Both compute the same function.

Run: python models/train_resnet.py
"""

import argparse
from pathlib import Path

from digits import EPOCHS, FOLDER, begin, export, train
from torch import Tensor, nn

CHANNELS = (16, 32, 64)


class Block(nn.Module):
    """Two 3x3 convolutions with batch norm, and a 1x1 convolution as the shortcut where the shape changes."""

    def __init__(self, num_inputs: int, num_outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(num_inputs, num_outputs, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(num_outputs),
            nn.ReLU(),
            nn.Conv2d(num_outputs, num_outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(num_outputs),
        )
        same = stride == 1 and num_inputs == num_outputs
        self.shortcut = (
            nn.Identity()
            if same
            else nn.Sequential(
                nn.Conv2d(num_inputs, num_outputs, 1, stride, bias=False),
                nn.BatchNorm2d(num_outputs),
            )
        )
        self.activation = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.body(x) + self.shortcut(x))


def resnet() -> nn.Module:
    """A stem, three residual blocks at 28, 14 and 7 pixels, average pooling, one linear layer."""
    return nn.Sequential(
        nn.Conv2d(1, CHANNELS[0], 3, padding=1, bias=False),
        nn.BatchNorm2d(CHANNELS[0]),
        nn.ReLU(),
        Block(CHANNELS[0], CHANNELS[0], 1),
        Block(CHANNELS[0], CHANNELS[1], 2),
        Block(CHANNELS[1], CHANNELS[2], 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(CHANNELS[2], 10),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--output", type=Path, default=FOLDER)
    arguments = parser.parse_args()
    begin()
    model = resnet()
    accuracy = train(model, epochs=arguments.epochs)
    export(model, arguments.output / "resnet_digits.onnx")
    export(model, arguments.output / "resnet_digits-bn.onnx", fold_batch_norm=False)
    print(f"resnet_digits.onnx, resnet_digits-bn.onnx: held-out accuracy {accuracy:.4f}")


if __name__ == "__main__":
    main()
