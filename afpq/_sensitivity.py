"""How much the network's outputs suffer from the error of one layer: measured at a few formats, read off in between."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np

__all__ = ["Sensitivity", "read_sensitivities", "write_sensitivities"]

# Slopes of log(loss) against log(error). Small perturbations have a loss that is linear in the squared error: slope 1
# below the finest probe, whatever the noise of a small loss says. Beyond the coarsest one losses grow no slower.
_SLOPES = (1.0, 2.0)
_LOWEST_LOSS = 1e-12


@dataclass(frozen=True)
class Sensitivity:
    """Measured (error, loss) points of one layer, by rising error."""

    errors: tuple[float, ...]
    losses: tuple[float, ...]

    @staticmethod
    def fit(points: Sequence[tuple[float, float]]) -> "Sensitivity":
        """From points in any order; a loss below that of a smaller error counts as noise and is raised to it."""
        losses_of: dict[float, list[float]] = {}
        for error, loss in points:
            if error > 0:
                losses_of.setdefault(error, []).append(loss)
        errors = sorted(losses_of)
        losses = [max(float(np.mean(losses_of[e])), _LOWEST_LOSS) for e in errors]
        return Sensitivity(tuple(errors), tuple(accumulate(losses, max)))

    def loss(self, error: float) -> float:
        """The loss at an error: log-log interpolation, rising everywhere, 0 at 0."""
        if error <= 0 or not self.errors:
            return 0.0
        x, y = np.log(self.errors), np.log(self.losses)
        at = float(np.log(error))
        if at <= x[0]:
            return float(np.exp(y[0] + (at - x[0])))
        if at < x[-1]:
            return float(np.exp(np.interp(at, x, y)))
        slope = 1.0
        if len(x) > 1:
            slope = float(np.clip((y[-1] - y[-2]) / (x[-1] - x[-2]), *_SLOPES))
        return float(np.exp(y[-1] + slope * (at - x[-1])))


def write_sensitivities(found: Mapping[str, Sensitivity], path: Path) -> None:
    """As JSON, every digit of them."""
    path.write_text(json.dumps({name: asdict(s) for name, s in found.items()}), encoding="utf-8")


def read_sensitivities(path: Path) -> dict[str, Sensitivity]:
    """What `write_sensitivities` wrote."""
    found = json.loads(path.read_text(encoding="utf-8"))
    return {name: Sensitivity(tuple(s["errors"]), tuple(s["losses"])) for name, s in found.items()}
