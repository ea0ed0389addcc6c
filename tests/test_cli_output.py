"""What commands print: sizes, names that fit, progress on a terminal."""

import io
from fnmatch import fnmatchcase

import pytest

from afpq._cli_output import StageProgress, format_bytes, format_change, parse_size, shorten_names


@pytest.mark.parametrize(
    ("text", "size"),
    [("1500000", 1_500_000), ("1.5MB", 1_500_000), ("800k", 800_000), ("3MiB", 3 * 2**20)],
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "MB", "-3", "0", "1.5XB", "nan"])
def test_wrong_sizes_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size"):
        parse_size(text)


def test_sizes_are_written() -> None:
    assert format_bytes(999) == "999 bytes"
    assert format_bytes(13_970_236) == "13,970,236 bytes (13.97 MB)"
    assert format_change(600, 100) == "600 -> 100 bytes, 6.00x smaller"
    assert format_change(100, 150) == "100 -> 150 bytes, 1.50x LARGER"


def test_long_names_become_globs_that_match_nothing_else() -> None:
    names = [f"/encoder/layer.{i}/attention/{part}/MatMul" for i in (1, 2, 11) for part in "qkv"]

    short = shorten_names([*names, "conv"], 24)

    assert short[-1] == "conv"
    for name, glob in zip(names, short, strict=False):
        assert len(glob) <= 24 and fnmatchcase(name, glob)
        assert sum(fnmatchcase(other, glob) for other in names) == 1


def test_names_that_cannot_be_shortened_stay_whole() -> None:
    names = ["a" * 30 + "x" + "b" * 30, "a" * 30 + "y" + "b" * 30]

    assert shorten_names(names, 20) == names


class Terminal:
    """A stream that says it is a terminal."""

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> int:
        self.text += text
        return len(text)

    def flush(self) -> None:
        pass

    def isatty(self) -> bool:
        return True


def test_fast_stages_show_nothing_on_a_terminal() -> None:
    stream = Terminal()
    with StageProgress(stream=stream) as progress:  # type: ignore[arg-type]
        progress("calibrate", 1, 2)
        progress("calibrate", 2, 2)

    assert stream.text == ""
    assert set(progress.seconds) == {"calibrate"}


def test_slow_stages_draw_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("afpq._cli_output._SHOW_AFTER_S", -1.0)
    stream = Terminal()
    with StageProgress(stream=stream) as progress:  # type: ignore[arg-type]
        progress("calibrate", 1, 2)
        progress("calibrate", 2, 2)

    assert "calibrate" in stream.text and "1/2" in stream.text
    assert "calibrate: 2 done in" in stream.text


def test_long_stages_say_how_long_off_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 13.0, 21.0])
    monkeypatch.setattr("afpq._cli_output.time.monotonic", lambda: next(clock))
    stream = io.StringIO()
    progress = StageProgress(stream=stream)
    progress("calibrate", 1, 8)
    progress("calibrate", 4, 8)

    assert stream.getvalue() == "calibrate: 4 of 8, 12 s, about 12 s left\n"
