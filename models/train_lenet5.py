"""Trains LeNet-5 (with ReLU and max pooling, no batch norm) on handwritten digits and writes `lenet5_digits.onnx`.

Run: python models/train_lenet5.py
"""

import argparse
from pathlib import Path

from digits import EPOCHS, FOLDER, begin, export, save_images, train
from torch import nn


def lenet5() -> nn.Module:
    """The five layers with weights: two convolutions, three linear layers; 61,706 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(400, 120),
        nn.ReLU(),
        nn.Linear(120, 84),
        nn.ReLU(),
        nn.Linear(84, 10),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--output", type=Path, default=FOLDER)
    arguments = parser.parse_args()
    begin()
    model = lenet5()
    accuracy = train(model, epochs=arguments.epochs)
    export(model, arguments.output / "lenet5_digits.onnx")
    save_images(arguments.output)
    print(f"lenet5_digits.onnx: held-out accuracy {accuracy:.4f}")


if __name__ == "__main__":
    main()
