"""The preprocess specification: text, completion from the model's input, pixels."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from afpq.errors import DataError
from afpq.preprocess import (
    PRESETS,
    Preprocess,
    complete,
    parse_preprocess,
    preprocess_image,
    read_image,
)

LONG = (
    "resize=256,crop=224,mean=0.485/0.456/0.406,std=0.229/0.224/0.225,"
    "layout=nchw,channels=rgb,scale=255"
)
INPUT = ("N", 3, 224, 224)


def pixels(height: int, width: int, channels: int = 3) -> npt.NDArray[np.uint8]:
    rng = np.random.default_rng([height, width])
    return rng.integers(0, 256, (height, width, channels)).astype(np.uint8)


def test_a_long_specification_is_read_completely() -> None:
    assert parse_preprocess(LONG) == Preprocess(
        preset=None,
        resize=(256,),
        crop=(224, 224),
        scale=255,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        channels="rgb",
        layout="nchw",
    )


def test_a_specification_prints_as_it_was_written() -> None:
    assert str(parse_preprocess(LONG)) == LONG


@pytest.mark.parametrize("preset", PRESETS)
def test_a_completed_preset_prints_and_parses_to_the_same_pixels(preset: str) -> None:
    spec = complete(parse_preprocess(preset), INPUT, "x")
    again = complete(parse_preprocess(str(spec)), INPUT, "x")
    assert str(again) == str(spec)
    image = pixels(300, 280)
    np.testing.assert_array_equal(
        preprocess_image(again, image, "x"), preprocess_image(spec, image, "x")
    )


def test_torchvision_is_completed_to_its_published_sizes() -> None:
    assert str(complete(parse_preprocess("imagenet-torchvision"), INPUT, "x")) == LONG


def test_a_preset_follows_the_size_of_the_input() -> None:
    spec = complete(parse_preprocess("imagenet-torchvision"), ("N", 3, 299, 299), "x")
    assert (spec.resize, spec.crop) == ((342,), (299, 299))


def test_a_preset_can_be_changed_in_one_thing() -> None:
    spec = parse_preprocess("unit,channels=bgr")
    assert (spec.preset, spec.scale, spec.channels) == ("unit", 255, "bgr")


@pytest.mark.parametrize(
    ("shape", "layout", "channels"),
    [
        (("N", 3, 8, 8), "nchw", "rgb"),
        (("N", 8, 8, 3), "nhwc", "rgb"),
        (("N", 1, 8, 8), "nchw", "gray"),
        ((1, 8, 8, 1), "nhwc", "gray"),
        (("N", None, None, None), "nchw", "rgb"),
    ],
)
def test_layout_and_channels_come_from_the_input(
    shape: tuple[int | str | None, ...], layout: str, channels: str
) -> None:
    spec = complete(parse_preprocess("unit"), shape, "x")
    assert (spec.layout, spec.channels) == (layout, channels)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("imagenet", "preprocess 'imagenet' is not one of imagenet-torchvision, "),
        ("size=3", "preprocess key 'size' is not one of channels, crop, layout"),
        ("resize=big", "preprocess resize=big is not a size"),
        ("crop=224x", "preprocess crop=224x is not a size"),
        ("crop=0", "preprocess crop=0 is not a size"),
        ("mean=a/b", "preprocess mean=a/b is not numbers"),
        ("std=0", "preprocess std=0 is not positive numbers"),
        ("scale=1/2", "preprocess scale=1/2 must be one number"),
        ("mean=nan", "preprocess mean=nan is not numbers"),
        ("channels=rgba", "preprocess channels=rgba is not one of rgb, bgr, gray"),
        ("layout=chw", "preprocess layout=chw is not one of nchw, nhwc"),
    ],
)
def test_a_mistake_in_the_text_is_named(text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        parse_preprocess(text)


@pytest.mark.parametrize(
    ("text", "shape", "message"),
    [
        ("unit", ("N", 10), "takes no images, it needs 4 axes"),
        ("unit,channels=gray", ("N", 3, 8, 8), "has 3 channels in layout nchw, but channels=gray"),
        ("mean=1/2", ("N", 3, 8, 8), "preprocess mean has 2 values for 3 channels"),
        ("imagenet-torchvision", ("N", 1, 8, 8), "has 1 channels in layout nchw, but channels=rgb"),
    ],
)
def test_a_specification_that_does_not_fit_the_input_is_an_error(
    text: str, shape: tuple[int | str, ...], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        complete(parse_preprocess(text), shape, "x")


def test_torchvision_pixels_are_normalised_by_channel() -> None:
    image = pixels(224, 224)
    spec = complete(parse_preprocess("imagenet-torchvision"), INPUT, "x")
    mean = np.array([0.485, 0.456, 0.406], np.float32)
    std = np.array([0.229, 0.224, 0.225], np.float32)
    expected = ((image.astype(np.float32) / 255 - mean) / std).transpose(2, 0, 1)
    np.testing.assert_array_equal(preprocess_image(spec, image, "x"), expected)


def test_tensorflow_pixels_reach_from_minus_one_to_one() -> None:
    spec = complete(parse_preprocess("imagenet-tensorflow"), ("N", 2, 2, 3), "x")
    image = np.zeros((2, 2, 3), np.uint8)
    image[0] = 255
    np.testing.assert_array_equal(preprocess_image(spec, image, "x")[:, 0, 0], [1, -1])


def test_caffe_pixels_are_blue_first() -> None:
    spec = complete(parse_preprocess("imagenet-caffe"), ("N", 3, 1, 1), "x")
    image = np.array([[[10, 20, 30]]], np.uint8)
    expected = np.array([30, 20, 10], np.float32) - np.array([103.939, 116.779, 123.68], np.float32)
    np.testing.assert_array_equal(preprocess_image(spec, image, "x")[:, 0, 0], expected)


def test_resize_keeps_the_ratio_and_crop_takes_the_centre() -> None:
    image = pixels(40, 61)
    spec = complete(parse_preprocess("resize=20,crop=16"), ("N", 3, 16, 16), "x")
    resized = Image.fromarray(image).resize((30, 20), Image.Resampling.BILINEAR)
    expected = np.asarray(resized)[2:18, 7:23].transpose(2, 0, 1)
    np.testing.assert_array_equal(preprocess_image(spec, image, "x"), expected)


def test_an_image_of_the_size_of_the_crop_is_taken_as_it_is() -> None:
    image = pixels(16, 16)
    spec = complete(parse_preprocess("resize=20,crop=16"), ("N", 3, 16, 16), "x")
    np.testing.assert_array_equal(preprocess_image(spec, image, "x"), image.transpose(2, 0, 1))


def test_an_exact_resize_ignores_the_ratio() -> None:
    spec = complete(parse_preprocess("raw,layout=nhwc"), (1, 12, 10, 3), "x")
    assert preprocess_image(spec, pixels(30, 30), "x").shape == (12, 10, 3)


def test_an_image_smaller_than_the_crop_is_an_error() -> None:
    spec = complete(parse_preprocess("crop=16"), ("N", 3, 16, 16), "x")
    with pytest.raises(DataError, match=r"dog.jpg has 10x20 pixels .*less than the crop 16x16"):
        preprocess_image(spec, pixels(10, 20), "dog.jpg")


def test_gray_and_rgb_are_converted_into_each_other() -> None:
    gray = complete(parse_preprocess("raw"), ("N", 1, 4, 4), "x")
    rgb = complete(parse_preprocess("raw"), ("N", 3, 4, 4), "x")
    assert preprocess_image(gray, pixels(4, 4), "x").shape == (1, 4, 4)
    assert preprocess_image(rgb, pixels(4, 4, 1), "x").shape == (3, 4, 4)


def test_images_are_read_as_asked(tmp_path: Path) -> None:
    Image.fromarray(pixels(5, 7)).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_image(tmp_path / "a.png", "rgb"), pixels(5, 7))
    assert read_image(tmp_path / "a.png", "gray").shape == (5, 7, 1)


def test_a_file_that_is_no_image_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("not an image")
    with pytest.raises(DataError, match=r"a.png is not a readable image"):
        read_image(tmp_path / "a.png", "rgb")
