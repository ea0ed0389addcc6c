"""The commands that run models: compare, bench."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from afpq._cli_output import (
    StageProgress,
    data_options,
    format_change,
    json_option,
    print_json,
    print_line,
    print_table,
    threads_option,
)
from afpq.errors import PlanError

if TYPE_CHECKING:
    from afpq.bench import BenchResult
    from afpq.evaluate import Comparison
    from afpq.simulate import Simulated

__all__ = ["bench", "compare", "print_comparison"]

_FILE = click.Path(path_type=Path)


def _simulation(
    context: click.Context, parameter: click.Parameter, value: str | None
) -> tuple[float, float] | None:
    if value is None:
        return None
    from afpq.simulate import parse_simulation

    try:
        return parse_simulation(value)
    except PlanError as error:
        raise click.BadParameter(str(error)) from error


@click.command(short_help="Accuracy of two models on the same data.")
@click.argument("reference", type=_FILE)
@click.argument("quantized", type=_FILE, required=False)
@click.option("--data", required=True, metavar="SRC", help="Samples, and labels if there are any.")
@data_options
@click.option("--layers", is_flag=True, help="Also the SQNR of every packed layer's output.")
@click.option(
    "--simulate",
    "simulation",
    callback=_simulation,
    metavar="w5a5",
    help="Instead of a second model: the first with so many bits per weight and activation, on average.",
)
@click.option(
    "--calib",
    metavar="SRC",
    help="Samples that --simulate quantizes with; --samples counts here too.",
)
@threads_option
@json_option
def compare(
    reference: Path,
    quantized: Path | None,
    *,
    data: str,
    preprocess: str | None,
    samples: int | None,
    layers: bool,
    simulation: tuple[float, float] | None,
    calib: str | None,
    threads: int,
    as_json: bool,
) -> None:
    """Accuracy of two models on the same data: top-1, agreement, KL, SQNR, sizes.

    SRC is an .npz, a folder of images (with --preprocess) or of .npy files, or module:function. With --simulate the
    second model is made in memory: weights as by `afpq quantize`, and every input of a layer rounded.

    \b
    Examples:
      afpq compare model.onnx small.onnx --data test.npz --layers
      afpq compare model.onnx --data test.npz --simulate w5a5
    """
    _check_second(quantized, simulation, calib, layers)
    from afpq.evaluate import compare as run

    simulated = None
    with StageProgress() as progress:
        if simulation is not None:
            from afpq.simulate import simulate

            simulated = simulate(
                reference,
                calib,
                bits=simulation[0],
                activation_bits=simulation[1],
                preprocess=preprocess,
                samples=samples,
                threads=threads,
                progress=progress,
            )
        other = quantized if simulated is None else simulated.session(threads=threads)
        assert other is not None
        result = run(
            reference,
            other,
            data,
            preprocess=preprocess,
            limit=samples,
            layers=layers,
            threads=threads,
            progress=progress,
        )
    if as_json:
        print_json(result.to_dict() | _simulation_fields(simulated))
        return
    print_comparison(result)
    if result.layers:
        print_line()
        rows = [(e.name, f"{e.sqnr_db:.1f}") for e in result.layers]
        print_table(("layer", "SQNR dB"), rows)
    print_line()
    if simulated is not None:
        print_line(
            f"simulated, nothing written: {simulated.plan.bits_per_weight:.3f} bits per weight, "
            f"scales included, {simulated.activation_bits:.3f} bits per activation"
        )
        return
    before, after = result.reference_bytes, result.quantized_bytes
    assert before is not None and after is not None
    print_line(f"{quantized}: {format_change(before, after)}")


def _check_second(
    quantized: Path | None, simulation: tuple[float, float] | None, calib: str | None, layers: bool
) -> None:
    if (quantized is None) == (simulation is None):
        raise click.UsageError("give a second model, or --simulate")
    if (calib is None) != (simulation is None):
        raise click.UsageError("--simulate and --calib need each other")
    if layers and simulation is not None:
        raise click.UsageError("--layers needs a second model file")


def _simulation_fields(simulated: "Simulated | None") -> dict[str, Any]:
    if simulated is None:
        return {}
    return {
        "bits_per_weight": simulated.plan.bits_per_weight,
        "bits_per_activation": simulated.activation_bits,
    }


@click.command(short_help="Speed of two models on this machine.")
@click.argument("reference", type=_FILE)
@click.argument("quantized", type=_FILE)
@click.option("--data", metavar="SRC", help="Take the inputs from here instead of making them up.")
@data_options
@click.option(
    "--batch", type=click.IntRange(min=1), default=1, metavar="N", help="Samples a run (1)."
)
@click.option(
    "--seconds",
    type=click.FloatRange(min=0),
    default=5.0,
    metavar="S",
    help="How long to measure (5); at least 20 rounds.",
)
@threads_option
@json_option
def bench(
    reference: Path,
    quantized: Path,
    *,
    data: str | None,
    preprocess: str | None,
    samples: int | None,
    batch: int,
    seconds: float,
    threads: int,
    as_json: bool,
) -> None:
    """Speed of two models on this machine, interleaved: median, spread, ratio.

    \b
    Examples:
      afpq bench model.onnx small.onnx --threads 1
      afpq bench model.onnx small.onnx --batch 8 --seconds 20
    """
    from afpq.bench import bench as run

    feeds = None
    if data is not None:
        from afpq.data import open_data
        from afpq.runtime import session

        inputs = session(reference, threads=threads).get_inputs()
        opened = open_data(data, inputs, preprocess=preprocess, limit=samples)
        feeds = next(opened.batches(batch))
    elif preprocess is not None or samples is not None:
        raise click.UsageError("--preprocess and --samples need --data")
    with StageProgress() as progress:
        result = run(
            reference,
            quantized,
            feeds=feeds,
            threads=threads,
            batch=batch,
            seconds=seconds,
            progress=progress,
        )
    if as_json:
        print_json(asdict(result))
    else:
        _print_bench(result)


def print_comparison(result: "Comparison") -> None:
    """The numbers of every output, one a line."""
    for output in result.outputs:
        print_line(f"output {output.name}: {output.kind}, {result.num_samples} samples")
        if output.kind == "varying":
            print_line("  the shapes differ from run to run: not compared")
        if output.top1 is not None and output.top1_reference is not None:
            drop = 100 * (output.top1 - output.top1_reference)
            print_line(
                f"  top-1      {100 * output.top1_reference:.2f} -> {100 * output.top1:.2f} % "
                f"({drop:+.2f} points, standard error {100 * (output.top1_stderr or 0):.2f})"
            )
        if output.top5 is not None and output.top5_reference is not None:
            print_line(
                f"  top-5      {100 * output.top5_reference:.2f} -> {100 * output.top5:.2f} %"
            )
        if output.agreement is not None:
            print_line(
                f"  agreement  {100 * output.agreement:.2f} % "
                f"(standard error {100 * (output.agreement_stderr or 0):.2f})"
            )
        if output.kl is not None:
            print_line(
                f"  KL         {output.kl:.5f} nats (standard error {output.kl_stderr or 0:.5f})"
            )
        if output.cosine is not None:
            print_line(f"  cosine     {output.cosine:.5f} (smallest {output.cosine_min:.5f})")
        if output.sqnr_db is not None:
            print_line(f"  SQNR       {output.sqnr_db:.1f} dB")


def _print_bench(result: "BenchResult") -> None:
    shapes = ", ".join(f"{k} {list(v)}" for k, v in result.shapes.items())
    threads = "one a core" if result.threads == 0 else f"{result.threads}"
    print_line(f"input {shapes}")
    print_line(f"threads: {threads}; {result.num_rounds} interleaved rounds")
    print_line()
    names = [Path(t.path).name for t in (result.first, result.second)]
    if names[0] == names[1]:
        names = [result.first.path, result.second.path]
    rows = [
        (
            name,
            f"{t.median_ms:.3f}",
            f"{t.p10_ms:.3f}..{t.p90_ms:.3f}",
            f"{t.min_ms:.3f}",
            f"{t.load_ms:.1f}",
            f"{t.file_bytes:,}",
        )
        for name, t in zip(names, (result.first, result.second), strict=True)
    ]
    print_table(("model", "median ms", "10..90 %", "min", "load", "bytes"), rows)
    print_line()
    word = "slower" if result.ratio > 1 else "faster"
    factor = result.ratio if result.ratio > 1 else 1 / result.ratio
    print_line(
        f"time ratio {result.ratio:.3f} (10..90 %: {result.ratio_p10:.3f}..{result.ratio_p90:.3f}): "
        f"{factor:.2f}x {word}"
    )
