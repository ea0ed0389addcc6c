"""What can become of the weights of a plan: ways to round and to correct, each of which has to prove itself."""

import os
from collections.abc import Callable, Mapping
from dataclasses import replace

from afpq._job import Job
from afpq._judge import choose_objective
from afpq._way import Way
from afpq.calibrate import Stats
from afpq.compensate import MAX_SAMPLES, Choice, compensate
from afpq.correct import correct_biases
from afpq.data import Data
from afpq.plan import Plan
from afpq.restore import restore
from afpq.runtime import FloatModel
from afpq.search import MODES

__all__ = ["find_ways", "gain", "refitted"]

# The first of equal ones is kept.
NEAREST = "nearest rounding"
BIAS_CORRECTION = "bias correction"
COMPENSATION = "compensated rounding"
LEARNING = "learned rounding"
RESTORED = ", statistics restored"

Progress = Callable[[str, int, int], None]


def find_ways(
    job: Job, plan: Plan, stats: Stats, nearest: Way, progress: Progress
) -> tuple[dict[str, Way], list[str]]:
    """All ways that the job's mode and data allow, by name, and in words what could not be tried.

    Each is a step of the job's journal.
    """
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
        ways[base] = _step(job, base, _compensated, job.fit, plan, corrected, progress)
        if ways[base].left:
            notes.append(f"{COMPENSATION} left at nearest rounding: {', '.join(ways[base].left)}")
    if mode.learned:
        from afpq.learn import UnsupportedError  # needs torch

        try:
            ways[LEARNING] = _step(job, LEARNING, _learned, job.fit, plan, ways[base], progress)
        except UnsupportedError as error:
            notes.append(f"{LEARNING} was not tried: {error}")
    if job.bn_recal:
        name = base + RESTORED
        ways[name] = _step(job, name, _restored, job.fit, plan, ways[base], progress)
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
    again = replace(job, journal=job.journal.scoped("all samples"))
    start, data = ways[BIAS_CORRECTION], job.samples
    way = _step(again, COMPENSATION, _compensated, data, plan, start, progress)
    if not kept.endswith(RESTORED):
        return way
    return _step(again, COMPENSATION + RESTORED, _restored, data, plan, way, progress)


def gain(losses: Mapping[str, float]) -> dict[str, float] | None:
    """What restoring statistics did to the loss of the way that it started from; None where it was not tried."""
    for name, loss in losses.items():
        if name.endswith(RESTORED):
            return {"loss_before": losses[name.removesuffix(RESTORED)], "loss_after": loss}
    return None


_Maker = Callable[[Job, Data, Plan, Way, Progress], Way]


def _step(
    job: Job, name: str, make: _Maker, data: Data, plan: Plan, start: Way, progress: Progress
) -> Way:
    """What `make` makes of `start`, unless the journal has it."""
    return job.journal.step(
        name, lambda: make(job, data, plan, start, progress), Way.save, Way.load
    )


def _compensated(job: Job, data: Data, plan: Plan, start: Way, progress: Progress) -> Way:
    tensors, biases, sqnr = compensate(
        FloatModel(job.model, threads=1),
        data,
        _choices(plan),
        start.tensors,
        start.biases,
        num_threads=_threads(job),
        progress=lambda done, total: progress("compensate", done, total),
    )
    left = [x.name for x in job.model.layers if x.weight_name in tensors.keys() - sqnr.keys()]
    return Way(tensors, biases, {**start.sqnr, **sqnr}, left=tuple(left))


def _learned(job: Job, data: Data, plan: Plan, start: Way, progress: Progress) -> Way:
    from afpq.learn import learn  # needs torch

    network = FloatModel(job.model, threads=1)
    outputs = network.run(next(data.batches(4)))
    tensors, biases = learn(
        network,
        data,
        _choices(plan),
        start.tensors,
        start.biases,
        choose_objective(job.model, [outputs], "auto"),
        seed=job.seed,
        num_threads=_threads(job),
        progress=lambda done, total: progress("learn", done, total),
        journal=job.journal.scoped(LEARNING),
    )
    return Way(tensors, biases, start.sqnr)


def _restored(job: Job, data: Data, plan: Plan, start: Way, progress: Progress) -> Way:
    restored = restore(
        FloatModel(job.model, threads=1),
        data,
        start.tensors,
        start.biases,
        num_threads=_threads(job),
        progress=lambda done, total: progress("restore", done, total),
    )
    return Way(restored.tensors, restored.biases, start.sqnr, restored.constants)


def _choices(plan: Plan) -> dict[str, Choice]:
    return {
        e.weight_name: Choice(e.format, e.kind, e.granularity)
        for e in plan.entries
        if e.format is not None
    }


def _threads(job: Job) -> int:
    return job.threads or os.cpu_count() or 1
