"""The command that writes a packed model for other runtimes: export."""

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from afpq._cli_output import (
    check_output,
    format_bytes,
    json_option,
    print_json,
    print_line,
    print_table,
)

if TYPE_CHECKING:
    from afpq.export import ExportedModel

__all__ = ["export"]

_FILE = click.Path(path_type=Path)


@click.command(short_help="Standard ONNX, or QONNX, from a packed model.")
@click.argument("model", type=_FILE)
@click.option(
    "--to",
    required=True,
    type=click.Choice(("float", "qdq", "qonnx")),
    help="float: rounded weights in float32; qdq: codes of ONNX's small types with "
    "DequantizeLinear; qonnx: QONNX's FloatQuant and IntQuant.",
)
@click.option("-o", "--output", type=_FILE, required=True, help="The file to write.")
@click.option(
    "--inexact",
    type=click.Choice(("error", "nearest")),
    default="error",
    help="What to do with weights that no standard type holds (qdq): stop, or round.",
)
@click.option("--force", is_flag=True, help="Replace an existing file.")
@json_option
def export(model: Path, *, to: str, output: Path, inexact: str, force: bool, as_json: bool) -> None:
    """Write a packed model for runtimes without afpq's operators.

    Every afpq operator becomes standard ONNX; names, shared weights and the rest of the graph stay. Rounding of
    activations is not part of an export.

    \b
    Examples:
      afpq export small.onnx --to float -o float.onnx
      afpq export small.onnx --to qdq --inexact nearest -o qdq.onnx
    """
    if inexact != "error" and to != "qdq":
        raise click.UsageError(f"--inexact is for --to qdq: {to} holds every weight exactly")
    check_output(output, force=force, sources=[model])
    from afpq.export import export as run
    from afpq.packed import file_bytes

    exported = run(model, to=to, inexact=inexact)
    size, before = exported.save(output), file_bytes(model)
    if as_json:
        print_json(
            {
                "to": to,
                "path": str(output),
                "source_bytes": before,
                "output_bytes": size,
                "opset": exported.opset,
                "layers": [{**asdict(layer), "exact": layer.exact} for layer in exported.layers],
                "notes": list(exported.notes),
                "checks": exported.checks,
            }
        )
        return
    _print_layers(exported)
    for text in exported.notes:
        print_line(text)
    if exported.checks["loaded"]:
        print_line(f"the file loads in onnxruntime and ran once: {exported.checks['run_once']}")
    else:
        print_line(f"the file was checked by onnx and not run: {exported.missing}")
    print_line(f"{output}: {format_bytes(size)}; the packed file has {before:,}")


def _print_layers(exported: "ExportedModel") -> None:
    rows = [
        (
            layer.name,
            layer.format,
            layer.type,
            "exact" if layer.sqnr_db is None else f"{layer.sqnr_db:.1f} dB",
            "shared" if layer.shared_with else f"{layer.packed_bytes:,}",
            "shared" if layer.shared_with else f"{layer.nbytes:,}",
        )
        for layer in exported.layers
    ]
    exact = sum(layer.exact for layer in exported.layers)
    sums = [
        sum(layer.packed_bytes for layer in exported.tensors),
        sum(layer.nbytes for layer in exported.tensors),
    ]
    total = ("total", "", "", f"{exact} of {len(rows)} exact", *(f"{n:,}" for n in sums))
    columns = ("layer", "format", "type", "weights", "packed", "bytes")
    print_table(columns, [*rows, total], left=4)
    types = Counter(layer.type for layer in exported.tensors)
    print_line()
    print_line("tensors: " + ", ".join(f"{count} {name}" for name, count in types.most_common()))
