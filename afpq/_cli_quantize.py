"""The command `quantize`."""

import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from afpq._cli_config import config_options, save_config
from afpq._cli_output import (
    StageProgress,
    check_output,
    check_report_suffix,
    data_options,
    json_option,
    note,
    parse_size,
    read_plan,
    threads_option,
)
from afpq._cli_result import print_dry_run, print_result
from afpq.errors import PlanError

if TYPE_CHECKING:
    from afpq.journal import Journal
    from afpq.quantize import Job, QuantizedModel

__all__ = ["quantize"]

_FILE = click.Path(path_type=Path)


def _size(context: click.Context, parameter: click.Parameter, value: str | None) -> int | None:
    try:
        return None if value is None else parse_size(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


def _overrides(
    context: click.Context, parameter: click.Parameter, value: tuple[str, ...]
) -> dict[str, str]:
    if not value:
        return {}
    from afpq.plan import parse_overrides

    try:
        return parse_overrides(value)
    except PlanError as error:
        raise click.BadParameter(str(error).removeprefix("--layer ")) from error


def _patterns(flag: str, text: str) -> Callable[[Any], Any]:
    return click.option(flag, multiple=True, metavar="GLOB", help=text)


@click.command(short_help="Write a packed model.")
@click.argument("model", type=_FILE, metavar="MODEL.onnx")
@click.option("-o", "--output", type=_FILE, metavar="OUT.onnx", help="The packed model to write.")
@click.option(
    "--bits",
    type=click.FloatRange(2, 8),
    metavar="B",
    help="Budget in bits per weight, scales included, 2..8; 5 if no other is given.",
)
@click.option("--size", callback=_size, metavar="BYTES", help="Budget for the file: 1.5MB, 800k.")
@click.option(
    "--max-drop",
    type=click.FloatRange(0, 100),
    metavar="PCT",
    help="Find the smallest model that loses no more on held-out samples: points of top-1 with labels, else percent "
    "of changed first classes, else percent of error energy.",
)
@click.option(
    "--calib", metavar="SRC", help="Samples: .npz, folder of images or .npy, module:function."
)
@data_options
@click.option(
    "--activations",
    type=click.Choice(["a16", "a8", "f32"]),
    default="a16",
    help="How layers read their inputs: 16-bit (default), 8-bit, or float.",
)
@click.option(
    "--bias",
    "kind",
    type=click.Choice(["real", "integer"]),
    default="real",
    help="Exponent bias: any scale (default), or powers of two.",
)
@click.option(
    "--mode",
    type=click.Choice(["quick", "default", "best"]),
    default="default",
    help="Work to do with --calib: nearest rounding (quick), compensated rounding, or a second pass and rounding "
    "learned with torch as well (best).",
)
@click.option(
    "--latency",
    type=_FILE,
    metavar="RATES.json",
    help="With --calib: of the plans in the budget that are predicted to lose at most a tenth more than the best, take "
    "the one with the fastest products, by what doctor --measure --save-rates found.",
)
@click.option(
    "--chain/--no-chain",
    default=True,
    help="Layers add residuals and, with --calib and --activations a8, convolutions pass bytes on (default).",
)
@click.option(
    "--bn-recal/--no-bn-recal",
    default=True,
    help="With --calib: also try to restore means and variances, of BatchNormalization and of channels (default).",
)
@click.option(
    "--equalize/--no-equalize",
    default=False,
    help="With --calib: also build from equalised weights, and keep the better model. Takes longer; seldom helps.",
)
@click.option(
    "--plan",
    "plan_file",
    type=_FILE,
    metavar="P.json",
    help="Use this plan instead of searching one.",
)
@click.option(
    "--save-plan",
    type=_FILE,
    metavar="P.json",
    help="Write the plan that was found, to edit or reuse.",
)
@_patterns("--include", "Quantize only these layers. May be repeated.")
@_patterns("--exclude", "Leave these layers float. May be repeated.")
@click.option(
    "--layer",
    "overrides",
    multiple=True,
    callback=_overrides,
    metavar="GLOB=FORMAT",
    help="Give these layers this format, such as 'conv*=e2m3'. May be repeated.",
)
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    metavar="N",
    help="Which samples are held out to prove corrections; 0 spreads them evenly.",
)
@threads_option
@click.option(
    "--dry-run",
    is_flag=True,
    help="Say what the budget leads to, in exact bytes per layer, without measuring or writing anything.",
)
@click.option(
    "--report",
    type=_FILE,
    metavar="R.html",
    help="Also write a report: R.html, R.md or R.json. Times the model for a second or two.",
)
@json_option
@click.option(
    "--resume",
    is_flag=True,
    help="Go on where the same command was interrupted or killed: OUT.onnx.journal keeps what it had finished.",
)
@config_options
@click.option("--force", is_flag=True, help="Replace existing outputs.")
def quantize(model: Path, **options: Any) -> int:
    """Write a packed model: every layer in a small float format of its own.

    Names for globs are shown by `afpq inspect MODEL`. With --calib, formats are chosen by measured sensitivity and
    rounding is compensated; without it, by weight error alone.

    \b
    Examples:
      afpq quantize model.onnx -o small.onnx --bits 5 --calib samples.npz
      afpq quantize model.onnx -o small.onnx --size 2MB --calib photos \\
          --preprocess imagenet-torchvision --activations a8 --report r.html
      afpq quantize model.onnx -o small.onnx --max-drop 0.5 --calib samples.npz
      afpq quantize model.onnx --bits 4 --layer '*/fc=e2m3' --dry-run
    """
    return _quantize(model, _Options(**options))


@dataclass(frozen=True)
class _Options:
    """The options of the command as click gives them."""

    output: Path | None
    bits: float | None
    size: int | None
    max_drop: float | None
    calib: str | None
    preprocess: str | None
    samples: int | None
    activations: str
    kind: str
    mode: str
    latency: Path | None
    chain: bool
    bn_recal: bool
    equalize: bool
    plan_file: Path | None
    save_plan: Path | None
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    overrides: dict[str, str]
    seed: int
    threads: int
    dry_run: bool
    report: Path | None
    as_json: bool
    resume: bool
    force: bool
    save_config: Path | None


def _quantize(model: Path, options: _Options) -> int:
    _check_usage(model, options)
    from afpq.quantize import build, find_plan, prepare, reach_goal
    from afpq.report import write_text

    plan = None if options.plan_file is None else read_plan(options.plan_file)
    journal = _journal_folder(options)
    job = prepare(
        model,
        plan,
        data=options.calib,
        bits=options.bits,
        size=options.size,
        max_drop=options.max_drop,
        preprocess=options.preprocess,
        samples=options.samples,
        activations=options.activations,
        kind=options.kind,
        mode=options.mode,
        latency=options.latency,
        chain=options.chain,
        bn_recal=options.bn_recal,
        equalize=options.equalize,
        include=options.include,
        exclude=options.exclude,
        overrides=options.overrides,
        seed=options.seed,
        threads=options.threads,
        journal=journal,
    )
    if options.save_config is not None:
        write_text(options.save_config, save_config(click.get_current_context()))
    _say_defaults(job, options)
    result: QuantizedModel | None = None
    with StageProgress() as progress, _going_on(job.journal):
        if options.dry_run:
            # Nothing is measured: what the budget leads to is known before the work starts.
            unmeasured = replace(job, fit=None, held_out=None, samples=None)
            found, stats = find_plan(unmeasured, progress=progress)
        elif job.max_drop is None:
            found, stats = find_plan(job, progress=progress)
        else:
            result = reach_goal(job, progress=progress)
            assert result.plan is not None
            found = result.plan
        if options.save_plan is not None:
            write_text(options.save_plan, found.to_json())
        if options.dry_run:
            return print_dry_run(job, found, as_json=options.as_json)
        if result is None:
            result = build(job, found, stats, progress=progress)
            # Equalisation may choose other formats for what layers read.
            if options.save_plan is not None and result.plan not in (None, found):
                write_text(options.save_plan, result.plan.to_json())
        assert options.output is not None
        size = result.save(options.output)
        job.journal.remove()
        result.facts = replace(
            result.facts, command=_command_line(), seconds=dict(progress.seconds)
        )
        if options.report is not None:
            result.report(options.report, progress=progress)
    return print_result(job, result, size, as_json=options.as_json)


def _journal_folder(options: _Options) -> Path | None:
    """Where the run keeps what it finishes; what lies there from another run is deleted, except to go on with it."""
    from afpq.journal import Journal

    if options.output is None or options.dry_run:
        return None
    folder = options.output.with_name(f"{options.output.name}.journal")
    if options.resume and not folder.exists():
        note(f"nothing to resume ({folder} does not exist): starting from the beginning")
    if not options.resume and folder.exists():
        Journal.discard(folder)
    return folder


@contextmanager
def _going_on(journal: "Journal") -> Iterator[None]:
    """Says how to go on where a run stops early, and leaves no journal that has nothing in it."""
    try:
        yield
    except BaseException:
        if not journal.steps():
            journal.remove()
        else:
            note(
                f"{journal.folder} keeps what was finished: the same command with --resume goes on"
            )
        raise


def _check_usage(model: Path, options: _Options) -> None:
    """Everything that can be wrong before a file is opened."""
    if options.output is None and not options.dry_run:
        raise click.UsageError("missing option -o OUT.onnx (or --dry-run)")
    given_budgets = _budgets(options)
    if len(given_budgets) > 1:
        raise click.UsageError(f"{' and '.join(given_budgets)} exclude each other")
    if options.plan_file is not None and given_budgets:
        raise click.UsageError(f"--plan already decides the sizes: leave out {given_budgets[0]}")
    if options.max_drop is not None and options.calib is None:
        raise click.UsageError("--max-drop needs --calib")
    if options.plan_file is not None and (options.include or options.exclude or options.overrides):
        raise click.UsageError("--plan already says what every layer gets: edit the plan instead")
    if options.calib is None and (options.preprocess is not None or options.samples is not None):
        raise click.UsageError("--preprocess and --samples need --calib")
    if options.latency is not None and (options.calib is None or options.plan_file is not None):
        raise click.UsageError(
            "--latency chooses formats by --calib, so it needs that and no --plan"
        )
    if options.dry_run and options.latency is not None:
        raise click.UsageError("--dry-run measures nothing, and --latency counts products")
    if options.dry_run and options.resume:
        raise click.UsageError("--dry-run keeps no journal to --resume from")
    if options.dry_run and options.max_drop is not None:
        raise click.UsageError("--dry-run measures nothing, and --max-drop finds its size by that")
    if options.dry_run and options.report is not None:
        raise click.UsageError("--report needs a written model, --dry-run writes none")
    if options.report is not None:
        check_report_suffix(options.report)
    outputs = [options.output, options.save_plan, options.report, options.save_config]
    given = [path.resolve() for path in outputs if path is not None]
    if len(set(given)) < len(given):
        raise click.UsageError("two outputs have the same name")
    sources = [model, options.plan_file, None if options.calib is None else Path(options.calib)]
    for path in outputs:
        if path is not None:
            check_output(path, force=options.force, sources=sources)


def _budgets(options: _Options) -> list[str]:
    """The options that were given of those that decide the size."""
    values = {"--bits": options.bits, "--size": options.size, "--max-drop": options.max_drop}
    return [name for name, value in values.items() if value is not None]


def _say_defaults(job: "Job", options: _Options) -> None:
    if options.plan_file is None and not _budgets(options):
        note(f"budget: {job.budget} (none was given)")
    if options.calib is None and options.plan_file is None:
        note("no --calib: formats follow from weight error alone and nothing is measured on the")
        note("network, so accuracy may drop far more than with samples; check with afpq compare")


def _command_line() -> str:
    return shlex.join(["afpq", *click.get_current_context().obj])
