"""The layers of a report page: the sortable table, the strip of bars, the histograms, the formats side by side."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from afpq._report_charts import Row, histogram_chart, strip_chart
from afpq._report_headline import objective_unit
from afpq._report_numbers import number_text, percent_text
from afpq.formats import AfpFormat

__all__ = ["KERNELS", "format_matrix", "histograms", "layer_table", "strip"]

# Kernel classes in the order of the legend.
KERNELS = {
    "byte": "signed bytes, integer dot products",
    "pair": "two byte planes, integer dot products",
    "wide": "float multiply-add, wide range",
    "planar": "float multiply-add, few channels",
    "rows": "rows are looked up",
    "unpack": "unpacked to float",
    "float": "float activations",
}

Layer = Mapping[str, Any]


@dataclass(frozen=True)
class _Column:
    """One column: the field `key` decides the order, its text is shown; `bar` draws the value behind the text."""

    title: str
    unit: str
    key: str
    show: Callable[[Layer], str]
    numeric: bool = True
    bar: bool = False
    kind: str = ""

    def value(self, layer: Layer) -> Any:
        # A tensor that several layers share counts once.
        return 0 if self.key == "bytes" and layer["shared_with"] else layer[self.key]


def layer_table(report: Mapping[str, Any]) -> dict[str, Any]:
    """Columns that have something to show, and a row of cells for every layer."""
    layers = report["layers"]
    columns = [c for c in _columns(report) if any(c.value(e) not in (None, "") for e in layers)]
    tops = _tops(report)
    for c in columns:
        tops.setdefault(c.key, max((c.value(e) or 0 for e in layers), default=0) if c.bar else 0)
    rows = [
        {
            "name": e["name"],
            "cells": [
                {
                    "text": c.show(e),
                    "sort": c.value(e),
                    "bar": round((c.value(e) or 0) / (tops[c.key] or 1), 3) if c.bar else None,
                    "kind": c.kind,
                    "bits": e["bits"],
                }
                for c in columns
            ],
        }
        for e in layers
    ]
    heads = [{"title": c.title, "unit": c.unit, "numeric": c.numeric} for c in columns]
    return {"columns": heads, "rows": rows}


def _columns(report: Mapping[str, Any]) -> list[_Column]:
    unit = objective_unit(report["objective"])
    measured = report["measured_loss"]
    measured_unit = "" if measured is None else objective_unit(measured["objective"])

    def number(key: str, show: Callable[[float], str] = number_text) -> Callable[[Layer], str]:
        return lambda e: "" if e[key] is None else show(e[key])

    def field(title: str, unit: str, key: str, kind: str = "") -> _Column:
        return _Column(title, unit, key, lambda e: e[key], False, kind=kind)

    def size(e: Layer) -> str:
        return "shared" if e["shared_with"] else f"{e['bytes']:,}"

    def shape(e: Layer) -> str:
        return " \u00d7 ".join(map(str, e["shape"]))

    expected = any(e["sqnr_db"] is not None for e in report["layers"])
    sqnr = ("expected, dB", "sqnr_db") if expected else ("weights, dB", "weight_sqnr_db")
    loss, alone = "predicted_loss", "measured_loss"
    return [
        field("layer", "", "name", "name"),
        field("op", "", "op"),
        _Column("format", "bits", "bits", lambda e: str(e["format"]), kind="chip"),
        _Column("weights", "n \u00d7 k", "num_weights", shape),
        _Column("size", "bytes", "bytes", size, bar=True),
        _Column(
            "density", "bits/weight", "bits_per_weight", number("bits_per_weight", "{:.2f}".format)
        ),
        _Column("predicted loss", unit, loss, number(loss), bar=True),
        _Column("measured loss", measured_unit, alone, number(alone), bar=True),
        _Column("SQNR", *sqnr, number(sqnr[1], "{:.1f}".format)),
        _Column("SQNR", "output, dB", "output_sqnr_db", number("output_sqnr_db", "{:.1f}".format)),
        _Column("time", "share", "time_share", number("time_share", percent_text), bar=True),
        field("kernel", "class", "kernel"),
        field("input", "format", "input_format"),
    ]


def strip(report: Mapping[str, Any]) -> dict[str, Any]:
    """The bars of all layers, and the kernel classes that occur."""
    layers = report["layers"]

    wanted: list[tuple[str, str, Callable[[float], str], str]] = [
        ("bits", "format width", lambda v: f"{v:.0f} bits", "kernel"),
        ("bytes", "size", lambda v: f"{v:,.0f} B", "bar-size"),
        ("predicted_loss", "predicted loss", number_text, "bar-loss"),
        ("measured_loss", "measured loss", number_text, "bar-loss"),
        ("time_share", "time", percent_text, "bar-time"),
    ]
    tops = _tops(report)
    rows: list[Row] = []
    for key, title, show, kind in wanted:
        values = [None if e["shared_with"] else e[key] for e in layers]
        known = [v for v in values if v]
        if known:
            rows.append((title, f"max {show(max(known))}", values, tops.get(key, max(known)), kind))
    titles, plot = strip_chart(rows, [f"k-{e['kernel']}" for e in layers])
    used = {e["kernel"] for e in layers}
    legend = [(name, text) for name, text in KERNELS.items() if name in used]
    return {"titles": titles, "plot": plot, "legend": legend}


def histograms(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A card for every stored tensor whose codes were counted."""
    cards = []
    for number, layer in enumerate(report["layers"]):
        found = layer["codebook_histogram"]
        if found is None:
            continue
        fmt = AfpFormat.parse(layer["format"])
        beyond = "" if found.get("clipped") is None else f"{percent_text(found['clipped'])} clipped"
        unused = sum(1 for count in found["codes"] if not count)
        parts = [f"{layer['format']}, {len(found['codes'])} values"]
        parts += [f"{unused} unused"] if unused else []
        parts += [beyond] if beyond else []
        cards.append(
            {
                "index": number,
                "name": layer["name"],
                "text": ", ".join(parts),
                "picture": histogram_chart(fmt, found),
            }
        )
    return cards


def format_matrix(reports: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For every layer of any model its format in each: name, and (format, bits, loss) or None."""
    names = dict.fromkeys(e["name"] for report in reports for e in report["layers"])
    found = [{e["name"]: e for e in report["layers"]} for report in reports]
    return [{"name": name, "cells": [layers.get(name) for layers in found]} for name in names]


def _tops(report: Mapping[str, Any]) -> dict[str, float]:
    """Where the bars of losses end: at one number, so that prediction and measurement can be compared by eye."""
    measured = report["measured_loss"]
    if measured is None or measured["objective"] != report["objective"]:
        return {}
    keys = ("predicted_loss", "measured_loss")
    top = max((e[key] or 0.0 for e in report["layers"] for key in keys), default=0.0)
    return dict.fromkeys(keys, top) if top else {}
