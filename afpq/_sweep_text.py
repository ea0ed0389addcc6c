"""What a sweep says: the lines and rows that the command prints, and the files that it writes."""

import json
from collections.abc import Sequence
from pathlib import Path

from afpq._draw import draw
from afpq._report_text import markdown_table
from afpq.report import write_text
from afpq.sweep import Point, Sweep

__all__ = [
    "COLUMNS",
    "JOINT_COLUMNS",
    "SUFFIXES",
    "joint_rows",
    "rows",
    "summary",
    "write_sweep",
]

SUFFIXES = (".svg", ".md", ".json")
COLUMNS = ("format", "of", "best bias", "score %", "KL", "SQNR dB", "plateau", "biases")
JOINT_COLUMNS = ("format", "weight bias", "activation bias", "score %", "KL", "SQNR dB")


def write_sweep(
    result: Sweep, outputs: Sequence[Path], *, tolerance: float, command: str = "`afpq sweep`"
) -> None:
    """Writes every output by its suffix, one of `SUFFIXES`, each whole or not at all.

    A .md shows the .svg beside it, and says that it was written by `command` (Markdown).
    """
    pictures = [path for path in outputs if path.suffix == ".svg"]
    for path in outputs:
        if path.suffix == ".svg":
            write_text(path, draw(result, tolerance))
        elif path.suffix == ".json":
            write_text(path, json.dumps(result.to_dict(tolerance), indent=1) + "\n")
        else:
            beside = [p for p in pictures if p.parent == path.parent]
            write_text(path, _markdown(result, tolerance, beside, command))


def summary(result: Sweep, tolerance: float) -> str:
    """What was measured on what, in one line."""
    error = result.float_stderr
    spread = "" if error is None else f" (standard error {100 * error:.2f})"
    name = {"top1": "top-1", "agreement": "agreement", "cosine": "cosine"}[result.metric]
    return (
        f"{result.model}: {name} over {result.num_samples} samples, float {100 * result.float_score:.2f} %"
        f"{spread}; a plateau is within {100 * tolerance:g} points of the best (of float, if that is less)"
    )


def rows(result: Sweep, tolerance: float) -> list[tuple[str, ...]]:
    """A row of `COLUMNS` for every curve."""
    found: list[tuple[str, ...]] = []
    for curve in result.curves:
        first, last = result.plateau(curve, tolerance)
        head = (str(curve.format), curve.subject, str(curve.best.exponent_bias))
        found.append((*head, *_numbers(curve.best), f"{first}..{last}", str(last - first + 1)))
    return found


def joint_rows(result: Sweep) -> list[tuple[str, ...]]:
    """A row of `JOINT_COLUMNS` for every format of which both were swept."""
    return [
        (
            str(entry.format),
            str(entry.weight_bias),
            str(entry.activation_bias),
            *_numbers(entry.point),
        )
        for entry in result.joint
    ]


def _numbers(point: Point) -> tuple[str, str, str]:
    kl = "-" if point.kl is None else f"{point.kl:.4f}"
    sqnr = "-" if point.sqnr_db is None else f"{point.sqnr_db:.1f}"
    return f"{100 * point.score:.2f}", kl, sqnr


def _markdown(result: Sweep, tolerance: float, pictures: Sequence[Path], command: str) -> str:
    lines = [
        "# Accuracy over formats and exponent biases",
        "",
        f"{summary(result, tolerance)}.",
        "",
    ]
    lines += [
        f"Written by {command}.",
        "",
        "One format and one exponent bias for all weights of the network, or for all that its layers read; the other",
        "side and all biases are float32. Codes stand for `I * 2^(1 - M - exponent_bias)` and saturate beyond the",
        "largest value. The best bias is that of the least KL (without classes: of the highest SQNR).",
        "",
    ]
    lines += [line for p in pictures for line in (f"![score over exponent bias]({p.name})", "")]
    lines.append(markdown_table(COLUMNS, rows(result, tolerance), left=2))
    if result.joint:
        lines += ["", "Weights and activations together, each at its best bias:", ""]
        lines.append(markdown_table(JOINT_COLUMNS, joint_rows(result), left=1))
    return "\n".join(lines) + "\n"
