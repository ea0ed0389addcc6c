"""Fine-tuning of a quantized network: weights move, formats stay.

The network computes with every weight as the file will store it; gradients pass straight through the rounding to the
float weight behind it, and to the scale of each channel (LSQ, Esser et al. 2020, equation 3). Learned rounding picks
among neighbouring codes from a few samples; here weights may go anywhere: this is training, and wants training data.
"""

import copy
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils import _pytree

from afpq._judge import Objective, choose_objective
from afpq._torch_data import Samples, read_samples
from afpq._torch_loss import output_loss
from afpq._torch_pair import (
    Source,
    TorchResult,
    changed_constants,
    copy_constants,
    exported,
    owned_layers,
    pair_up,
)
from afpq._trained_weight import TrainedBias, TrainedWeight
from afpq.errors import DataError, ModelError
from afpq.packed import PackedLayer, weight_values
from afpq.plan import Plan
from afpq.quantize import QuantizedModel
from afpq.quantize import quantize as quantize_model
from afpq.rewrite import rewrite

__all__ = ["finetune"]

Loss = Callable[[Any, Tensor | None], Tensor]
Progress = Callable[[str, int, int], None]
Batch = tuple[dict[str, Tensor], Tensor | None]

_SCALE_SHARE = 0.1  # of the rate: what scales move, and biases in units of their outputs
_CALIBRATION = 512  # samples of data that comes in batches
_CHECKS = 8  # how often the validation data is asked


def finetune(
    module: nn.Module,
    plan: Plan,
    data: object,
    *,
    loss: Loss | None = None,
    validation: object = None,
    steps: int = 1000,
    batch_size: int = 32,
    rate: float = 3e-3,
    seed: int = 0,
    progress: Progress | None = None,
    **options: Any,
) -> TorchResult:
    """Trains a network whose weights are in the formats of a plan, and packs what comes out.

    The network starts as `afpq.torch.quantize` packs it under the plan, compensated and corrected. Weights, scales and
    biases of the packed layers are trained, by Adam with a rate that falls like a cosine; batch norm is folded. That
    happens on the device of the module; what comes back runs on the processor. Activations are float32 meanwhile, which
    `a16` comes close to; with static `a8` formats compare the result.

    Args:
        module: the float network, which is not changed.
        plan: `afpq.torch.quantize(..).model.plan`, or what `Plan.from_json` reads.
        data: what to train on, in the forms that `afpq.torch.quantize` takes; batches are asked for again and again, so
            they may be shuffled or varied. The first `samples` (512) of them calibrate.
        loss: of the module's outputs and the data's labels (None where it has none); by default the distance to the
            float network's outputs, which needs no labels.
        validation: data that says which state was the best, the first one included; without it the last one counts.
        steps: of the optimizer.
        batch_size: of data that is whole; batches that data yields are taken as they are.
        rate: of a step, relative to the root mean square of a layer's weights, each in units of its channel's scale.
        seed: draws the order of samples.
        progress: is told what goes on.
        options: further options of `afpq.torch.quantize`, such as `activations`.

    Raises:
        ModelError: the module cannot be exported, or the loss is not finite.
        DataError: the data does not fit the module.

    Example:
        >>> import torch, afpq.torch, afpq.train
        >>> net = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8))
        >>> x = torch.randn(256, 32)
        >>> plan = afpq.torch.quantize(net, x, bits=2.5).model.plan
        >>> tuned = afpq.train.finetune(net, plan, x, steps=20)
        >>> tuned.model.plan == plan
        True
    """
    progress = progress or (lambda stage, done, total: None)
    training = _training(module, data)
    first = data if training.whole else _kept(training, options.get("samples") or _CALIBRATION)
    with exported(module, first, None, options.get("samples")) as source:
        feeds = source.samples.for_afpq()
        start = quantize_model(source.model, plan=plan, data=feeds, chain=False, **options)
        device = _device_of(module)
        student = _Student(source, start).to(device)
        source.module.to(device)
        measure = _Measure(source, loss, device)
        judged = None if validation is None else read_samples(module, validation, None)
        batches = _batches(training, batch_size, seed)
        found = _train(student, measure, batches, judged, steps, rate, progress)
        student.load_state_dict(found)
        student.cpu()
        source.module.cpu()
        model = student.packed(source, start, options.get("activations", "a16"), steps)
        return pair_up(source, model)


class _Student(nn.Module):
    """A copy of the float module that computes with stored weights and biases."""

    def __init__(self, source: Source, start: QuantizedModel) -> None:
        super().__init__()
        self.module = copy.deepcopy(source.module).requires_grad_(False)
        copy_constants(self.module, source.model, start)
        self.places = owned_layers(start, source.names)
        self.weights: dict[str, tuple[nn.Module, TrainedWeight]] = {}  # by weight_name
        for path, places in self.places.items():
            self._take(self.module.get_submodule(path), places[0])

    def _take(self, layer: Any, packed: PackedLayer) -> None:
        if packed.weight_name not in self.weights:
            value = torch.from_numpy(np.array(weight_values(packed)))
            shape = layer.weight.shape
            if len(shape) > 2:
                value = value.reshape(shape[0], *shape[2:], shape[1]).movedim(-1, 1)
            weight = TrainedWeight(packed, value)
            layer.weight.data = (value / weight.start).contiguous()
            layer.weight.requires_grad_(True)
            self.weights[packed.weight_name] = layer, weight
        # Tied layers hold one parameter, and so get one parametrization.
        weight = self.weights[packed.weight_name][1]
        parametrize.register_parametrization(layer, "weight", weight, unsafe=True)
        if packed.bias is not None:
            start = torch.from_numpy(np.array(packed.bias))
            layer.bias = nn.Parameter(torch.zeros_like(start))
            bias = TrainedBias(start, layer.weight.detach())
            parametrize.register_parametrization(layer, "bias", bias, unsafe=True)

    def forward(self, **arguments: Tensor) -> Any:
        return self.module(**arguments)

    def groups(self, rate: float) -> list[dict[str, Any]]:
        """Parameters with their rates: a weight's is relative to the size of its layer's, in units of the scales."""
        result: list[dict[str, Any]] = []
        for layer, weight in self.weights.values():
            units = _units(layer)
            size = float(units.detach().square().mean().sqrt()) or 1.0
            result.append({"params": [units], "lr": rate * size})
            if weight.log_scale.requires_grad:
                result.append({"params": [weight.log_scale], "lr": _SCALE_SHARE * rate})
        for path in self.places:
            place: Any = self.module.get_submodule(path)
            if "bias" in place.parametrizations:
                shift = place.parametrizations.bias.original
                result.append({"params": [shift], "lr": _SCALE_SHARE * rate})
        return result

    def packed(
        self, source: Source, start: QuantizedModel, activations: str, steps: int
    ) -> QuantizedModel:
        assert start.plan is not None
        # Files number their tensors; the float model has the names that `rewrite` takes.
        known = {
            place.weight_name: source.model.layer(place.name).weight_name
            for places in self.places.values()
            for place in places
        }
        tensors = {
            known[name]: weight.stored(_units(layer))
            for name, (layer, weight) in self.weights.items()
        }
        biases = {
            place.name: self.module.get_submodule(path).bias.detach().numpy()  # type: ignore[operator]
            for path, places in self.places.items()
            for place in places
            if place.bias is not None
        }
        constants = changed_constants(source.model, start)
        graph = rewrite(
            source.model,
            start.plan,
            tensors,
            biases,
            constants=constants,
            activations=activations,
            chain=False,
        )
        facts = start.facts
        if facts.correction is not None:
            notes = [*facts.correction["notes"], f"fine-tuned: {steps} steps"]
            facts = replace(facts, correction={**facts.correction, "notes": notes})
        facts = replace(facts, accuracy=None)  # it was measured before
        return replace(start, packed=graph, facts=facts, path=None)


def _units(layer: Any) -> nn.Parameter:
    found: nn.Parameter = layer.parametrizations.weight.original
    return found


@dataclass(frozen=True, eq=False)
class _Measure:
    """The loss that is trained, from outputs, what the float network has in their place, and labels."""

    source: Source
    loss: Loss | None
    device: torch.device

    def __call__(self, student: _Student, batch: Batch) -> Tensor:
        arguments = {name: value.to(self.device) for name, value in batch[0].items()}
        labels = None if batch[1] is None else batch[1].to(self.device)
        got = student(**arguments)
        if self.loss is not None:
            return self.loss(got, labels)
        with torch.no_grad():
            wanted = _floats(self.source.module(**arguments))
        objective = self._objective(wanted)
        outputs = [[y[i] for i in objective.outputs] for y in (_floats(got), wanted)]
        return output_loss(objective, *outputs)

    def _objective(self, wanted: list[Tensor]) -> Objective:
        return choose_objective(self.source.model, [[y.cpu().numpy() for y in wanted]], "auto")


def _training(module: nn.Module, data: object) -> Samples:
    """Every pass iterates the data anew, so a loader that shuffles does so each time; only generators are kept."""
    if isinstance(data, Tensor | np.ndarray | tuple | Mapping | str | Path) or callable(data):
        return read_samples(module, data, None)
    if isinstance(data, Iterable) and iter(data) is not data:
        return read_samples(module, lambda: iter(data), None)
    return read_samples(module, data, None)


def _kept(samples: Samples, limit: int) -> list[dict[str, Any]]:
    """The first batches, to calibrate with: their passes must not differ."""
    kept: list[dict[str, Any]] = []
    seen = 0
    for feed in samples.passes():
        kept.append(feed)
        seen += max(len(a) for a in feed.values())
        if seen >= limit:
            break
    return kept


def _device_of(module: nn.Module) -> torch.device:
    first = next(itertools.chain(module.parameters(), module.buffers()), None)
    return torch.device("cpu") if first is None else first.device


def _floats(outputs: Any) -> list[Tensor]:
    return [y for y in _pytree.tree_leaves(outputs) if isinstance(y, Tensor)]


def _batch(feed: dict[str, Any]) -> Batch:
    tensors = {name: torch.from_numpy(np.array(a)) for name, a in feed.items()}
    labels = tensors.pop("labels", None)
    return tensors, labels


def _batches(samples: Samples, batch_size: int, seed: int) -> Iterator[Batch]:
    """Without end: shuffled pieces of what is whole, else what the passes yield."""
    random = np.random.default_rng(seed)
    while True:
        seen = 0
        for feed in samples.passes():
            if not samples.whole:
                seen += 1
                yield _batch(feed)
                continue
            size = min(len(a) for a in feed.values())
            order = random.permutation(size)
            piece = min(batch_size, size)
            for begin in range(0, size - piece + 1, piece):
                seen += 1
                yield _batch({n: a[order[begin : begin + piece]] for n, a in feed.items()})
        if not seen:
            raise DataError("the data yields no batches")


def _validate(student: _Student, measure: _Measure, samples: Samples, batch_size: int) -> float:
    losses, weights = [], []
    with torch.no_grad():
        for feed in samples.passes():
            size = max(len(a) for a in feed.values())
            step = batch_size if samples.whole else size
            for begin in range(0, size, step):
                part = _batch({n: a[begin : begin + step] for n, a in feed.items()})
                losses.append(float(measure(student, part)))
                weights.append(min(step, size - begin))
    return float(np.average(losses, weights=weights))


def _train(
    student: _Student,
    measure: _Measure,
    batches: Iterator[Batch],
    validation: Samples | None,
    steps: int,
    rate: float,
    progress: Progress,
) -> dict[str, Tensor]:
    """The state of the student that was the best, or the last one."""
    groups = student.groups(rate)
    highest = [group["lr"] for group in groups]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99))
    best = _state(student)
    least = math.inf if validation is None else _validate(student, measure, validation, 250)
    for step in range(steps):
        optimizer.zero_grad()
        loss = measure(student, next(batches))
        if not math.isfinite(float(loss.detach())):
            raise ModelError(f"the loss of step {step} is {float(loss.detach())}: lower the rate")
        loss.backward()  # type: ignore[no-untyped-call]
        for group, high in zip(optimizer.param_groups, highest, strict=True):
            group["lr"] = high * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.step()
        progress("finetune", step + 1, steps)
        if validation is not None and (step + 1) % max(1, steps // _CHECKS) == 0:
            found = _validate(student, measure, validation, 250)
            if found < least:
                best, least = _state(student), found
    return best if validation is not None else _state(student)


def _state(student: _Student) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in student.state_dict().items()}
