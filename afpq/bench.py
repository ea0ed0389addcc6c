"""Times two models on this machine, interleaved: every round runs both, so that what slows one slows the other.

The pair is two files with the same inputs, usually a float model and its packed one. Only medians of a busy machine are
comparable; the spread (10th to 90th percentile) is reported with them.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from afpq._probe import Feeds, random_feeds
from afpq.errors import DataError, ModelError
from afpq.packed import file_bytes
from afpq.runtime import session

__all__ = ["BenchResult", "Timing", "bench"]

_MIN_ROUNDS = 20
_WARM_UP = 3


@dataclass(frozen=True)
class Timing:
    """Times of one model in milliseconds."""

    path: str
    file_bytes: int
    load_ms: float
    median_ms: float
    p10_ms: float
    p90_ms: float
    min_ms: float


@dataclass(frozen=True)
class BenchResult:
    """Both timings; `ratio` is the median over rounds of the second model's time over the first's."""

    first: Timing
    second: Timing
    ratio: float
    ratio_p10: float
    ratio_p90: float
    num_rounds: int
    threads: int
    shapes: Mapping[str, tuple[int, ...]]


def bench(
    first: str | Path,
    second: str | Path,
    *,
    feeds: Feeds | None = None,
    threads: int = 0,
    batch: int = 1,
    seconds: float = 5.0,
    progress: Callable[[str, int, int], None] | None = None,
) -> BenchResult:
    """Runs both models in turn for about `seconds`, at least 20 rounds; random inputs if `feeds` is None.

    Raises:
        ModelError: a file cannot be loaded or run.
        DataError: the models do not have the same inputs, or these cannot be made up.
    """
    loaded = [_load(path, threads) for path in (first, second)]
    sessions = [s for s, _ in loaded]
    names = [sorted(i.name for i in s.get_inputs()) for s in sessions]
    if names[0] != names[1]:
        raise DataError(
            f"{first} has the inputs {', '.join(names[0])}, {second} has {', '.join(names[1])}"
        )
    feeds = random_feeds(sessions[0], batch) if feeds is None else feeds
    times = _rounds(sessions, feeds, seconds, progress)
    ratios = times[1] / times[0]
    return BenchResult(
        first=_timing(first, loaded[0][1], times[0]),
        second=_timing(second, loaded[1][1], times[1]),
        ratio=float(np.median(ratios)),
        ratio_p10=float(np.percentile(ratios, 10)),
        ratio_p90=float(np.percentile(ratios, 90)),
        num_rounds=times.shape[1],
        threads=threads,
        shapes={name: array.shape for name, array in feeds.items()},
    )


def _load(path: str | Path, threads: int) -> tuple[ort.InferenceSession, float]:
    start = time.perf_counter()
    loaded = session(path, threads=threads)
    return loaded, 1e3 * (time.perf_counter() - start)


def _rounds(
    sessions: list[ort.InferenceSession],
    feeds: Feeds,
    seconds: float,
    progress: Callable[[str, int, int], None] | None,
) -> npt.NDArray[np.float64]:
    """Milliseconds [2, rounds]; who goes first alternates."""
    for model in sessions:
        try:
            for _ in range(_WARM_UP):
                model.run(None, feeds)
        except Exception as error:  # onnxruntime has a kind of its own for every status
            message = " ".join(str(error).split())
            raise ModelError(
                f"onnxruntime cannot run the model on this input: {message}"
            ) from error
    times: list[tuple[float, float]] = []
    start = time.perf_counter()
    while len(times) < _MIN_ROUNDS or time.perf_counter() - start < seconds:
        order = (0, 1) if len(times) % 2 else (1, 0)
        taken = [0.0, 0.0]
        for index in order:
            begin = time.perf_counter()
            sessions[index].run(None, feeds)
            taken[index] = 1e3 * (time.perf_counter() - begin)
        times.append((taken[0], taken[1]))
        if progress is not None:
            share = min((time.perf_counter() - start) / seconds, len(times) / _MIN_ROUNDS)
            progress("bench", min(int(100 * share), 99), 100)
    if progress is not None:
        progress("bench", 100, 100)
    return np.asarray(np.array(times).T)


def _timing(path: str | Path, load_ms: float, times: npt.NDArray[np.float64]) -> Timing:
    return Timing(
        path=str(path),
        file_bytes=file_bytes(path),
        load_ms=load_ms,
        median_ms=float(np.median(times)),
        p10_ms=float(np.percentile(times, 10)),
        p90_ms=float(np.percentile(times, 90)),
        min_ms=float(times.min()),
    )
