"""Interleaved timing: what it reports, never how fast."""

import pytest

from afpq.bench import bench
from afpq.errors import DataError


def test_both_models_are_timed_in_as_many_rounds(models, packed_lenet):
    result = bench(models / "lenet5_digits.onnx", packed_lenet, threads=1, seconds=0.05)
    assert result.num_rounds >= 20
    assert 0 < result.ratio_p10 <= result.ratio <= result.ratio_p90
    for timing in (result.first, result.second):
        assert 0 < timing.min_ms <= timing.p10_ms <= timing.median_ms <= timing.p90_ms
    assert result.second.file_bytes == packed_lenet.stat().st_size


def test_progress_ends_at_its_total(models, packed_lenet):
    calls = []
    bench(
        models / "lenet5_digits.onnx",
        packed_lenet,
        seconds=0.05,
        progress=lambda stage, done, total: calls.append((stage, done, total)),
    )
    assert calls and calls[-1][1] == calls[-1][2]


def test_models_with_other_inputs_are_refused(models, packed_lenet, shared):
    with pytest.raises(DataError):
        bench(shared / "models/lm/stories260k.onnx", packed_lenet, seconds=0.05)
