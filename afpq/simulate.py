"""What a network would do with few bits for weights and activations: packed, with rounding in front of its layers.

Weights are searched, rounded and compensated as by `quantize`. Every tensor that a quantized product reads, the
network's inputs too, gets a format of 3 to 8 bits and is rounded by plain ONNX operators, exactly as
`formats.fake_quantize` rounds; the layers then compute with float activations. Nothing of it is written to a file.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import onnx_ir as ir
import onnxruntime as ort

from afpq._build import session_of
from afpq._rounder import round_inputs
from afpq.activations import allocate_activations
from afpq.errors import DataError, PlanError
from afpq.graph import Model
from afpq.packed import DOMAIN
from afpq.plan import ActivationEntry, Plan
from afpq.quantize import build, find_plan, prepare

__all__ = ["Simulated", "parse_simulation", "round_in_graph", "simulate"]

WEIGHT_BITS, ACTIVATION_BITS = (2.0, 8.0), (3.0, 8.0)

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, eq=False)
class Simulated:
    """A simulated network: its plan with all formats, and the mean bits of what layers read."""

    graph: ir.Model = field(repr=False)
    plan: Plan
    activation_bits: float  # mean over the elements of all rounded tensors

    def session(self, *, threads: int = 0) -> ort.InferenceSession:
        """An onnxruntime session of it."""
        return session_of(self.graph, threads)


def parse_simulation(text: str) -> tuple[float, float]:
    """Reads `w5a5` or `w4.8a5.7`: mean bits per weight (scales included) and per activation.

    Raises:
        PlanError: it is not of that form, or a number is out of range.
    """
    match = re.fullmatch(r"w(\d+(?:\.\d+)?)a(\d+(?:\.\d+)?)", text)
    if match is None:
        raise PlanError(f"simulation {text!r} is not of the form w5a5 or w4.8a4.8")
    weights, activations = float(match[1]), float(match[2])
    for what, bits, (low, high) in (
        ("weight", weights, WEIGHT_BITS),
        ("activation", activations, ACTIVATION_BITS),
    ):
        if not low <= bits <= high:
            raise PlanError(f"{what} bits {bits:g} are not in the range {low:g}..{high:g}")
    return weights, activations


def simulate(
    model: str | Path | Model,
    data: object,
    *,
    bits: float,
    activation_bits: float,
    preprocess: str | None = None,
    samples: int | None = None,
    threads: int = 0,
    progress: Progress | None = None,
) -> Simulated:
    """Quantizes weights under a budget in memory, and rounds what layers read to `activation_bits` on average.

    Raises:
        ModelError: the model cannot be read, or has nothing to quantize.
        DataError: there is no data, or it does not fit the model.
        PlanError: a budget is impossible.
    """
    if data is None:
        raise DataError("a simulation needs data: formats of activations are chosen on samples")
    job = prepare(
        model,
        data=data,
        bits=bits,
        preprocess=preprocess,
        samples=samples,
        activations="f32",
        threads=threads,
    )
    plan, stats = find_plan(job, progress=progress)
    assert stats is not None and job.fit is not None
    packed = build(job, plan, stats, progress=progress).packed
    entries, mean = allocate_activations(
        job.model,
        plan,
        stats,
        job.fit,
        bits=activation_bits,
        threads=threads,
        progress=progress,
    )
    found = {entry.tensor: entry for entry in entries}
    readers = {layer.name: found.get(layer.input_name or "") for layer in job.model.layers}
    round_in_graph(packed, {name: entry for name, entry in readers.items() if entry is not None})
    return Simulated(packed, plan, mean)


def round_in_graph(packed: ir.Model, entries: dict[str, ActivationEntry]) -> None:
    """Rounds what the packed products called by the names read; other readers of a tensor keep its float values."""
    products = (n for n in packed.graph if n.domain == DOMAIN and n.op_type in ("MatMul", "Conv"))
    found = [(node, entries.get(node.name or "")) for node in products]
    places = [(node, 0, entry.format, entry.scale) for node, entry in found if entry is not None]
    round_inputs(packed.graph, places)
