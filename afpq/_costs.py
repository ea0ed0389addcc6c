"""What every candidate of every tensor costs, and the choice of one each under a budget."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from afpq._candidates import Candidate, Target
from afpq._fields import rounded
from afpq._measure import Workshop
from afpq.errors import PlanError
from afpq.plan import Option, Plan, PlanEntry, allocate, fastest

__all__ = ["DEFAULT_BITS", "Costs"]

DEFAULT_BITS = 5.0

# A faster plan may lose so much more than the one that loses least.
_LATENCY_LOSS = 1.1

_FRONTIER_POINTS = 13
_FRONTIER_BITS = 8.0  # where it ends


@dataclass(frozen=True, eq=False)
class Costs:
    """What every candidate of every tensor stores and loses: a plan under any budget follows from it.

    `found` and `losses` go by weight_name and are parallel; tensors that stay float are missing. `objective` says what
    the losses are, as in `Plan`. `seconds`, parallel to both, is what the products of one sample take: with it, the
    fastest plan is chosen whose predicted loss is at most a tenth above the least.
    """

    targets: tuple[Target, ...]  # all, in the order of the model
    found: Mapping[str, Sequence[Candidate]]
    losses: Mapping[str, Sequence[float]]
    objective: str
    shop: Workshop | None = (
        None  # where a second pass measures; None where rounding is not compensated
    )
    seconds: Mapping[str, Sequence[float]] | None = None

    @cached_property
    def active(self) -> tuple[Target, ...]:
        """The tensors that are quantized."""
        return tuple(t for t in self.targets if t.weight_name in self.found)

    @property
    def num_weights(self) -> int:
        return sum(t.weight.size for t in self.active)

    @property
    def smallest_bits(self) -> int:
        """Stored bits of the smallest plan."""
        return sum(min(c.storage_bits for c in choices) for choices in self.found.values())

    def choose(self, limit_bits: int) -> dict[str, int]:
        """For every active tensor the position in `found` of the best plan within so many bits."""
        best = allocate(self._options, limit_bits)
        if self.seconds is not None:
            seconds = [self.seconds[t.weight_name] for t in self.active]
            most = _LATENCY_LOSS * self.predicted(self._named(best))
            best = fastest(self._options, seconds, best, limit_bits, most)
        return self._named(best)

    @cached_property
    def _options(self) -> list[list[Option]]:
        return [
            [
                Option(c.storage_bits, x)
                for c, x in zip(self.found[t.weight_name], self.losses[t.weight_name], strict=True)
            ]
            for t in self.active
        ]

    def _named(self, choice: Sequence[int]) -> dict[str, int]:
        return dict(zip((t.weight_name for t in self.active), choice, strict=True))

    def predicted(self, choice: Mapping[str, int]) -> float:
        """The sum of losses of a choice."""
        return math.fsum(self.losses[name][j] for name, j in choice.items())

    @cached_property
    def frontier(self) -> tuple[tuple[float, float], ...]:
        """Bits per weight and least sum of losses under budgets from the smallest plan to 8 bits."""
        if not self.active:
            return ()
        largest = max(self.smallest_bits, round(_FRONTIER_BITS * self.num_weights))
        steps = _FRONTIER_POINTS - 1
        limits = [
            self.smallest_bits + (largest - self.smallest_bits) * i // steps
            for i in range(_FRONTIER_POINTS)
        ]
        points = {}
        for limit in dict.fromkeys(limits):
            choice = self._named(allocate(self._options, limit))
            bits = sum(self.found[name][j].storage_bits for name, j in choice.items())
            points[bits] = rounded(self.predicted(choice)) or 0.0
        return tuple((rounded(bits / self.num_weights) or 0.0, x) for bits, x in points.items())

    def plan(self, *, bits: float | None = None, size: int | None = None) -> Plan:
        """The plan with the least sum of losses that `bits` per weight (default 5) or `size` in bytes allow.

        Raises:
            PlanError: the budget is too small.
        """
        if not self.active:
            return self.plan_of({}, None)
        return self.plan_of(self.choose(self.budget_bits(bits, size)), self.budget(bits, size))

    def plan_of(self, choice: Mapping[str, int], budget: float | None) -> Plan:
        """The plan that makes a choice, made for a budget in bits per weight."""
        entries = tuple(
            _entry(t, self.found[t.weight_name][j], self.losses[t.weight_name][j])
            if (j := choice.get(t.weight_name)) is not None
            else _float_entry(t)
            for t in self.targets
        )
        return Plan(entries, budget, self.objective, frontier=self.frontier)

    def budget(self, bits: float | None, size: int | None) -> float:
        """The budget in bits per weight."""
        if size is not None:
            return 8 * size / self.num_weights
        return DEFAULT_BITS if bits is None else bits

    def budget_bits(self, bits: float | None, size: int | None) -> int:
        """The budget in stored bits, checked against the smallest plan.

        Raises:
            PlanError: the budget is too small.
        """
        if size is not None:
            if self.smallest_bits > 8 * size:
                raise PlanError(
                    f"a size of {size} bytes is impossible: the {len(self.active)} quantized "
                    f"tensors take at least {-(-self.smallest_bits // 8)} bytes"
                )
            return 8 * size
        wanted = self.budget(bits, None)
        limit = math.floor(wanted * self.num_weights * (1 + 1e-12))
        if self.smallest_bits > limit:
            least = math.ceil(1000 * self.smallest_bits / self.num_weights) / 1000
            raise PlanError(
                f"a budget of {wanted:g} bits per weight is impossible: the {len(self.active)} "
                f"quantized tensors take at least {least:.3f}, scales and padding included"
            )
        return limit


def _entry(target: Target, candidate: Candidate, loss: float) -> PlanEntry:
    n, k = target.weight.shape
    return PlanEntry(
        layers=target.names,
        weight_name=target.weight_name,
        n=n,
        k=k,
        format=candidate.format,
        kind=candidate.kind,
        granularity=candidate.granularity,
        error=candidate.error,
        predicted_loss=loss,
    )


def _float_entry(target: Target) -> PlanEntry:
    n, k = target.weight.shape
    return PlanEntry(target.names, target.weight_name, n, k, None)
