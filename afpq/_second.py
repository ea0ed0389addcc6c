"""The second pass of a search: what layers cost where all of them are rounded, and what follows for the choice.

The first pass adds up losses that were measured in an otherwise float network. Here the whole network is built as it
chose, and each layer is moved by one width there, down and up. How much more or less that changes the outputs than was
predicted corrects the layer's losses; the new choice counts only if the network that follows from it is clearly better.

The squared error alone corrects: on few samples, differences of KL between two networks are mostly noise, and
corrections by it made networks worse.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from afpq._candidates import Candidate, quantized_values
from afpq._costs import Costs
from afpq._judge import in_threads
from afpq._measure import Workshop, stage
from afpq.compensate import Choice, Floats, probe
from afpq.correct import correct_biases

__all__ = ["second_pass"]

# A layer's losses are multiplied by the measured ratio to these powers: as measured, and half as far in the logarithm.
_POWERS = (1.0, 0.5)
_RATIOS = (0.1, 10.0)  # beyond, a measurement says only "hardly" and "very much"
# Which of two networks is better depends on the samples: one that replaces the first must show more than that.
_MUST_GAIN = 0.97
_TINY = 1e-300


@dataclass(frozen=True, eq=False)
class _Part:
    """What replaces a tensor and the biases of its layers."""

    weights: dict[str, Floats]
    biases: dict[str, Floats]


def second_pass(costs: Costs, limit_bits: int) -> tuple[Costs, dict[str, int]]:
    """The better choice within a budget in stored bits, and costs that add up to the loss it was measured to have."""
    shop = costs.shop
    assert shop is not None
    first = costs.choose(limit_bits)
    moves = {name: _moves(costs, name, j) for name, j in first.items()}
    parts = _build(shop, costs, {name: [j, *moves[name]] for name, j in first.items()}, "rebuild")
    start = _joined([parts[name][0] for name in first])
    measured = shop.judge.losses(start.weights, start.biases)
    tasks = [(name, k) for name in first for k in range(1, 1 + len(moves[name]))]

    def move(task: tuple[str, int]) -> float:
        name, k = task
        moved = _joined([start, parts[name][k]])
        return shop.judge.losses(moved.weights, moved.biases)[1]

    errors = in_threads(move, tasks, shop.num_threads, stage(shop.progress, "second pass"))
    found = dict(zip(tasks, errors, strict=True))
    unit = costs.predicted(first) / max(measured[1], _TINY)  # loss per squared error
    ratios = {
        name: _ratio(
            [costs.losses[name][j] for j in (first[name], *moves[name])],
            [measured[1], *(found[name, k] for k in range(1, 1 + len(moves[name])))],
            unit,
        )
        for name in first
    }
    # The first choice stays unless another scores below this.
    best, tried = (_MUST_GAIN * _score(measured), costs, first, measured), [first]
    for power in _POWERS:
        corrected = replace(
            costs,
            losses={n: [x * ratios[n] ** power for x in costs.losses[n]] for n in costs.losses},
        )
        choice = corrected.choose(limit_bits)
        if choice in tried:
            continue
        tried.append(choice)
        built = _build(shop, costs, {name: [j] for name, j in choice.items()}, "rebuild")
        network = _joined([built[name][0] for name in choice])
        result = shop.judge.losses(network.weights, network.biases)
        if _score(result) < best[0]:
            best = (_score(result), corrected, choice, result)
    _, kept, choice, result = best
    scale = result[0] / max(kept.predicted(choice), _TINY)
    losses = {name: [x * scale for x in values] for name, values in kept.losses.items()}
    return replace(kept, losses=losses), choice


def _moves(costs: Costs, name: str, position: int) -> list[int]:
    """Positions of the best candidates one width below and one above that at `position`, where there are any."""
    best: dict[int, int] = {}
    for j, candidate in enumerate(costs.found[name]):
        width = candidate.format.bits
        if width not in best or costs.losses[name][j] < costs.losses[name][best[width]]:
            best[width] = j
    here = costs.found[name][position].format.bits
    below, above = [b for b in best if b < here], [b for b in best if b > here]
    return [best[b] for b in (*sorted(below)[-1:], *sorted(above)[:1])]


def _ratio(predicted: Sequence[float], errors: Sequence[float], unit: float) -> float:
    """How much more than predicted the error changes from the least to the largest of the predicted losses."""
    low, high = min(predicted), max(predicted)
    if high <= low:
        return 1.0
    change = errors[predicted.index(high)] - errors[predicted.index(low)]
    return min(max(unit * change / (high - low), _RATIOS[0]), _RATIOS[1])


def _build(
    shop: Workshop, costs: Costs, wanted: Mapping[str, Sequence[int]], what: str
) -> dict[str, list[_Part]]:
    """Each tensor as its candidates `wanted`, rounded where all others are as the first of theirs."""
    found: dict[str, list[Candidate]] = {
        name: [costs.found[name][j] for j in positions] for name, positions in wanted.items()
    }
    targets = {t.weight_name: t for t in costs.active}

    def nearest(name: str, candidate: Candidate) -> _Part:
        weights = {name: quantized_values(targets[name], candidate, num_threads=1)}
        return _Part(weights, correct_biases(targets[name].layers, shop.stats, weights))

    start = _joined([nearest(name, candidates[0]) for name, candidates in found.items()])
    rounded = probe(
        shop.judge.network,
        shop.samples,
        {
            name: [Choice(c.format, c.kind, c.granularity) for c in candidates]
            for name, candidates in found.items()
        },
        weights=start.weights,
        biases=start.biases,
        num_threads=shop.num_threads,
        progress=stage(shop.progress, what),
    )
    return {
        name: [_Part({name: r.values}, {targets[name].names[0]: r.bias}) for r in rounded[name]]
        if name in rounded
        else [nearest(name, candidate) for candidate in candidates]
        for name, candidates in found.items()
    }


def _joined(parts: Sequence[_Part]) -> _Part:
    """One network of several parts; later ones count."""
    result = _Part({}, {})
    for part in parts:
        result.weights.update(part.weights)
        result.biases.update(part.biases)
    return result


def _score(losses: tuple[float, float]) -> float:
    """Loss and squared error as one number: the loss alone is decided by few samples."""
    return math.sqrt(losses[0] * losses[1])
