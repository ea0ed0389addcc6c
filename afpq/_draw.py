"""Draws a sweep as an SVG: a panel for weights and one for activations, the score over the exponent bias."""

from collections.abc import Callable
from html import escape

from afpq.sweep import Curve, Sweep

__all__ = ["draw"]

_WIDTH, _HEIGHT = 460, 300  # of the plotted area of one panel
_LEFT, _TOP, _BOTTOM, _GAP = 60, 50, 62, 120
# Okabe and Ito's colours, which most colour-blind readers can tell apart.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8B6F47")
_TITLES = {
    "top1": "top-1, %",
    "agreement": "agreement with the float network, %",
    "cosine": "cosine, %",
}


def draw(sweep: Sweep, tolerance: float) -> str:
    """The text of an SVG file: the plateau of a curve is bold, its best bias a dot, the float network a dashed line."""
    panels = list(dict.fromkeys(curve.subject for curve in sweep.curves))
    formats = list(dict.fromkeys(str(curve.format) for curve in sweep.curves))
    colours = {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(formats)}
    width = _LEFT + len(panels) * (_WIDTH + _GAP)
    height = _TOP + _HEIGHT + _BOTTOM
    body = [f'<rect width="{width}" height="{height}" fill="white"/>']
    for number, subject in enumerate(panels):
        curves = [curve for curve in sweep.curves if curve.subject == subject]
        x0 = _LEFT + number * (_WIDTH + _GAP)
        body += _panel(x0, f"{sweep.model}: {subject}", curves, colours, sweep, tolerance)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="13">\n'
        + "\n".join(body)
        + "\n</svg>\n"
    )


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

    out = [_text(x0 + _WIDTH / 2, _TOP - 18, title, "middle", "#000", bold=True)]
    for percent in range(0, 101, 20):
        out.append(_line(x0, y(percent / 100), x0 + _WIDTH, y(percent / 100), "#ddd"))
        out.append(_text(x0 - 8, y(percent / 100) + 4, str(percent), "end"))
    for bias in range(-(-low // 5) * 5, high + 1, 5):
        out.append(_line(x(bias), _TOP + _HEIGHT, x(bias), _TOP + _HEIGHT + 5, "#888"))
        out.append(_text(x(bias), _TOP + _HEIGHT + 20, str(bias)))
    axis = f"exponent bias of all {curves[0].subject}"
    out.append(_text(x0 + _WIDTH / 2, _TOP + _HEIGHT + 44, axis))
    middle, label = _TOP + _HEIGHT / 2, _TITLES[sweep.metric]
    out.append(
        f'<text transform="translate({x0 - 42} {middle}) rotate(-90)" text-anchor="middle">{label}</text>'
    )
    exact = y(sweep.float_score)
    out.append(_line(x0, exact, x0 + _WIDTH, exact, "#888", dashes="6 4"))
    out.append(_text(x0 + _WIDTH + 8, exact - 6, "float32", "start", "#666"))
    for number, curve in enumerate(curves):
        place = exact + 16 + 18 * number
        colour = colours[str(curve.format)]
        out.append(_text(x0 + _WIDTH + 8, place, str(curve.format), "start", colour, bold=True))
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
    spots = [(p.exponent_bias, f"{x(p.exponent_bias):.1f},{y(p.score):.1f}") for p in curve.points]
    flat = [spot for bias, spot in spots if first <= bias <= last]
    line = 'fill="none" stroke-linejoin="round" stroke-linecap="round"'
    best = curve.best
    return [
        f'<polyline points="{" ".join(s for _, s in spots)}" stroke="{colour}" stroke-width="1.5" {line}/>',
        f'<polyline points="{" ".join(flat)}" stroke="{colour}" stroke-width="4" {line}/>',
        f'<circle cx="{x(best.exponent_bias):.1f}" cy="{y(best.score):.1f}" r="5" fill="{colour}" stroke="white"/>',
    ]


def _line(x1: float, y1: float, x2: float, y2: float, colour: str, dashes: str = "none") -> str:
    return (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" '
        f'stroke-dasharray="{dashes}"/>'
    )


def _text(
    x: float,
    y: float,
    text: str,
    anchor: str = "middle",
    colour: str = "#333",
    *,
    bold: bool = False,
) -> str:
    weight = "bold" if bold else "normal"
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}" '
        f'font-weight="{weight}">{escape(text)}</text>'
    )
