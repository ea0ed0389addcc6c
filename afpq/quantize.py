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
from afpq.report import RunFacts, accuracy_facts, build_report, file_facts, layer_facts, write_report
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
