"""One option for every group within a budget of bits: least sum of losses (an exact multiple-choice knapsack), or least
time where losses may be somewhat larger."""

import ctypes
import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import optimize, sparse

from afpq.errors import PlanError

__all__ = ["Option", "allocate", "fastest"]

# The solver stops at absolute gaps of 1e-6: objectives are scaled so that this is far below what a loss means.
_OBJECTIVE_RANGE = 1e5
_MAX_ATTEMPTS = 4
# Of what is equally fast, the plan with less loss: all of the loss allowed counts as much as this share of the time.
_LOSS_SHARE = 1e-3


@dataclass(frozen=True)
class Option:
    """What one choice costs: stored bits and loss."""

    storage_bits: int
    loss: float


def allocate(options: Sequence[Sequence[Option]], budget_bits: int) -> list[int]:
    """The index of the chosen option in every group; the sum of bits never exceeds the budget.

    Deterministic; among options of equal bits and loss the first counts.

    Raises:
        PlanError: a group has no option, a loss is not finite, or even the smallest options exceed the budget.
    """
    for index, group in enumerate(options):
        if not group:
            raise PlanError(f"group {index} has no option")
        if not all(math.isfinite(o.loss) for o in group):
            raise PlanError(f"group {index} has a loss that is not finite")
    smallest = sum(min(o.storage_bits for o in group) for group in options)
    if smallest > budget_bits:
        raise PlanError(f"a budget of {budget_bits} bits is too small: {smallest} is the minimum")
    fronts = [_front(group) for group in options]
    greedy = _greedy(options, fronts, budget_bits)
    exact = _solve(options, fronts, greedy, budget_bits)
    return min((exact, greedy), key=lambda choice: _loss(options, choice))


def _front(group: Sequence[Option]) -> list[int]:
    """Options that no other beats, by rising bits and falling loss."""
    order = sorted(range(len(group)), key=lambda j: (group[j].storage_bits, group[j].loss, j))
    front: list[int] = []
    for j in order:
        if not front or group[j].loss < group[front[-1]].loss:
            front.append(j)
    return front


def _greedy(
    options: Sequence[Sequence[Option]], fronts: list[list[int]], budget_bits: int
) -> list[int]:
    """From the smallest options upwards, always the step with the most loss saved per bit."""
    position = [0] * len(fronts)
    room = budget_bits - sum(g[f[0]].storage_bits for g, f in zip(options, fronts, strict=True))

    def steps(index: int) -> list[tuple[float, int, int, int]]:
        group, front = options[index], fronts[index]
        here = group[front[position[index]]]
        result = []
        for p in range(position[index] + 1, len(front)):
            bits = group[front[p]].storage_bits - here.storage_bits
            if bits <= room:
                result.append(((here.loss - group[front[p]].loss) / bits, -index, p, bits))
        return result

    while True:
        best = max((s for i in range(len(fronts)) for s in steps(i)), default=None)
        if best is None:
            return [front[p] for front, p in zip(fronts, position, strict=True)]
        position[-best[1]] = best[2]
        room -= best[3]


def _solve(
    options: Sequence[Sequence[Option]],
    fronts: list[list[int]],
    greedy: list[int],
    budget_bits: int,
) -> list[int]:
    """The integer program over options that can be part of a solution better than the greedy one."""
    least = [group[front[-1]].loss for group, front in zip(options, fronts, strict=True)]
    slack = _loss(options, greedy) - math.fsum(least)
    if slack <= 0:
        return greedy
    kept = [
        [j for j in front if group[j].loss - low <= slack * (1 + 1e-9)]
        for group, front, low in zip(options, fronts, least, strict=True)
    ]
    flat, one_each = _variables(kept)
    base = [min(options[i][j].storage_bits for j in front) for i, front in enumerate(kept)]
    bits = np.array([options[i][j].storage_bits - base[i] for i, j in flat], np.int64)
    loss = np.array([(options[i][j].loss - least[i]) / slack for i, j in flat])
    room = budget_bits - sum(base)
    unit = int(np.gcd.reduce(bits)) or 1
    limit = room // unit
    for _ in range(_MAX_ATTEMPTS):
        within = [optimize.LinearConstraint((bits // unit)[None].astype(float), -np.inf, limit)]
        chosen = _milp(loss * _OBJECTIVE_RANGE, one_each, within, 0.0)
        if chosen is None:
            break
        over = int((bits[chosen] // unit).sum()) - room // unit
        if over <= 0:
            return [flat[v][1] for v in chosen]
        limit -= over  # the solver's tolerance let it through
    return greedy


def fastest(
    options: Sequence[Sequence[Option]],
    seconds: Sequence[Sequence[float]],
    choice: Sequence[int],
    budget_bits: int,
    most_loss: float,
) -> list[int]:
    """The choice of least time within the budget whose losses add up to no more than `most_loss`.

    `choice`, which fulfils both, comes back where nothing faster is found. Deterministic; within some thousandths of
    the least time, since of what is equally fast the plan with less loss counts.
    """
    total = _time(seconds, choice)
    if total <= 0 or most_loss <= 0:
        return list(choice)
    kept = [
        _undominated([(o.storage_bits, o.loss, t) for o, t in zip(group, times, strict=True)])
        for group, times in zip(options, seconds, strict=True)
    ]
    flat, one_each = _variables(kept)
    bits = np.array([options[i][j].storage_bits for i, j in flat], float) / budget_bits
    loss = np.array([options[i][j].loss for i, j in flat]) / most_loss
    time = np.array([seconds[i][j] for i, j in flat]) / total
    room = 1.0
    for _ in range(_MAX_ATTEMPTS):
        within = [optimize.LinearConstraint(np.stack([bits, loss]), -np.inf, room)]
        chosen = _milp(_OBJECTIVE_RANGE * (time + _LOSS_SHARE * loss), one_each, within, 1e-3)
        if chosen is None:
            break
        found = [flat[v][1] for v in chosen]
        stored = sum(group[j].storage_bits for group, j in zip(options, found, strict=True))
        if stored <= budget_bits and _loss(options, found) <= most_loss:
            return found if _time(seconds, found) < total else list(choice)
        room -= 2e-6  # the solver's tolerance let it through
    return list(choice)


def _undominated(costs: Sequence[tuple[int, float, float]]) -> list[int]:
    """Positions of costs that no other undercuts in everything; of equal ones the first."""

    def beaten(j: int) -> bool:
        return any(
            all(x <= y for x, y in zip(costs[i], costs[j], strict=True))
            and (costs[i] != costs[j] or i < j)
            for i in range(len(costs))
        )

    return [j for j in range(len(costs)) if not beaten(j)]


def _time(seconds: Sequence[Sequence[float]], choice: Sequence[int]) -> float:
    return math.fsum(times[j] for times, j in zip(seconds, choice, strict=True))


def _variables(kept: Sequence[Sequence[int]]) -> tuple[list[tuple[int, int]], Any]:
    """Group and position of every variable, and the rows that add up the variables of each group."""
    flat = [(i, j) for i, group in enumerate(kept) for j in group]
    owner = [i for i, _ in flat]
    return flat, sparse.csr_array((np.ones(len(flat)), (owner, np.arange(len(flat)))))


def _milp(
    costs: npt.NDArray[np.float64], one_each: Any, within: list[Any], gap: float
) -> npt.NDArray[np.int64] | None:
    """The chosen variable of every group, or None if the solver finds nothing."""
    with _silent_stdout():
        result = optimize.milp(
            costs,
            integrality=np.ones(len(costs)),
            bounds=optimize.Bounds(0, 1),
            constraints=[optimize.LinearConstraint(one_each, 1, 1), *within],
            options={"mip_rel_gap": gap},
        )
    if result.x is None:
        return None
    owner = one_each.tocsr()
    return np.array(
        [
            owner.indices[a:b][np.argmax(result.x[owner.indices[a:b]])]
            for a, b in zip(owner.indptr[:-1], owner.indptr[1:], strict=True)
        ],
        np.int64,
    )


@contextmanager
def _silent_stdout() -> Iterator[None]:
    """Sends what native code prints to nowhere: HiGHS has debugging lines that no option turns off."""
    try:
        saved = os.dup(1)
    except OSError:  # the process has no stdout
        yield
        return
    if sys.__stdout__ is not None:
        sys.__stdout__.flush()
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        if os.name == "posix":
            ctypes.CDLL(None).fflush(None)  # or the lines would come out later
        os.dup2(saved, 1)
        os.close(saved)
        os.close(nowhere)


def _loss(options: Sequence[Sequence[Option]], choice: Sequence[int]) -> float:
    return math.fsum(group[j].loss for group, j in zip(options, choice, strict=True))
