"""Loss scaling: the factor that lifts gradients into the range of their format, from step to step.

A scaler is frozen; `start` and `next` give the state, a small frozen record that an optimizer stores.
"""

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

__all__ = ["BackOff", "ConstantScale", "LogMax", "LossScale", "ScaleState"]


@dataclass(frozen=True)
class ScaleState:
    """The scale of the step to come, and what its scaler remembers."""

    scale: float
    steps: int = 0  # that were taken or skipped
    clean: int = 0  # since the last change of the scale
    mean: float = 0.0  # running means of LogMax
    square: float = 0.0


@runtime_checkable
class LossScale(Protocol):
    """How the scale goes on after a step whose greatest gradient, without the scale, was `largest`.

    That is infinity or NaN where gradients overflowed; the step is then skipped.
    """

    def start(self) -> ScaleState: ...

    def next(self, state: ScaleState, largest: float) -> ScaleState: ...


@dataclass(frozen=True)
class ConstantScale:
    """The same scale for every step."""

    value: float = 1.0

    def start(self) -> ScaleState:
        return ScaleState(self.value)

    def next(self, state: ScaleState, largest: float) -> ScaleState:
        return ScaleState(self.value, state.steps + 1)


@dataclass(frozen=True)
class BackOff:
    """Half the scale after an overflow, twice the scale after `interval` steps without one (Micikevicius et al. 2018).

    `floor`, pairs of a step and the least scale from it on, ignores overflows that would lower the scale further: the
    enhanced loss scaling of Mellempudi et al. 2019.
    """

    initial: float = 65536.0
    interval: int = 2000
    factor: float = 2.0
    floor: tuple[tuple[int, float], ...] = ((0, 1.0),)
    ceiling: float = 2.0**40

    def start(self) -> ScaleState:
        return ScaleState(max(self.initial, self._least(0)))

    def next(self, state: ScaleState, largest: float) -> ScaleState:
        steps = state.steps + 1
        least = self._least(steps)
        if not math.isfinite(largest):
            return ScaleState(max(state.scale / self.factor, least), steps)
        clean = state.clean + 1
        if clean < self.interval:
            return ScaleState(max(state.scale, least), steps, clean)
        return ScaleState(max(min(state.scale * self.factor, self.ceiling), least), steps)

    def _least(self, steps: int) -> float:
        return max((height for step, height in self.floor if steps >= step), default=0.0)


@dataclass(frozen=True)
class LogMax:
    """The scale that puts the greatest gradient `deviations` of its deviations below the greatest number `max`.

    Logarithms of the greatest gradients of past steps are taken to be normal; their mean and mean square are running
    means with decay `decay` (Kuchaiev et al. 2018, "OpenSeq2Seq"; compared by Noune et al. 2022, table 12).
    """

    max: float = 57344.0
    deviations: float = 3.0
    decay: float = 0.99
    initial: float = 65536.0

    def start(self) -> ScaleState:
        return ScaleState(self.initial)

    def next(self, state: ScaleState, largest: float) -> ScaleState:
        steps = state.steps + 1
        if not math.isfinite(largest) or largest <= 0:
            scale = state.scale / 2 if not math.isfinite(largest) else state.scale
            return ScaleState(scale, steps, state.clean, state.mean, state.square)
        log = math.log2(largest)
        seen = state.clean + 1
        mean = self.decay * state.mean + (1 - self.decay) * log
        square = self.decay * state.square + (1 - self.decay) * log * log
        share = 1 - self.decay**seen  # what the running means lack at the start
        deviation = math.sqrt(max(0.0, square / share - (mean / share) ** 2))
        exponent = math.log2(self.max) - (mean / share + self.deviations * deviation)
        scale = 2.0 ** max(-126.0, min(126.0, exponent))
        return ScaleState(scale, steps, seen, mean, square)
