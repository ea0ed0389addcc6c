"""Times two models on this machine, interleaved: every round runs both, so that what slows one slows the other.

The pair is two files with the same inputs, usually a float model and its packed one. Only medians of a busy machine are
comparable; the spread (10th to 90th percentile) is reported with them.
"""

import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from afpq._probe import Feeds, random_feeds
from afpq.errors import DataError, ModelError
from afpq.packed import file_bytes
from afpq.runtime import session

__all__ = ["BenchResult", "Rounds", "Timing", "bench", "node_shares", "time_models"]

_MIN_ROUNDS = 20
_WARM_UP = 3
# With more than one thread, those of a model go on looking for work for a while after it has run, on the processors
# that the next one needs. And when they wake, the system takes a while to give each a processor of its own.
_SETTLE_SECONDS = 0.04
_WAKE_SECONDS = 0.02
_BURST_SECONDS = 0.02
_MIN_PROFILED = 3
_KERNEL_TIME = "_kernel_time"  # how the profile ends the name of a node


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


@dataclass(frozen=True, eq=False)
class Rounds:
    """Models that were timed in turn."""

    timings: tuple[Timing, ...]
    milliseconds: npt.NDArray[np.float64]  # [models, rounds]
    shapes: Mapping[str, tuple[int, ...]]

    def ratio(self) -> tuple[float, float, float]:
        """The last model's time over the first's: median over the rounds, 10th and 90th percentile."""
        ratios = self.milliseconds[-1] / self.milliseconds[0]
        p10, median, p90 = np.percentile(ratios, (10, 50, 90))
        return float(median), float(p10), float(p90)


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
    rounds = time_models(
        (first, second),
        feeds=feeds,
        threads=threads,
        batch=batch,
        seconds=seconds,
        progress=progress,
    )
    ratio, ratio_p10, ratio_p90 = rounds.ratio()
    return BenchResult(
        first=rounds.timings[0],
        second=rounds.timings[1],
        ratio=ratio,
        ratio_p10=ratio_p10,
        ratio_p90=ratio_p90,
        num_rounds=rounds.milliseconds.shape[1],
        threads=threads,
        shapes=rounds.shapes,
    )


def time_models(
    paths: Sequence[str | Path],
    *,
    feeds: Feeds | None = None,
    threads: int = 0,
    batch: int = 1,
    seconds: float = 5.0,
    min_rounds: int = _MIN_ROUNDS,
    warm: bool = True,
    progress: Callable[[str, int, int], None] | None = None,
) -> Rounds:
    """Runs any number of models in turn for about `seconds`, at least `min_rounds` times each; see `bench`.

    In each turn a model has just run before, as it has where it serves, unless `warm` is false and there is one thread:
    the others have taken its place in the caches then.
    """
    loaded = [_load(path, threads) for path in paths]
    sessions = [s for s, _ in loaded]
    names = [sorted(i.name for i in s.get_inputs()) for s in sessions]
    for path, other in zip(paths[1:], names[1:], strict=True):
        if other != names[0]:
            raise DataError(
                f"{paths[0]} has the inputs {', '.join(names[0])}, {path} has {', '.join(other)}"
            )
    feeds = random_feeds(sessions[0], batch) if feeds is None else feeds
    pause = _SETTLE_SECONDS if threads != 1 and len(sessions) > 1 else 0.0
    times = _rounds(sessions, feeds, seconds, min_rounds, pause, warm, progress)
    return Rounds(
        tuple(
            _timing(path, load_ms, row)
            for path, (_, load_ms), row in zip(paths, loaded, times, strict=True)
        ),
        times,
        {name: array.shape for name, array in feeds.items()},
    )


def node_shares(
    path: str | Path, feeds: Feeds | None = None, *, threads: int = 0, seconds: float = 0.5
) -> dict[str, float]:
    """The share of a model's time that each node takes by onnxruntime's own profile, by node name.

    Raises:
        ModelError: the file cannot be loaded or run.
        DataError: inputs cannot be made up.
    """
    with tempfile.TemporaryDirectory() as folder:
        model = session(path, threads=threads, profile=Path(folder) / "profile")
        feeds = random_feeds(model) if feeds is None else feeds
        start = time.perf_counter()
        runs = 0
        while runs < _MIN_PROFILED or time.perf_counter() - start < seconds:
            _run(model, feeds)
            runs += 1
        events = json.loads(Path(model.end_profiling()).read_text())
    taken: dict[str, float] = {}
    for event in events:
        name = str(event.get("name", ""))
        if event.get("cat") == "Node" and name.endswith(_KERNEL_TIME):
            name = name.removesuffix(_KERNEL_TIME)
            taken[name] = taken.get(name, 0.0) + float(event["dur"])
    total = sum(taken.values())
    return {name: duration / total for name, duration in taken.items()} if total else {}


def _load(path: str | Path, threads: int) -> tuple[ort.InferenceSession, float]:
    start = time.perf_counter()
    loaded = session(path, threads=threads)
    return loaded, 1e3 * (time.perf_counter() - start)


def _rounds(
    sessions: list[ort.InferenceSession],
    feeds: Feeds,
    seconds: float,
    min_rounds: int,
    pause: float,
    warm: bool,
    progress: Callable[[str, int, int], None] | None,
) -> npt.NDArray[np.float64]:
    """Milliseconds [models, rounds], always in the same order: what a model finds in the caches is the same each time.

    Behind a pause, some runs only wake threads, and the median of some that follow counts.
    """
    for model in sessions:
        for _ in range(_WARM_UP):
            _run(model, feeds)
    times: list[list[float]] = []
    start = time.perf_counter()
    while len(times) < min_rounds or time.perf_counter() - start < seconds:
        taken = [0.0] * len(sessions)
        for index, model in enumerate(sessions):
            if pause > 0:
                time.sleep(pause)
            if warm or pause > 0:
                _burst(model, feeds, _WAKE_SECONDS if pause > 0 else 0.0)
            burst = _burst(model, feeds, _BURST_SECONDS if pause > 0 else 0.0)
            taken[index] = 1e3 * float(np.median(burst))
        times.append(taken)
        if progress is not None:
            share = min((time.perf_counter() - start) / seconds, len(times) / min_rounds)
            progress("bench", min(int(100 * share), 99), 100)
    if progress is not None:
        progress("bench", 100, 100)
    return np.asarray(np.array(times).T)


def _burst(model: ort.InferenceSession, feeds: Feeds, seconds: float) -> list[float]:
    """Seconds of the runs that begin within `seconds`, one at least."""
    taken: list[float] = []
    begin = start = time.perf_counter()
    while not taken or begin < start + seconds:
        model.run(None, feeds)
        end = time.perf_counter()
        taken.append(end - begin)
        begin = end
    return taken


def _run(model: ort.InferenceSession, feeds: Feeds) -> None:
    try:
        model.run(None, feeds)
    except Exception as error:  # onnxruntime has a kind of its own for every status
        message = " ".join(str(error).split())
        raise ModelError(f"onnxruntime cannot run the model on this input: {message}") from error


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
