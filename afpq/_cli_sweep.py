"""The command that maps accuracy over formats and exponent biases: sweep."""

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

__all__ = ["sweep"]

_FILE = click.Path(path_type=Path)


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

    \b
    Examples:
      afpq sweep model.onnx --data test.npz
    """
    if formats and bits:
        raise click.UsageError("give --formats or --bits, not both")
    from afpq import _sweep_text as text
    from afpq import sweep as study

    for path in outputs:
        if path.suffix not in text.SUFFIXES:
            raise click.UsageError(f"sweep {path}: the supported suffixes are .svg, .md and .json")
        check_output(path, force=force, sources=[model])

    chosen = formats or [f for width in bits or (8,) for f in study.distinct_formats(width)]
    subjects = study.SUBJECTS if what == "both" else (what,)
    if "activations" in subjects:
        bare = [str(fmt) for fmt in chosen if fmt.mantissa_bits == 0]
        if len(bare) == len(chosen) and what == "activations":
            raise click.UsageError(
                f"no format to sweep ({', '.join(bare)}): activations need one with a mantissa"
            )
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
    text.write_sweep(result, outputs, tolerance=tolerance / 100)
    if as_json:
        print_json(result.to_dict(tolerance / 100))
        return
    print_line(text.summary(result, tolerance / 100))
    print_line()
    print_table(text.COLUMNS, text.rows(result, tolerance / 100), left=2)
    if result.joint:
        print_line()
        print_line("weights and activations together, each at its best bias")
        print_table(text.JOINT_COLUMNS, text.joint_rows(result))
