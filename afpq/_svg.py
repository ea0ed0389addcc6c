"""SVG as text: elements, axes and scales. The one way in which afpq draws; what is drawn is decided by its callers.

Numbers are written with at most one decimal: a pixel is enough. Attribute names use `_` for `-`, and `class_` for
`class`; an attribute that is None is left out. All text is escaped here.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from html import escape

__all__ = [
    "OKABE_ITO",
    "axis_ticks",
    "circle",
    "element",
    "group",
    "line",
    "linear",
    "logarithmic",
    "path",
    "polyline",
    "power_ticks",
    "rect",
    "svg",
    "text",
]

# Okabe and Ito's colours, which most colour-blind readers can tell apart.
OKABE_ITO = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8B6F47",
)  # fmt: skip

Attribute = str | float | None
Scale = Callable[[float], float]


def element(tag: str, content: str = "", /, **attributes: Attribute) -> str:
    """One element; `content` is SVG, already escaped."""
    fields = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{_value(value)}"'
        for name, value in attributes.items()
        if value is not None
    )
    return f"<{tag}{fields}>{content}</{tag}>" if content else f"<{tag}{fields}/>"


def svg(
    width: float, height: float, body: Iterable[str], *, label: str, **attributes: Attribute
) -> str:
    """A whole picture; `label` is what a screen reader says of it."""
    return element(
        "svg",
        "\n".join(body),
        xmlns="http://www.w3.org/2000/svg",
        width=width,
        height=height,
        viewBox=f"0 0 {_value(width)} {_value(height)}",
        role="img",
        aria_label=label,
        **attributes,
    )


def group(body: Iterable[str], **attributes: Attribute) -> str:
    return element("g", "".join(body), **attributes)


def line(x1: float, y1: float, x2: float, y2: float, **attributes: Attribute) -> str:
    return element("line", x1=x1, y1=y1, x2=x2, y2=y2, **attributes)


def rect(x: float, y: float, width: float, height: float, **attributes: Attribute) -> str:
    return element("rect", x=x, y=y, width=width, height=height, **attributes)


def circle(x: float, y: float, radius: float, **attributes: Attribute) -> str:
    return element("circle", cx=x, cy=y, r=radius, **attributes)


def path(steps: str, **attributes: Attribute) -> str:
    return element("path", d=steps, **attributes)


def polyline(points: Iterable[tuple[float, float]], **attributes: Attribute) -> str:
    return element(
        "polyline", points=" ".join(f"{_value(x)},{_value(y)}" for x, y in points), **attributes
    )


def text(x: float, y: float, content: str, **attributes: Attribute) -> str:
    return element("text", escape(content), x=x, y=y, **attributes)


def linear(low: float, high: float, start: float, end: float) -> Scale:
    """Values low..high as positions start..end."""
    span = high - low or 1.0
    return lambda value: start + (end - start) * (value - low) / span


def logarithmic(low: float, high: float, start: float, end: float) -> Scale:
    """Positive values low..high as positions start..end, equal ratios at equal distances."""
    scale = linear(math.log10(low), math.log10(high), start, end)
    return lambda value: scale(math.log10(value))


def axis_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers (1, 2 or 5 times a power of ten apart) within low..high."""
    if high <= low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def power_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Powers of ten within low..high, thinned to at most `most`; with 2 and 5 times them where there are few."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    factors: Sequence[int] = (1,) if last - first > 2 else (1, 2, 5)
    ticks = [f * 10.0**e for e in range(first, last + 1) for f in factors]
    inside = [t for t in ticks if low * 0.999 <= t <= high * 1.001]
    return inside[:: -(-len(inside) // most)] if len(inside) > most else inside


def _value(value: str | float) -> str:
    if isinstance(value, str):
        return escape(value, quote=True)
    return f"{value:.1f}".removesuffix(".0") if math.isfinite(value) else "0"
