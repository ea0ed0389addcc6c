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
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from afpq._blocks import block_borders
from afpq._feeds import Feed
from afpq._judge import LOWEST_PROBABILITY, Objective, num_classes
from afpq._moments import channel_axis
from afpq._torch_graph import TorchGraph, UnsupportedError, as_tensor
from afpq.compensate import Choice
from afpq.correct import can_correct
from afpq.data import Data
from afpq.errors import DataError
from afpq.formats import AfpFormat, codebook, round_scale
from afpq.graph import Layer
from afpq.packing import PackedTensor
from afpq.rounding import fake_quantize_rows, quantize_tensor
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
        best = learner.state()
        least = learner.judge(held_out, best)
        random = np.random.default_rng(seed)
        for step in learner.fit(learned, random):
            if step % (_STEPS // _CHECKS) == 0:
                state = learner.state()
                loss = learner.judge(held_out, state)
                if loss < least:
                    best, least = state, loss
            if progress is not None:
                progress(step, _STEPS)
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
        self._weights = {n: _Weight(tensors[n], choices[n].kind) for n in sorted(names)}
        self._start = {
            x.name: as_tensor(np.array(_bias(x, biases), np.float32))
            for x in self._layers
            if can_correct(x)
        }
        self._biases = dict(self._start)

    def state(self) -> _State:
        """The tensors and biases as they are stored."""
        tensors = {n: w.stored() for n, w in self._weights.items()}
        return tensors, {n: b.numpy().copy() for n, b in self._biases.items()}

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
                return float(self._output_loss(got, batch.wanted)), len(batch.wanted[0])

        found = list(self._pool.map(losses, feeds))
        return float(np.average([x for x, _ in found], weights=[n for _, n in found]))

    def fit(self, feeds: Sequence[Feed], random: np.random.Generator) -> Iterator[int]:
        """Takes `_STEPS` steps, and yields after each how many there were; rates fall as half a cosine."""
        powers = self._powers(feeds)
        units = self._deviations(self._read(feeds[0]))
        shifts = {n: torch.zeros_like(b) for n, b in self._start.items()}
        scales = [w.log_scale for w in self._weights.values() if w.kind == "real"]
        groups = (
            ([w.offset for w in self._weights.values()], _OFFSET_RATE),
            (scales, _SCALE_RATE),
            (list(shifts.values()), _BIAS_RATE),
        )
        optimizer = torch.optim.Adam(
            [{"params": p, "lr": rate, "rate": rate} for p, rate in groups if p], betas=(0.9, 0.99)
        )
        order: list[int] = []
        for step in range(_STEPS):
            while len(order) < _MICRO_BATCHES:
                order.extend(random.permutation(len(feeds)).tolist())
            picked, order = order[:_MICRO_BATCHES], order[_MICRO_BATCHES:]
            of_biases = self._set_gradients([feeds[i] for i in picked], powers)
            for name, gradient in of_biases.items():
                shifts[name].grad = gradient * units[name]
            for group in optimizer.param_groups:
                group["lr"] = group["rate"] * 0.5 * (1 + math.cos(math.pi * step / _STEPS))
            optimizer.step()
            for weight in self._weights.values():
                weight.stay_near()
            for name, shift in shifts.items():
                self._biases[name] = self._start[name] + shift * units[name]
            yield step + 1

    def _set_gradients(self, feeds: Sequence[Feed], powers: Sequence[float]) -> dict[str, Tensor]:
        """Sets those of all weights, and gives back those of the biases."""
        weights = {n: w.value().requires_grad_() for n, w in self._weights.items()}
        biases = {n: b.clone().requires_grad_() for n, b in self._biases.items()}
        leaves = [*weights.values(), *biases.values()]

        def gradient(feed: Feed) -> tuple[Tensor, ...]:
            batch = self._read(feed)
            got = self._graph(batch.tensors, weights, biases)
            loss = self._output_loss(got, batch.wanted) + _BLOCKS * self._block_loss(
                got, batch.wanted, powers
            )
            return torch.autograd.grad(loss / len(feeds), leaves)

        # Summed in one order, whatever thread was first.
        parts = list(self._pool.map(gradient, feeds))
        sums = [sum(p[1:], p[0]) for p in zip(*parts, strict=True)]
        for (name, value), total in zip(weights.items(), sums, strict=False):
            self._weights[name].set_gradients(value.detach(), total)
        return dict(zip(biases, sums[len(weights) :], strict=True))

    def _output_loss(self, got: Sequence[Tensor], wanted: Sequence[Tensor]) -> Tensor:
        if self._objective.name == "kl":
            p, q = (
                _log_probabilities(x[0], self._objective.is_distribution) for x in (wanted, got)
            )
            return functional.kl_div(q, p, log_target=True, reduction="batchmean")
        count = self._num_outputs
        return _mean(
            [
                (a - b).square().sum() / b.square().sum().clamp(min=1e-30)
                for a, b in zip(got[:count], wanted[:count], strict=True)
            ]
        )

    def _block_loss(
        self, got: Sequence[Tensor], wanted: Sequence[Tensor], powers: Sequence[float]
    ) -> Tensor:
        count = self._num_outputs
        triples = zip(got[count:], wanted[count:], powers[count:], strict=True)
        return _mean([(a - b).square().mean() / power for a, b, power in triples])

    def _powers(self, feeds: Sequence[Feed]) -> list[float]:
        """The variance of each tensor that is wanted."""

        def sums(feed: Feed) -> list[tuple[float, float, int]]:
            wanted = [t.double() for t in self._read(feed).wanted]
            return [(float(t.sum()), float(t.square().sum()), t.numel()) for t in wanted]

        total, squares, count = np.sum(list(self._pool.map(sums, feeds)), axis=0).T
        variance = squares / count - np.square(total / count)
        return [float(x) for x in np.maximum(variance, 1e-30)]

    def _deviations(self, batch: _Batch) -> dict[str, Tensor]:
        """The standard deviation of each channel of each layer, the unit that biases are learned in."""
        layers = [x for x in self._layers if x.name in self._biases]
        graph = TorchGraph(
            self._network.model, [x.output_name for x in layers], self._weights.keys()
        )
        with torch.no_grad():
            values = graph(
                batch.tensors, {n: w.value() for n, w in self._weights.items()}, self._biases
            )
        rows = {
            x.name: value.movedim(channel_axis(x), -1).reshape(-1, x.n)
            for x, value in zip(layers, values, strict=True)
        }
        return {name: value.std(0, correction=0) for name, value in rows.items()}


def _bias(layer: Layer, biases: Mapping[str, Floats]) -> Floats:
    own = np.zeros(layer.n, np.float32) if layer.bias is None else layer.bias
    return biases.get(layer.name, own)


def _mean(losses: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(losses)).mean() if losses else torch.zeros(())


def _log_probabilities(x: Tensor, is_distribution: bool) -> Tensor:
    rows = x.reshape(-1, num_classes(x.shape))
    if not is_distribution:
        return rows.log_softmax(-1)
    clamped = rows.clamp(min=LOWEST_PROBABILITY)
    return (clamped / clamped.sum(-1, keepdim=True)).log()


class _Weight:
    """A quantized matrix [n, k] and what is learned of it."""

    def __init__(self, tensor: PackedTensor, kind: str) -> None:
        self.format: AfpFormat = tensor.format
        self.kind = kind
        self.start = as_tensor(np.array(tensor.scale, np.float32))[:, None]
        self.integers = as_tensor(tensor.decode()) / self.start
        self._lower, self._upper, self.step = _neighbours(self.integers, self.format)
        self.offset = torch.zeros_like(self.integers)
        self.log_scale = torch.zeros_like(self.start)

    @property
    def scale(self) -> Tensor:
        return self.start * self.log_scale.exp()

    @property
    def exact(self) -> Tensor:
        """What is rounded, in units of the weight."""
        return (self.integers + self.offset * self.step) * self.start

    def value(self) -> Tensor:
        """[n, k] what the network computes with."""
        scale = self.scale.reshape(-1).numpy()
        return as_tensor(fake_quantize_rows(self.exact.numpy(), self.format, scale))

    def set_gradients(self, value: Tensor, of_value: Tensor) -> None:
        """From `value` and its gradients, straight through the rounding."""
        inside = self.exact.abs() <= self.format.max_integer * self.scale
        self.offset.grad = of_value * inside * self.step * self.start
        # The last sum is over a few thousand numbers at most: one thread adds them.
        of_scale = (of_value * (value - self.exact * inside)).sum(1, keepdim=True)
        self.log_scale.grad = of_scale if len(self.start) > 1 else of_scale.sum(0, keepdim=True)

    def stay_near(self) -> None:
        """Keeps offsets within the neighbouring codes."""
        reach = [(end - self.integers) / self.step for end in (self._lower, self._upper)]
        self.offset.clamp_(*reach)

    def stored(self) -> PackedTensor:
        scale = round_scale(self.format, self.scale.reshape(-1).numpy(), self.kind)
        return quantize_tensor(self.exact.numpy(), self.format, scale, kind=self.kind)


def _neighbours(integers: Tensor, fmt: AfpFormat) -> tuple[Tensor, Tensor, Tensor]:
    """For integers of a format those before and after them, themselves at the ends, and the mean distance to these."""
    known = np.unique(codebook(fmt))
    place = np.searchsorted(known, integers.numpy())
    before, after = np.maximum(place - 1, 0), np.minimum(place + 1, len(known) - 1)
    lower, upper = known[before].astype(np.float32), known[after].astype(np.float32)
    steps = (upper - lower) / (after - before).astype(np.float32)
    return as_tensor(lower), as_tensor(upper), as_tensor(steps)
