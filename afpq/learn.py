"""Learned rounding: which of its neighbouring codes each weight takes, decided by gradients through the whole network.

Compensated rounding is close to the best that a layer can do for its own outputs. What is left lies between layers: an
error that the next activation function cuts off is free, one that the outputs do not depend on is cheap. So all layers
are learned together, from compensated rounding on. The loss is the one of the search (KL divergence or squared error of
the outputs), and beside it the squared error of what each block gives on (BRECQ, Li et al. 2021), which keeps a few
samples from being learned by heart.

Learned are, for every weight, an offset that stays within the codes next to the one it has (AdaRound, Nagel et al.
2020, but rounding passes gradients straight through); for every channel its scale (LSQ, Esser et al. 2020, equation 3)
and its bias. Samples that are not learned from say which state was the best; the first one is among them.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from pickle import UnpicklingError

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from afpq._blocks import block_borders
from afpq._feeds import Feed
from afpq._judge import Objective
from afpq._learned_weight import LearnedWeight
from afpq._moments import channel_axis
from afpq._torch_graph import TorchGraph, UnsupportedError, as_tensor
from afpq._torch_loss import mean_loss, output_loss
from afpq.compensate import Choice
from afpq.correct import can_correct
from afpq.data import Data
from afpq.errors import DataError, JournalError
from afpq.graph import Layer
from afpq.journal import Journal
from afpq.packing import PackedTensor
from afpq.runtime import FloatModel

__all__ = ["UnsupportedError", "learn"]

Floats = npt.NDArray[np.float32]
Progress = Callable[[int, int], None]

_HELD_OUT = 0.2
_MAX_SAMPLES = 1024
_MICRO_BATCH = 8  # samples that run together
_MICRO_BATCHES = 2  # of one step; a number that does not depend on the machine
_STEPS = 400
_CHECKS = 8  # how often the held-out samples are asked
_OFFSET_RATE = 0.02  # steps
_SCALE_RATE = 1e-3  # relative
_BIAS_RATE = 3e-3  # deviations of the output
_STATE = "state"  # the journal's step
_BLOCKS = 1.0  # what the blocks' error counts beside the outputs'


def learn(
    network: FloatModel,
    data: Data,
    choices: Mapping[str, Choice],
    start: Mapping[str, PackedTensor],
    biases: Mapping[str, Floats],
    objective: Objective,
    *,
    seed: int = 0,
    num_threads: int = 1,
    progress: Progress | None = None,
    journal: Journal | None = None,
) -> tuple[dict[str, PackedTensor], dict[str, Floats]]:
    """Learns codes, scales and biases of all quantized tensors at once.

    Args:
        network: the float network.
        data: samples to learn from; a part of them says when it is best.
        choices: by weight_name, of all quantized tensors.
        start: these tensors, rounded.
        biases: by layer name, that go with them.
        objective: what is minimised.
        seed: draws the order of samples.
        num_threads: the result is the same for any number.
        progress: is told what is done and how much there is.
        journal: keeps the state at each check; learning goes on from the last one, to the same result.

    Returns:
        The tensors by weight_name, and biases by layer name.

    Raises:
        UnsupportedError: the network has an operator that torch cannot run, or the samples cannot be divided.
    """
    try:
        fitted, judged = data.take(_MAX_SAMPLES).split(_HELD_OUT)
    except DataError as error:
        raise UnsupportedError(f"there are too few samples: {error}") from error
    with ThreadPoolExecutor(
        max(1, num_threads), initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        learner = _Learner(network, choices, start, biases, objective, pool)
        learned, held_out = learner.feeds(fitted), learner.feeds(judged)
        network.run(held_out[0], learner.names)  # starts the session that all threads use
        fit = _Fit(learner, learned, seed)
        saved = None if journal is None else journal.find(_STATE)
        if saved is None:
            best = learner.state()
            least = learner.judge(held_out, best)
        else:
            best, least = fit.load(saved, start)
        while fit.num_steps < _STEPS:
            fit.take_step()
            if fit.num_steps % (_STEPS // _CHECKS) == 0:
                state = learner.state()
                loss = learner.judge(held_out, state)
                if loss < least:
                    best, least = state, loss
                if journal is not None:
                    journal.keep(_STATE, partial(fit.save, best=best, least=least))
            if progress is not None:
                progress(fit.num_steps, _STEPS)
    tensors, shifted = best
    return {**start, **tensors}, {**biases, **shifted}


_State = tuple[dict[str, PackedTensor], dict[str, Floats]]


@dataclass(frozen=True, eq=False)
class _Batch:
    tensors: dict[str, Tensor]  # what the learned part of the network reads
    wanted: list[Tensor]  # outputs of the float network, then those of its blocks


class _Learner:
    """A network of learned weights and biases, and how they change."""

    def __init__(
        self,
        network: FloatModel,
        choices: Mapping[str, Choice],
        tensors: Mapping[str, PackedTensor],
        biases: Mapping[str, Floats],
        objective: Objective,
        pool: ThreadPoolExecutor,
    ) -> None:
        self._network, self._pool, self._objective = network, pool, objective
        model = network.model
        self._num_outputs = len(objective.outputs)
        outputs = [model.outputs[i].name for i in objective.outputs]
        outputs += block_borders(model, choices.keys())
        self._graph = TorchGraph(model, outputs, choices.keys())
        self.names = (*self._graph.context, *self._graph.outputs)  # read from the float network
        self._layers = self._graph.layers
        names = {layer.weight_name for layer in self._layers}
        self.weights = {n: LearnedWeight(tensors[n], choices[n].kind) for n in sorted(names)}
        self.start = {
            x.name: as_tensor(np.array(_bias(x, biases), np.float32))
            for x in self._layers
            if can_correct(x)
        }
        self.biases = dict(self.start)

    def state(self) -> _State:
        """The tensors and biases as they are stored."""
        tensors = {n: w.stored() for n, w in self.weights.items()}
        return tensors, {n: b.numpy().copy() for n, b in self.biases.items()}

    def feeds(self, data: Data) -> list[Feed]:
        """Samples in small batches, grouped once and for all: shapes that a network computes may depend on them."""
        return list(data.batches(_MICRO_BATCH))

    def _read(self, feed: Feed) -> _Batch:
        found = map(as_tensor, self._network.run(feed, self.names))
        values = dict(zip(self.names, found, strict=True))
        return _Batch(
            {name: values[name] for name in self._graph.context},
            [values[name] for name in self._graph.outputs],
        )

    def judge(self, feeds: Sequence[Feed], state: _State) -> float:
        """The loss at the outputs of stored weights and biases."""
        weights = {n: as_tensor(t.decode()) for n, t in state[0].items()}
        biases = {n: as_tensor(b) for n, b in state[1].items()}

        def losses(feed: Feed) -> tuple[float, int]:
            batch = self._read(feed)
            with torch.no_grad():
                got = self._graph(batch.tensors, weights, biases)
                return float(output_loss(self._objective, got, batch.wanted)), len(batch.wanted[0])

        found = list(self._pool.map(losses, feeds))
        return float(np.average([x for x, _ in found], weights=[n for _, n in found]))

    def set_gradients(self, feeds: Sequence[Feed], powers: Sequence[float]) -> dict[str, Tensor]:
        """Sets those of all weights, and gives back those of the biases."""
        weights = {n: w.value().requires_grad_() for n, w in self.weights.items()}
        biases = {n: b.clone().requires_grad_() for n, b in self.biases.items()}
        leaves = [*weights.values(), *biases.values()]

        def gradient(feed: Feed) -> tuple[Tensor, ...]:
            batch = self._read(feed)
            got = self._graph(batch.tensors, weights, biases)
            loss = output_loss(self._objective, got, batch.wanted)
            loss = loss + _BLOCKS * self._block_loss(got, batch.wanted, powers)
            return torch.autograd.grad(loss / len(feeds), leaves)

        # Summed in one order, whatever thread was first.
        parts = list(self._pool.map(gradient, feeds))
        sums = [sum(p[1:], p[0]) for p in zip(*parts, strict=True)]
        for (name, value), total in zip(weights.items(), sums, strict=False):
            self.weights[name].set_gradients(value.detach(), total)
        return dict(zip(biases, sums[len(weights) :], strict=True))

    def _block_loss(
        self, got: Sequence[Tensor], wanted: Sequence[Tensor], powers: Sequence[float]
    ) -> Tensor:
        count = self._num_outputs
        triples = zip(got[count:], wanted[count:], powers[count:], strict=True)
        return mean_loss([(a - b).square().mean() / power for a, b, power in triples])

    def powers(self, feeds: Sequence[Feed]) -> list[float]:
        """The variance of each tensor that is wanted."""

        def sums(feed: Feed) -> list[tuple[float, float, int]]:
            wanted = [t.double() for t in self._read(feed).wanted]
            return [(float(t.sum()), float(t.square().sum()), t.numel()) for t in wanted]

        total, squares, count = np.sum(list(self._pool.map(sums, feeds)), axis=0).T
        variance = squares / count - np.square(total / count)
        return [float(x) for x in np.maximum(variance, 1e-30)]

    def deviations(self, feed: Feed) -> dict[str, Tensor]:
        """The standard deviation of each channel of each layer, the unit that biases are learned in."""
        batch = self._read(feed)
        layers = [x for x in self._layers if x.name in self.biases]
        graph = TorchGraph(
            self._network.model, [x.output_name for x in layers], self.weights.keys()
        )
        with torch.no_grad():
            values = graph(
                batch.tensors, {n: w.value() for n, w in self.weights.items()}, self.biases
            )
        rows = {
            x.name: value.movedim(channel_axis(x), -1).reshape(-1, x.n)
            for x, value in zip(layers, values, strict=True)
        }
        return {name: value.std(0, correction=0) for name, value in rows.items()}


class _Fit:
    """Steps of Adam on a learner, with rates that fall as half a cosine; `save` and `load` stop it and go on."""

    def __init__(self, learner: _Learner, feeds: Sequence[Feed], seed: int) -> None:
        self.num_steps = 0
        self._learner, self._feeds = learner, feeds
        self._random = np.random.default_rng(seed)
        self._order: list[int] = []
        self._powers = learner.powers(feeds)
        self._units = learner.deviations(feeds[0])
        self._offsets = {n: w.offset for n, w in learner.weights.items()}
        self._scales = {n: w.log_scale for n, w in learner.weights.items()}
        self._shifts = {n: torch.zeros_like(b) for n, b in learner.start.items()}
        moving = {n: t for n, t in self._scales.items() if learner.weights[n].kind == "real"}
        groups = (
            (self._offsets, _OFFSET_RATE),
            (moving, _SCALE_RATE),
            (self._shifts, _BIAS_RATE),
        )
        self._optimizer = torch.optim.Adam(
            [{"params": list(p.values()), "lr": r, "rate": r} for p, r in groups if p],
            betas=(0.9, 0.99),
        )

    def take_step(self) -> None:
        learner = self._learner
        while len(self._order) < _MICRO_BATCHES:
            self._order.extend(self._random.permutation(len(self._feeds)).tolist())
        picked, self._order = self._order[:_MICRO_BATCHES], self._order[_MICRO_BATCHES:]
        of_biases = learner.set_gradients([self._feeds[i] for i in picked], self._powers)
        for name, gradient in of_biases.items():
            self._shifts[name].grad = gradient * self._units[name]
        for group in self._optimizer.param_groups:
            group["lr"] = group["rate"] * 0.5 * (1 + math.cos(math.pi * self.num_steps / _STEPS))
        self._optimizer.step()
        for weight in learner.weights.values():
            weight.stay_near()
        self._move_biases()
        self.num_steps += 1

    def _move_biases(self) -> None:
        for name, shift in self._shifts.items():
            self._learner.biases[name] = self._learner.start[name] + shift * self._units[name]

    def save(self, path: Path, best: _State, least: float) -> None:
        """Writes all that changes, and the best state with its loss."""
        tensors, biases = best
        torch.save(
            {
                "num_steps": self.num_steps,
                "order": self._order,
                "random": self._random.bit_generator.state,
                "learned": [self._offsets, self._scales, self._shifts],
                "optimizer": self._optimizer.state_dict(),
                "least": least,
                "data": {n: torch.from_numpy(t.data) for n, t in tensors.items()},
                "scale": {n: torch.from_numpy(t.scale) for n, t in tensors.items()},
                "biases": {n: torch.from_numpy(b) for n, b in biases.items()},
            },
            path,
        )

    def load(self, path: Path, start: Mapping[str, PackedTensor]) -> tuple[_State, float]:
        """What `save` wrote for tensors like `start`.

        Raises:
            JournalError: the file is damaged.
        """
        try:
            saved = torch.load(path, weights_only=True)
            self.num_steps, self._order = saved["num_steps"], saved["order"]
            self._random.bit_generator.state = saved["random"]
            parts = (self._offsets, self._scales, self._shifts)
            for part, values in zip(parts, saved["learned"], strict=True):
                for name, tensor in part.items():
                    tensor.copy_(values[name])
            self._optimizer.load_state_dict(saved["optimizer"])
            data, scale = saved["data"], saved["scale"]
            tensors = {
                n: replace(start[n], data=data[n].numpy(), scale=scale[n].numpy()) for n in data
            }
            biases = {n: b.numpy() for n, b in saved["biases"].items()}
        except (RuntimeError, ValueError, KeyError, EOFError, UnpicklingError) as error:
            raise JournalError(f"{path}: damaged, start over without it: {error}") from error
        self._move_biases()
        return (tensors, biases), saved["least"]


def _bias(layer: Layer, biases: Mapping[str, Floats]) -> Floats:
    own = np.zeros(layer.n, np.float32) if layer.bias is None else layer.bias
    return biases.get(layer.name, own)
