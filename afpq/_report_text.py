"""The report of a packed model as Markdown, from the dictionary that `report.build_report` makes."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

__all__ = ["describe_gain", "markdown_table", "render_markdown"]

_HEADLINE_METRICS = ("top1_reference", "top1", "agreement", "kl", "cosine", "sqnr_db")


def render_markdown(report: Mapping[str, Any]) -> str:
    """The report as Markdown."""
    sections = (
        _headline(report),
        _accuracy(report["accuracy"]),
        _goal(report["goal"]),
        _frontier(report),
        _speed(report["speed"]),
        _layer_table(report["layers"]),
        _remarks(report["layers"]),
        _not_measured(report["not_measured"]),
        _float_part(report["left_float"], report["float_tensors"]),
        _calibration(report),
        _provenance(report),
    )
    return "\n\n".join(s for s in sections if s) + "\n"


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
    lines.append(markdown_table(("", "float bytes", "packed bytes", "smaller"), body))
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
        parts.append(f"{title}\n\n{markdown_table(('metric', 'value'), numbers)}")
    return "\n\n".join(parts)


def _goal(goal: Mapping[str, Any] | None) -> str:
    if goal is None:
        return ""
    met = "met" if goal["met"] else "missed"
    rows = [
        (
            f"{t['bits_per_weight']:.3f}",
            "NaN" if t["percent"] is None else f"{t['percent']:.3g}",
            "yes" if t["met"] else "no",
        )
        for t in sorted(goal["trials"], key=lambda t: t["bits_per_weight"])
    ]
    return (
        f"## Goal\n\nA drop of at most {goal['max_drop']:g} %: {met}, {goal['text']}. All trials were judged on the "
        "same samples, so the one that was chosen may look better than it is.\n\n"
        + markdown_table(("bits per weight", "drop, %", "within the limit"), rows)
    )


def _frontier(report: Mapping[str, Any]) -> str:
    if len(report["frontier"]) < 2:
        return ""
    rows = [(f"{bits:.3f}", _number(loss)) for bits, loss in report["frontier"]]
    return "## Other budgets\n\nThe best plan for each, as predicted.\n\n" + markdown_table(
        ("bits per weight", f"predicted loss ({report['objective']})"), rows
    )


def _speed(speed: Mapping[str, Any] | None) -> str:
    if speed is None:
        return ""
    rows = [
        (
            name,
            *(f"{speed[key][field]:.3f}" for field in ("median_ms", "p10_ms", "p90_ms", "load_ms")),
        )
        for name, key in (("float", "reference"), ("packed", "model"))
        if speed[key] is not None
    ]
    ratio = ""
    if speed["ratio"] is not None:
        r = speed["ratio"]
        ratio = f"\n\nTime ratio {r['median']:.3f} (10..90 %: {r['p10']:.3f}..{r['p90']:.3f})."
    return (
        f"## Speed on this machine\n\n{speed['rounds']} interleaved runs, {speed['threads']} threads, input "
        f"{speed['inputs']}.\n\n"
        + markdown_table(("model", "median ms", "10 %", "90 %", "load ms"), rows)
        + ratio
    )


def _not_measured(reasons: Mapping[str, str]) -> str:
    if not reasons:
        return ""
    lines = [f"- {what}: {why}" for what, why in reasons.items()]
    return "## Not measured\n\n" + "\n".join(lines)


def _layer_table(layers: list[dict[str, Any]]) -> str:
    columns = (
        "layer", "op", "format", "granularity", "bits per weight", "weights", "bytes",
        "predicted loss", "measured loss", "SQNR dB", "output SQNR dB", "time", "kernel", "input",
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
            _number(e["measured_loss"]),
            _number(e["sqnr_db"]),
            _number(e["output_sqnr_db"]),
            "" if e["time_share"] is None else f"{100 * e['time_share']:.1f} %",
            e["kernel"],
            e["input_format"],
        )
        for e in layers
    ]
    return f"## Packed layers\n\n{markdown_table(columns, rows)}"


def _remarks(layers: list[dict[str, Any]]) -> str:
    slow = [e for e in layers if e["remark"]]
    if not slow:
        return "Every packed layer runs on integer dot products or reads rows directly."
    rows = [(e["name"], e["kernel"], e["remark"]) for e in slow]
    return "## Layers off the integer path\n\n" + markdown_table(("layer", "kernel", "why"), rows)


def _float_part(left: list[dict[str, Any]], tensors: list[dict[str, Any]]) -> str:
    parts = ["## Left float"]
    if left:
        rows = [(e["name"], e["op_type"], f"{e['num_weights']:,}", e["reason"]) for e in left]
        parts.append(markdown_table(("layer", "op", "weights", "why"), rows))
    if tensors:
        ordered = sorted(tensors, key=lambda t: (-t["nbytes"], t["name"]))
        rows = [
            (t["name"], "x".join(map(str, t["shape"])), f"{t['nbytes']:,}", t["used_by"])
            for t in ordered
        ]
        parts.append(markdown_table(("float constant", "shape", "bytes", "used by"), rows))
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
    text = "## Calibration\n\n" + markdown_table(("", ""), _pairs(calibration))
    if correction is None:
        return text
    rows = [(name, f"{loss:.4g}") for name, loss in correction["losses"].items()]
    again = ""
    if calibration is not None and correction["fitted_samples"] > calibration["samples"]:
        again = (
            f", then fitted once more to {correction['fitted_samples']}, these among them; "
            "losses are from before that"
        )
    notes = "".join(f"\n\n{note[0].upper()}{note[1:]}." for note in correction["notes"])
    restored = ""
    for key, what in (("bn_recal", "Restoring statistics"), ("equalization", "Equalisation")):
        if correction.get(key) is not None:
            kept = correction[key].get("kept")
            result = "" if kept is None else ", kept" if kept else ", not kept"
            restored += f"\n\n{what}: {describe_gain(correction[key])}{result}."
    return (
        f"{text}\n\n### Correction\n\nKept: {correction['kept']}, the best on "
        f"{correction['held_out_samples']} held-out samples{again}.\n\n"
        f"{markdown_table(('way', 'loss'), rows)}{restored}{notes}"
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
    return text + markdown_table(("", ""), rows)


def _pairs(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Rows of name and value; what is not known is left out."""
    known = {key: value for key, value in values.items() if value not in (None, "")}
    return [(key.replace("_", " "), _number(value)) for key, value in known.items()]


def markdown_table(
    columns: Iterable[str], rows: Iterable[Iterable[str]], *, left: int | None = None
) -> str:
    """A table; columns after the first `left` are numbers, set to the right."""
    head = list(columns)
    texts = len(head) if left is None else left
    lines = [_row(head), _row(["---"] * texts + ["---:"] * (len(head) - texts))]
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
