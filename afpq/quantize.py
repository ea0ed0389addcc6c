"""From a float model to a packed one: check, calibrate, search, encode, compensate, rewrite.

`quantize` does all; `prepare`, `find_plan` and `build` are its steps, for callers that stop in between. Every input is
checked in `prepare`, before the first heavy step. Nothing is written before `QuantizedModel.save`, which loads and runs
the new file once before it takes its name.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import onnx_ir as ir

from afpq._build import (
    build_graph,
    check_budget,
    file_size,
    with_activations,
)
from afpq._job import DEFAULT_BITS, Job, prepare
from afpq._probe import Feeds
from afpq._quantized_model import QuantizedModel, load
from afpq._smallest import smallest_model
from afpq.calibrate import Stats, calibrate
from afpq.equalize import equalize as equalize_model
from afpq.errors import NaNError
from afpq.graph import Model
from afpq.plan import Plan
from afpq.report import RunFacts
from afpq.search import search

__all__ = [
    "DEFAULT_BITS",
    "Job",
    "QuantizedModel",
    "build",
    "file_size",
    "find_plan",
    "load",
    "prepare",
    "quantize",
    "reach_goal",
]

Progress = Callable[[str, int, int], None]


def quantize(
    model: str | Path | Model,
    plan: Plan | None = None,
    stats: Stats | None = None,
    *,
    data: object = None,
    bits: float | None = None,
    size: int | None = None,
    max_drop: float | None = None,
    preprocess: str | None = None,
    samples: int | None = None,
    activations: str = "a16",
    kind: str = "real",
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
    overrides: Mapping[str, str] | None = None,
    mode: str = "default",
    latency: str | Path | None = None,
    chain: bool = True,
    bn_recal: bool = True,
    equalize: bool = False,
    seed: int = 0,
    threads: int = 0,
    progress: Progress | None = None,
    journal: str | Path | None = None,
) -> QuantizedModel:
    """Quantizes a model under a budget (5 bits per weight if none is given), or as a plan says.

    With `data` the formats are chosen by measured sensitivity and rounding is compensated; a quarter of the samples
    is held out to prove that it helps. `max_drop`, in place of a budget, finds the smallest model that loses no more
    on these: points of top-1 if the data has labels, else percent of changed first classes, else percent of error
    energy (`facts.goal` says how much it was, how sure that is, and whether the goal was met). `mode` says how much
    work is done: `quick` rounds to nearest and corrects biases, `best` measures more than `default` and learns
    rounding with torch. `latency` is a file of rates (`afpq doctor --measure --save-rates`): the plan is the one with
    the fastest products of those in the budget whose predicted loss is at most a tenth above the least. With
    activations `a8` and data, tensors get static formats, and with `chain` convolutions pass them to each other as
    bytes. With `bn_recal` means and variances are restored too, of BatchNormalization and of the layers' channels,
    where the held-out samples say that it helps. `equalize` builds a second model, from equalised weights, and keeps
    the better one. `stats` spares the calibration. Without data and statistics, formats follow from weight error
    alone. `seed` draws the held-out samples. The same arguments give the same bytes, whatever `threads` is. `journal`
    names a folder that keeps what is finished: the same call after a kill goes on from there. It is the caller's to
    delete.

    Raises:
        JournalError: the journal belongs to another run, or another process uses it.
        ModelError: the model cannot be read, or has nothing to quantize.
        DataError: the data does not fit the model.
        PlanError: the budget is impossible, a pattern matches nothing, or the plan does not fit.

    Example:
        >>> digits = np.load("models/digits_calibration.npz")["input"]
        >>> model = afpq.quantize("models/lenet5_digits.onnx", data={"input": digits[:64]}, bits=4.5)
        >>> model.save("lenet5.onnx") < 40_000  # bytes
        True

        `data` may also be a path, a DataLoader of torch, or batches from a generator; `progress` is told what goes on:

        >>> stages = []
        >>> model = afpq.quantize(
        ...     "models/lenet5_digits.onnx",
        ...     data=({"input": digits[i : i + 16]} for i in range(0, 64, 16)),
        ...     progress=lambda stage, done, total: stages.append(stage),
        ... )
        >>> "calibrate" in stages
        True
    """
    job = prepare(
        model,
        plan,
        data=data,
        bits=bits,
        size=size,
        max_drop=max_drop,
        preprocess=preprocess,
        samples=samples,
        activations=activations,
        kind=kind,
        include=include,
        exclude=exclude,
        overrides=overrides,
        mode=mode,
        latency=latency,
        chain=chain,
        bn_recal=bn_recal,
        equalize=equalize,
        seed=seed,
        threads=threads,
        journal=journal,
    )
    if max_drop is not None:
        return reach_goal(job, stats, progress=progress)
    found, known = find_plan(job, stats, progress=progress)
    return build(job, found, known, progress=progress)


def find_plan(
    job: Job, stats: Stats | None = None, *, progress: Progress | None = None
) -> tuple[Plan, Stats | None]:
    """Calibrates if there is data, and searches unless the job has a plan; static activation formats come last.

    Raises:
        PlanError: the budget is impossible.
    """
    progress = progress or _silent
    size = None if job.plan is not None else check_budget(job)
    if stats is None:
        stats = _statistics(job, progress)
    plan = job.plan
    if plan is None:
        found = partial(
            search,
            job.model,
            stats,
            bits=job.bits,
            size=size,
            data=job.fit,
            kind=job.kind,
            include=job.include,
            exclude=job.exclude,
            overrides=job.overrides,
            mode=job.mode,
            rates=job.latency,
            activations=job.activations,
            threads=job.threads,
            progress=progress,
            journal=job.journal,
        )
        plan = job.journal.step("plan", found, _write_plan, _read_plan)
    return with_activations(job, plan, stats, progress), stats


def build(
    job: Job, plan: Plan, stats: Stats | None = None, *, progress: Progress | None = None
) -> QuantizedModel:
    """Encodes the weights as the plan says, compensates what rounding lost if that helps, and rewrites the graph."""
    progress = progress or _silent
    packed, facts = build_graph(job, plan, stats, progress)
    if job.equalize and stats is not None:
        packed, plan, facts = _equalized(job, plan, stats, (packed, facts), progress)
    return QuantizedModel(packed, plan, facts, probe=_first_input(job), job=job)


def reach_goal(
    job: Job, stats: Stats | None = None, *, progress: Progress | None = None
) -> QuantizedModel:
    """Calibrates and searches once, and builds under several budgets: the smallest model within `job.max_drop`.

    If none is, the one that loses least; `facts.goal["met"]` tells.

    Raises:
        PlanError: the model has no output to judge.
    """
    progress = progress or _silent
    if stats is None:
        stats = _statistics(job, progress)
    assert stats is not None
    plan, packed, facts = smallest_model(job, stats, progress)
    return QuantizedModel(packed, plan, facts, probe=_first_input(job), job=job)


def _statistics(job: Job, progress: Progress) -> Stats | None:
    """Of the samples for calibration, where there are any."""
    if job.fit is None:
        return None
    found = partial(calibrate, job.model, job.fit, threads=job.threads, progress=progress)
    return job.journal.step("calibrate", found, Stats.save, Stats.load)


def _write_plan(plan: Plan, path: Path) -> None:
    path.write_text(plan.to_json(), encoding="utf-8")


def _read_plan(path: Path) -> Plan:
    return Plan.from_json(path.read_text(encoding="utf-8"))


def _first_input(job: Job) -> Feeds | None:
    return None if job.fit is None else next(job.fit.batches(1))


def _equalized(
    job: Job, plan: Plan, stats: Stats, plain: tuple[ir.Model, RunFacts], progress: Progress
) -> tuple[ir.Model, Plan, RunFacts]:
    """The same plan for the equalised network, or what there is without, whichever is better on held-out samples."""
    packed, facts = plain
    correction = facts.correction
    assert correction is not None and job.fit is not None

    def with_note(text: str) -> RunFacts:
        notes = [*correction["notes"], f"equalisation was left out: {text}"]
        return replace(facts, correction={**correction, "notes": notes})

    bits = min(max(round(plan.bits_per_weight), 2), 8)
    equalized = equalize_model(job.model, stats, job.fit, bits=bits, num_threads=job.threads)
    if not equalized.factors:
        return packed, plan, with_note("no pair of layers gains")
    other = replace(job, model=equalized.model, journal=job.journal.scoped("equalized"))
    known = _statistics(other, progress)
    assert known is not None
    # What layers read has changed: static formats are chosen anew.
    changed = with_activations(other, replace(plan, activations=None), known, progress)
    try:
        made = build_graph(other, changed, known, progress)
    except NaNError as error:
        return packed, plan, with_note(str(error))
    made[0].metadata_props["afpq.equalized"] = "yes"
    before, after = (_held_out_loss(facts) for _, facts in (plain, made))
    kept = after < before
    packed, facts = made if kept else plain
    proof = {
        "kept": kept,
        "pairs": len(equalized.factors),
        "loss_before": before,
        "loss_after": after,
    }
    facts = replace(facts, correction={**(facts.correction or {}), "equalization": proof})
    return packed, changed if kept else plan, facts


def _held_out_loss(facts: RunFacts) -> float:
    assert facts.correction is not None
    return float(min(facts.correction["losses"].values()))


def _silent(stage: str, done: int, total: int) -> None:
    """Progress that nobody wants to see."""
