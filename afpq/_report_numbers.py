"""How numbers read in a report: three digits where more mean nothing, always with a unit."""

import math

__all__ = ["bytes_text", "factor_text", "ms_text", "number_text", "percent_text"]

_SUPERSCRIPT = str.maketrans(
    "-0123456789", "\u207b\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079"
)


def number_text(value: float, digits: int = 3) -> str:
    """`0.0123`, `48.8`, `1,234`, and `3.3 x 10^-5` with a raised exponent where there would be many zeros."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else str(value)
    if abs(value) >= 999.5:
        return f"{value:,.0f}"
    if abs(value) < 1e-3:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
        raised = str(int(exponent)).translate(_SUPERSCRIPT)
        return f"10{raised}" if mantissa == "1" else f"{mantissa}\u00b710{raised}"
    return f"{value:.{digits}g}"


def bytes_text(size: int) -> str:
    """`13.97 MB`; powers of 1000."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= factor:
            return (
                f"{size / factor:.2f} {unit}"
                if size < 100 * factor
                else f"{size / factor:.1f} {unit}"
            )
    return f"{size} bytes"


def percent_text(share: float) -> str:
    """A share as percent: `98.4 %`, `0.03 %`, never `100 %` for less."""
    percent = 100 * share
    if percent in (0, 100):
        return f"{percent:.0f} %"
    if percent > 99.95:
        return "> 99.9 %"
    return f"{percent:.1f} %" if percent >= 1 else f"{percent:.2g} %"


def ms_text(milliseconds: float) -> str:
    """`0.42 ms`, `1.24 s`."""
    if milliseconds >= 1000:
        return f"{milliseconds / 1000:.2f} s"
    return f"{number_text(milliseconds)} ms"


def factor_text(ratio: float) -> str:
    """`6.5x` with a multiplication sign."""
    return f"{ratio:.2f}\u00d7" if ratio < 10 else f"{ratio:.1f}\u00d7"
