"""Data of torch programs: which forms are taken, and how they are bound to forward."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.utils.data import DataLoader, TensorDataset  # noqa: E402

from afpq._torch_data import example_of, read_samples  # noqa: E402
from afpq.errors import DataError  # noqa: E402


class Two(nn.Module):
    def forward(self, ids, mask=None, **more):
        return ids


class One(nn.Module):
    def forward(self, x):
        return x


def feeds(module, data, limit=None):
    samples = read_samples(module, data, limit)
    return [{k: v.shape for k, v in feed.items()} for feed in samples.passes()]


X = torch.arange(12.0).reshape(6, 2)
LABELS = torch.arange(6)
BATCHES = [{"x": (4, 2), "labels": (4,)}, {"x": (2, 2), "labels": (2,)}]


@pytest.mark.parametrize(
    "data",
    [X, X.numpy(), (X,), {"x": X}],
    ids=["tensor", "array", "tuple", "dictionary"],
)
def test_all_samples_at_once(data):
    samples = read_samples(One(), data, None)
    np.testing.assert_array_equal(samples.for_afpq()["x"], X.numpy())


def test_all_samples_in_a_file(tmp_path):
    np.savez(tmp_path / "data.npz", x=X.numpy(), labels=LABELS.numpy())
    samples = read_samples(One(), tmp_path / "data.npz", None)
    assert set(samples.for_afpq()) == {"x", "labels"}
    with pytest.raises(DataError, match=r"nothing\.npz is no \.npz file"):
        read_samples(One(), str(tmp_path / "nothing.npz"), None)


def test_labels_after_the_arguments_and_in_dictionaries():
    loader = DataLoader(TensorDataset(X, LABELS), batch_size=4)
    assert feeds(One(), loader) == BATCHES
    assert feeds(One(), [{"x": x, "labels": y} for x, y in loader]) == BATCHES
    assert feeds(One(), lambda: ((x, y) for x, y in loader)) == BATCHES


def test_arguments_by_position_by_name_and_in_the_order_of_forward():
    mask = torch.ones(6, 2)
    assert list(feeds(Two(), (X, mask))[0]) == ["ids", "mask"]
    assert list(feeds(Two(), {"extra": mask, "mask": mask, "ids": X})[0]) == [
        "ids",
        "mask",
        "extra",
    ]
    assert list(feeds(Two(), [{"ids": X, "mask": None}])[0]) == ["ids"]


def test_a_shuffled_loader_gives_the_same_samples_on_every_pass():
    torch.manual_seed(0)
    loader = DataLoader(TensorDataset(X), batch_size=2, shuffle=True)
    samples = read_samples(One(), loader, None)
    first, second = ([f["x"] for f in samples.passes()] for _ in range(2))
    np.testing.assert_array_equal(np.concatenate(first), np.concatenate(second))


def test_an_endless_generator_is_cut():
    def endless():
        while True:
            yield X

    assert len(feeds(One(), endless(), limit=3)) == 3
    samples = read_samples(One(), endless, None)
    assert example_of(samples, 20)[1] == {"x": {0}}


def test_open_axes_are_the_samples_and_those_that_differ():
    batches = [torch.zeros(4, 3, 8), torch.zeros(2, 5, 8), torch.zeros(4, 6, 8)]
    example, axes = example_of(read_samples(One(), batches, None), None)
    assert axes == {"x": {0, 1}} and example["x"].shape == (4, 6, 8)
    whole = read_samples(One(), torch.zeros(9, 3), None)
    example, axes = example_of(whole, None)
    assert axes == {"x": {0}} and example["x"].shape == (2, 3)
    state = [{"ids": torch.zeros(2, 3), "mask": torch.zeros(1, 3)}]
    assert example_of(read_samples(Two(), state, None), None)[1] == {"ids": set(), "mask": set()}


def test_a_batch_of_one_is_doubled():
    example, axes = example_of(read_samples(One(), [torch.ones(1, 3)] * 2, None), None)
    assert axes == {"x": {0}} and example["x"].shape == (2, 3)


class Many(nn.Module):
    def forward(self, *xs):
        return xs


@pytest.mark.parametrize(
    ("module", "data", "message"),
    [
        (One(), 7, "the data is a int, which yields no batches"),
        (One(), [], "the data yields no batches"),
        (One(), [7], "batch 0 of the data: argument 'x' is a int, not a tensor"),
        (One(), [X, X.bfloat16()], "argument 'x' is torch.bfloat16, which NumPy does not have"),
        (One(), {"y": X}, r"the data does not fit forward\(x\) of One"),
        (One(), (X, X), "does not fit forward"),
        (One(), [{"x": None}], "batch 0 of the data has no arguments"),
        (One(), [X, X[0]], r"batch 1 of the data: argument 'x' is float32 \[2\], in the first batch"),
        (Two(), [(X,), (X, X)], "batch 1 of the data has the arguments ids, mask, the first ids"),
        (Many(), X, r"forward of Many takes \*xs: wrap it in a module whose arguments have names"),
    ],
)  # fmt: skip
def test_data_that_does_not_fit_is_refused(module, data, message):
    with pytest.raises(DataError, match=message):
        example_of(read_samples(module, data, None), None)
