"""The inputs of a quantization, read and checked before the first heavy step."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from afpq._costs import DEFAULT_BITS
from afpq._fold_norms import fold_batch_norms
from afpq.activations import added_tensors
from afpq.data import Data, open_data
from afpq.errors import DataError, ModelError, PlanError, RuntimeUnavailableError
from afpq.graph import Model, load_model
from afpq.journal import Journal
from afpq.packed import file_bytes, model_files
from afpq.plan import Plan, check_plan, match_names
from afpq.rates import read_rates
from afpq.report import environment, file_facts
from afpq.runtime import FloatModel
from afpq.search import MODES

__all__ = ["DEFAULT_BITS", "Job", "float_tensors", "prepare"]

MIN_BITS, MAX_BITS = 2.0, 8.0
ACTIVATIONS = ("a16", "a8", "f32")
KINDS = ("real", "integer")
# Facts of the environment that change no bytes of the result.
_NO_VERSIONS = ("cores", "system", "processor")
HELD_OUT = 0.25  # of the calibration samples: corrections are proven on them
MIN_SAMPLES_TO_SPLIT = 8
_SETTINGS = (  # that decide about the bytes
    "bits",
    "size",
    "max_drop",
    "activations",
    "kind",
    "include",
    "exclude",
    "overrides",
    "mode",
    "latency",
    "chain",
    "bn_recal",
    "equalize",
    "seed",
)
_NOTHING_KEPT = Journal()


@dataclass(frozen=True, eq=False)
class Job:
    """Checked inputs of one run; made by `prepare`."""

    model: Model
    plan: Plan | None = None
    bits: float | None = None
    size: int | None = None
    max_drop: float | None = None  # percent, see `afpq._drop`
    fit: Data | None = None  # samples for calibration and search
    held_out: Data | None = None  # samples that only judge
    samples: Data | None = None  # all of both
    data_name: str = ""
    activations: str = "a16"
    kind: str = "real"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    overrides: Mapping[str, str] = field(default_factory=dict)  # pattern -> format
    mode: str = "default"
    latency: Mapping[str, float] | None = None  # the rates of its activations, see `afpq.rates`
    chain: bool = True
    bn_recal: bool = True
    equalize: bool = False
    seed: int = 0
    threads: int = 0
    journal: Journal = _NOTHING_KEPT

    @cached_property
    def source(self) -> Mapping[str, Any]:
        """What a report tells of the float model."""
        return file_facts(self.model.path, file_bytes(self.model.path))

    @property
    def budget(self) -> str | None:
        """The limit in words; None if a given plan decides."""
        if self.size is not None:
            return f"{self.size:,} bytes for the file"
        if self.max_drop is not None:
            return f"a drop of at most {self.max_drop:g} %"
        return None if self.bits is None else f"{self.bits:g} bits per weight"


def prepare(
    model: str | Path | Model,
    plan: Plan | None = None,
    *,
    data: object = None,
    bits: float | None = None,
    size: int | None = None,
    max_drop: float | None = None,
    preprocess: str | None = None,
    samples: int | None = None,
    activations: str = "a16",
    kind: str = "real",
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
    overrides: Mapping[str, str] | None = None,
    mode: str = "default",
    latency: str | Path | None = None,
    chain: bool = True,
    bn_recal: bool = True,
    equalize: bool = False,
    seed: int = 0,
    threads: int = 0,
    journal: str | Path | None = None,
) -> Job:
    """Reads and checks everything that a run needs; see `quantize`."""
    _check_choices(plan, bits, size, max_drop, activations, kind, mode, equalize)
    loaded = fold_batch_norms(model if isinstance(model, Model) else load_model(model))
    if not loaded.layers:
        raise ModelError(f"{loaded.path}: nothing to quantize{_first_reason(loaded)}")
    any_budget = any(x is not None for x in (plan, bits, size, max_drop))
    job = Job(
        model=loaded,
        plan=plan,
        bits=DEFAULT_BITS if not any_budget else bits,
        size=size,
        max_drop=max_drop,
        activations=activations,
        kind=kind,
        include=tuple(include),
        exclude=tuple(exclude),
        overrides=dict(overrides or {}),
        mode=mode,
        latency=None if latency is None else read_rates(latency, activations),
        chain=chain,
        bn_recal=bn_recal,
        equalize=equalize,
        seed=seed,
        threads=threads,
    )
    _check_names(job)
    judged = [
        name
        for name, asked in (("max_drop", max_drop is not None), ("equalize", equalize))
        if asked
    ]
    if latency is not None and (plan is not None or data is None):
        why = "a plan already has the formats" if plan is not None else "it needs data"
        raise PlanError(f"latency chooses formats by how often layers multiply: {why}")
    if data is None:
        if judged:
            raise PlanError(f"{judged[0]} needs data to judge by")
        return _journaled(job, journal)
    if MODES[mode].learned and find_spec("torch") is None:
        raise RuntimeUnavailableError(
            f"mode {mode} learns rounding with torch, which is missing: pip install 'afpq[torch]', "
            "or take the default mode"
        )
    opened = open_data(data, loaded.inputs, preprocess=preprocess, limit=samples)
    FloatModel(loaded, threads=threads).run(next(opened.batches(1)))
    name = str(data) if isinstance(data, str | Path) else type(data).__name__
    fit, held_out = _split(opened, seed)
    if judged and held_out is None:
        together = opened.source.samples_per_unit
        least = max(MIN_SAMPLES_TO_SPLIT, 2 * together)
        raise PlanError(
            f"{judged[0]} judges held-out samples, and {opened.num_samples} are too few to hold any out: "
            f"give {least} or more" + (f" (they come {together} at a time)" if together > 1 else "")
        )
    job = replace(job, fit=fit, held_out=held_out, samples=opened, data_name=name)
    return _journaled(job, journal)


def _journaled(job: Job, folder: str | Path | None) -> Job:
    """With the journal in `folder`, if there is to be one."""
    if folder is None:
        return job
    identity = {
        "model": {p.name: file_facts(p)["sha256"] for p in model_files(job.model.path)},
        "data": None if job.samples is None else job.samples.fingerprint(None),
        "plan": None if job.plan is None else job.plan.plan_hash,
        **{name: getattr(job, name) for name in _SETTINGS},
        # Another library may add up in another order.
        "version of": {k: v for k, v in environment().items() if k not in _NO_VERSIONS},
    }
    return replace(job, journal=Journal.open(folder, identity))


def _check_choices(
    plan: Plan | None,
    bits: float | None,
    size: int | None,
    max_drop: float | None,
    activations: str,
    kind: str,
    mode: str,
    equalize: bool,
) -> None:
    if sum(x is not None for x in (plan, bits, size, max_drop)) > 1:
        raise PlanError(
            "give one of plan, bits, size and max_drop: each decides how large the model gets"
        )
    if equalize and max_drop is not None:
        raise PlanError(
            "equalize tries a second model under one budget: give bits or size, not max_drop"
        )
    if equalize and plan is not None and plan.activations:
        raise PlanError("equalize changes what layers read: take the activations out of the plan")
    if max_drop is not None and not 0 <= max_drop <= 100:
        raise PlanError(f"max_drop {max_drop:g} is not in the range 0..100 percent")
    if bits is not None and not MIN_BITS <= bits <= MAX_BITS:
        raise PlanError(f"bits {bits:g} is not in the range {MIN_BITS:g}..{MAX_BITS:g}")
    if size is not None and size < 1:
        raise PlanError(f"size {size} is not a positive number of bytes")
    if activations not in ACTIVATIONS:
        raise PlanError(f"activations {activations!r} is not one of {', '.join(ACTIVATIONS)}")
    if kind not in KINDS:
        raise PlanError(f"exponent bias kind {kind!r} is not one of {', '.join(KINDS)}")
    if mode not in MODES:
        raise PlanError(f"mode {mode!r} is not one of {', '.join(MODES)}")


def _check_names(job: Job) -> None:
    if job.plan is not None:
        if job.include or job.exclude or job.overrides:
            raise PlanError("a plan already says which layers get what: edit the plan instead")
        shapes = {layer.name: (layer.weight_name, layer.n, layer.k) for layer in job.model.layers}
        read = {layer.input_name for layer in job.model.layers if layer.input_name is not None}
        if job.plan.activations:
            read |= set(added_tensors(job.model))
        check_plan(job.plan, shapes, read)
        if job.plan.activations and job.activations != "a8":
            raise PlanError(
                f"the plan has static formats of activations: they need activations a8, not {job.activations}"
            )
        if all(entry.format is None for entry in job.plan.entries):
            raise PlanError("the plan leaves every layer float: nothing to quantize")
    elif float_tensors(job) == set(job.model.tensors()):
        raise PlanError("the patterns leave every layer float: nothing to quantize")


def float_tensors(job: Job) -> set[str]:
    """Names of the weights that the options keep float: one layer that has to stay float keeps its whole tensor."""
    names = [layer.name for layer in job.model.layers]
    included = match_names(job.include, names, "--include")
    excluded = match_names(job.exclude, names, "--exclude")
    stay = {name for found in excluded.values() for name in found}
    if job.include:
        stay |= set(names) - {name for found in included.values() for name in found}
    pinned = match_names(job.overrides, names, "--layer")
    for pattern, fmt in job.overrides.items():
        stay = stay | set(pinned[pattern]) if fmt == "float" else stay - set(pinned[pattern])
    return {layer.weight_name for layer in job.model.layers if layer.name in stay}


def _first_reason(model: Model) -> str:
    if not model.skipped:
        return " (no Conv, MatMul, Gemm, Gather, ConvTranspose, LSTM or GRU with constant weights)"
    first = model.skipped[0]
    return f"; {len(model.skipped)} weights stay float, the first {first.name!r}: {first.reason}"


def _split(data: Data, seed: int) -> tuple[Data, Data | None]:
    """Most of the samples for calibration, some to judge by; all for calibration if there are few.

    Held-out samples are spread evenly with seed 0, and drawn with any other.
    """
    if data.num_samples < MIN_SAMPLES_TO_SPLIT:
        return data, None
    try:
        if seed == 0:
            return data.split(HELD_OUT)
        count = round(HELD_OUT * len(data.units))
        drawn = np.zeros(len(data.units), bool)
        drawn[np.random.default_rng(seed).choice(len(data.units), count, replace=False)] = True
        if not drawn.any():
            return data, None
        return replace(data, units=data.units[~drawn]), replace(data, units=data.units[drawn])
    except DataError:  # one batch that cannot be divided
        return data, None
