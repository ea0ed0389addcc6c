"""The smallest model that keeps the metric: bisection over the budget, every trial built and judged.

Calibration and sensitivities are measured once. A trial allocates under its budget, builds the packed graph as any run
does, and is judged on the held-out samples as onnxruntime runs it. Whether a trial passes is a measurement: near the
limit it errs as the interval says, and the smallest one that passes looks a little better than it is.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import onnx_ir as ir

from afpq._build import build_graph, with_activations
from afpq._drop import CONFIDENCE, Drop, drop_of
from afpq._job import MAX_BITS, Job
from afpq.calibrate import Stats
from afpq.errors import NaNError, PlanError
from afpq.plan import Plan
from afpq.report import RunFacts
from afpq.search import measure

__all__ = ["first_that_passes", "smallest_model"]

STEPS_PER_BIT = 10

Progress = Callable[[str, int, int], None]
Result = tuple[Plan, ir.Model, RunFacts]


def smallest_model(job: Job, stats: Stats, progress: Progress) -> Result:
    """The plan, graph and facts of the smallest model whose drop stays within `job.max_drop`.

    If none does up to 8 bits a weight, it is the one that loses least; `facts.goal["met"]` tells.

    Raises:
        PlanError: the model has no output to judge.
        NaNError: no trial has outputs that are numbers.
    """
    limit = job.max_drop
    assert limit is not None and job.held_out is not None
    costs = measure(
        job.model,
        stats,
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
    trials: list[dict[str, Any]] = []
    best: tuple[tuple[bool, float, float], Drop, Result] | None = None

    failed: NaNError | None = None

    def passes(step: int) -> bool:
        nonlocal best, failed
        plan = with_activations(job, costs.plan(bits=step / STEPS_PER_BIT), stats, progress)
        bits = plan.bits_per_weight
        try:
            trial = replace(job, journal=job.journal.scoped(f"{step / STEPS_PER_BIT} bits"))
            graph, facts = build_graph(trial, plan, stats, progress)
        except NaNError as error:  # too few bits for this network
            failed = error
            trials.append({"bits_per_weight": bits, "percent": None, "met": False})
            return False
        drop = drop_of(facts.accuracy["outputs"]) if facts.accuracy is not None else None
        if drop is None:
            raise PlanError("max_drop: the model has no output that can be judged")
        met = drop.percent <= limit
        trials.append({"bits_per_weight": bits, "percent": drop.percent, "met": met})
        # Of those that pass the smallest, else the one that loses least.
        rank = (not met, bits if met else drop.percent, bits)
        if best is None or rank < best[0]:
            best = rank, drop, (plan, graph, facts)
        return met

    smallest = math.ceil(STEPS_PER_BIT * costs.smallest_bits / costs.num_weights - 1e-9)
    first_that_passes(smallest, max(smallest, round(STEPS_PER_BIT * MAX_BITS)), passes)
    if best is None:
        assert failed is not None
        raise failed
    _, drop, (plan, graph, facts) = best
    goal = {
        "max_drop": limit,
        "met": drop.percent <= limit,
        **asdict(drop),
        "high": drop.high if math.isfinite(drop.high) else None,
        "confidence": CONFIDENCE,
        "text": drop.text,
        "trials": trials,
    }
    return plan, graph, replace(facts, goal=goal)


def first_that_passes(low: int, high: int, passes: Callable[[int], bool]) -> int | None:
    """The smallest number of low..high that passes, if all above one that passes pass too; None if high fails."""
    beyond = high + 1
    end = beyond
    while low < end:
        middle = (low + end) // 2
        if passes(middle):
            end = middle
        else:
            low = middle + 1
    return None if end == beyond else end
