"""The report of a packed model: one dictionary, written as JSON or as Markdown.

`build_report` collects what the file itself tells (sizes, formats, kernels, what stayed float); `RunFacts` adds what
only the run that wrote it knows (source, plan, calibration, accuracy, command). Nothing is measured here.
"""

import hashlib
import json
import os
import platform
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from afpq import __version__
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
    "render_markdown",
    "write_report",
    "write_text",
]

SUFFIXES = (".md", ".json")
SCHEMA = 1

_HEADLINE_METRICS = ("top1_reference", "top1", "agreement", "kl", "cosine", "sqnr_db")
_LIBRARIES = ("numpy", "scipy", "onnx", "onnx-ir", "onnxruntime")


@dataclass(frozen=True)
class LayerFacts:
    """What the run knows about one stored tensor."""

    predicted_loss: float | None = None
    sqnr_db: float | None = None


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
            "float_tensors_bytes": sum(t.nbytes for t in model.floats),
            "num_packed_weights": num_weights,
            "bits_per_weight": 8 * packed_bytes / num_weights if num_weights else None,
        },
        "budget": facts.budget,
        "objective": facts.objective,
        "predicted_loss": facts.predicted_loss,
        "accuracy": facts.accuracy,
        "goal": facts.goal,
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
        name: LayerFacts(entry.predicted_loss, sqnr_db.get(entry.weight_name))
        for entry in entries
        for name in entry.layers
    }


def accuracy_facts(comparison: Mapping[str, Any], data: str) -> dict[str, Any]:
    """A comparison as a dictionary, with what it was measured on."""
    return {"data": data, **comparison}


def write_report(report: Mapping[str, Any], path: str | Path) -> None:
    """Writes Markdown (.md) or JSON (.json), whole or not at all.

    Raises:
        AfpqError: the suffix is not one of `SUFFIXES`.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise AfpqError(f"report {path}: its suffix must be one of {', '.join(SUFFIXES)}")
    if path.suffix == ".json":
        write_text(path, json.dumps(report, indent=2, allow_nan=False) + "\n")
    else:
        write_text(path, render_markdown(report))


def write_text(path: Path, text: str) -> None:
    """Writes a text file through a temporary one, so that it is whole or absent."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def render_markdown(report: Mapping[str, Any]) -> str:
    """The report as Markdown."""
    sections = (
        _headline(report),
        _accuracy(report["accuracy"]),
        _goal(report["goal"]),
        _layer_table(report["layers"]),
        _remarks(report["layers"]),
        _float_part(report["left_float"], report["float_tensors"]),
        _calibration(report),
        _provenance(report),
    )
    return "\n\n".join(s for s in sections if s) + "\n"


def _layers(model: PackedModel, facts: RunFacts) -> list[dict[str, Any]]:
    first = {name: layer.name for name, layer in model.tensors().items()}
    return [_layer(layer, first[layer.weight_name], facts) for layer in model.layers]


def _layer(layer: PackedLayer, owner: str, facts: RunFacts) -> dict[str, Any]:
    known = facts.layers.get(layer.name.removesuffix(".unpack"), LayerFacts())
    return {
        "name": layer.name,
        "op": layer.op,
        "format": str(layer.format),
        "bits": layer.format.bits,
        "kind": layer.kind,
        "granularity": layer.granularity,
        "num_weights": layer.num_weights,
        "bytes": layer.storage_bytes,
        "bits_per_weight": layer.bits_per_weight,
        "predicted_loss": known.predicted_loss,
        "sqnr_db": known.sqnr_db,
        "kernel": layer.kernel,
        "activations": layer.activations,
        "input_format": layer.input_format,
        "activation_scale": layer.activation_scale,
        "remark": layer.remark,
        "shared_with": None if owner == layer.name else owner,
    }


def _headline(report: Mapping[str, Any]) -> str:
    size, output = report["size"], report["output"]
    lines = [f"# {Path(output['path']).name}", ""]
    before, after = size["source_bytes"], size["output_bytes"]
    rows = [("file", before, after)] if before is not None else []
    rows.append(
        ("packed layers", size["quantizable_weights_before_bytes"], size["packed_weights_bytes"])
    )
    body = [(name, f"{b:,}", f"{a:,}", f"{b / max(a, 1):.2f}x") for name, b, a in rows]
    if before is None:
        body.insert(0, ("file", "", f"{after:,}", ""))
    lines.append(_table(("", "float bytes", "packed bytes", "smaller"), body))
    bits = size["bits_per_weight"]
    if bits is not None:
        budget = "" if report["budget"] is None else f"; budget: {report['budget']}"
        lines += ["", f"{bits:.3f} bits per weight, scales included{budget}."]
    lines.append(f"Float constants that remain: {size['float_tensors_bytes']:,} bytes.")
    lines += [f"\n{line}" for line in _accuracy_lines(report["accuracy"])]
    return "\n".join(lines)


def _accuracy_lines(accuracy: Mapping[str, Any] | None) -> list[str]:
    if accuracy is None:
        return ["Accuracy was not measured."]
    lines = []
    for output in accuracy["outputs"]:
        numbers = [
            f"{key.replace('_', ' ')} {_number(output[key])}"
            for key in _HEADLINE_METRICS
            if output.get(key) is not None
        ]
        lines.append(f"Against the float model, output `{output['name']}`: {', '.join(numbers)}.")
    return lines


def _accuracy(accuracy: Mapping[str, Any] | None) -> str:
    if accuracy is None:
        return "## Accuracy\n\nNot measured: no data was given."
    parts = [
        "## Accuracy",
        f"{accuracy['num_samples']:,} samples of {accuracy['data']}, both models run by onnxruntime.",
    ]
    for output in accuracy["outputs"]:
        numbers = _pairs({k: v for k, v in output.items() if k not in ("name", "kind")})
        title = f"Output `{output['name']}` ({output['kind']})"
        parts.append(f"{title}\n\n{_table(('metric', 'value'), numbers)}")
    return "\n\n".join(parts)


def _goal(goal: Mapping[str, Any] | None) -> str:
    if goal is None:
        return ""
    met = "met" if goal["met"] else "missed"
    rows = [
        (f"{t['bits_per_weight']:.3f}", f"{t['percent']:.3g}", "yes" if t["met"] else "no")
        for t in sorted(goal["trials"], key=lambda t: t["bits_per_weight"])
    ]
    return (
        f"## Goal\n\nA drop of at most {goal['max_drop']:g} %: {met}, {goal['text']}. All trials were judged on the "
        "same samples, so the one that was chosen may look better than it is.\n\n"
        + _table(("bits per weight", "drop, %", "within the limit"), rows)
    )


def _layer_table(layers: list[dict[str, Any]]) -> str:
    columns = (
        "layer", "op", "format", "granularity", "bits per weight", "weights", "bytes",
        "predicted loss", "SQNR dB", "kernel", "input",
    )  # fmt: skip
    rows = [
        (
            e["name"],
            e["op"],
            e["format"],
            f"{e['granularity']}, {e['kind']}",
            f"{e['bits_per_weight']:.3f}",
            f"{e['num_weights']:,}",
            f"shared with {e['shared_with']}" if e["shared_with"] else f"{e['bytes']:,}",
            _number(e["predicted_loss"]),
            _number(e["sqnr_db"]),
            e["kernel"],
            e["input_format"],
        )
        for e in layers
    ]
    return f"## Packed layers\n\n{_table(columns, rows)}"


def _remarks(layers: list[dict[str, Any]]) -> str:
    slow = [e for e in layers if e["remark"]]
    if not slow:
        return "Every packed layer runs on integer dot products or reads rows directly."
    rows = [(e["name"], e["kernel"], e["remark"]) for e in slow]
    return "## Layers off the integer path\n\n" + _table(("layer", "kernel", "why"), rows)


def _float_part(left: list[dict[str, Any]], tensors: list[dict[str, Any]]) -> str:
    parts = ["## Left float"]
    if left:
        rows = [(e["name"], e["op_type"], f"{e['num_weights']:,}", e["reason"]) for e in left]
        parts.append(_table(("layer", "op", "weights", "why"), rows))
    if tensors:
        ordered = sorted(tensors, key=lambda t: (-t["nbytes"], t["name"]))
        rows = [
            (t["name"], "x".join(map(str, t["shape"])), f"{t['nbytes']:,}", t["used_by"])
            for t in ordered
        ]
        parts.append(_table(("float constant", "shape", "bytes", "used by"), rows))
    if not left and not tensors:
        parts.append("Nothing: every weight of two or more axes is packed.")
    return "\n\n".join(parts)


def _calibration(report: Mapping[str, Any]) -> str:
    calibration, correction = report["calibration"], report["correction"]
    if calibration is None and report["objective"] is None:
        return "## Calibration\n\nNot known: this report was made from the file alone."
    if calibration is None:
        return (
            "## Calibration\n\nNone. Formats were chosen by weight error alone: nothing was measured "
            "on the network, so the predicted losses only rank layers."
        )
    text = "## Calibration\n\n" + _table(("", ""), _pairs(calibration))
    if correction is None:
        return text
    rows = [(name, f"{loss:.4g}") for name, loss in correction["losses"].items()]
    again = ""
    if calibration is not None and correction["fitted_samples"] > calibration["samples"]:
        again = f", then fitted once more to all {correction['fitted_samples']}; losses are from before that"
    notes = "".join(f"\n\n{note[0].upper()}{note[1:]}." for note in correction["notes"])
    restored = ""
    for key, what in (("bn_recal", "Restoring statistics"), ("equalization", "Equalisation")):
        if correction.get(key) is not None:
            restored += f"\n\n{what}: {describe_gain(correction[key])}."
    return (
        f"{text}\n\n### Correction\n\nKept: {correction['kept']}, the best on "
        f"{correction['held_out_samples']} held-out samples{again}.\n\n{_table(('way', 'loss'), rows)}{restored}{notes}"
    )


def describe_gain(gain: Mapping[str, float]) -> str:
    """What one step did to the held-out loss, in words."""
    before, after = gain["loss_before"], gain["loss_after"]
    change = f" ({100 * (after / before - 1):+.0f} %)" if before > 0 else ""
    return f"held-out loss {before:.3g} -> {after:.3g}{change}"


def _provenance(report: Mapping[str, Any]) -> str:
    rows = []
    for name in ("source", "output"):
        facts = report[name] or {}
        rows += _pairs({f"{name} {key}": value for key, value in facts.items()})
    rows += _pairs({"objective": report["objective"], "predicted_loss": report["predicted_loss"]})
    rows += _pairs(report["checks"])
    rows += [(f"{k}, seconds", f"{v:.1f}") for k, v in report["seconds"].items()]
    rows += [(k, str(v)) for k, v in report["environment"].items()]
    text = "## How it was made\n\n"
    if report["command"]:
        text += f"```\n{report['command']}\n```\n\n"
    return text + _table(("", ""), rows)


def _pairs(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Rows of name and value; what is not known is left out."""
    known = {key: value for key, value in values.items() if value not in (None, "")}
    return [(key.replace("_", " "), _number(value)) for key, value in known.items()]


def _table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(columns)
    lines = [_row(head), _row(["---"] * len(head))]
    return "\n".join([*lines, *(_row(cell.replace("|", "\\|") for cell in row) for row in rows)])


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _number(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
