"""The networks, each with samples to calibrate on and others to be judged by.

The network in models/ is always there; the others are read from a folder of real models and data.
"""

import csv
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

__all__ = ["PAIRS", "Case", "cases", "cifar"]

ROOT = Path(__file__).resolve().parents[2]
IMAGENET = "imagenet-torchvision"
MEAN, STD = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])
PAIRS = 20  # sentence pairs a batch
CALIBRATION_PAIRS, PAIR_SEED = 200, 0


@dataclass(frozen=True)
class Case:
    """A network and its data, as `afpq.data.open_data` takes it.

    Tasks: `classes`; `tokens`, a language model; `sentences`, an encoder of the first then the second sentences of
    `PAIRS` pairs, whose human scores are the labels.
    """

    name: str
    model: Path
    calibration: object
    evaluation: object
    preprocess: str | None = None
    labels: np.ndarray | None = None
    task: str = "classes"


def cases(materials: Path, folder: Path) -> dict[str, Callable[[], Case]]:
    """Every network there is, by name, loaded when it is called; `folder` takes files that live as long as the run."""
    makers: dict[str, Callable[[str], Case]] = {"resnet_digits": digits}
    if (materials / "models").is_dir():
        models, data = materials / "models", materials / "data"
        makers |= {
            "resnet20_cifar10": partial(
                resnet20, model=models / "cifar10/resnet20.onnx", data=data / "cifar10"
            ),
            "kws_dscnn": partial(
                dscnn, model=models / "tinyml/kws_dscnn.onnx", words=data / "kws/mfcc.npz"
            ),
        }
        makers |= {
            name: partial(imagenet, model=models / f"imagenet/{name}.onnx", data=data / "imagenet")
            for name in ("squeezenet1_1", "mobilenetv2_tv")
        }
        makers |= {
            "stories260k": partial(
                stories, model=models / "lm/stories260k.onnx", text=data / "tinystories/text.npz"
            ),
            "minilm_stsb": partial(
                minilm, models=models / "minilm", pairs=data / "stsb/dev.npz", folder=folder
            ),
        }
    return {name: partial(make, name) for name, make in makers.items()}


def digits(name: str) -> Case:
    here = ROOT / "models"
    parts = here / "digits_calibration.npz", here / "digits_evaluation.npz"
    return Case(name, here / "resnet_digits.onnx", *parts)


def resnet20(name: str, *, model: Path, data: Path) -> Case:
    return Case(name, model, cifar(data / "train.npz", 256), cifar(data / "test.npz"))


def cifar(path: Path, samples: int | None = None) -> dict:
    """The first `samples` images (default: all) as the network takes them, and their labels."""
    with np.load(path) as arrays:
        pixels = arrays["images"][:samples].astype(np.float32)
        images = ((pixels / 255 - MEAN) / STD).transpose(0, 3, 1, 2)
        return {"input": images.copy(), "labels": arrays["labels"][:samples]}


def dscnn(name: str, *, model: Path, words: Path) -> Case:
    found = keywords(words)
    halves = [{key: value[part::2] for key, value in found.items()} for part in (0, 1)]
    return Case(name, model, *halves)


def keywords(path: Path) -> dict:
    with np.load(path) as arrays:
        steps = arrays["features_int8"].astype(np.float32) - arrays["zero_point"]
        values = steps * arrays["scale"]
        return {"input": values[:, None].astype(np.float32), "labels": arrays["labels"]}


def imagenet(name: str, *, model: Path, data: Path) -> Case:
    parts = data / "calibration", data / "evaluation"
    return Case(name, model, *parts, IMAGENET, image_labels(data / "evaluation/labels.csv"))


def image_labels(path: Path) -> np.ndarray:
    with path.open() as stream:
        found = {row["file"]: int(row["label"]) for row in csv.DictReader(stream)}
    return np.array([found[name] for name in sorted(found)])


def stories(name: str, *, model: Path, text: Path) -> Case:
    """Windows of 256 tokens; every third calibrates."""
    with np.load(text) as arrays:
        ids = arrays["ids"].astype(np.int64)
    chosen = np.arange(len(ids)) % 3 == 0
    return Case(name, model, {"input_ids": ids[chosen]}, {"input_ids": ids[~chosen]}, task="tokens")


def minilm(name: str, *, models: Path, pairs: Path, folder: Path) -> Case:
    """Pairs of the benchmark STS-B; a random 200 calibrate."""
    with np.load(pairs) as arrays:
        order = np.random.default_rng(PAIR_SEED).permutation(len(arrays["score"]))
        rest = order[CALIBRATION_PAIRS:]
        rest = np.sort(rest[: len(rest) // PAIRS * PAIRS])
        return Case(
            name,
            float32_copy(models / "all-MiniLM-L6-v2.float16-weights.onnx", folder),
            sentence_batches(arrays, np.sort(order[:CALIBRATION_PAIRS])),
            sentence_batches(arrays, rest),
            labels=arrays["score"][rest],
            task="sentences",
        )


def sentence_batches(arrays: dict, pairs: np.ndarray) -> list[dict]:
    """Token ids and masks, cut to the longest sentence of a batch: first sentences, second ones, and so on."""
    batches = []
    for start in range(0, len(pairs), PAIRS):
        for side in "ab":
            lengths = arrays[f"len_{side}"][pairs[start : start + PAIRS]]
            ids = arrays[f"ids_{side}"][pairs[start : start + PAIRS], : lengths.max()]
            mask = np.arange(lengths.max()) < lengths[:, None]
            batches.append(
                {
                    "input_ids": ids.astype(np.int64),
                    "attention_mask": mask.astype(np.int64),
                    "token_type_ids": np.zeros(ids.shape, np.int64),
                }
            )
    return batches


def float32_copy(model: Path, folder: Path) -> Path:
    """The encoder's weights lie in the folder as float16, to be half as large."""
    network = onnx.load(model)
    for tensor in network.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT16:
            values = numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    onnx.save(network, folder / "minilm.onnx")
    return folder / "minilm.onnx"
