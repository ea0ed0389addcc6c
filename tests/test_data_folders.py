"""Folders of images and of arrays against what a model expects."""

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from samples import (
    IMAGE,
    TOKENS,
    VECTOR,
    joined,
    vectors,
    write_images,
)

from afpq.data import open_data
from afpq.errors import DataError, RuntimeUnavailableError

# --- images ---


def test_images_are_read_in_name_order_with_their_labels(tmp_path: Path) -> None:
    images = write_images(tmp_path / "i", 4)
    table = "file,label\n003.png,7\n000.png,4\n001.png,5\n002.png,6\n"
    (tmp_path / "i/labels.csv").write_text(table)
    data = open_data(tmp_path / "i", IMAGE, preprocess="raw")
    np.testing.assert_array_equal(data.labels, [4, 5, 6, 7])
    np.testing.assert_array_equal(joined(data, "input", 3), np.stack(images).transpose(0, 3, 1, 2))


def test_the_applied_preprocessing_is_known_completely(tmp_path: Path) -> None:
    write_images(tmp_path / "i", 1)
    data = open_data(tmp_path / "i", IMAGE, preprocess="imagenet-tensorflow")
    expected = "resize=9,crop=8,mean=1,std=1,layout=nchw,channels=rgb,scale=127.5"
    assert str(data.preprocess) == expected
    again = open_data(tmp_path / "i", IMAGE, preprocess=expected)
    np.testing.assert_array_equal(joined(again, "input"), joined(data, "input"))


def test_images_in_sub_folders_are_found(tmp_path: Path) -> None:
    (tmp_path / "i").mkdir()
    write_images(tmp_path / "i/b", 1)
    write_images(tmp_path / "i/a", 2)
    (tmp_path / "i/labels.csv").write_text("file,label\na/000.png,0\na/001.png,0\nb/000.png,1\n")
    data = open_data(tmp_path / "i", IMAGE, preprocess="unit")
    np.testing.assert_array_equal(data.labels, [0, 0, 1])


def test_images_without_preprocessing_are_an_error_that_lists_presets(tmp_path: Path) -> None:
    write_images(tmp_path / "i", 1)
    with pytest.raises(DataError, match="name their preprocessing, one of imagenet-torchvision, "):
        open_data(tmp_path / "i", IMAGE)


def test_an_empty_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("nothing")
    message = r"has no images \(.bmp .jpeg .jpg .png .webp\) and no .npy"
    with pytest.raises(DataError, match=message):
        open_data(tmp_path, IMAGE, preprocess="raw")


def test_a_broken_image_is_named(tmp_path: Path) -> None:
    write_images(tmp_path / "i", 2)
    (tmp_path / "i/000.png").write_bytes(b"broken")
    with pytest.raises(DataError, match=r"000.png is not a readable image"):
        open_data(tmp_path / "i", IMAGE, preprocess="raw")


def test_images_of_another_size_than_the_input_are_an_error(tmp_path: Path) -> None:
    write_images(tmp_path / "i", 2, 9)
    message = r"000.png: input 'input' has shape \[1, 3, 9, 9\], the model expects"
    with pytest.raises(DataError, match=message):
        open_data(tmp_path / "i", IMAGE, preprocess="scale=255")


def test_images_of_different_sizes_are_an_error_for_an_open_size(tmp_path: Path) -> None:
    write_images(tmp_path / "i", 2)
    Image.fromarray(np.zeros((9, 8, 3), np.uint8)).save(tmp_path / "i/001.png")
    data = open_data(tmp_path / "i", [("x", "float32", ("N", 3, "h", "w"))], preprocess="raw")
    with pytest.raises(DataError, match=r"001.png has another size than .*000.png; add resize="):
        list(data.batches())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("file,label\n000.png,1\n", "labels.csv has no row for 001.png"),
        ("file,label\n000.png,dog\n", "needs the columns file,label with integer labels"),
        ("name,class\n000.png,1\n", "needs the columns file,label with integer labels"),
    ],
)
def test_wrong_labels_are_named(tmp_path: Path, content: str, message: str) -> None:
    write_images(tmp_path / "i", 2)
    (tmp_path / "i/labels.csv").write_text(content)
    with pytest.raises(DataError, match=message):
        open_data(tmp_path / "i", IMAGE, preprocess="raw")


def test_images_are_for_models_with_one_input(tmp_path: Path) -> None:
    write_images(tmp_path / "i", 1)
    with pytest.raises(DataError, match="are for models with one input, not ids, mask"):
        open_data(tmp_path / "i", TOKENS, preprocess="raw")


def test_missing_pillow_is_reported_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_images(tmp_path / "i", 1)
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(RuntimeUnavailableError, match=r"pip install 'afpq\[images\]'"):
        open_data(tmp_path / "i", IMAGE, preprocess="raw")


@pytest.mark.parametrize("axes", [(0, 1, 2, 3), (0, 3, 1, 2)])
def test_uint8_arrays_take_preprocessing_like_images(axes: tuple[int, ...]) -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3)).astype(np.uint8)
    data = open_data({"input": images.transpose(axes)}, IMAGE, preprocess="unit")
    expected = images.transpose(0, 3, 1, 2).astype(np.float32) / np.float32(255)
    np.testing.assert_array_equal(joined(data, "input"), expected)


def test_gray_arrays_need_no_channel_axis() -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8)).astype(np.uint8)
    data = open_data(images, [("x", "float32", (1, 1, 8, 8))], preprocess="raw")
    np.testing.assert_array_equal(joined(data, "x"), images[:, None])


def test_float_arrays_take_no_preprocessing() -> None:
    with pytest.raises(DataError, match="preprocessing is for uint8 images"):
        open_data({"input": np.zeros((2, 3, 8, 8), np.float32)}, IMAGE, preprocess="unit")


def test_a_network_that_takes_bytes_gets_bytes(tmp_path: Path) -> None:
    images = write_images(tmp_path / "i", 2)
    data = open_data(tmp_path / "i", [("x", "uint8", ("N", 8, 8, 3))], preprocess="raw")
    assert next(data.batches())["x"].dtype == np.uint8
    np.testing.assert_array_equal(joined(data, "x"), images)


# --- folders of .npy ---


def test_npy_files_of_one_input_are_samples_or_batches(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", vectors(3)[0])
    np.save(tmp_path / "b.npy", vectors(3)[1:])
    data = open_data(tmp_path, VECTOR)
    assert data.num_samples == 3
    np.testing.assert_array_equal(joined(data, "x"), vectors(3))


def test_npy_files_of_several_inputs_lie_in_their_folders(tmp_path: Path) -> None:
    for index, length in enumerate([5, 3]):
        for name in ("ids", "mask"):
            (tmp_path / name).mkdir(exist_ok=True)
            np.save(tmp_path / name / f"{index}.npy", np.full(length, index))
    (tmp_path / "labels.csv").write_text("file,label\n0.npy,1\n1.npy,0\n")
    data = open_data(tmp_path, TOKENS)
    assert [feed["mask"].shape for feed in data.batches()] == [(1, 5), (1, 3)]
    np.testing.assert_array_equal(data.labels, [1, 0])


def test_npy_folders_that_do_not_match_the_inputs_are_named(tmp_path: Path) -> None:
    (tmp_path / "ids").mkdir()
    np.save(tmp_path / "ids/0.npy", np.zeros(3, np.int64))
    with pytest.raises(DataError, match="sub-folders ids; the model expects one for each input"):
        open_data(tmp_path, TOKENS)


def test_npy_folders_with_different_files_are_an_error(tmp_path: Path) -> None:
    for name, file in (("ids", "0.npy"), ("mask", "1.npy")):
        (tmp_path / name).mkdir()
        np.save(tmp_path / name / file, np.zeros(3, np.int64))
    with pytest.raises(DataError, match="ids and mask do not have the same file names"):
        open_data(tmp_path, TOKENS)


def test_a_broken_npy_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.npy").write_bytes(b"broken")
    with pytest.raises(DataError, match=r"a.npy is not a readable .npy file"):
        open_data(tmp_path, VECTOR)


def test_images_and_arrays_in_one_folder_are_ambiguous(tmp_path: Path) -> None:
    write_images(tmp_path, 2)
    np.save(tmp_path / "a.npy", vectors(1))
    with pytest.raises(DataError, match=r"has 2 images and 1 .npy files; keep one kind"):
        open_data(tmp_path, VECTOR)
