"""How the command line talks: sizes, tables, JSON on stdout; progress on stderr; no colour off a terminal."""

import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from glob import escape as glob_escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import click
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from afpq.errors import AfpqError, PlanError

if TYPE_CHECKING:
    from afpq.plan import Plan

__all__ = [
    "StageProgress",
    "check_output",
    "check_report_suffix",
    "data_options",
    "format_bytes",
    "format_change",
    "format_ratio",
    "json_option",
    "note",
    "parse_size",
    "print_json",
    "print_line",
    "print_table",
    "read_plan",
    "shorten_names",
    "threads_option",
]

REPORT_SUFFIXES = (".html", ".md", ".json")

_SHOW_AFTER_S = 2.0  # faster stages show nothing on a terminal
_REPEAT_S = 10.0  # off a terminal, a line at most this often inside a stage
_GAP = "  "  # between columns
_NARROWEST_NAME = 16
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}

json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print the result as JSON, and nothing else."
)
threads_option = click.option(
    "-j",
    "--threads",
    type=click.IntRange(min=0),
    default=0,
    metavar="N",
    help="Threads to use; 0 means one a core. Results do not depend on it.",
)


def data_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that say how data is read."""
    limit = click.option(
        "--samples", type=click.IntRange(min=1), metavar="N", help="Use at most N samples."
    )
    preprocess = click.option(
        "--preprocess",
        metavar="SPEC",
        help="How images become inputs: imagenet-torchvision, imagenet-tensorflow, "
        "imagenet-caffe, unit, raw, or resize=256,crop=224,mean=..,std=..",
    )
    return preprocess(limit(command))


def check_output(path: Path, *, force: bool, sources: Iterable[Path | None]) -> None:
    """Refuses an output that cannot be written, before any work.

    Raises:
        UsageError: it is one of the inputs.
        AfpqError: its folder is missing or read-only, it is a folder, or it exists and `force` is not given.
    """
    for source in sources:
        if source is not None and path.exists() and source.exists() and path.samefile(source):
            raise click.UsageError(f"{path} is an input; write to another file")
    folder = path.parent
    if not folder.exists():
        raise AfpqError(f"{path}: the folder {folder} does not exist")
    if not folder.is_dir():
        raise AfpqError(f"{path}: {folder} is not a folder")
    if path.is_dir():
        raise AfpqError(f"{path}: is a folder, not a file to write")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise AfpqError(f"{path}: the folder {folder} is read-only")
    if path.exists() and not force:
        raise AfpqError(f"{path} exists; --force replaces it")


def check_report_suffix(path: Path) -> None:
    """Refuses a report of an unknown kind.

    Raises:
        UsageError: the suffix is not supported.
    """
    if path.suffix not in REPORT_SUFFIXES:
        known = f"{', '.join(REPORT_SUFFIXES[:-1])} and {REPORT_SUFFIXES[-1]}"
        raise click.UsageError(f"report {path}: the supported suffixes are {known}")


def read_plan(path: Path) -> "Plan":
    """Reads a plan file.

    Raises:
        PlanError: it is missing, or no plan; names the file.
    """
    from afpq.plan import Plan

    try:
        return Plan.from_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PlanError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise PlanError(f"{path}: not a text file") from error
    except PlanError as error:
        raise PlanError(f"{path}: {error}") from error


def parse_size(text: str) -> int:
    """Reads `1500000`, `1.5MB`, `800k`, `3MiB` as bytes.

    Raises:
        ValueError: the text is not a positive size.
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([kmg]i?)?b?\s*", text.lower())
    size = int(float(match.group(1)) * _UNITS[match.group(2) or ""]) if match else 0
    if size < 1:
        raise ValueError(f"{text!r} is not a size; write 1500000, 1.5MB or 3MiB")
    return size


def format_bytes(size: int) -> str:
    """`13,970,236 bytes (13.97 MB)`."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= factor:
            return f"{size:,} bytes ({size / factor:.2f} {unit})"
    return f"{size} bytes"


def format_change(before: int, after: int) -> str:
    """`13,970,236 -> 2,253,966 bytes, 6.20x smaller`."""
    return f"{before:,} -> {after:,} bytes, {format_ratio(before, after)}"


def format_ratio(before: int, after: int) -> str:
    """`5.9x smaller`."""
    if after == before:
        return "the same size"
    if after <= before:
        return f"{before / max(after, 1):.2f}x smaller"
    return f"{after / max(before, 1):.2f}x LARGER"


def print_line(text: str = "") -> None:
    """One line of the result."""
    print(text)


def note(text: str) -> None:
    """One line that is not the result: stderr."""
    print(text, file=sys.stderr, flush=True)


def print_json(value: object) -> None:
    """The whole result for a machine."""
    print(json.dumps(value, indent=2, sort_keys=False, allow_nan=False, default=str))


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> None:
    """A plain table: the first `left` columns are texts, the others numbers set to the right.

    On a terminal, names in the first column that do not fit are shortened to globs that match nothing else; piped,
    nothing is cut.
    """
    widths = [max(map(len, cells)) for cells in zip(columns, *rows, strict=True)]
    if sys.stdout.isatty():
        rest = sum(width + len(_GAP) for width in widths[1:])
        room = max(shutil.get_terminal_size().columns - rest, _NARROWEST_NAME)
        if widths[0] > room:
            short = shorten_names([row[0] for row in rows], room)
            rows = [(name, *row[1:]) for name, row in zip(short, rows, strict=True)]
            widths[0] = max(map(len, [columns[0], *short]))
    for number, row in enumerate((columns, *rows)):
        cells = [
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        line = _GAP.join(cells).rstrip()
        click.echo(click.style(line, bold=True) if number == 0 else line)


def shorten_names(names: Sequence[str], width: int) -> list[str]:
    """Names of at most `width` characters: `*` in place of the middle, where that still matches one name only."""
    return [name if len(name) <= width else _shorten(name, names, width) for name in names]


def _shorten(name: str, names: Sequence[str], width: int) -> str:
    for head in range(width // 3, -1, -1):
        tail = width - 1 - head
        glob = f"{glob_escape(name[:head])}*{glob_escape(name[len(name) - tail :])}"
        if len(glob) <= width and {n for n in names if fnmatchcase(n, glob)} == {name}:
            return glob
    return name


class StageProgress:
    """Stages of one command: `progress("calibrate", done, total)`, any number of times, `done == total` at the end.

    On a terminal a bar appears once a stage takes longer than two seconds and a line stays when it ends; otherwise
    one line a stage, and one every ten seconds inside long ones.
    """

    def __init__(self, *, stream: TextIO | None = None) -> None:
        self.stream = sys.stderr if stream is None else stream
        self.terminal = self.stream.isatty() and os.environ.get("TERM") != "dumb"
        self.stage = ""
        self.started = self.printed = time.monotonic()
        self.bar: Progress | None = None
        self.task: TaskID | None = None
        self.seconds: dict[str, float] = {}

    def __enter__(self) -> "StageProgress":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __call__(self, stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        if stage != self.stage:
            self.close()
            self.stage, self.started, self.printed = stage, now, now
        elapsed = now - self.started
        if done >= total:
            self._finish(elapsed, total)
        elif self.terminal and elapsed > _SHOW_AFTER_S:
            self._draw(done, total)
        elif not self.terminal and now - self.printed > _REPEAT_S:
            self.printed = now
            left = elapsed * (total - done) / max(done, 1)
            self._line(f"{stage}: {done} of {total}, {elapsed:.0f} s, about {left:.0f} s left")

    def close(self) -> None:
        """Removes the bar."""
        if self.bar is not None:
            self.bar.stop()
        self.bar, self.task, self.stage = None, None, ""

    def _finish(self, elapsed: float, total: int) -> None:
        stage = self.stage
        self.close()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + elapsed
        if not self.terminal or elapsed > _SHOW_AFTER_S:
            count = f" {total}" if total > 1 else ""
            self._line(f"{stage}:{count} done in {elapsed:.1f} s")

    def _draw(self, done: int, total: int) -> None:
        if self.bar is None:
            console = Console(file=self.stream, highlight=False)
            self.bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                console=console,
                transient=True,
            )
            self.bar.start()
            self.task = self.bar.add_task(self.stage, total=total)
        assert self.task is not None
        self.bar.update(self.task, completed=done, total=total)

    def _line(self, text: str) -> None:
        print(text, file=self.stream, flush=True)
