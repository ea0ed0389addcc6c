"""The report as one HTML page: no network, no file beside it, readable without its script.

Pictures are SVG made here, not by a library of the page: they take their colours from the style sheet, so one picture
serves both themes and paper, and a model of fifty layers stays below 200 kB. The script only adds sorting, a filter,
hover details and the switch of the theme. `templates/` has the page, its style and its script.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from afpq._report_charts import Dot, drop_chart, frontier_chart, scatter_chart
from afpq._report_headline import Z95, headline, objective_unit, outputs_table, remarks
from afpq._report_layers import format_matrix, histograms, layer_table, strip
from afpq._report_numbers import bytes_text, factor_text, ms_text, number_text, percent_text
from afpq._report_text import describe_gain

__all__ = ["render_html"]

_TEMPLATES = Path(__file__).parent / "templates"


def render_html(reports: Sequence[Mapping[str, Any]]) -> str:
    """The page of one report, or of several side by side."""
    titles = _titles(reports)
    models = [_model(r, titles[number], number) for number, r in enumerate(reports)]
    return _template().render(
        models=models,
        title=" and ".join(m["title"] for m in models),
        comparison=_comparison(reports) if len(reports) > 1 else None,
        created=reports[0]["created"],
        version=reports[0]["environment"]["afpq"],
    )


@cache
def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "bytes": bytes_text,
        "number": number_text,
        "percent": percent_text,
        "ms": ms_text,
    }
    return environment.get_template("report.html")


def _titles(reports: Sequence[Mapping[str, Any]]) -> list[str]:
    """File names, or paths where two names are equal."""
    paths = [report["output"]["path"] for report in reports]
    names = [Path(path).name for path in paths]
    return names if len(set(names)) == len(names) else paths


def _model(report: Mapping[str, Any], title: str, number: int) -> dict[str, Any]:
    """What the template shows of one model."""
    return {
        "id": f"m{number}",
        "title": title,
        "report": report,
        "tiles": headline(report),
        "remarks": remarks(report),
        "outputs": [] if report["accuracy"] is None else outputs_table(report["accuracy"]),
        "sizes": _sizes(report["size"]),
        "strip": strip(report),
        "table": layer_table(report),
        "cards": histograms(report),
        "frontier": _frontier(report),
        "measured": _measured(report) is not None,
        "trials": None if report["goal"] is None else drop_chart(report["goal"]),
        "slow": [e for e in report["layers"] if e["remark"]],
        "floats": sorted(report["float_tensors"], key=lambda t: (-t["nbytes"], t["name"])),
        "gains": _gains(report["correction"]),
        "unit": objective_unit(report["objective"]),
    }


def _sizes(size: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The two bars of bytes: name, total, and parts (label, bytes, class, width in percent of the larger bar)."""
    after = [
        ("codes", size["codes_bytes"], "s-codes"),
        ("scales", size["scales_bytes"], "s-scales"),
        ("float constants", size["float_tensors_bytes"], "s-float"),
    ]
    rest = size["output_bytes"] - sum(part[1] for part in after)
    after.append(("graph, biases, everything else", max(rest, 0), "s-rest"))
    weights = size["quantizable_weights_before_bytes"]
    before = [("weights that are packed now", weights, "s-weights")]
    if size["source_bytes"] is not None:
        before.append(("everything else", max(size["source_bytes"] - weights, 0), "s-rest"))
    bars = [("float file" if size["source_bytes"] is not None else "weights, float", before)]
    bars.append(("packed file", after))
    largest = max(sum(part[1] for part in parts) for _, parts in bars) or 1
    return [
        {
            "name": name,
            "bytes": sum(part[1] for part in parts),
            "parts": [
                {"label": label, "bytes": count, "kind": kind, "width": 100 * count / largest}
                for label, count, kind in parts
                if count
            ],
        }
        for name, parts in bars
    ]


def _frontier(report: Mapping[str, Any]) -> str | None:
    points, size = report["frontier"], report["size"]
    if len(points) < 2 or size["bits_per_weight"] is None:
        return None
    chosen = None
    if report["predicted_loss"]:
        chosen = size["bits_per_weight"], report["predicted_loss"]
    unit = objective_unit(report["objective"])
    return frontier_chart(points, chosen, _measured(report), unit, size["num_packed_weights"])


def _measured(report: Mapping[str, Any]) -> tuple[float, float] | None:
    """The loss that was measured in the unit of the prediction, and half of its interval."""
    if report["accuracy"] is None or report["objective"] != "kl":
        return None
    output = next((o for o in report["accuracy"]["outputs"] if o["kl"] is not None), None)
    return None if output is None else (output["kl"], Z95 * (output["kl_stderr"] or 0.0))


def _gains(correction: Mapping[str, Any] | None) -> list[str]:
    if correction is None:
        return []
    found = []
    for key, what in (("bn_recal", "Restoring statistics"), ("equalization", "Equalisation")):
        gain = correction.get(key)
        if gain is not None:
            kept = gain.get("kept")
            result = "" if kept is None else ", kept" if kept else ", not kept"
            found.append(f"{what}: {describe_gain(gain)}{result}.")
    return found


def _comparison(reports: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Rows of one fact each with a cell for every model, the formats side by side, and accuracy over size."""
    rows: list[tuple[str, list[str]]] = [
        ("file", [bytes_text(r["size"]["output_bytes"]) for r in reports]),
        ("smaller than float", [_smaller(r["size"]) for r in reports]),
        ("bits per weight", [_known(r["size"]["bits_per_weight"], "{:.3f}") for r in reports]),
    ]
    metrics: dict[tuple[str, str], list[str]] = {}
    for number, report in enumerate(reports):
        for row in [] if report["accuracy"] is None else outputs_table(report["accuracy"]):
            cells = metrics.setdefault((row["output"], row["metric"]), [""] * len(reports))
            sure = row["sure"] if row["sure"][:1] in ("\u00b1", "") else f"({row['sure']})"
            cells[number] = f"{row['after']} {sure}".strip()
    several = len({output for output, _ in metrics}) > 1
    rows += [
        (f"{output}: {metric}" if several else metric, c) for (output, metric), c in metrics.items()
    ]
    rows.append(("time for one run", [_time(r["speed"]) for r in reports]))
    rows.append(("time over float", [_ratio(r["speed"]) for r in reports]))
    rows.append(("formats", [_formats(r) for r in reports]))
    rows.append(
        (
            "layers off the integer path",
            [str(sum(bool(e["remark"]) for e in r["layers"])) for r in reports],
        )
    )
    return {
        "rows": [row for row in rows if any(row[1])],
        "formats": format_matrix(reports),
        "scatter": _scatter(reports),
    }


def _scatter(reports: Sequence[Mapping[str, Any]]) -> str | None:
    for key, axis, scale in (
        ("kl", "KL, nats", 1.0),
        ("relative_error", "error energy, %", 100.0),
    ):
        dots: list[Dot] = []
        for report, title in zip(reports, _titles(reports), strict=True):
            outputs = [] if report["accuracy"] is None else report["accuracy"]["outputs"]
            output = next((o for o in outputs if o[key] is not None), None)
            if output is not None:
                stderr = output[f"{key}_stderr"]
                half = None if stderr is None else Z95 * scale * stderr
                size = report["size"]["output_bytes"] / 1e6
                dots.append((title, size, scale * output[key], half))
        if len(dots) > 1:
            return scatter_chart(dots, "file, MB", axis)
    return None


def _smaller(size: Mapping[str, Any]) -> str:
    if size["source_bytes"] is None:
        return ""
    return factor_text(size["source_bytes"] / max(size["output_bytes"], 1))


def _known(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _time(speed: Mapping[str, Any] | None) -> str:
    if speed is None:
        return ""
    times = speed["model"]
    spread = f"10\u201390 %: {ms_text(times['p10_ms'])} to {ms_text(times['p90_ms'])}"
    return f"{ms_text(times['median_ms'])} ({spread})"


def _ratio(speed: Mapping[str, Any] | None) -> str:
    if speed is None or speed["ratio"] is None:
        return ""
    ratio = speed["ratio"]
    return f"{factor_text(ratio['median'])} ({factor_text(ratio['p10'])} to {factor_text(ratio['p90'])})"


def _formats(report: Mapping[str, Any]) -> str:
    counts = Counter(e["format"] for e in report["layers"] if not e["shared_with"])
    return ", ".join(f"{name} {count}" for name, count in counts.most_common())
