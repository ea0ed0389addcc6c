"""Draws a sweep as an SVG: a panel for weights and one for activations, the score over the exponent bias."""

from collections.abc import Callable

from afpq._svg import OKABE_ITO, circle, line, polyline, rect, svg, text
from afpq.sweep import Curve, Sweep

__all__ = ["draw"]

_WIDTH, _HEIGHT = 460, 300  # of the plotted area of one panel
_LEFT, _TOP, _BOTTOM, _GAP = 60, 50, 62, 120
_TITLES = {
    "top1": "top-1, %",
    "agreement": "agreement with the float network, %",
    "cosine": "cosine, %",
}


def draw(sweep: Sweep, tolerance: float) -> str:
    """The text of an SVG file: the plateau of a curve is bold, its best bias a dot, the float network a dashed line."""
    panels = list(dict.fromkeys(curve.subject for curve in sweep.curves))
    formats = list(dict.fromkeys(str(curve.format) for curve in sweep.curves))
    colours = {name: OKABE_ITO[i % len(OKABE_ITO)] for i, name in enumerate(formats)}
    width = _LEFT + len(panels) * (_WIDTH + _GAP)
    height = _TOP + _HEIGHT + _BOTTOM
    body = [rect(0, 0, width, height, fill="white")]
    for number, subject in enumerate(panels):
        curves = [curve for curve in sweep.curves if curve.subject == subject]
        x0 = _LEFT + number * (_WIDTH + _GAP)
        body += _panel(x0, f"{sweep.model}: {subject}", curves, colours, sweep, tolerance)
    label = f"{_TITLES[sweep.metric]} of {sweep.model} over the exponent bias, for {len(formats)} formats"
    return svg(width, height, body, label=label, font_family="sans-serif", font_size="13") + "\n"


def _panel(
    x0: int,
    title: str,
    curves: list[Curve],
    colours: dict[str, str],
    sweep: Sweep,
    tolerance: float,
) -> list[str]:
    biases = [point.exponent_bias for curve in curves for point in curve.points]
    low, high = min(biases), max(biases)

    def x(bias: float) -> float:
        return x0 + _WIDTH * (bias - low) / max(high - low, 1)

    def y(score: float) -> float:
        return _TOP + _HEIGHT * (1 - max(score, 0.0))

    bottom, right, middle = _TOP + _HEIGHT, x0 + _WIDTH, x0 + _WIDTH / 2
    out = [_text(middle, _TOP - 18, title, colour="#000", bold=True)]
    for percent in range(0, 101, 20):
        height = y(percent / 100)
        out.append(line(x0, height, right, height, stroke="#ddd"))
        out.append(_text(x0 - 8, height + 4, str(percent), "end"))
    for bias in range(-(-low // 5) * 5, high + 1, 5):
        out.append(line(x(bias), bottom, x(bias), bottom + 5, stroke="#888"))
        out.append(_text(x(bias), bottom + 20, str(bias)))
    out.append(_text(middle, bottom + 44, f"exponent bias of all {curves[0].subject}"))
    turned = f"translate({x0 - 42} {_TOP + _HEIGHT / 2}) rotate(-90)"
    out.append(text(0, 0, _TITLES[sweep.metric], transform=turned, text_anchor="middle"))
    exact = y(sweep.float_score)
    out.append(line(x0, exact, right, exact, stroke="#888", stroke_dasharray="6 4"))
    out.append(_text(right + 8, exact - 6, "float32", "start", "#666"))
    for number, curve in enumerate(curves):
        place = exact + 16 + 18 * number
        name = str(curve.format)
        out.append(_text(right + 8, place, name, "start", colours[name], bold=True))
    plateaus = {curve: sweep.plateau(curve, tolerance) for curve in curves}
    # The widest plateau first, or it would hide the others.
    for curve, flat in sorted(plateaus.items(), key=lambda item: item[1][0] - item[1][1]):
        out += _curve(curve, flat, colours[str(curve.format)], x, y)
    return out


def _curve(
    curve: Curve,
    plateau: tuple[int, int],
    colour: str,
    x: Callable[[float], float],
    y: Callable[[float], float],
) -> list[str]:
    first, last = plateau
    spots = [(p.exponent_bias, (x(p.exponent_bias), y(p.score))) for p in curve.points]
    flat = [spot for bias, spot in spots if first <= bias <= last]
    return [
        _stroke([spot for _, spot in spots], colour, 1.5),
        _stroke(flat, colour, 4),
        circle(x(curve.best.exponent_bias), y(curve.best.score), 5, fill=colour, stroke="white"),
    ]


def _stroke(points: list[tuple[float, float]], colour: str, width: float) -> str:
    return polyline(
        points,
        stroke=colour,
        stroke_width=width,
        fill="none",
        stroke_linejoin="round",
        stroke_linecap="round",
    )


def _text(
    x: float,
    y: float,
    content: str,
    anchor: str = "middle",
    colour: str = "#333",
    *,
    bold: bool = False,
) -> str:
    weight = "bold" if bold else None
    return text(x, y, content, text_anchor=anchor, fill=colour, font_weight=weight)
