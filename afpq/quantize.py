"""From a float model to a packed one: check, calibrate, search, encode, correct, rewrite.

`quantize` does all; `prepare`, `find_plan` and `build` are its steps, for callers that stop in between. Every input is
checked in `prepare`, before the first heavy step. Nothing is written before `QuantizedModel.save`, which loads and runs
the new file once before it takes its name.
"""

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime as ort

from afpq._probe import Feeds, random_feeds
from afpq.calibrate import Stats, calibrate
from afpq.correct import correct_bias
from afpq.data import Data, open_data
from afpq.errors import DataError, ModelError, PlanError
from afpq.evaluate import Comparison, compare
from afpq.graph import Layer, Model, load_model
from afpq.packed import describe_packed, file_bytes, is_packed, read_ir
from afpq.packing import PackedTensor, packed_bytes
from afpq.plan import Plan, check_plan, match_names
from afpq.report import (
    RunFacts,
    accuracy_facts,
    build_report,
    file_facts,
    layer_facts,
    write_report,
)
from afpq.rewrite import EXTERNAL_DATA_BYTES, rewrite, save, serialize
from afpq.rounding import best_scale, quantize_tensor
from afpq.runtime import FloatModel, session
from afpq.search import search

__all__ = [
    "DEFAULT_BITS",
    "Job",
    "QuantizedModel",
    "build",
    "find_plan",
    "load",
    "prepare",
    "quantize",
]

DEFAULT_BITS = 5.0
MIN_BITS, MAX_BITS = 2.0, 8.0
ACTIVATIONS = ("a16", "a8", "f32")
KINDS = ("real", "integer")
HELD_OUT = 0.25  # of the calibration samples: corrections are proven on them
MIN_SAMPLES_TO_SPLIT = 8

Progress = Callable[[str, int, int], None]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Job:
    """Checked inputs of one run; made by `prepare`."""

    model: Model
    plan: Plan | None = None
    bits: float | None = None
    size: int | None = None
    fit: Data | None = None  # samples for calibration and search
    held_out: Data | None = None  # samples that only judge
    data_name: str = ""
    activations: str = "a16"
    kind: str = "real"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    overrides: Mapping[str, str] = field(default_factory=dict)  # pattern -> format
    seed: int = 0
    threads: int = 0

    @property
    def budget(self) -> str | None:
        """The limit in words; None if a given plan decides."""
        if self.size is not None:
            return f"{self.size:,} bytes for the file"
        return None if self.bits is None else f"{self.bits:g} bits per weight"


@dataclass(eq=False)
class QuantizedModel:
    """A packed model in memory, or one that `load` opened. `plan` is None after `load`."""

    packed: ir.Model = field(repr=False)
    plan: Plan | None
    facts: RunFacts
    path: Path | None = None  # where it lies on disk, once saved or loaded
    probe: Feeds | None = field(default=None, repr=False)  # one input, to run a saved file once

    def save(self, path: str | Path) -> int:
        """Writes the file, loads it again, runs it once, and only then gives it its name; returns its bytes.

        Raises:
            ModelError: it cannot be written, or onnxruntime cannot load or run it. Nothing is left behind then.
        """
        path = Path(path)
        try:
            folder = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
        except OSError as error:
            raise ModelError(f"{path}: cannot be written: {error.strerror}") from error
        try:
            size = save(self.packed, folder / path.name)
            checks = _try_file(folder / path.name, self.probe)
            # External data first: the model's own file is what makes the result valid.
            for file in sorted(folder.iterdir(), key=lambda f: f.name == path.name):
                os.replace(file, path.parent / file.name)
        except OSError as error:
            raise ModelError(f"{path}: cannot be written: {error.strerror or error}") from error
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        self.path = path
        self.facts = replace(self.facts, checks={**self.facts.checks, **checks})
        return size

    def report(self, path: str | Path) -> None:
        """Writes the report, Markdown or JSON by the suffix.

        Raises:
            AfpqError: the suffix is not known, or the model was not saved.
        """
        write_report(self.summary(), path)

    def summary(self) -> dict[str, Any]:
        """The report as a dictionary.

        Raises:
            ModelError: the model was not saved.
        """
        if self.path is None:
            raise ModelError("save the model before its report: the report measures the file")
        packed = describe_packed(self.packed, self.path, file_bytes(self.path, read_ir(self.path)))
        return build_report(packed, self.facts)

    def session(self, *, threads: int = 0) -> ort.InferenceSession:
        """An onnxruntime session of it."""
        if self.path is not None:
            return session(self.path, threads=threads)
        return _session_of(self.packed, threads)


def quantize(
    model: str | Path | Model,
    plan: Plan | None = None,
    stats: Stats | None = None,
    *,
    data: object = None,
    bits: float | None = None,
    size: int | None = None,
    preprocess: str | None = None,
    samples: int | None = None,
    activations: str = "a16",
    kind: str = "real",
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
    overrides: Mapping[str, str] | None = None,
    seed: int = 0,
    threads: int = 0,
    progress: Progress | None = None,
) -> QuantizedModel:
    """Quantizes a model under a budget (5 bits per weight if none is given), or as a plan says.

    With `data` the formats are chosen by measured sensitivity and biases are corrected; a quarter of the samples is
    held out to prove the corrections. `stats` spares the calibration. Without both, formats follow from weight error
    alone. The same arguments give the same bytes, whatever `threads` is.

    Raises:
        ModelError: the model cannot be read, or has nothing to quantize.
        DataError: the data does not fit the model.
        PlanError: the budget is impossible, a pattern matches nothing, or the plan does not fit.
    """
    job = prepare(
        model,
        plan,
        data=data,
        bits=bits,
        size=size,
        preprocess=preprocess,
        samples=samples,
        activations=activations,
        kind=kind,
        include=include,
        exclude=exclude,
        overrides=overrides,
        seed=seed,
        threads=threads,
    )
    found, known = find_plan(job, stats, progress=progress)
    return build(job, found, known, progress=progress)


def load(path: str | Path) -> QuantizedModel:
    """Opens a packed file: nothing else is needed.

    Raises:
        ModelError: it cannot be read, or is not packed by afpq.
    """
    model = read_ir(path)
    if not is_packed(model):
        raise ModelError(f"{path}: not a packed model (no operator of the domain afpq)")
    return QuantizedModel(packed=model, plan=None, facts=RunFacts(), path=Path(path))


def prepare(
    model: str | Path | Model,
    plan: Plan | None = None,
    *,
    data: object = None,
    bits: float | None = None,
    size: int | None = None,
    preprocess: str | None = None,
    samples: int | None = None,
    activations: str = "a16",
    kind: str = "real",
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
    overrides: Mapping[str, str] | None = None,
    seed: int = 0,
    threads: int = 0,
) -> Job:
    """Reads and checks everything that a run needs; see `quantize`."""
    _check_choices(plan, bits, size, activations, kind)
    loaded = model if isinstance(model, Model) else load_model(model)
    if not loaded.layers:
        raise ModelError(f"{loaded.path}: nothing to quantize{_first_reason(loaded)}")
    job = Job(
        model=loaded,
        plan=plan,
        bits=DEFAULT_BITS if plan is None and bits is None and size is None else bits,
        size=size,
        activations=activations,
        kind=kind,
        include=tuple(include),
        exclude=tuple(exclude),
        overrides=dict(overrides or {}),
        seed=seed,
        threads=threads,
    )
    _check_names(job)
    if data is None:
        return job
    opened = open_data(data, loaded.inputs, preprocess=preprocess, limit=samples)
    FloatModel(loaded, threads=threads).run(next(opened.batches(1)))
    name = str(data) if isinstance(data, str | Path) else type(data).__name__
    return replace(job, **_split(opened), data_name=name)


def find_plan(
    job: Job, stats: Stats | None = None, *, progress: Progress | None = None
) -> tuple[Plan, Stats | None]:
    """Calibrates if there is data, and searches unless the job has a plan.

    Raises:
        PlanError: the budget is impossible.
    """
    progress = progress or _silent
    if stats is None and job.fit is not None:
        stats = calibrate(
            job.model,
            job.fit,
            threads=job.threads,
            progress=lambda done, total: progress("calibrate", done, total),
        )
    if job.plan is not None:
        return job.plan, stats
    plan = search(
        job.model,
        stats,
        bits=job.bits,
        size=job.size,
        data=job.fit,
        kind=job.kind,
        include=job.include,
        exclude=job.exclude,
        overrides=job.overrides,
        threads=job.threads,
        progress=progress,
    )
    return plan, stats


def build(
    job: Job, plan: Plan, stats: Stats | None = None, *, progress: Progress | None = None
) -> QuantizedModel:
    """Encodes the weights as the plan says, corrects biases if that helps, and rewrites the graph."""
    progress = progress or _silent
    clock = _Clock()
    with clock("encode"):
        tensors, sqnr = _encode(job, plan, stats, progress)
    plain = rewrite(job.model, plan, tensors, {}, activations=job.activations)
    facts = RunFacts(
        source=file_facts(job.model.path, file_bytes(job.model.path)),
        budget=job.budget,
        objective=plan.objective,
        predicted_loss=plan.predicted_loss,
        layers=layer_facts(plan.entries, sqnr),
        left_float=_left_float(job.model, plan),
        float_bytes=_float_bytes(job.model, tensors),
        calibration=_calibration_facts(job, stats),
    )
    probe = None if job.fit is None else next(job.fit.batches(1))
    if job.held_out is None or stats is None:
        return QuantizedModel(plain, plan, replace(facts, seconds=clock.seconds), probe=probe)
    with clock("correct"):
        biases = _corrected(job.model, tensors, stats)
        corrected = rewrite(job.model, plan, tensors, biases, activations=job.activations)
        before, after = _compare(job, [plain, corrected], progress)
    kept = _loss(after) < _loss(before)
    facts = replace(
        facts,
        correction={
            "kept": kept,
            "layers": len(biases),
            "held_out_samples": job.held_out.num_samples,
            "loss_without": _loss(before),
            "loss_with": _loss(after),
        },
        accuracy=accuracy_facts(
            (after if kept else before).to_dict(),
            f"{job.data_name} held out of calibration and search",
        ),
        seconds=clock.seconds,
    )
    return QuantizedModel(corrected if kept else plain, plan, facts, probe=probe)


def _check_choices(
    plan: Plan | None, bits: float | None, size: int | None, activations: str, kind: str
) -> None:
    if sum(x is not None for x in (plan, bits, size)) > 1:
        raise PlanError("give one of plan, bits and size: each decides how large the model gets")
    if bits is not None and not MIN_BITS <= bits <= MAX_BITS:
        raise PlanError(f"bits {bits:g} is not in the range {MIN_BITS:g}..{MAX_BITS:g}")
    if size is not None and size < 1:
        raise PlanError(f"size {size} is not a positive number of bytes")
    if activations not in ACTIVATIONS:
        raise PlanError(f"activations {activations!r} is not one of {', '.join(ACTIVATIONS)}")
    if kind not in KINDS:
        raise PlanError(f"exponent bias kind {kind!r} is not one of {', '.join(KINDS)}")


def _check_names(job: Job) -> None:
    names = [layer.name for layer in job.model.layers]
    match_names(job.include, names, "--include")
    match_names(job.exclude, names, "--exclude")
    match_names(job.overrides, names, "--layer")
    if job.plan is not None:
        if job.include or job.exclude or job.overrides:
            raise PlanError("a plan already says which layers get what: edit the plan instead")
        shapes = {layer.name: (layer.weight_name, layer.n, layer.k) for layer in job.model.layers}
        check_plan(job.plan, shapes)


def _first_reason(model: Model) -> str:
    if not model.skipped:
        return " (no Conv, MatMul, Gemm, Gather, ConvTranspose, LSTM or GRU with constant weights)"
    first = model.skipped[0]
    return f"; {len(model.skipped)} weights stay float, the first {first.name!r}: {first.reason}"


def _split(data: Data) -> dict[str, Data | None]:
    """Most of the samples for calibration, some to judge by; all for calibration if there are few."""
    if data.num_samples < MIN_SAMPLES_TO_SPLIT:
        return {"fit": data, "held_out": None}
    try:
        fit, held_out = data.split(HELD_OUT)
    except DataError:  # one batch that cannot be divided
        return {"fit": data, "held_out": None}
    return {"fit": fit, "held_out": held_out}


def _encode(
    job: Job, plan: Plan, stats: Stats | None, progress: Progress
) -> tuple[dict[str, PackedTensor], dict[str, float]]:
    """Packed tensors and the SQNR of their outputs in dB, by weight_name."""
    by_weight: dict[str, list[Layer]] = {}
    for layer in job.model.layers:
        by_weight.setdefault(layer.weight_name, []).append(layer)
    tensors: dict[str, PackedTensor] = {}
    sqnr: dict[str, float] = {}
    for number, entry in enumerate(plan.entries, 1):
        if entry.format is not None:
            layers = by_weight[entry.weight_name]
            weight, energy = layers[0].weight, tensor_energy(layers, stats)
            scale, error = best_scale(
                weight,
                entry.format,
                energy,
                kind=entry.kind,
                granularity=entry.granularity,
                num_threads=job.threads,
            )
            tensors[entry.weight_name] = quantize_tensor(
                weight, entry.format, scale, kind=entry.kind, num_threads=job.threads
            )
            sqnr[entry.weight_name] = _sqnr_db(weight, energy, float(error.sum()))
        progress("encode", number, len(plan.entries))
    return tensors, sqnr


def _sqnr_db(weight: Floats, energy: npt.NDArray[np.float64] | None, error: float) -> float:
    rows = 1 if energy is None else len(energy)
    squares = np.square(weight, dtype=np.float64).reshape(rows, -1, weight.shape[1]).sum(axis=1)
    signal = float(squares.sum() if energy is None else (squares * energy).sum())
    return 10 * float(np.log10(max(signal, 1e-300) / max(error, 1e-300)))


def _corrected(
    model: Model, tensors: Mapping[str, PackedTensor], stats: Stats
) -> dict[str, Floats]:
    """New biases by layer name, for every product whose input was seen."""
    decoded = {name: tensor.decode() for name, tensor in tensors.items()}
    return {
        layer.name: correct_bias(layer, stats, decoded[layer.weight_name])
        for layer in model.layers
        if layer.weight_name in decoded and layer.kind in ("matmul", "conv") and layer.name in stats
    }


def _compare(job: Job, models: list[ir.Model], progress: Progress) -> list[Comparison]:
    assert job.held_out is not None
    reference = session(job.model.path, threads=job.threads, ops=False)
    result = []
    for number, packed in enumerate(models):
        total = len(models) * job.held_out.num_samples
        first = number * job.held_out.num_samples
        result.append(
            compare(
                reference,
                _session_of(packed, job.threads),
                job.held_out,
                threads=job.threads,
                progress=lambda _, done, __, first=first, total=total: progress(
                    "correct", first + done, total
                ),
            )
        )
    return result


def _loss(comparison: Comparison) -> float:
    """One number for how far the outputs are from float: KL, else noise over signal, averaged over the outputs."""
    losses = []
    for output in comparison.outputs:
        if output.kl is not None:
            losses.append(output.kl)
        elif output.sqnr_db is not None:
            losses.append(10 ** (-output.sqnr_db / 10))
        elif output.agreement is not None:
            losses.append(1 - output.agreement)
    return float(np.mean(losses)) if losses else 0.0


def _session_of(packed: ir.Model, threads: int) -> ort.InferenceSession:
    graphs = (packed.graph, *packed.graph.subgraphs())
    values = (v.const_value for g in graphs for v in g.initializers.values())
    if sum(t.nbytes for t in values if t is not None) <= EXTERNAL_DATA_BYTES:
        return session(serialize(packed), threads=threads)
    with tempfile.TemporaryDirectory() as folder:
        save(packed, Path(folder) / "model.onnx")
        return session(Path(folder) / "model.onnx", threads=threads)


def _try_file(path: Path, probe: Feeds | None) -> dict[str, Any]:
    """Loads a written file and runs it once; made-up inputs may not suit a model, real ones must."""
    loaded = session(path)
    try:
        feeds = random_feeds(loaded) if probe is None else probe
        loaded.run(None, feeds)
    except Exception as error:  # onnxruntime has a kind of its own for every status
        if probe is None:
            return {"loaded": True, "run_once": "no: made-up inputs do not suit the model"}
        message = " ".join(str(error).split())
        raise ModelError(f"the packed model loads but does not run: {message}") from error
    return {"loaded": True, "run_once": "on made-up inputs" if probe is None else "on a sample"}


def _left_float(model: Model, plan: Plan) -> list[dict[str, Any]]:
    """Weights that the file holds as floats, and why."""
    planned = {name: entry for entry in plan.entries for name in entry.layers}
    result = []
    for layer in model.layers:
        entry = planned.get(layer.name)
        if entry is None or entry.format is None:
            reason = "not in the plan" if entry is None else "excluded, or float in the plan"
            fields = (layer.name, layer.op_type, reason, layer.num_weights)
            result.append(dict(zip(_FLOAT_FIELDS, fields, strict=True)))
    for skipped in model.skipped:
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


class _Clock:
    """Seconds of every stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start


def _silent(stage: str, done: int, total: int) -> None:
    """Progress that nobody wants to see."""
