"""The command that maps accuracy over formats and exponent biases: sweep."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from afpq._cli_output import (
    StageProgress,
    check_output,
    data_options,
    json_option,
    note,
    print_json,
    print_line,
    print_table,
    threads_option,
)
from afpq.errors import FormatError

if TYPE_CHECKING:
    from afpq.formats import AfpFormat
    from afpq.sweep import Point, Sweep

__all__ = ["sweep"]

_FILE = click.Path(path_type=Path)
_SUFFIXES = (".svg", ".md", ".json")


def _formats(
    context: click.Context, parameter: click.Parameter, value: str | None
) -> "list[AfpFormat] | None":
    if value is None:
        return None
    from afpq.formats import AfpFormat

    try:
        return list(dict.fromkeys(AfpFormat.parse(text) for text in value.split(",")))
    except FormatError as error:
        raise click.BadParameter(str(error)) from error


@click.command(short_help="Accuracy over formats and exponent biases, drawn.")
@click.argument("model", type=_FILE)
@click.option("--data", required=True, metavar="SRC", help="Samples, and labels if there are any.")
@data_options
@click.option("--formats", callback=_formats, metavar="e4m3,e5m2,..", help="These formats.")
@click.option(
    "--bits",
    type=click.IntRange(2, 8),
    multiple=True,
    metavar="B",
    help="All formats of B bits (8); can be repeated.",
)
@click.option(
    "--what",
    type=click.Choice(("weights", "activations", "both")),
    default="both",
    help="What is rounded (both: one after the other, then together at the best biases).",
)
@click.option(
    "--tolerance",
    type=click.FloatRange(min=0),
    default=1.0,
    metavar="P",
    help="A plateau is within so many points of the best bias (1).",
)
@click.option(
    "-o",
    "--output",
    "outputs",
    type=_FILE,
    multiple=True,
    help="S.svg, S.md or S.json; can be repeated.",
)
@click.option("--force", is_flag=True, help="Replace existing files.")
@threads_option
@json_option
def sweep(
    model: Path,
    *,
    data: str,
    preprocess: str | None,
    samples: int | None,
    formats: "list[AfpFormat] | None",
    bits: tuple[int, ...],
    what: str,
    tolerance: float,
    outputs: tuple[Path, ...],
    force: bool,
    threads: int,
    as_json: bool,
) -> None:
    """Accuracy over formats and exponent biases, one of each for the whole network.

    For every format, all weights (and then all that layers read) are rounded with one exponent bias; the table says
    which bias is best and over which range accuracy holds, and S.svg draws it. Top-1 counts where the data has
    labels, agreement with the float network elsewhere.
    """
    if formats and bits:
        raise click.UsageError("give --formats or --bits, not both")
    for path in outputs:
        if path.suffix not in _SUFFIXES:
            raise click.UsageError(f"sweep {path}: the supported suffixes are .svg, .md and .json")
        check_output(path, force=force, sources=[model])
    from afpq import sweep as study

    chosen = formats or [f for width in bits or (8,) for f in study.distinct_formats(width)]
    subjects = study.SUBJECTS if what == "both" else (what,)
    if "activations" in subjects:
        bare = [str(fmt) for fmt in chosen if fmt.mantissa_bits == 0]
        if bare:
            note(f"note: {', '.join(bare)} without a mantissa: weights only")
    with StageProgress() as progress:
        result = study.sweep(
            model,
            data,
            formats=chosen,
            subjects=subjects,
            preprocess=preprocess,
            samples=samples,
            threads=threads,
            progress=progress,
        )
    _write(result, outputs, tolerance / 100)
    if as_json:
        print_json(result.to_dict(tolerance / 100))
        return
    print_line(_summary(result, tolerance / 100))
    print_line()
    print_table(_COLUMNS, _rows(result, tolerance / 100), left=2)
    if result.joint:
        print_line()
        print_line("weights and activations together, each at its best bias")
        print_table(_JOINT_COLUMNS, _joint_rows(result))


def _write(result: "Sweep", outputs: Sequence[Path], tolerance: float) -> None:
    from afpq._draw import draw

    pictures = [path for path in outputs if path.suffix == ".svg"]
    for path in outputs:
        if path.suffix == ".svg":
            path.write_text(draw(result, tolerance))
        elif path.suffix == ".json":
            path.write_text(json.dumps(result.to_dict(tolerance), indent=1) + "\n")
        else:
            beside = [p for p in pictures if p.parent == path.parent]
            path.write_text(_markdown(result, tolerance, beside))


_COLUMNS = ("format", "of", "best bias", "score %", "KL", "SQNR dB", "plateau", "biases")
_JOINT_COLUMNS = ("format", "weight bias", "activation bias", "score %", "KL", "SQNR dB")


def _summary(result: "Sweep", tolerance: float) -> str:
    error = result.float_stderr
    spread = "" if error is None else f" (standard error {100 * error:.2f})"
    name = {"top1": "top-1", "agreement": "agreement", "cosine": "cosine"}[result.metric]
    return (
        f"{result.model}: {name} over {result.num_samples} samples, float {100 * result.float_score:.2f} %"
        f"{spread}; a plateau is within {100 * tolerance:g} points of the best (of float, if that is less)"
    )


def _rows(result: "Sweep", tolerance: float) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for curve in result.curves:
        first, last = result.plateau(curve, tolerance)
        head = (str(curve.format), curve.subject, str(curve.best.exponent_bias))
        rows.append((*head, *_numbers(curve.best), f"{first}..{last}", str(last - first + 1)))
    return rows


def _joint_rows(result: "Sweep") -> list[tuple[str, ...]]:
    return [
        (
            str(entry.format),
            str(entry.weight_bias),
            str(entry.activation_bias),
            *_numbers(entry.point),
        )
        for entry in result.joint
    ]


def _numbers(point: "Point") -> tuple[str, str, str]:
    kl = "-" if point.kl is None else f"{point.kl:.4f}"
    sqnr = "-" if point.sqnr_db is None else f"{point.sqnr_db:.1f}"
    return f"{100 * point.score:.2f}", kl, sqnr


def _markdown(result: "Sweep", tolerance: float, pictures: Sequence[Path]) -> str:
    lines = [
        "# Accuracy over formats and exponent biases",
        "",
        f"{_summary(result, tolerance)}.",
        "",
    ]
    lines += [
        "Written by `afpq sweep`.",
        "",
        "One format and one exponent bias for all weights of the network, or for all that its layers read; the other",
        "side and all biases are float32. Codes stand for `I * 2^(1 - M - exponent_bias)` and saturate beyond the",
        "largest value. The best bias is that of the least KL (without classes: of the highest SQNR).",
        "",
    ]
    lines += [line for p in pictures for line in (f"![score over exponent bias]({p.name})", "")]
    lines += _table(_COLUMNS, _rows(result, tolerance), left=2)
    if result.joint:
        lines += ["", "Weights and activations together, each at its best bias:", ""]
        lines += _table(_JOINT_COLUMNS, _joint_rows(result), left=1)
    return "\n".join(lines) + "\n"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, left: int) -> list[str]:
    marks = ["---" if i < left else "---:" for i in range(len(columns))]
    return [f"| {' | '.join(row)} |" for row in (columns, marks, *rows)]
