"""The commands that look at formats, check a file, or look at this machine: formats, verify, doctor."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from afpq._cli_output import (
    StageProgress,
    json_option,
    print_json,
    print_line,
    print_table,
    threads_option,
)

__all__ = ["doctor", "formats", "verify"]

_FIT = {
    "byte": "signed bytes, integer dot products",
    "pair": "two byte planes, integer dot products",
    "wide": "float32 lanes",
}


@click.command(short_help="The number formats and how each is executed.")
@json_option
def formats(*, as_json: bool) -> None:
    """Every number format: its values and how it is executed.

    \b
    Examples:
      afpq formats
    """
    from afpq.formats import all_formats, codebook

    rows: list[dict[str, Any]] = [
        {
            "format": str(fmt),
            "bits": fmt.bits,
            "values": len(set(codebook(fmt).tolist())),
            "max_integer": fmt.max_integer,
            "smallest": 2.0 ** (1 - fmt.mantissa_bits),
            "largest": fmt.max_integer * 2.0 ** (1 - fmt.mantissa_bits),
            "kernel": fmt.kernel_class,
        }
        for fmt in sorted(all_formats(), key=lambda f: (f.bits, f))
    ]
    if as_json:
        print_json(rows)
        return
    columns = ("format", "kernel", "bits", "values", "smallest", "largest", "max/min")
    print_table(
        columns,
        [
            (
                r["format"],
                r["kernel"],
                f"{r['bits']}",
                f"{r['values']}",
                f"{r['smallest']:g}",
                f"{r['largest']:g}",
                f"{r['max_integer']}",
            )
            for r in rows
        ],
        left=2,
    )
    print_line()
    print_line("smallest and largest magnitude for exponent_bias 0; each bias step halves them")
    for name, text in _FIT.items():
        print_line(f"{name}: {text}")


@click.command(short_help="Check a packed model and how it is executed.")
@click.argument("model", type=click.Path(path_type=Path))
@threads_option
@json_option
def verify(model: Path, *, threads: int, as_json: bool) -> int:
    """Check a packed model: checksums, codes, and that the runtime computes what the format says.

    \b
    Examples:
      afpq verify small.onnx
    """
    from afpq.verify import verify as run

    with StageProgress() as progress:
        findings = run(model, threads=threads, progress=progress)
    failed = [f for f in findings if not f.passed]
    if as_json:
        print_json({"passed": not failed, "findings": [asdict(f) for f in findings]})
        return 1 if failed else 0
    for finding in failed:
        print_line(f"FAILED  {finding.check:9} {finding.layer or model}: {finding.detail}")
    for check in dict.fromkeys(f.check for f in findings):
        total = [f for f in findings if f.check == check]
        print_line(f"{check:9} {sum(f.passed for f in total)} of {len(total)} passed")
    print_line(f"{model}: {'DAMAGED or not executed as defined' if failed else 'sound'}")
    return 1 if failed else 0


@click.command(short_help="What works on this machine, and how fast.")
@click.option(
    "--measure", is_flag=True, help="Also measure: memory, two cores, float32, packed layers."
)
@click.option(
    "--save-rates",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="RATES.json",
    help="With --measure: write how fast each kind of format multiplies here, for quantize --latency.",
)
@json_option
def doctor(*, measure: bool, save_rates: Path | None, as_json: bool) -> int:
    """What of afpq works on this machine: versions, instruction sets, the custom-op library, every kernel.

    \b
    Examples:
      afpq doctor
      AFPQ_ISA=avx2 afpq doctor --measure
      afpq doctor --measure --save-rates rates.json
    """
    if save_rates is not None and not measure:
        raise click.UsageError("--save-rates needs --measure")
    from afpq.doctor import doctor as run
    from afpq.doctor import measure as peaks
    from afpq.rates import rates_json
    from afpq.report import environment, write_text

    checks = run()
    if measure:
        measured, rates = peaks()
        checks += measured
    failed = any(not check.passed for check in checks)
    if save_rates is not None and not failed:
        write_text(save_rates, rates_json(environment()["isa"], rates))
    if as_json:
        print_json({"passed": not failed, "checks": [asdict(check) for check in checks]})
    else:
        for check in checks:
            print_line(f"{'ok  ' if check.passed else 'FAIL'}  {check.name:18} {check.detail}")
    return 1 if failed else 0
