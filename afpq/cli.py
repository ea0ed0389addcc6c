"""The command `afpq`: results on stdout, progress and errors on stderr.

Exit codes: 0 done, 1 failed, 2 wrong usage, 3 goal missed (the best was written), 130 interrupted. A failure is one
line `error: ...`; only bugs show a traceback.
"""

import os
import sys
from collections.abc import Sequence

import click

from afpq import (
    _cli_completion,
    _cli_diff,
    _cli_export,
    _cli_inspect,
    _cli_look,
    _cli_measure,
    _cli_quantize,
    _cli_report,
    _cli_sweep,
)
from afpq._cli_output import note
from afpq.errors import AfpqError

__all__ = ["main"]

_EXAMPLES = """\b
Examples:
  afpq quantize model.onnx -o small.onnx --bits 5 --calib images/ \\
       --preprocess imagenet-torchvision
  afpq inspect model.onnx
  afpq compare model.onnx small.onnx --data test.npz
  afpq bench model.onnx small.onnx
"""


@click.group(
    epilog=_EXAMPLES,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 80},
)
@click.option("--version", is_flag=True, help="Show the version and exit.")
@click.pass_context
def afpq(context: click.Context, version: bool) -> None:
    """Small floats of its own for every layer: ONNX models of 2 to 8 bits a weight.

    The packed model runs in onnxruntime with afpq's custom-op library.
    """
    if version:
        from afpq import __version__

        click.echo(f"afpq {__version__}")
        context.exit(0)
    if context.invoked_subcommand is None:
        click.echo(context.get_help())
        context.exit(0)


for _command in (
    _cli_quantize.quantize,
    _cli_inspect.inspect,
    _cli_diff.diff,
    _cli_measure.compare,
    _cli_measure.bench,
    _cli_report.report,
    _cli_export.export,
    _cli_sweep.sweep,
    _cli_look.formats,
    _cli_look.verify,
    _cli_look.doctor,
    _cli_completion.completion,
):
    afpq.add_command(_command)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line (without the program's name; `sys.argv` if None) and returns the exit code.

    >>> main(["--version"])  # doctest: +ELLIPSIS
    afpq ...
    0
    """
    try:
        arguments = sys.argv[1:] if argv is None else list(argv)
        code = afpq.main(arguments, "afpq", standalone_mode=False, obj=arguments)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except click.UsageError as error:
        hint = "" if error.ctx is None else f" (see {error.ctx.command_path} --help)"
        note(f"error: {_lowered(_one_line(error.format_message()))}{hint}")
        return 2
    except (click.Abort, KeyboardInterrupt):
        note("interrupted")
        return 130
    except BrokenPipeError:  # the reader of a pipe went away, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except AfpqError as error:
        note(f"error: {_one_line(str(error))}")
    except OSError as error:
        name = f"{error.filename}: " if error.filename else ""
        note(f"error: {name}{error.strerror or error}")
    except MemoryError:
        note("error: out of memory")
    return 1


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _lowered(text: str) -> str:
    """Messages of click in the style of the others: no capital, no full stop."""
    return text[:1].lower() + text[1:].removesuffix(".")
