"""Arrays against what a model expects: content, order, checks, memory; and parts of data."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from samples import FEEDS, FIXED, TOKENS, VECTOR, joined, token_batches, vectors

from afpq._feeds import Batching, as_inputs, batching_of
from afpq.data import open_data
from afpq.errors import DataError

F32 = np.dtype(np.float32)
I64 = np.dtype(np.int64)


# --- inputs ---


@pytest.mark.parametrize(
    ("shapes", "expected"),
    [
        ([("N", 4)], Batching("any")),
        ([(None, 4), ("N", "seq")], Batching("any")),
        ([(2, 4), (2, 3)], Batching("fixed", 2)),
        ([(1, 3, 8, 8)], Batching("fixed", 1)),
        ([("N", 4), (2, "N", 3)], Batching("feed")),
        ([("N", 4), ()], Batching("feed")),
        ([(1, 4), (2, 1, 3)], Batching("feed")),
    ],
)
def test_batching_follows_from_the_first_axes(shapes: list[Any], expected: Batching) -> None:
    inputs = as_inputs((f"x{i}", "float32", shape) for i, shape in enumerate(shapes))
    assert batching_of(inputs) == expected


def test_inputs_are_read_from_tuples_objects_and_onnxruntime_types() -> None:
    class NodeArg:
        name, type, shape = "x", "tensor(float)", ["N", 4]

    class Info:
        name, dtype, shape = "x", "float32", ("N", 4)

    assert as_inputs([NodeArg()]) == as_inputs([Info()]) == as_inputs(VECTOR)
    assert as_inputs(VECTOR) == (("x", F32, ("N", 4)),)


@pytest.mark.parametrize("dtype", ["str", "tensor(string)", "unknown"])
def test_inputs_of_other_types_are_errors(dtype: str) -> None:
    with pytest.raises(DataError, match=r"input 'x' has type .*, which is not supported"):
        as_inputs([("x", dtype, ("N",))])


def test_a_model_without_inputs_takes_no_data() -> None:
    with pytest.raises(DataError, match="the model has no inputs"):
        open_data(vectors(1), [])


# --- arrays ---


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_an_npz_gives_its_samples_in_order(tmp_path: Path, save: Any) -> None:
    save(tmp_path / "d.npz", x=vectors(7), labels=np.arange(7))
    data = open_data(tmp_path / "d.npz", VECTOR)
    assert (data.names, data.num_samples) == (("x",), 7)
    assert [len(feed["x"]) for feed in data.batches(3)] == [3, 3, 1]
    np.testing.assert_array_equal(joined(data, "x", 3), vectors(7))
    np.testing.assert_array_equal(data.labels, np.arange(7))


def test_an_uncompressed_npz_is_memory_mapped(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=np.asfortranarray(vectors(7)), labels=np.arange(7))
    from afpq._array_files import load_npz

    arrays = load_npz(tmp_path / "d.npz")
    assert isinstance(arrays["x"], np.memmap)
    np.testing.assert_array_equal(arrays["x"], vectors(7))
    np.testing.assert_array_equal(arrays["labels"], np.arange(7))


def test_data_is_read_again_on_every_pass(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=vectors(5))
    data = open_data(str(tmp_path / "d.npz"), VECTOR)
    np.testing.assert_array_equal(joined(data, "x"), joined(data, "x", 2))
    assert data.labels is None


@pytest.mark.parametrize("key", ["X", "image"])
def test_a_wrong_key_names_expected_and_found(tmp_path: Path, key: str) -> None:
    np.savez(tmp_path / "d.npz", **{key: vectors(3)})  # type: ignore[arg-type]
    with pytest.raises(DataError, match=rf"has the keys {key}; the model expects x \(and labels"):
        open_data(tmp_path / "d.npz", VECTOR)


def test_an_unknown_extra_key_is_an_error() -> None:
    with pytest.raises(DataError, match="has the keys x, label; the model expects x"):
        open_data({"x": vectors(3), "label": np.arange(3)}, VECTOR)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04broken", b"plain text"])
def test_a_broken_npz_is_one_clear_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "d.npz").write_bytes(content)
    with pytest.raises(DataError, match=r"d.npz is not a readable .npz file"):
        open_data(tmp_path / "d.npz", VECTOR)


def test_a_truncated_npz_is_one_clear_error(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=vectors(100))
    whole = (tmp_path / "d.npz").read_bytes()
    (tmp_path / "d.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"d.npz is not a readable .npz file"):
        open_data(tmp_path / "d.npz", VECTOR)


def test_an_npz_of_python_objects_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=np.array([None, "a"], object))
    with pytest.raises(DataError, match=r"d.npz is not a readable .npz file"):
        open_data(tmp_path / "d.npz", VECTOR)


def test_a_missing_file_says_what_data_can_be() -> None:
    with pytest.raises(DataError, match=r"nothing.npz does not exist; data is an .npz file, a fol"):
        open_data("nothing.npz", VECTOR)


def test_a_file_of_another_kind_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_text("1,2")
    with pytest.raises(DataError, match=r"d.csv is neither an .npz nor an .npy file"):
        open_data(tmp_path / "d.csv", VECTOR)


@pytest.mark.parametrize("shape", [(3,), (3, 5), (3, 4, 1)])
def test_a_wrong_shape_names_both(shape: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match=r"input 'x' has shape \[3.*\], the model expects \[N, 4\]"):
        open_data({"x": np.zeros(shape, np.float32)}, VECTOR)


def test_different_numbers_of_samples_are_an_error() -> None:
    arrays = {"ids": np.zeros((3, 5), np.int64), "mask": np.zeros((2, 5), np.int64)}
    with pytest.raises(DataError, match="different numbers of samples: 3 of ids, 2 of mask"):
        open_data(arrays, TOKENS)


def test_no_samples_are_an_error() -> None:
    with pytest.raises(DataError, match="has 0 samples; at least one is needed"):
        open_data(vectors(0), VECTOR)


@pytest.mark.parametrize("labels", [np.zeros(2, int), np.zeros((3, 1), int), np.zeros(3)])
def test_labels_must_be_one_integer_a_sample(labels: npt.NDArray[Any]) -> None:
    with pytest.raises(DataError, match="labels must be 3 integers, one a sample"):
        open_data({"x": vectors(3), "labels": labels}, VECTOR)


def test_a_model_may_have_an_input_called_labels() -> None:
    inputs = [*VECTOR, ("labels", "int64", ("N",))]
    data = open_data({"x": vectors(3), "labels": np.arange(3)}, inputs)
    assert data.labels is None
    assert data.names == ("x", "labels")


@pytest.mark.parametrize(
    ("have", "want"),
    [("float64", "float32"), ("float16", "float32"), ("float32", "float16"), ("int32", "int64"),
     ("uint16", "int64"), ("int64", "int32"), ("bool", "int64")],
)  # fmt: skip
def test_casts_that_keep_the_meaning_are_made(have: str, want: str) -> None:
    values = np.array([[0, 1], [1, 0]]).astype(have)
    data = open_data(values, [("x", want, ("N", 2))])
    got = joined(data, "x")
    assert got.dtype == want
    np.testing.assert_array_equal(got, values)


@pytest.mark.parametrize(
    ("have", "want", "message"),
    [
        ("uint8", "float32", "the model expects float32; if these are images, name their preproc"),
        ("int64", "float32", "the model expects float32; convert it to float"),
        ("float32", "int64", "has type float32, the model expects int64"),
        ("int64", "bool", "has type int64, the model expects bool"),
        ("<U3", "float32", "has type <U3, the model expects float32"),
    ],
)
def test_casts_that_change_the_meaning_are_errors(have: str, want: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_data(np.zeros((2, 2)).astype(have), [("x", want, ("N", 2))])


@pytest.mark.parametrize(
    ("value", "have", "want"),
    [(1e39, "float64", "float32"), (2**31, "int64", "int32"), (-1, "int64", "uint8")],
)
def test_values_beyond_the_type_of_the_input_are_errors(value: Any, have: str, want: str) -> None:
    data = open_data(np.array([[value]], have), [("x", want, ("N", 1))])
    with pytest.raises(DataError, match=f"input 'x' has values beyond {want}"):
        next(data.batches())


def test_infinity_in_the_data_survives_a_cast() -> None:
    data = open_data(np.array([[np.inf]]), [("x", "float32", ("N", 1))])
    assert next(data.batches())["x"][0, 0] == np.inf


def test_an_array_is_enough_for_a_model_with_one_input(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", vectors(3))
    np.testing.assert_array_equal(joined(open_data(vectors(3), VECTOR), "x"), vectors(3))
    np.testing.assert_array_equal(joined(open_data(tmp_path / "x.npy", VECTOR), "x"), vectors(3))
    with pytest.raises(DataError, match="is one array, but the model has the inputs ids, mask"):
        open_data(vectors(3), TOKENS)


def test_a_fixed_batch_is_always_given_whole() -> None:
    data = open_data({"x": vectors(7), "labels": np.arange(7)}, FIXED)
    assert data.num_samples == 6
    assert [len(feed["x"]) for feed in data.batches(1)] == [2, 2, 2]
    assert [len(feed["x"]) for feed in data.batches(100)] == [2, 2, 2]
    np.testing.assert_array_equal(joined(data, "x"), vectors(6))
    np.testing.assert_array_equal(data.labels, np.arange(6))


def test_too_few_samples_for_a_fixed_batch_are_an_error() -> None:
    with pytest.raises(DataError, match="has 1 samples; the model takes 2 at once"):
        open_data(vectors(1), FIXED)


def test_a_model_that_takes_complete_feeds_gets_one_a_sample() -> None:
    state = np.arange(5 * 6, dtype=np.float32).reshape(5, 2, 1, 3)
    arrays = {"x": vectors(5)[:, None], "state": state, "rate": np.arange(5)}
    data = open_data(arrays, FEEDS)
    feeds = list(data.batches(32))
    assert [feed["x"].shape for feed in feeds] == [(1, 4)] * 5
    assert feeds[3]["rate"].shape == ()
    assert feeds[3]["rate"] == 3
    np.testing.assert_array_equal(feeds[3]["state"], state[3])


# --- parts ---


@pytest.mark.parametrize(("held_out", "count"), [(0.25, 5), (4, 4), (1, 1), (0.01, 1)])
def test_a_split_is_disjoint_complete_and_repeatable(held_out: float | int, count: int) -> None:
    data = open_data({"x": vectors(20), "labels": np.arange(20)}, VECTOR)
    rest, held = data.split(held_out)
    assert held.num_samples == count
    assert rest.labels is not None
    assert held.labels is not None
    assert sorted([*rest.labels, *held.labels]) == list(range(20))
    np.testing.assert_array_equal(joined(held, "x"), vectors(20)[held.labels])
    assert data.split(held_out)[1].fingerprint() == held.fingerprint()


@pytest.mark.parametrize("held_out", [0, 20, 30, 0.99])
def test_a_split_with_an_empty_part_is_an_error(held_out: float | int) -> None:
    with pytest.raises(DataError, match=f"cannot hold out {held_out} of 20 samples"):
        open_data(vectors(20), VECTOR).split(held_out)


def test_a_split_of_batches_cuts_through_them() -> None:
    data = open_data(token_batches((3, 5), (3, 7)), TOKENS)
    rest, held = data.split(2)
    assert [feed["ids"].shape for feed in held.batches()] == [(1, 5), (1, 7)]
    assert [feed["ids"].shape for feed in rest.batches()] == [(2, 5), (2, 7)]


def test_a_split_keeps_fixed_batches_whole() -> None:
    rest, held = open_data(vectors(12), FIXED).split(3)
    assert (rest.num_samples, held.num_samples) == (8, 4)


def test_a_limit_spreads_over_the_data() -> None:
    data = open_data(vectors(10), VECTOR, limit=2)
    np.testing.assert_array_equal(joined(data, "x"), vectors(10)[[2, 7]])
    assert open_data(data, VECTOR) is data
    assert open_data(data, VECTOR, limit=50).num_samples == 2
    with pytest.raises(DataError, match="a limit of 0 samples leaves no data"):
        open_data(vectors(10), VECTOR, limit=0)


def test_a_fingerprint_changes_with_content_and_number() -> None:
    plain = open_data(vectors(5), VECTOR).fingerprint()
    assert plain == open_data({"x": vectors(5)}, VECTOR).fingerprint()
    assert len({plain, open_data(vectors(6), VECTOR).fingerprint(), _changed()}) == 3
    assert len(plain) == 64


def _changed() -> str:
    values = vectors(5)
    values[4, 3] += 1
    return open_data(values, VECTOR).fingerprint()
