"""From a plan to a packed graph: encode the weights, correct the biases, rewrite; and what a report needs to know."""

import math
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime as ort

from afpq._candidates import Target, candidates, targets
from afpq._job import Job, float_tensors
from afpq._judge import WORST_LOSS
from afpq._way import Way
from afpq._ways import find_ways, gain, refitted
from afpq.activations import choose_activations
from afpq.calibrate import Stats
from afpq.compensate import MAX_SAMPLES
from afpq.correct import can_correct
from afpq.errors import NaNError, PlanError
from afpq.evaluate import Comparison, compare
from afpq.formats import AfpFormat
from afpq.graph import Model
from afpq.packing import PackedTensor, packed_bytes
from afpq.plan import ActivationEntry, Plan, PlanEntry
from afpq.report import RunFacts, accuracy_facts, layer_facts
from afpq.rewrite import EXTERNAL_DATA_BYTES, rewrite, save, serialize
from afpq.rounding import best_scale, quantize_tensor
from afpq.runtime import session

__all__ = ["build_graph", "check_budget", "file_size", "session_of", "with_activations"]

_SMALLEST = AfpFormat(0, 1)

Progress = Callable[[str, int, int], None]
Floats = npt.NDArray[np.float32]
Biases = Mapping[str, Floats]


def build_graph(
    job: Job, plan: Plan, stats: Stats | None, progress: Progress
) -> tuple[ir.Model, RunFacts]:
    """The packed graph of a plan, and the facts of the run.

    Raises:
        NaNError: whatever way the weights are rounded, the outputs are NaN.
    """
    tensors, sqnr = _encode(job, plan, stats, progress)
    facts = RunFacts(
        source=job.source,
        budget=job.budget,
        objective=plan.objective,
        predicted_loss=plan.predicted_loss,
        frontier=plan.frontier,
        layers=layer_facts(plan.entries, sqnr),
        left_float=_left_float(job, plan),
        float_bytes=_float_bytes(job.model, tensors),
        calibration=_calibration_facts(job, stats),
    )
    if stats is None:
        return _rewrite(job, plan, tensors, {}), facts
    if job.held_out is None:  # nothing to prove a correction on
        return _rewrite(job, plan, tensors, {}), facts
    ways, notes = find_ways(job, plan, stats, Way(tensors, {}, sqnr), progress)
    trials = _try_all(job, plan, ways, progress)
    losses = {name: trial.loss for name, trial in trials.items()}
    kept = min(losses, key=lambda name: losses[name])
    graph, way = trials[kept].graph, ways[kept]
    notes += [f"{name} was left out: its output is NaN" for name in ways if name not in trials]
    again = refitted(job, plan, kept, ways, progress)
    if again is not None:
        with suppress(NaNError):
            trial = _try_all(job, plan, {kept: again}, progress)[kept]
            # It was fitted to these samples: a larger loss would be odd.
            if trial.loss <= losses[kept]:
                graph, way = trial.graph, again
    samples = job.samples if way is again else job.fit
    return graph, replace(
        facts,
        layers=layer_facts(plan.entries, way.sqnr),
        correction={
            "kept": kept,
            "held_out_samples": job.held_out.num_samples,
            "losses": losses,
            "bn_recal": gain(losses),
            "notes": notes,
            "fitted_samples": 0 if samples is None else min(samples.num_samples, MAX_SAMPLES),
            "equalization": None,
        },
        accuracy=accuracy_facts(
            trials[kept].comparison.to_dict(),
            f"{job.data_name} (held out of calibration and search"
            + ("; before the last fit)" if way is again else ")"),
        ),
    )


def with_activations(job: Job, plan: Plan, stats: Stats | None, progress: Progress) -> Plan:
    """The plan, with static formats for what integer layers read where `a8` and data ask for them and it has none."""
    wanted = job.activations == "a8" and plan.activations is None
    if not wanted or stats is None or job.fit is None:
        return plan
    chosen = choose_activations(
        job.model,
        plan,
        stats,
        job.fit,
        kind=job.kind,
        threads=job.threads,
        progress=progress,
    )
    return replace(plan, activations=chosen)


def file_size(job: Job, plan: Plan) -> int:
    """Bytes of the file that a plan leads to, without encoding anything; exact up to added biases, never too small."""
    tensors = {}
    for entry in plan.entries:
        if entry.format is not None:
            size = packed_bytes(entry.n, entry.k, entry.format.bits)
            scale = np.ones(entry.n if entry.granularity == "per_channel" else 1, np.float32)
            tensors[entry.weight_name] = PackedTensor(
                entry.format, entry.n, entry.k, np.zeros(size, np.uint8), scale, entry.kind
            )
    biases = {}
    if job.held_out is not None:
        for number, layer in enumerate(job.model.layers, 1):
            if layer.weight_name in tensors and can_correct(layer):
                # Equal biases would be stored once: no two of these are.
                biases[layer.name] = np.full(layer.n, np.pi * number, np.float32)
    graph = _rewrite(job, plan, tensors, biases)
    total = _tensor_bytes(graph)
    return len(serialize(graph)) if total <= EXTERNAL_DATA_BYTES else total


def check_budget(job: Job) -> int | None:
    """Refuses a budget that no plan can meet; returns the bytes for packed weights if the budget is a file size.

    Raises:
        PlanError: the budget is too small.
    """
    stay = float_tensors(job)
    active = [t for t in targets(job.model.layers, None) if t.weight_name not in stay]
    found = [
        candidates(t, kind=job.kind, formats=[_SMALLEST], num_threads=job.threads) for t in active
    ]
    smallest = -(-sum(min(c.storage_bits for c in choices) for choices in found) // 8)
    weights = sum(t.weight.size for t in active)
    if job.size is None:
        if job.bits is not None and 8 * smallest > job.bits * weights:
            raise PlanError(
                f"a budget of {job.bits:g} bits per weight is impossible: scales and padding included, "
                f"{math.ceil(8000 * smallest / weights) / 1000:.3f} is the least"
            )
        return None
    rest = _rest_bytes(job, active)
    if rest + smallest > job.size:
        raise PlanError(
            f"a file of {job.size:,} bytes is impossible: the smallest weights take {smallest:,} bytes, "
            f"everything else {rest:,}"
        )
    return job.size - rest


def _rest_bytes(job: Job, active: list[Target]) -> int:
    """What a file holds besides packed weights, a little more rather than less."""
    entries = tuple(
        PlanEntry(t.names, t.weight_name, len(t.weight), t.weight.shape[1], _SMALLEST, job.kind)
        for t in active
    )
    payload = sum(entry.storage_bits for entry in entries) // 8
    plan = Plan(entries, None, "size", activations=_any_activations(job))
    # Lengths and offsets of larger tensors take a few bytes more.
    return file_size(job, plan) - payload + 16 * len(entries)


def _any_activations(job: Job) -> tuple[ActivationEntry, ...]:
    """Static formats for all tensors that may get one: what they take in the file."""
    if job.activations != "a8" or job.fit is None:
        return ()
    names = dict.fromkeys(layer.input_name for layer in job.model.layers if layer.input_name)
    return tuple(ActivationEntry(name, AfpFormat(2, 5, signed=False), 1.0) for name in names)


def session_of(packed: ir.Model, threads: int) -> ort.InferenceSession:
    """A session of a graph in memory."""
    if _tensor_bytes(packed) <= EXTERNAL_DATA_BYTES:
        return session(serialize(packed), threads=threads)
    with tempfile.TemporaryDirectory() as folder:  # the file stays mapped after its name is gone
        save(packed, Path(folder) / "model.onnx")
        return session(Path(folder) / "model.onnx", threads=threads)


@dataclass(frozen=True, eq=False)
class _Trial:
    """A packed network on the held-out samples, as onnxruntime runs it."""

    graph: ir.Model
    comparison: Comparison
    loss: float


def _try_all(
    job: Job, plan: Plan, ways: Mapping[str, Way], progress: Progress
) -> dict[str, _Trial]:
    assert job.held_out is not None
    # One thread: what is kept must not depend on how sums are split.
    reference = session(job.model.path, threads=1, ops=False)
    count = job.held_out.num_samples
    trials: dict[str, _Trial] = {}
    failed = NaNError("there was no way to try")
    for number, (name, way) in enumerate(ways.items()):
        graph = _rewrite(job, plan, way.tensors, way.biases, way.constants)
        try:
            comparison = compare(
                reference,
                session_of(graph, 1),
                job.held_out,
                progress=partial(_report_trial, progress, number * count, len(ways) * count),
            )
        except NaNError as error:
            failed = error
            continue
        trials[name] = _Trial(graph, comparison, _loss(comparison))
    if not trials:
        raise failed
    return trials


def _report_trial(progress: Progress, before: int, total: int, _: str, done: int, __: int) -> None:
    progress("prove", before + done, total)


def _encode(
    job: Job, plan: Plan, stats: Stats | None, progress: Progress
) -> tuple[dict[str, PackedTensor], dict[str, float]]:
    """Packed tensors, and the expected SQNR of their products in dB, by weight_name."""
    found = {target.weight_name: target for target in targets(job.model.layers, stats)}
    tensors: dict[str, PackedTensor] = {}
    sqnr: dict[str, float] = {}
    for number, entry in enumerate(plan.entries, 1):
        if entry.format is not None:
            target = found[entry.weight_name]
            scale, error = best_scale(
                target.weight,
                entry.format,
                target.energy,
                kind=entry.kind,
                granularity=entry.granularity,
                num_threads=job.threads,
            )
            tensors[entry.weight_name] = quantize_tensor(
                target.weight, entry.format, scale, kind=entry.kind, num_threads=job.threads
            )
            signal, noise = float(target.signal.sum()), float(error.sum())
            if signal > 0 and noise > 0:
                sqnr[entry.weight_name] = 10 * math.log10(signal / noise)
        progress("encode", number, len(plan.entries))
    return tensors, sqnr


def _loss(comparison: Comparison) -> float:
    """One number for how far the outputs are from float: KL, else noise over signal, averaged over the outputs.

    Finite, as reports hold it: outputs that are all zero in the float network make any noise infinite.
    """
    losses = []
    for output in comparison.outputs:
        if output.kl is not None:
            losses.append(output.kl)
        elif output.sqnr_db is not None:
            losses.append(10 ** (-output.sqnr_db / 10))
        elif output.agreement is not None:
            losses.append(1 - output.agreement)
    return min(float(np.mean(losses)), WORST_LOSS) if losses else 0.0


def _rewrite(
    job: Job,
    plan: Plan,
    tensors: Mapping[str, PackedTensor],
    biases: Mapping[str, Floats],
    constants: Mapping[str, Floats] | None = None,
) -> ir.Model:
    return rewrite(
        job.model,
        plan,
        tensors,
        biases,
        constants=constants,
        activations=job.activations,
        chain=job.chain,
    )


def _tensor_bytes(model: ir.Model) -> int:
    graphs = (model.graph, *model.graph.subgraphs())
    values = (v.const_value for g in graphs for v in g.initializers.values())
    return sum(t.nbytes for t in values if t is not None)


def _left_float(job: Job, plan: Plan) -> list[dict[str, Any]]:
    """Weights that the file holds as floats, and why."""
    chosen = "left out by --include, --exclude or --layer"
    if job.plan is not None:
        chosen = "float in the given plan"
    planned = {name: entry for entry in plan.entries for name in entry.layers}
    result = []
    for layer in job.model.layers:
        entry = planned.get(layer.name)
        if entry is None or entry.format is None:
            fields = (layer.name, layer.op_type, chosen, layer.num_weights)
            result.append(dict(zip(_FLOAT_FIELDS, fields, strict=True)))
    for skipped in job.model.skipped:
        fields = (skipped.name, skipped.op_type, skipped.reason, skipped.num_weights)
        result.append(dict(zip(_FLOAT_FIELDS, fields, strict=True)))
    return result


_FLOAT_FIELDS = ("name", "op_type", "reason", "num_weights")


def _float_bytes(model: Model, tensors: Mapping[str, PackedTensor]) -> int:
    size = {"float32": 4, "float16": 2}
    return sum(
        layer.num_weights * size[layer.dtype]
        for name, layer in model.tensors().items()
        if name in tensors
    )


def _calibration_facts(job: Job, stats: Stats | None) -> dict[str, Any] | None:
    if stats is None:
        return None
    return {
        "data": job.data_name,
        "samples": stats.num_samples,
        "held_out_samples": 0 if job.held_out is None else job.held_out.num_samples,
        "preprocess": None
        if job.fit is None or job.fit.preprocess is None
        else str(job.fit.preprocess),
        "data_hash": stats.data_hash,
    }
