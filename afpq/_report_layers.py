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


@dataclass(frozen=True, eq=False)
class _Column:
    """One column: its value decides the order, its text is shown, `share` draws a bar behind it."""

    title: str
    unit: str
    value: Callable[[Layer], Any]
    show: Callable[[Layer], str]
    numeric: bool = True
    bar: bool = False
    kind: str = ""


def layer_table(report: Mapping[str, Any]) -> dict[str, Any]:
    """Columns that have something to show, and a row of cells for every layer."""
    layers = report["layers"]
    columns = [c for c in _columns(report) if any(c.value(e) not in (None, "") for e in layers)]
    largest = {c: max((c.value(e) or 0 for e in layers), default=0) or 1 for c in columns if c.bar}
    rows = [
        {
            "name": e["name"],
            "cells": [
                {
                    "text": c.show(e),
                    "sort": c.value(e),
                    "bar": round((c.value(e) or 0) / largest[c], 3) if c.bar else None,
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

    def field(key: str) -> Callable[[Layer], Any]:
        return lambda e: e[key]

    def size(e: Layer) -> str:
        return "shared" if e["shared_with"] else f"{e['bytes']:,}"

    def shape(e: Layer) -> str:
        return " \u00d7 ".join(map(str, e["shape"]))

    return [
        _Column("layer", "", field("name"), field("name"), False, kind="name"),
        _Column("op", "", field("op"), field("op"), False),
        _Column(
            "format",
            "bits",
            lambda e: e["bits"] + len(e["format"]) / 100,
            field("format"),
            kind="b",
        ),
        _Column("weights", "n \u00d7 k", field("num_weights"), shape),
        _Column("size", "bytes", lambda e: 0 if e["shared_with"] else e["bytes"], size, bar=True),
        _Column(
            "density",
            "bits/weight",
            field("bits_per_weight"),
            lambda e: f"{e['bits_per_weight']:.2f}",
        ),
        _Column(
            "predicted loss", unit, field("predicted_loss"), number("predicted_loss"), bar=True
        ),
        _Column(
            "measured loss",
            measured_unit,
            field("measured_loss"),
            number("measured_loss"),
            bar=True,
        ),
        _Column("SQNR", "expected, dB", field("sqnr_db"), number("sqnr_db", _decibel)),
        _Column("SQNR", "weights, dB", field("weight_sqnr_db"), number("weight_sqnr_db", _decibel)),
        _Column("SQNR", "output, dB", field("output_sqnr_db"), number("output_sqnr_db", _decibel)),
        _Column("time", "share", field("time_share"), number("time_share", percent_text), bar=True),
        _Column("kernel", "class", field("kernel"), field("kernel"), False),
        _Column("input", "format", field("input_format"), field("input_format"), False),
    ]


def strip(report: Mapping[str, Any]) -> dict[str, Any]:
    """The bars of all layers, and the kernel classes that occur."""
    layers = report["layers"]

    def values(key: str) -> list[float | None]:
        return [None if e["shared_with"] else e[key] for e in layers]

    def top(key: str, show: Callable[[float], str]) -> str:
        known = [v for v in values(key) if v is not None]
        return f"max {show(max(known))}" if known and max(known) > 0 else ""

    wanted: list[tuple[str, str, Callable[[float], str], str]] = [
        ("bits", "format width", lambda v: f"{v:.0f} bits", "kernel"),
        ("bytes", "size", lambda v: f"{v:,.0f} B", "bar-size"),
        ("predicted_loss", "predicted loss", number_text, "bar-loss"),
        ("measured_loss", "measured loss", number_text, "bar-loss"),
        ("time_share", "time", percent_text, "bar-time"),
    ]
    rows: list[Row] = [
        (title, top(key, show), values(key), kind)
        for key, title, show, kind in wanted
        if any(v for v in values(key))
    ]
    titles, plot = strip_chart(rows, [f"k-{e['kernel']}" for e in layers])
    used = {e["kernel"] for e in layers}
    legend = [(name, text) for name, text in KERNELS.items() if name in used]
    return {"titles": titles, "plot": plot, "legend": legend}


def histograms(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A card for every stored tensor whose codes were counted."""
    cards = []
    for number, layer in enumerate(report["layers"]):
        found = layer["histogram"]
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


def _decibel(value: float) -> str:
    return f"{value:.1f}"
