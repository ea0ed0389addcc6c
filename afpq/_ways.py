"""What can become of the weights of a plan: ways to round and to correct, each of which has to prove itself."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from afpq._job import Job
from afpq._judge import choose_objective
from afpq.calibrate import Stats
from afpq.compensate import MAX_SAMPLES, Choice, compensate
from afpq.correct import correct_biases
from afpq.data import Data
from afpq.packing import PackedTensor
from afpq.plan import Plan
from afpq.restore import restore
from afpq.runtime import FloatModel
from afpq.search import MODES

__all__ = ["Way", "find_ways", "gain", "refitted"]

# The first of equal ones is kept.
NEAREST = "nearest rounding"
BIAS_CORRECTION = "bias correction"
COMPENSATION = "compensated rounding"
LEARNING = "learned rounding"
RESTORED = ", statistics restored"

Progress = Callable[[str, int, int], None]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Way:
    """What one way of rounding and correcting makes of a plan."""

    tensors: Mapping[str, PackedTensor]
    biases: Mapping[str, Floats]
    sqnr: Mapping[str, float]
    constants: Mapping[str, Floats] = field(default_factory=dict)


def find_ways(
    job: Job, plan: Plan, stats: Stats, nearest: Way, progress: Progress
) -> tuple[dict[str, Way], list[str]]:
    """All ways that the job's mode and data allow, by name, and in words what could not be tried."""
    decoded = {name: tensor.decode() for name, tensor in nearest.tensors.items()}
    biases = correct_biases(job.model.layers, stats, decoded)
    corrected = Way(nearest.tensors, biases, nearest.sqnr)
    ways, notes = {NEAREST: nearest, BIAS_CORRECTION: corrected}, list[str]()
    if job.fit is None:
        return ways, notes
    base = NEAREST
    mode = MODES[job.mode]
    if mode.compensated:
        base = COMPENSATION
        ways[COMPENSATION], left = _compensated(job, job.fit, plan, corrected, progress)
        if left:
            notes.append(f"{COMPENSATION} left at nearest rounding: {', '.join(left)}")
    if mode.learned:
        way = _learned(job, job.fit, plan, ways[base], progress)
        if isinstance(way, Way):
            ways[LEARNING] = way
        else:
            notes.append(way)
    if job.bn_recal:
        ways[base + RESTORED] = _restored(job, job.fit, ways[base], progress)
    return ways, notes


def refitted(
    job: Job, plan: Plan, kept: str, ways: Mapping[str, Way], progress: Progress
) -> Way | None:
    """The way called `kept`, made anew from all samples, those that chose it among them.

    None where more samples would change nothing, or where the model has to be the one that was judged.
    """
    if not kept.startswith(COMPENSATION) or job.max_drop is not None:
        return None
    if job.fit is None or job.samples is None or job.fit.num_samples >= MAX_SAMPLES:
        return None
    way, _ = _compensated(job, job.samples, plan, ways[BIAS_CORRECTION], progress)
    return _restored(job, job.samples, way, progress) if kept.endswith(RESTORED) else way


def gain(losses: Mapping[str, float]) -> dict[str, float] | None:
    """What restoring statistics did to the loss of the way that it started from; None where it was not tried."""
    for name, loss in losses.items():
        if name.endswith(RESTORED):
            return {"loss_before": losses[name.removesuffix(RESTORED)], "loss_after": loss}
    return None


def _compensated(
    job: Job, data: Data, plan: Plan, corrected: Way, progress: Progress
) -> tuple[Way, list[str]]:
    """The way, and names of the layers that had to stay at nearest rounding."""
    tensors, biases, sqnr = compensate(
        FloatModel(job.model, threads=1),
        data,
        _choices(plan),
        corrected.tensors,
        corrected.biases,
        num_threads=_threads(job),
        progress=lambda done, total: progress("compensate", done, total),
    )
    left = [x.name for x in job.model.layers if x.weight_name in tensors.keys() - sqnr.keys()]
    return Way(tensors, biases, {**corrected.sqnr, **sqnr}), left


def _learned(job: Job, data: Data, plan: Plan, way: Way, progress: Progress) -> Way | str:
    from afpq.learn import UnsupportedError, learn  # needs torch

    network = FloatModel(job.model, threads=1)
    outputs = network.run(next(data.batches(4)))
    try:
        tensors, biases = learn(
            network,
            data,
            _choices(plan),
            way.tensors,
            way.biases,
            choose_objective(job.model, [outputs], "auto"),
            seed=job.seed,
            num_threads=_threads(job),
            progress=lambda done, total: progress("learn", done, total),
        )
    except UnsupportedError as error:
        return f"{LEARNING} was not tried: {error}"
    return Way(tensors, biases, way.sqnr)


def _restored(job: Job, data: Data, way: Way, progress: Progress) -> Way:
    restored = restore(
        FloatModel(job.model, threads=1),
        data,
        way.tensors,
        way.biases,
        num_threads=_threads(job),
        progress=lambda done, total: progress("restore", done, total),
    )
    return Way(restored.tensors, restored.biases, way.sqnr, restored.constants)


def _choices(plan: Plan) -> dict[str, Choice]:
    return {
        e.weight_name: Choice(e.format, e.kind, e.granularity)
        for e in plan.entries
        if e.format is not None
    }


def _threads(job: Job) -> int:
    return job.threads or os.cpu_count() or 1
