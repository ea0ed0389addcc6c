"""Walks through a network layer by layer and tells what each layer reads, in the float and in the changed network.

Weights are changed one layer after the other, and each choice depends on what the layers before it have become. To run
the network from the start for every layer would take time quadratic in its depth. So the tensors that are alive before
a layer are kept for all samples, and the next layers start from them; where they are too large, an earlier point
serves.
"""

from collections import Counter, deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from afpq._feeds import Feed
from afpq._moments import Moments, MomentSums
from afpq.correct import can_correct
from afpq.data import Data
from afpq.graph import Layer, Model
from afpq.runtime import FloatModel, Simulation

__all__ = ["MAX_K", "Changes", "Seen", "Step", "Stop", "groups_of", "visit", "walk"]

# Covariances of longer rows would take more than half a gigabyte.
MAX_K = 6144
_KEPT_BYTES = 256 << 20  # of one network's tensors
_BATCH_BYTES = 2 << 20  # of the inputs of a batch
_MAX_BATCH = 16
# Rows a layer needs: many for each unknown, and enough to have met all of a large map.
_ROWS_PER_K = 40
_FEWEST_ROWS, _MOST_ROWS = 1 << 14, 1 << 17

_PHASE = 7919  # batches start at different rows

Array = npt.NDArray[Any]
Weights = Mapping[str, npt.NDArray[np.float32]]


@dataclass(frozen=True)
class Step:
    """Layers that read one tensor alike, and the moments of each."""

    layers: tuple[Layer, ...]
    moments: tuple[Moments, ...]


@dataclass(frozen=True)
class Stop:
    """A place of a walk, before the node at `node_index`, and the names of the tensors to look at there."""

    node_index: int
    wanted: tuple[str, ...]  # in the float network
    found: tuple[str, ...]  # in the changed one


@dataclass(frozen=True)
class Changes:
    """What a changed network has in place of the float one's, see `FloatModel.simulate`."""

    weights: Weights = field(default_factory=dict)
    biases: Weights = field(default_factory=dict)
    constants: Weights = field(default_factory=dict)


@dataclass(frozen=True)
class Seen:
    """What is met at a stop."""

    num_batches: int
    batches: Iterator[tuple[list[Array], list[Array]]]  # values of `wanted` and of `found`


def groups_of(model: Model, weight_names: Collection[str]) -> list[tuple[Layer, ...]]:
    """Layers with these weights, those together that read the same rows, in the order of the first of each group.

    Left out are layers without a product, weights that several layers share, Gemms that keep their C, and rows longer
    than `MAX_K`.
    """
    users = Counter(layer.weight_name for layer in model.layers)
    found: dict[tuple[object, ...], list[Layer]] = {}
    for layer in model.layers:
        alone = users[layer.weight_name] == 1 and layer.weight_name in weight_names
        # Where a Gemm keeps its C, its output holds more than the layer computes.
        if alone and can_correct(layer) and not layer.keeps_c and layer.k <= MAX_K:
            key = (layer.input_name, layer.k_axis, layer.conv, layer.groups, layer.k)
            found.setdefault(key, []).append(layer)
    return [tuple(layers) for layers in found.values()]


def walk(
    network: FloatModel,
    data: Data,
    groups: Sequence[tuple[Layer, ...]],
    *,
    weights: Weights | None = None,
    biases: Weights | None = None,
    num_threads: int = 1,
) -> Iterator[Step]:
    """Goes through groups of layers that read the same rows (see `groups_of`), in the order of the network.

    Without `weights`, inputs are those of the float network. With `weights` (by weight_name) and `biases` (by layer
    name) they are those of the network with these, and the outputs that are wanted are the float network's. The caller
    adds to both before it takes the next step.
    """
    changes = None if weights is None else Changes(weights, {} if biases is None else biases)
    stops = []
    for layers in groups:
        read = (str(layers[0].input_name),)
        outputs = tuple(layer.output_name for layer in layers)
        stops.append(Stop(layers[0].node_index, read if changes is None else outputs, read))
    visits = visit(network, data, stops, changes, num_threads=num_threads)
    for layers, seen in zip(groups, visits, strict=True):
        rows = min(max(_ROWS_PER_K * layers[0].k, _FEWEST_ROWS), _MOST_ROWS)
        rows = max(rows // seen.num_batches, 1)
        sums = MomentSums(layers)
        for number, (wanted, found) in enumerate(seen.batches):
            sums.add(found[0], None if changes is None else wanted, rows, number * _PHASE)
        yield Step(layers, tuple(sums.moments(changes is not None)))


def visit(
    network: FloatModel,
    data: Data,
    stops: Sequence[Stop],
    changes: Changes | None,
    *,
    num_threads: int = 1,
) -> Iterator[Seen]:
    """Goes to places of a network, given in the order of their nodes, and tells which tensors are there.

    Without changes the float network stands for both. All batches of a stop must be taken before the next stop. The
    caller may add to the changes in between: what lies behind the stop is computed with them.
    """
    alive = _Liveness(network.model)
    size = _batch_size(data)
    num_batches = sum(1 for _ in data.batches(size))
    tracks = [_Track(network, data, size, num_batches) for _ in range(1 if changes is None else 2)]
    with ThreadPoolExecutor(max(1, num_threads)) as pool:
        for stop in stops:
            keep = alive.before(stop.node_index)
            tracks[0].start(stop.wanted, keep, Changes())
            if changes is not None:
                tracks[1].start(stop.found, keep, changes)
            results = [_ahead(pool, track, 1 + num_threads // len(tracks)) for track in tracks]
            batches = ((found[0], found[-1]) for found in zip(*results, strict=True))
            yield Seen(num_batches, batches)


class _Track:
    """One network on all samples: the tensors that are kept of it, and what is computed from them."""

    def __init__(self, network: FloatModel, data: Data, batch: int, num_batches: int) -> None:
        self._network, self._data, self._batch = network, data, batch
        self._kept: list[Feed] | None = None  # by batch; None: the data itself
        self._num_batches = num_batches

    def start(self, fetch: tuple[str, ...], keep: frozenset[str], changes: Changes) -> None:
        """Prepares to compute `fetch` from what is kept, and to keep the tensors called `keep` instead."""
        first = next(iter(self.batches()))[1]
        self._fetch = fetch
        for self._keep in (keep, frozenset[str]()):
            names = dict.fromkeys((*fetch, *sorted(self._keep)))
            self._computed = tuple(name for name in names if name not in first)
            self._simulation: Simulation | None = None
            if self._computed:
                self._simulation = self._network.simulate(
                    changes.weights,
                    changes.biases,
                    constants=changes.constants,
                    fetch=self._computed,
                    given=first,
                )
            size = sum(a.nbytes for a in self._values(first, self._keep))
            if size * self._num_batches <= _KEPT_BYTES:
                break
        self._next: list[Feed] = [{}] * self._num_batches if self._kept is None else self._kept

    def batches(self) -> Iterator[tuple[int, Feed]]:
        """What is kept, batch by batch."""
        if self._kept is not None:
            return enumerate(self._kept)
        return enumerate(self._data.batches(self._batch))

    def run(self, batch: tuple[int, Feed]) -> list[Array]:
        """The values of `fetch`; those to keep are put aside."""
        number, feed = batch
        found = self._values(feed, (*self._fetch, *self._keep))
        if self._keep:
            self._next[number] = dict(zip(self._keep, found[len(self._fetch) :], strict=True))
        return found[: len(self._fetch)]

    def finish(self) -> None:
        """After the last batch: what was put aside is what is kept."""
        if self._keep:
            self._kept = self._next

    def _values(self, feed: Feed, names: Iterable[str]) -> list[Array]:
        values = dict(feed)
        if self._simulation is not None:
            values |= zip(self._computed, self._simulation.run(feed), strict=True)
        return [values[name] for name in names]


class _Liveness:
    """Which tensors of the main graph are computed before a node and read by it or after it."""

    def __init__(self, model: Model) -> None:
        self._born = {info.name: -1 for info in model.inputs}
        self._read: dict[str, int] = {}
        self._odd: set[str] = set()  # not a tensor, so nothing that can be fed
        for index, node in enumerate(model.ir.graph):
            for value in _reads(node):
                self._read[value.name or ""] = index
            if node.op_type == "Constant":
                continue  # stays in the graph
            for value in node.outputs:
                self._born[value.name or ""] = index
                if isinstance(value.type, ir.SequenceType | ir.OptionalType):
                    self._odd.add(value.name or "")

    def before(self, index: int) -> frozenset[str]:
        """Names of the tensors alive before the node at `index`; none if one of them cannot be kept."""
        names = {n for n, born in self._born.items() if born < index <= self._read.get(n, -1)}
        return frozenset() if names & self._odd else frozenset(names)


def _reads(node: ir.Node) -> Iterator[ir.Value]:
    """What a node and the graphs inside it read."""
    yield from (value for value in node.inputs if value is not None)
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            for inner in attribute.as_graph():
                yield from _reads(inner)


def _ahead(pool: ThreadPoolExecutor, track: _Track, depth: int) -> Iterator[list[Array]]:
    """What a track computes for each batch, in order, at most `depth` batches ahead."""
    waiting: deque[Future[list[Array]]] = deque()
    for batch in track.batches():
        waiting.append(pool.submit(track.run, batch))
        if len(waiting) > depth:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
    track.finish()


def _batch_size(data: Data) -> int:
    sample = sum(array.nbytes for array in next(data.batches(1)).values())
    return min(_MAX_BATCH, max(1, _BATCH_BYTES // max(sample, 1)))
