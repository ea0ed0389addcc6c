"""How tests call the command line, and what they look at afterwards."""

from pathlib import Path

import pytest

from afpq.cli import main


def run(*arguments: object) -> int:
    return main([str(a) for a in arguments])


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr that says what is wrong."""
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, captured.err
    assert "Traceback" not in captured.err and captured.out == ""
    return lines[0]


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())
