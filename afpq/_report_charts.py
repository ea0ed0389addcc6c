"""The pictures of a report page, as SVG. Colours are classes: the page's style sheet gives them, light and dark.

Every function takes plain numbers and returns text; a `data-tip` attribute is what the page shows on hover.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from afpq._report_numbers import bytes_text, number_text
from afpq._svg import (
    axis_ticks,
    circle,
    group,
    line,
    linear,
    logarithmic,
    path,
    polyline,
    power_ticks,
    rect,
    svg,
    text,
)
from afpq.formats import AfpFormat, codebook

__all__ = [
    "Dot",
    "Row",
    "drop_chart",
    "frontier_chart",
    "histogram_chart",
    "interval_bar",
    "scatter_chart",
    "strip_chart",
]

Row = tuple[str, str, list[float | None], float, str]  # title, note, values, top of scale, class
Dot = tuple[str, float, float, float | None]  # name, x, y, half of y's interval


def strip_chart(rows: Sequence[Row], classes: Sequence[str]) -> tuple[str, str]:
    """Bars for every layer, one row for each quantity: titles, and the plot whose columns carry `data-i`."""
    count = max(len(classes), 1)
    step = min(max(1010 / count, 7.0), 64.0)
    tall, gap = 54, 16
    width, height = math.ceil(count * step), len(rows) * (tall + gap) + 22
    titles, plot = [], []
    for number, (title, note, values, top, kind) in enumerate(rows):
        bottom = number * (tall + gap) + tall + 6
        titles.append(text(92, bottom - tall / 2, title, class_="t", text_anchor="end"))
        titles.append(text(92, bottom - tall / 2 + 15, note, class_="s", text_anchor="end"))
        plot.append(line(0, bottom, width, bottom, class_="axis"))
        for i, value in enumerate(values):
            if value:
                h = max(tall * value / top, 0.7)
                fill = classes[i] if kind == "kernel" else kind
                plot.append(rect(i * step + 0.5, bottom - h, step - 1, h, class_=fill))
    every = next(n for n in (1, 2, 5, 10, 20, 50, 100, 1000) if n * step >= 26)
    for i in range(0, count, every):
        plot.append(
            text((i + 0.5) * step, height - 4, str(i + 1), class_="s", text_anchor="middle")
        )
    titles.append(text(92, height - 4, "layer", class_="s", text_anchor="end"))
    plot += [
        rect(i * step, 0, step, height - 18, class_="hit", data_i=str(i)) for i in range(count)
    ]
    return (
        svg(100, height, titles, label="what the rows are"),
        svg(
            width,
            height,
            plot,
            label="bars for every layer; the table has the same numbers",
            class_="strip",
            preserveAspectRatio="none",  # on paper it gets narrower, and stays beside its titles
            tabindex="0",
        ),
    )


def histogram_chart(fmt: AfpFormat, found: Mapping[str, Any]) -> str:
    """Weights over their codebook: above the line the float weights, below how often each value is used."""
    width, middle, height = 240, 58, 92
    steps = np.unique(codebook(fmt))
    x = linear(-found["limit"], found["limit"], 0, width)
    body = []
    if found["float"] is None:
        middle = 84
        tall, down = 76.0, False
    else:
        top, wide = max(max(found["float"]), 1), width / len(found["float"])
        outline = [f"M0 {middle}"]
        for i, bin_count in enumerate(found["float"]):
            outline.append(f"V{middle - 52 * bin_count / top:.0f}H{(i + 1) * wide:.1f}")
        body.append(path("".join(outline) + f"V{middle}Z", class_="density"))
        tall, down = 30.0, True
    used = max(*found["codes"], 1)
    stems = []
    for value, count in zip(steps, found["codes"], strict=True):
        h = max(tall * count / used, 1.0) * (1 if down else -1)
        stems.append(f"M{x(float(value)):.1f} {middle}v{h:.1f}")
    thick = min(max(0.5 * width / len(steps), 1.0), 4.0)
    body.append(path("".join(stems), class_="stems", stroke_width=thick))
    body.append(line(0, middle, width, middle, class_="axis"))
    return svg(width, height, body, label=f"weights over the values of {fmt}")


def frontier_chart(
    points: Sequence[Sequence[float]],
    chosen: tuple[float, float] | None,
    measured: tuple[float, float] | None,
    unit: str,
    num_weights: int,
) -> str:
    """Predicted loss over bits per weight; the chosen point, and the measured loss with half its interval."""
    losses = [p[1] for p in points if p[1] > 0]
    losses += [chosen[1]] if chosen and chosen[1] > 0 else []
    if measured and measured[0] > 0:
        losses += [measured[0]]
    x_all = [p[0] for p in points] + ([chosen[0]] if chosen else [])
    frame = _Frame(
        (math.floor(min(x_all) * 2) / 2, math.ceil(max(x_all) * 2) / 2),
        (min(losses) / 1.5, max(losses) * 1.5),
        "bits per weight, scales included",
        f"loss, {unit}",
        log_y=True,
    )
    drawn = [(frame.x(b), frame.y(loss)) for b, loss in points if loss > 0]
    body = [*frame.body, polyline(drawn, class_="curve")]
    for bits, loss in points:
        if loss > 0:
            size = bytes_text(round(bits * num_weights / 8))
            tip = f"{bits:.2f} bits per weight, {size} of packed weights\npredicted loss {number_text(loss)} {unit}"
            body.append(circle(frame.x(bits), frame.y(loss), 3.5, class_="point", data_tip=tip))
    if chosen and chosen[1] > 0:
        spot = frame.x(chosen[0]), frame.y(chosen[1])
        tip = f"chosen: {chosen[0]:.3f} bits per weight\npredicted loss {number_text(chosen[1])} {unit}"
        body.append(line(spot[0], spot[1], spot[0], frame.bottom, class_="guide"))
        body.append(circle(*spot, 6, class_="chosen", data_tip=tip))
        body.append(frame.label(*spot, "chosen"))
    if chosen and measured and measured[0] > 0:
        body += _measured(frame, chosen[0], measured, unit)
    return svg(
        frame.width, frame.height, body, label="predicted loss over bits per weight", class_="plot"
    )


def drop_chart(goal: Mapping[str, Any]) -> str:
    """The models that were tried for a goal: drop over bits per weight, and the limit."""
    trials = [t for t in goal["trials"] if t["percent"] is not None]
    top = max([t["percent"] for t in trials] + [goal["max_drop"], 0.1]) * 1.1
    low = min([t["percent"] for t in trials] + [0.0])
    bits = [t["bits_per_weight"] for t in trials] or [0.0]
    frame = _Frame(
        (math.floor(min(bits)), math.ceil(max(bits))),
        (low, top),
        "bits per weight, scales included",
        "measured drop, %",
    )
    limit = frame.y(goal["max_drop"])
    body = [*frame.body, line(frame.left, limit, frame.right, limit, class_="limit")]
    body.append(
        text(frame.right, limit - 5, f"limit {goal['max_drop']:g} %", class_="s", text_anchor="end")
    )
    for t in trials:
        tip = f"{t['bits_per_weight']:.3f} bits per weight\ndrop {number_text(t['percent'])} %"
        kind = "chosen" if t["met"] else "missed"
        spot = frame.x(t["bits_per_weight"]), frame.y(t["percent"])
        body.append(circle(*spot, 5, class_=kind, data_tip=tip))
    return svg(
        frame.width, frame.height, body, label="measured drop over bits per weight", class_="plot"
    )


def scatter_chart(dots: Sequence[Dot], x_title: str, y_title: str) -> str:
    """Several models: one dot each with its name and the interval of y."""
    xs = [d[1] for d in dots]
    lows, highs = [d[2] - (d[3] or 0) for d in dots], [d[2] + (d[3] or 0) for d in dots]
    pad = 0.08 * (max(xs) - min(xs)) or 0.1 * max(xs) or 1.0
    rise = 0.08 * (max(highs) - min(lows)) or 0.1 * abs(max(highs)) or 1.0
    frame = _Frame(
        (max(min(xs) - pad, 0), max(xs) + pad),
        (min(lows) - rise if min(lows) < 0 else max(min(lows) - rise, 0), max(highs) + rise),
        x_title,
        y_title,
    )
    body = list(frame.body)
    for name, x, y, half in dots:
        spot = frame.x(x), frame.y(y)
        if half is not None:
            body.append(_whisker(spot[0], frame.y(y - half), frame.y(y + half)))
        sure = "" if half is None else f" \u00b1 {number_text(half)}"
        tip = f"{name}\n{x_title}: {number_text(x)}\n{y_title}: {number_text(y)}{sure}"
        body.append(circle(*spot, 6, class_="chosen", data_tip=tip))
        body.append(frame.label(*spot, name))
    return svg(frame.width, frame.height, body, label=f"{y_title} over {x_title}", class_="plot")


def interval_bar(value: float, low: float, high: float, limit: float | None = None) -> str:
    """A number, the interval around it and zero, on one line."""
    ends = [value, low, high, 0.0] + ([] if limit is None else [limit])
    span = max(ends) - min(ends) or 1.0
    x = linear(min(ends) - 0.12 * span, max(ends) + 0.12 * span, 0, 220)
    body = [line(0, 9, 220, 9, class_="axis"), line(x(0), 2, x(0), 16, class_="zero")]
    body.append(line(x(low), 9, x(high), 9, class_="interval"))
    marks = [(low, number_text(low)), (high, f"{number_text(high)} %")]
    if limit is not None:
        body.append(line(x(limit), 1, x(limit), 17, class_="limit"))
    if min(abs(x(0) - x(low)), abs(x(0) - x(high))) > 24:
        marks.append((0.0, "0"))
    body.append(circle(x(value), 9, 4.5, class_="chosen"))
    body += [text(x(at), 28, label, class_="s", text_anchor="middle") for at, label in marks]
    tip = f"lost: {number_text(value)} %, 95 %: {number_text(low)} to {number_text(high)} %"
    tip += "" if limit is None else f", limit {limit:g} %"
    return svg(220, 32, body, label=tip, class_="line", data_tip=tip)


class _Frame:
    """Axes with ticks, and the scales inside them."""

    width, height = 520, 300
    left, right, top, bottom = 62, 504, 14, 252

    def __init__(
        self,
        xs: tuple[float, float],
        ys: tuple[float, float],
        x_title: str,
        y_title: str,
        *,
        log_y: bool = False,
    ) -> None:
        self.x = linear(*xs, self.left, self.right)
        self.y = (logarithmic if log_y else linear)(*ys, self.bottom, self.top)
        self.body = []
        for tick in power_ticks(*ys) if log_y else axis_ticks(*ys):
            y = self.y(tick)
            self.body.append(line(self.left, y, self.right, y, class_="grid"))
            label = number_text(tick)
            self.body.append(text(self.left - 7, y + 4, label, class_="s", text_anchor="end"))
        for tick in axis_ticks(*xs, 7):
            x = self.x(tick)
            self.body.append(line(x, self.bottom, x, self.bottom + 4, class_="axis"))
            label = number_text(tick)
            self.body.append(text(x, self.bottom + 18, label, class_="s", text_anchor="middle"))
        self.body.append(line(self.left, self.bottom, self.right, self.bottom, class_="axis"))
        middle = (self.left + self.right) / 2
        self.body.append(text(middle, self.height - 10, x_title, class_="t", text_anchor="middle"))
        turned = f"translate(13 {(self.top + self.bottom) / 2:.0f}) rotate(-90)"
        self.body.append(text(0, 0, y_title, class_="t", text_anchor="middle", transform=turned))

    def label(self, x: float, y: float, content: str) -> str:
        """A name beside a dot, on the side where there is room."""
        right = x < (self.left + self.right) / 2
        return text(
            x + (11 if right else -11),
            y - 7,
            content,
            class_="t strong",
            text_anchor="start" if right else "end",
        )


def _measured(frame: _Frame, bits: float, measured: tuple[float, float], unit: str) -> list[str]:
    loss, half = measured
    x, y = frame.x(bits), frame.y(loss)
    low = max(loss - half, loss / 20)
    whisker = _whisker(x, min(frame.y(low), frame.bottom), max(frame.y(loss + half), frame.top))
    tip = f"measured on held-out samples: {number_text(loss)} \u00b1 {number_text(half)} {unit} (95 %)"
    diamond = path(f"M{x:.1f} {y - 6:.1f}l6 6l-6 6l-6 -6Z", class_="measured", data_tip=tip)
    return [group([whisker, diamond])]


def _whisker(x: float, start: float, end: float) -> str:
    steps = f"M{x:.1f} {start:.1f}V{end:.1f}M{x - 4:.1f} {start:.1f}h8M{x - 4:.1f} {end:.1f}h8"
    return path(steps, class_="whisker")
