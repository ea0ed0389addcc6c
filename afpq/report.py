"""The report of a packed model: one dictionary, written as a page, as Markdown or as JSON.

`build_report` collects what the file itself tells (sizes, formats, kernels, what stayed float); `RunFacts` adds what
only the run that wrote it knows (source, plan, calibration, accuracy, command). Nothing is measured here.
"""

import hashlib
import json
import os
import platform
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from afpq import __version__
from afpq._report_html import render_html
from afpq._report_text import describe_gain, render_markdown
from afpq.errors import AfpqError
from afpq.packed import PackedLayer, PackedModel
from afpq.plan import PlanEntry

__all__ = [
    "SUFFIXES",
    "LayerFacts",
    "RunFacts",
    "accuracy_facts",
    "build_report",
    "describe_gain",
    "environment",
    "file_facts",
    "layer_facts",
    "render_html",
    "render_markdown",
    "write_report",
    "write_text",
]

SUFFIXES = (".html", ".md", ".json")
SCHEMA = 1

_LIBRARIES = ("numpy", "scipy", "onnx", "onnx-ir", "onnxruntime")


@dataclass(frozen=True)
class LayerFacts:
    """What the run knows about one stored tensor."""

    predicted_loss: float | None = None  # what rounding it costs at the outputs, by the plan
    measured_loss: float | None = None  # the same measured: this layer as packed, all others float
    sqnr_db: float | None = None  # of its products, expected from calibration
    weight_sqnr_db: float | None = None  # of its weights against the float model's
    output_sqnr_db: float | None = None  # of its output in the packed network, measured
    time_share: float | None = None
    codebook_histogram: Mapping[str, Any] | None = None  # see `_examine.histogram`


@dataclass(frozen=True)
class RunFacts:
    """What a run knows and the file does not. Every field is ready for JSON."""

    source: Mapping[str, Any] | None = None  # path, bytes, sha256 of the float model
    command: str | None = None
    budget: str | None = None
    objective: str | None = None
    predicted_loss: float | None = None
    layers: Mapping[str, LayerFacts] = field(default_factory=dict)  # by layer name
    float_bytes: int | None = None  # of the packed weights, before
    left_float: Iterable[Mapping[str, Any]] = ()  # name, op_type, reason, num_weights
    calibration: Mapping[str, Any] | None = None
    correction: Mapping[str, Any] | None = None
    accuracy: Mapping[str, Any] | None = None
    goal: Mapping[str, Any] | None = None  # what --max-drop asked for and what it found
    frontier: Iterable[Iterable[float]] = ()  # bits per weight and predicted loss of other budgets
    speed: Mapping[str, Any] | None = None  # times in milliseconds, on this machine
    measured: Mapping[str, Any] | None = (
        None  # what measured losses of layers are, and of what data
    )
    not_measured: Mapping[str, str] = field(default_factory=dict)  # what is unknown, and why
    checks: Mapping[str, Any] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)


def build_report(model: PackedModel, facts: RunFacts | None = None) -> dict[str, Any]:
    """The whole report as a dictionary of plain values."""
    facts = RunFacts() if facts is None else facts
    tensors = model.tensors().values()
    packed_bytes = sum(t.storage_bytes for t in tensors)
    num_weights = sum(t.num_weights for t in tensors)
    float_bytes = facts.float_bytes
    if float_bytes is None:
        float_bytes = int(model.metadata.get("afpq.float_weight_bytes", 4 * num_weights))
    return {
        "schema": SCHEMA,
        "created": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "source": facts.source,
        "output": file_facts(model.path, model.file_bytes)
        | {
            "spec_version": model.metadata.get("afpq.spec_version"),
            "written_by": model.metadata.get("afpq.version"),
            "plan_hash": model.metadata.get("afpq.plan_hash"),
        },
        "size": {
            "source_bytes": None if facts.source is None else facts.source["bytes"],
            "output_bytes": model.file_bytes,
            "quantizable_weights_before_bytes": float_bytes,
            "packed_weights_bytes": packed_bytes,
            "codes_bytes": sum(int(t.packed.nbytes) for t in tensors),
            "scales_bytes": sum(int(t.stored_scale.nbytes) for t in tensors),
            "float_tensors_bytes": sum(t.nbytes for t in model.floats),
            "num_packed_weights": num_weights,
            "bits_per_weight": 8 * packed_bytes / num_weights if num_weights else None,
        },
        "budget": facts.budget,
        "objective": facts.objective,
        "predicted_loss": facts.predicted_loss,
        "accuracy": facts.accuracy,
        "goal": facts.goal,
        "frontier": [list(point) for point in facts.frontier],
        "speed": facts.speed,
        "measured_loss": facts.measured,
        "not_measured": dict(facts.not_measured),
        "layers": _layers(model, facts),
        "left_float": [dict(entry) for entry in facts.left_float],
        "float_tensors": [asdict(t) for t in model.floats],
        "calibration": facts.calibration,
        "correction": facts.correction,
        "checks": dict(facts.checks),
        "command": facts.command,
        "seconds": {name: round(s, 3) for name, s in facts.seconds.items()},
        "environment": environment(),
    }


def environment() -> dict[str, Any]:
    """Versions of everything that took part, and the instruction set in use."""
    result: dict[str, Any] = {
        "afpq": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": os.cpu_count(),
    }
    result |= {name: _version(name) for name in _LIBRARIES}
    try:
        from afpq._core import kernels

        result["isa"] = kernels.active_isa()
    except (ImportError, ValueError) as error:
        result["isa"] = f"none: {error}"
    return result


def file_facts(path: str | Path, num_bytes: int | None = None) -> dict[str, Any]:
    """Path, bytes and sha256 of a file."""
    path = Path(path)
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    size = path.stat().st_size if num_bytes is None else num_bytes
    return {"path": str(path), "bytes": size, "sha256": digest.hexdigest()}


def layer_facts(
    entries: Iterable[PlanEntry], sqnr_db: Mapping[str, float] | None = None
) -> dict[str, LayerFacts]:
    """What a plan predicts of every layer, with the SQNR of its weight (by weight_name) where that is known."""
    sqnr_db = {} if sqnr_db is None else sqnr_db
    return {
        name: LayerFacts(
            predicted_loss=entry.predicted_loss, sqnr_db=sqnr_db.get(entry.weight_name)
        )
        for entry in entries
        for name in entry.layers
    }


def accuracy_facts(comparison: Mapping[str, Any], data: str) -> dict[str, Any]:
    """A comparison as a dictionary, with what it was measured on."""
    return {"data": data, **comparison}


def write_report(report: Mapping[str, Any] | Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """Writes one report or several as a page (.html), Markdown (.md) or JSON (.json), whole or not at all.

    Raises:
        AfpqError: the suffix is not one of `SUFFIXES`.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise AfpqError(f"report {path}: its suffix must be one of {', '.join(SUFFIXES)}")
    reports = [report] if isinstance(report, Mapping) else list(report)
    if path.suffix == ".html":
        write_text(path, render_html(reports))
    elif path.suffix == ".json":
        write_text(path, _json(reports))
    else:
        write_text(path, "\n".join(render_markdown(r) for r in reports))


def _json(reports: Sequence[Mapping[str, Any]]) -> str:
    """One report as it is, several as `reports`; lists of numbers on one line."""
    content = reports[0] if len(reports) == 1 else {"schema": SCHEMA, "reports": reports}
    text = json.dumps(content, indent=2, allow_nan=False)
    # A text in JSON holds no line break, so this changes nothing but space.
    return re.sub(r"\[\n[^\[\]{}\"]+\]", lambda m: f"[{' '.join(m[0][1:-1].split())}]", text) + "\n"


def write_text(path: Path, text: str) -> None:
    """Writes a text file through a temporary one, so that it is whole or absent."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _layers(model: PackedModel, facts: RunFacts) -> list[dict[str, Any]]:
    first = {name: layer.name for name, layer in model.tensors().items()}
    return [_layer(layer, first[layer.weight_name], facts) for layer in model.layers]


def _layer(layer: PackedLayer, owner: str, facts: RunFacts) -> dict[str, Any]:
    by_name = facts.layers
    known = by_name.get(layer.name) or by_name.get(layer.name.removesuffix(".unpack"), LayerFacts())
    return {
        "name": layer.name,
        "op": layer.op,
        "format": str(layer.format),
        "bits": layer.format.bits,
        "kind": layer.kind,
        "granularity": layer.granularity,
        "shape": [layer.n, layer.k],
        "num_weights": layer.num_weights,
        "bytes": layer.storage_bytes,
        "bits_per_weight": layer.bits_per_weight,
        **asdict(known),
        "kernel": layer.kernel,
        "activations": layer.activations,
        "input_format": layer.input_format,
        "activation_scale": layer.activation_scale,
        "remark": layer.remark,
        "shared_with": None if owner == layer.name else owner,
    }


def _processor() -> str:
    """The name of the processor, as well as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
