"""Compares two models on the same data: accuracy, agreement, KL divergence, SQNR, cosine, per output and per layer.

Everything is streamed: only sums are kept of the outputs. Errors that come with a number are standard errors, binomial
for shares. What an output means (`kind`) is found in the reference's first batch, see `_metrics.output_kind`.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime as ort

from afpq._tally import Energy, OutputComparison, Tally
from afpq.data import open_data
from afpq.errors import ModelError
from afpq.packed import DOMAIN, WITHOUT_WEIGHT, file_bytes, read_ir, read_packed
from afpq.runtime import session

__all__ = ["Comparison", "LayerComparison", "OutputComparison", "compare", "compare_output"]

Array = npt.NDArray[Any]
Progress = Callable[[str, int, int], None]  # stage, samples done, samples in all
Source: TypeAlias = str | Path | ort.InferenceSession

BATCH = 16
BATCH_WITH_LAYERS = 2  # all layers' outputs of both models are held at once


@dataclass(frozen=True)
class LayerComparison:
    """The output of one packed layer (with what is fused into it) against the same tensor of the reference."""

    name: str
    output_name: str
    sqnr_db: float


@dataclass(frozen=True)
class Comparison:
    """Two models on the same data."""

    num_samples: int
    outputs: tuple[OutputComparison, ...]
    layers: tuple[LayerComparison, ...]
    reference_bytes: int | None  # None for a session: no file is known
    quantized_bytes: int | None
    preprocess: str | None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; an infinite SQNR (equal outputs) is None."""
        return {key: _plain(value) for key, value in asdict(self).items()}


def compare(
    reference: Source,
    quantized: Source,
    data: object,
    *,
    preprocess: str | None = None,
    limit: int | None = None,
    layers: bool = False,
    threads: int = 0,
    progress: Progress | None = None,
) -> Comparison:
    """Runs both models (files or sessions) over the data (a `Data`, or anything `open_data` takes).

    `layers` also compares the output of every packed layer; it needs files.

    Raises:
        ModelError: a model cannot be run, the two do not have the same outputs, or one gives NaN.
        DataError: the data does not fit the reference.
    """
    tensors = _layer_tensors(reference, quantized) if layers else {}
    extra = list(tensors.values())
    first, names = _open(reference, extra, threads)
    second, others = _open(quantized, extra, threads)
    for name in names:
        if name not in others:
            found = ", ".join(others)
            raise ModelError(f"the quantized model has no output {name!r}; it has {found}")
    fetched = list(dict.fromkeys(names + extra))
    stored = _stored_as_bytes(quantized) if layers else {}
    opened = open_data(data, first.get_inputs(), preprocess=preprocess, limit=limit)
    outputs = {name: Tally(name) for name in names}
    inner = {name: Energy() for name in extra}
    done = 0
    for feed in opened.batches(BATCH_WITH_LAYERS if layers else BATCH):
        count = opened.count(feed)
        labels = None if opened.labels is None else opened.labels[done : done + count]
        results = _run(first, fetched, feed), _run(second, fetched, feed)
        for name, a, b in zip(fetched, *results, strict=True):
            if name in outputs:
                outputs[name].add(a, b, labels)
            if name in inner:
                inner[name].add(a, stored[name].values(b) if name in stored else b)
        done += count
        if progress is not None:
            progress("compare", done, opened.num_samples)
    return Comparison(
        num_samples=done,
        outputs=tuple(tally.result() for tally in outputs.values()),
        layers=tuple(
            LayerComparison(layer, name, inner[name].sqnr_db()) for layer, name in tensors.items()
        ),
        reference_bytes=_bytes(reference),
        quantized_bytes=_bytes(quantized),
        preprocess=None if opened.preprocess is None else str(opened.preprocess),
    )


def compare_output(
    name: str, batches: Iterable[tuple[Array, Array, npt.NDArray[np.int64] | None]]
) -> OutputComparison:
    """The numbers of one output from batches of (reference, other, labels of the samples or None).

    Raises:
        ModelError: an output holds NaN.
    """
    tally = Tally(name)
    for reference, other, labels in batches:
        tally.add(reference, other, labels)
    return tally.result()


def _open(model: Source, extra: list[str], threads: int) -> tuple[ort.InferenceSession, list[str]]:
    """A session that can give the tensors `extra` too, and the names of the model's own outputs."""
    if isinstance(model, ort.InferenceSession) or not extra:
        opened = session(model, threads=threads) if isinstance(model, str | Path) else model
        return opened, [output.name for output in opened.get_outputs()]
    graph = read_ir(model)
    names = [output.name or "" for output in graph.graph.outputs]
    values = {value.name: value for node in graph.graph for value in node.outputs}
    graph.graph.outputs.extend(values[name] for name in extra if name not in names)
    try:
        loaded = ir.external_data.load_to_model(graph)
        content = ir.to_proto(loaded).SerializeToString()
    except ValueError as error:  # protobuf's limit
        raise ModelError(f"{model}: layers can be compared only in models below 2 GB") from error
    return session(content, threads=threads), names


def _layer_tensors(reference: Source, quantized: Source) -> dict[str, str]:
    """Packed layers by name and the tensor each writes, where the reference has a tensor of that name."""
    if isinstance(reference, ort.InferenceSession) or isinstance(quantized, ort.InferenceSession):
        raise ModelError("layers can be compared only between model files, not sessions")
    known = {value.name for node in read_ir(reference).graph for value in node.outputs}
    skipped = ("Unpack", *WITHOUT_WEIGHT)
    result = {}
    for node in read_ir(quantized).graph:
        name = node.outputs[0].name if node.outputs else None
        if node.domain == DOMAIN and node.op_type not in skipped and name in known:
            result[node.name or str(name)] = str(name)
    return result


@dataclass(frozen=True)
class _Bytes:
    """How a tensor is stored that convolutions pass to each other: channels last, I + zero."""

    scale: float
    zero: int

    def values(self, stored: Array) -> Array:
        numbers = (stored.astype(np.float32) - self.zero) * np.float32(self.scale)
        return np.moveaxis(numbers, -1, 1)


def _stored_as_bytes(quantized: Source) -> dict[str, _Bytes]:
    assert not isinstance(quantized, ort.InferenceSession)
    return {
        layer.output_name: _Bytes(layer.output_scale, layer.output_format.zero_byte)
        for layer in read_packed(quantized).layers
        if layer.output_format is not None and layer.output_scale is not None
    }


def _run(model: ort.InferenceSession, names: list[str], feed: Mapping[str, Array]) -> list[Array]:
    taken = {entry.name for entry in model.get_inputs()}
    if not taken <= set(feed):
        raise ModelError(
            f"the models have different inputs: {', '.join(sorted(taken))} and {', '.join(feed)}"
        )
    try:
        return list(model.run(names, {name: feed[name] for name in taken}))
    except Exception as error:  # onnxruntime has a kind of its own for every status
        raise ModelError(
            f"onnxruntime cannot run the model: {' '.join(str(error).split())}"
        ) from error


def _bytes(model: Source) -> int | None:
    return None if isinstance(model, ort.InferenceSession) else file_bytes(model)


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
