"""Batches that Python code yields against what a model expects."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from samples import FIXED, TOKENS, VECTOR, joined, token_batches, vectors

from afpq.data import open_data
from afpq.errors import DataError


def test_sequence_lengths_may_differ_from_batch_to_batch() -> None:
    data = open_data(token_batches((2, 5), (3, 7)), TOKENS)
    assert data.num_samples == 5
    assert [feed["ids"].shape for feed in data.batches(2)] == [(2, 5), (2, 7), (1, 7)]


def test_a_generator_is_kept_and_read_again() -> None:
    data = open_data((item for item in token_batches((2, 5), (1, 4))), TOKENS)
    assert len(list(data.batches())) == len(list(data.batches())) == 2


def test_a_limit_ends_an_endless_generator() -> None:
    def endless() -> Iterator[npt.NDArray[np.float32]]:
        while True:
            yield vectors(4)

    assert open_data(endless(), VECTOR, limit=6).num_samples == 6
    assert open_data(endless, VECTOR, limit=6).num_samples == 6
    assert sum(len(f["x"]) for f in open_data(endless, VECTOR, limit=6).batches()) == 6


def test_batches_of_arrays_are_enough_for_one_input() -> None:
    np.testing.assert_array_equal(
        joined(open_data([vectors(3), vectors(2)], VECTOR), "x"),
        np.concatenate([vectors(3), vectors(2)]),
    )


def test_labels_may_come_with_the_batches() -> None:
    items = [{"x": vectors(2), "labels": np.array([3, 4])}, {"x": vectors(1), "labels": [5]}]
    np.testing.assert_array_equal(open_data(items, VECTOR).labels, [3, 4, 5])
    with pytest.raises(DataError, match="yields labels in 1 of 2 batches"):
        open_data([items[0], {"x": vectors(1)}], VECTOR)


def test_arrays_may_come_in_the_order_of_the_inputs_and_labels_last() -> None:
    ids, mask = np.ones((2, 3), np.int64), np.zeros((2, 3), np.int64)
    data = open_data([(ids, mask), [ids, mask]], TOKENS)
    for feed in data.batches(2):
        np.testing.assert_array_equal(feed["ids"], ids)
        np.testing.assert_array_equal(feed["mask"], mask)
    data = open_data([(vectors(2), np.array([3, 4]))], VECTOR)
    np.testing.assert_array_equal(joined(data, "x"), vectors(2))
    np.testing.assert_array_equal(data.labels, [3, 4])


def test_loaders_and_tensors_of_torch_are_data() -> None:
    torch = pytest.importorskip("torch")
    loaders = torch.utils.data
    x, labels = torch.from_numpy(vectors(7)), torch.arange(7)
    whole = open_data(x, VECTOR)
    alone = open_data(loaders.DataLoader(loaders.TensorDataset(x), batch_size=3), VECTOR)
    assert whole.num_samples == alone.num_samples == 7
    np.testing.assert_array_equal(joined(whole, "x"), vectors(7))
    np.testing.assert_array_equal(joined(alone, "x"), vectors(7))

    shuffled = loaders.DataLoader(loaders.TensorDataset(x, labels), batch_size=3, shuffle=True)
    data = open_data(shuffled, VECTOR)
    # Labels were read in one pass and samples in two others: they must belong together.
    for _ in range(2):
        np.testing.assert_array_equal(joined(data, "x"), vectors(7)[data.labels])


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([], "yields no samples"),
        ([(1, 2)], "batch 0 of the data is a tuple; it must be a dict of arrays with the keys x"),
        ([{"y": vectors(1)}], "batch 0 of the data has the keys y; the model expects x"),
        ([vectors(1), vectors(1)[:, :3]], r"batch 1 of the data: input 'x' has shape \[1, 3\]"),
        ([vectors(1).astype(np.uint8)], "the model expects float32; if these are images"),
        (7, "the data is a int, which yields no batches"),
    ],
)
def test_a_wrong_batch_is_named(items: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_data(items, VECTOR)


def test_batches_of_a_fixed_size_must_have_it() -> None:
    assert open_data([vectors(2), vectors(2)], FIXED).num_samples == 4
    with pytest.raises(DataError, match=r"has shape \[3, 4\], the model expects \[2, 4\]"):
        open_data([vectors(3)], FIXED)


MODULE = """
import numpy as np

def good():
    for length in (3, 5):
        yield {"ids": np.zeros((2, length), np.int64), "mask": np.ones((2, length), np.int64)}

def bad():
    yield from good()
    raise ValueError("no such file")
"""


def test_a_function_of_a_module_is_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_calibration.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    data = open_data("my_calibration:good", TOKENS)
    assert [feed["ids"].shape for feed in data.batches()] == [(2, 3), (2, 5)]
    with pytest.raises(DataError, match="my_calibration:bad failed: ValueError: no such file"):
        open_data("my_calibration:bad", TOKENS)
    with pytest.raises(DataError, match="has no function 'other'; it has good, bad"):
        open_data("my_calibration:other", TOKENS)


def test_a_module_that_cannot_be_imported_is_named() -> None:
    message = "cannot import 'no_such_module' of no_such_module:f: ModuleNotFoundError"
    with pytest.raises(DataError, match=message):
        open_data("no_such_module:f", VECTOR)
