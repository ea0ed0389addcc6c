"""Interleaved timing: what it reports, never how fast."""

import numpy as np
import pytest

from afpq.bench import _rounds, bench, node_shares, time_models
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


def test_any_number_of_models_takes_turns(models, packed_lenet):
    paths = [models / "lenet5_digits.onnx", packed_lenet, packed_lenet]
    rounds = time_models(paths, seconds=0, min_rounds=4)
    assert rounds.milliseconds.shape == (3, 4)
    assert [timing.path for timing in rounds.timings] == [str(path) for path in paths]
    expected = np.median(rounds.milliseconds[2] / rounds.milliseconds[0])
    assert rounds.ratio()[0] == pytest.approx(expected)
    assert rounds.shapes == {"input": (1, 1, 28, 28)}


class Counted:
    """A session that notes when it runs."""

    def __init__(self, name, runs):
        self.run = lambda *_: runs.append(name)


@pytest.mark.parametrize(("warm", "turn"), [(True, "aabb"), (False, "ab")])
def test_a_model_runs_before_the_run_that_counts(warm, turn):
    runs = []
    sessions = [Counted("a", runs), Counted("b", runs)]
    times = _rounds(sessions, {}, 0, 4, 0.0, warm, None)
    assert times.shape == (2, 4)
    assert "".join(runs)[6:] == 4 * turn  # 3 before the first round


def test_nodes_share_the_time_of_a_model(packed_lenet, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shares = node_shares(packed_lenet, seconds=0)
    assert {"/0/Conv", "/7/Gemm", "/11/Gemm"} <= set(shares)
    assert sum(shares.values()) == pytest.approx(1) and min(shares.values()) > 0
    assert list(tmp_path.iterdir()) == []  # the profile is gone
