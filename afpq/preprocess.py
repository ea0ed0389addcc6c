"""How images become a network's input: a small text specification, parsed and applied.

    imagenet-torchvision                                   a preset
    unit,channels=bgr                                      a preset with one thing changed
    resize=256,crop=224,mean=0.485/0.456/0.406,std=0.229/0.224/0.225,layout=nchw,channels=rgb,scale=255

    resize    256: the shorter side; 224x192: exactly, height x width (bilinear)
    crop      224 or 224x192: the centre
    channels  rgb, bgr or gray: the order the network sees
    scale     x / scale, then (x - mean) / std; one number, or one for each channel in
              that order
    layout    nchw or nhwc

What a text leaves open is taken from the model's input by `complete`: the layout, gray for one
channel and, with a preset, the size. An image that already has the size of the crop is neither
resized nor cropped.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from afpq.errors import DataError, RuntimeUnavailableError

__all__ = [
    "PRESETS",
    "Preprocess",
    "complete",
    "parse_preprocess",
    "preprocess_image",
    "read_image",
]

_TORCHVISION = "scale=255,mean=0.485/0.456/0.406,std=0.229/0.224/0.225,channels=rgb"
PRESETS = {
    "imagenet-torchvision": _TORCHVISION,
    "imagenet-tensorflow": "scale=127.5,mean=1,channels=rgb",
    "imagenet-caffe": "mean=103.939/116.779/123.68,channels=bgr",
    "raw": "",
    "unit": "scale=255",
}
_DEFAULT_CROP = 224  # of ImageNet networks whose input size is open
_RESIZE_TO_CROP = 256 / 224


@dataclass(frozen=True)
class Preprocess:
    """A parsed specification, None where it is left open; `str()` writes it as text again."""

    preset: str | None = None
    resize: tuple[int, ...] | None = None  # (shorter side,) or (height, width)
    crop: tuple[int, int] | None = None  # height, width
    scale: float = 1.0
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    channels: str | None = None
    layout: str | None = None

    def __str__(self) -> str:
        parts = []
        if self.resize is not None:
            parts.append(f"resize={'x'.join(map(str, self.resize))}")
        if self.crop is not None:
            square = self.crop[0] == self.crop[1]
            parts.append(f"crop={self.crop[0] if square else 'x'.join(map(str, self.crop))}")
        parts.append(f"mean={'/'.join(f'{v:.9g}' for v in self.mean)}")
        parts.append(f"std={'/'.join(f'{v:.9g}' for v in self.std)}")
        parts += [f"{k}={v}" for k in ("layout", "channels") if (v := getattr(self, k)) is not None]
        return ",".join([*parts, f"scale={self.scale:.9g}"])


def parse_preprocess(text: str) -> Preprocess:
    """Reads a specification (see the module's head).

    Raises:
        DataError: a preset, key or value that does not exist.
    """
    spec = Preprocess()
    for part in filter(None, (p.strip() for p in text.split(","))):
        key, equals, value = part.partition("=")
        if not equals:
            if part not in PRESETS:
                raise DataError(
                    f"preprocess {part!r} is not one of {', '.join(PRESETS)}, nor key=value"
                )
            spec = replace(parse_preprocess(PRESETS[part]), preset=part)
        elif key in _PARSERS:
            spec = replace(spec, **{key: _PARSERS[key](key, value)})
        else:
            raise DataError(f"preprocess key {key!r} is not one of {', '.join(sorted(_PARSERS))}")
    return spec


def complete(spec: Preprocess, shape: tuple[int | str | None, ...], name: str) -> Preprocess:
    """Fills in what the specification leaves open from the shape of the model's input `name`.

    Raises:
        DataError: the input takes no images, or the numbers of channels differ.
    """
    if len(shape) != 4:
        raise DataError(f"input {name!r} of shape {list(shape)} takes no images, it needs 4 axes")
    last = shape[3] in (1, 3) and shape[1] not in (1, 3)
    layout = spec.layout or ("nhwc" if last else "nchw")
    depth, height, width = shape[1:] if layout == "nchw" else (shape[3], *shape[1:3])
    channels = spec.channels or ("gray" if depth == 1 else "rgb")
    num_channels = 1 if channels == "gray" else 3
    if isinstance(depth, int) and depth != num_channels:
        raise DataError(
            f"input {name!r} of shape {list(shape)} has {depth} channels in layout {layout}, "
            f"but channels={channels} gives {num_channels}"
        )
    for key, values in (("mean", spec.mean), ("std", spec.std)):
        if len(values) not in (1, num_channels):
            raise DataError(
                f"preprocess {key} has {len(values)} values for {num_channels} channels"
            )
    spec = replace(spec, layout=layout, channels=channels)
    size = (height, width) if isinstance(height, int) and isinstance(width, int) else None
    return _complete_size(spec, size)


def _complete_size(spec: Preprocess, size: tuple[int, int] | None) -> Preprocess:
    if spec.preset is None or spec.crop is not None:
        return spec
    if not spec.preset.startswith("imagenet"):
        return spec if size is None or spec.resize is not None else replace(spec, resize=size)
    crop = size or (_DEFAULT_CROP, _DEFAULT_CROP)
    resize = spec.resize or (round(min(crop) * _RESIZE_TO_CROP),)
    return replace(spec, crop=crop, resize=resize)


def read_image(path: Path, channels: str) -> npt.NDArray[np.uint8]:
    """Decodes a file: uint8 [height, width, 3], or [height, width, 1] for channels "gray".

    Raises:
        DataError: the file is no readable image.
    """
    pillow = _pillow()
    try:
        with pillow.open(path) as image:
            pixels = np.asarray(image.convert("L" if channels == "gray" else "RGB"))
    except (OSError, ValueError, SyntaxError) as error:
        raise DataError(f"{path} is not a readable image: {error}") from error
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def preprocess_image(
    spec: Preprocess, pixels: npt.NDArray[np.uint8], where: str
) -> npt.NDArray[np.float32]:
    """One image, uint8 [height, width, RGB or gray], to the input without its batch axis.

    Raises:
        DataError: the image `where` is smaller than the crop.
    """
    pixels = _crop(spec, _resize(spec, pixels), where)
    if spec.channels == "gray" and pixels.shape[2] == 3:
        pixels = np.asarray(_pillow().fromarray(pixels).convert("L"))[:, :, None]
    elif spec.channels != "gray" and pixels.shape[2] == 1:
        pixels = np.repeat(pixels, 3, axis=2)
    if spec.channels == "bgr":
        pixels = pixels[:, :, ::-1]
    x = pixels.astype(np.float32) / np.float32(spec.scale)
    x = (x - np.array(spec.mean, np.float32)) / np.array(spec.std, np.float32)
    return np.ascontiguousarray(x.transpose(2, 0, 1) if spec.layout == "nchw" else x)


def _resize(spec: Preprocess, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    height, width = pixels.shape[:2]
    if spec.resize is None or (height, width) == spec.crop:
        return pixels
    if len(spec.resize) == 2:
        new = (spec.resize[0], spec.resize[1])
    else:  # the longer side is truncated, as torchvision does
        short = spec.resize[0]
        tall = height > width
        new = (short * height // width, short) if tall else (short, short * width // height)
    if new == (height, width):
        return pixels
    pillow = _pillow()
    source = pillow.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    result = np.asarray(source.resize((new[1], new[0]), pillow.Resampling.BILINEAR))
    return result[:, :, None] if result.ndim == 2 else result


def _crop(spec: Preprocess, pixels: npt.NDArray[np.uint8], where: str) -> npt.NDArray[np.uint8]:
    height, width = pixels.shape[:2]
    if spec.crop is None or (height, width) == spec.crop:
        return pixels
    if height < spec.crop[0] or width < spec.crop[1]:
        raise DataError(
            f"{where} has {height}x{width} pixels (height x width), "
            f"less than the crop {spec.crop[0]}x{spec.crop[1]}"
        )
    top, left = round((height - spec.crop[0]) / 2), round((width - spec.crop[1]) / 2)
    return pixels[top : top + spec.crop[0], left : left + spec.crop[1]]


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise RuntimeUnavailableError(
            "images need Pillow, which is not installed: pip install 'afpq[images]'"
        ) from error
    return Image


def _sizes(key: str, text: str) -> tuple[int, ...]:
    match = re.fullmatch(r"([1-9]\d{0,4})(?:x([1-9]\d{0,4}))?", text)
    if match is None:
        raise DataError(f"preprocess {key}={text} is not a size; write {key}=224 or {key}=224x192")
    return tuple(int(side) for side in match.groups() if side)


def _crop_sizes(key: str, text: str) -> tuple[int, ...]:
    sides = _sizes(key, text)
    return sides if len(sides) == 2 else sides * 2


def _numbers(key: str, text: str) -> tuple[float, ...]:
    try:
        values = tuple(float(part) for part in text.split("/"))
    except ValueError:
        values = ()
    if not values or not np.isfinite(values).all() or (key != "mean" and min(values) <= 0):
        rule = "numbers" if key == "mean" else "positive numbers"
        raise DataError(f"preprocess {key}={text} is not {rule} such as {key}=0.5 or {key}=1/2/3")
    return values


def _number(key: str, text: str) -> float:
    values = _numbers(key, text)
    if len(values) != 1:
        raise DataError(f"preprocess {key}={text} must be one number")
    return values[0]


def _one_of(*choices: str) -> Callable[[str, str], str]:
    def parse(key: str, text: str) -> str:
        if text not in choices:
            raise DataError(f"preprocess {key}={text} is not one of {', '.join(choices)}")
        return text

    return parse


_PARSERS: dict[str, Callable[[str, str], Any]] = {
    "resize": _sizes,
    "crop": _crop_sizes,
    "scale": _number,
    "mean": _numbers,
    "std": _numbers,
    "channels": _one_of("rgb", "bgr", "gray"),
    "layout": _one_of("nchw", "nhwc"),
}
