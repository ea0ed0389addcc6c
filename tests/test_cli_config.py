"""`--config` and `--save-config`: a file says what the command line says, and what it cannot say is refused."""

from pathlib import Path

import pytest
from commands import error_of, names, run


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return tmp_path / "run.toml"


def test_a_saved_call_is_repeated(
    lenet: Path, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, again = tmp_path / "first.onnx", tmp_path / "again.onnx"
    options = ["--size", "60k", "--layer", "/3/*=e2m1", "--exclude", "/0/*", "--bias", "integer"]

    assert run("quantize", lenet, "-o", first, *options, "--save-config", config, "-j", 1) == 0
    text = config.read_text()
    assert run("quantize", "--config", config, "-o", again) == 0

    assert text == (
        f'model = "{lenet}"\noutput = "{first}"\nsize = 60000\nbias = "integer"\n'
        'exclude = ["/0/*"]\nlayer = ["/3/*=e2m1"]\nthreads = 1\n'
    )
    assert again.read_bytes() == first.read_bytes()


def test_the_command_line_comes_first(
    lenet: Path, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config.write_text("bits = 3\nactivations = 'a8'\nbn-recal = false\n")
    saved = config.with_name("saved.toml")

    assert run("quantize", lenet, "--config", config, "--bits", 6, "--dry-run", "--json",
               "--save-config", saved) == 0  # fmt: skip

    assert saved.read_text() == (
        f'model = "{lenet}"\nbits = 6.0\nactivations = "a8"\nbn-recal = false\n'
    )
    assert '"budget": "6 bits per weight"' in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bit = 3", "no option is called 'bit'; did you mean bits?"),
        ("force = true", "no option is called 'force'"),
        ("bits = [3]", "bits takes a text or a number, not [3]"),
        ("bits = true", "bits takes a text or a number, not true"),
        ("bn-recal = 'no'", 'bn-recal takes true or false, not "no"'),
        ("exclude = '/fc/*'", 'exclude takes a list of texts, not "/fc/*"'),
        ("bits = 9", "9.0 is not in the range"),
        ("bits: 3", "not a TOML file"),
    ],
)
def test_what_the_command_line_cannot_say_is_refused(
    text: str, message: str, lenet: Path, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config.write_text(text)

    assert run("quantize", lenet, "--config", config, "-o", config.with_name("out.onnx")) == 2

    assert message.lower() in error_of(capsys).lower()
    assert names(config.parent) == ["run.toml", "work"]


def test_a_missing_file_is_named(lenet: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("quantize", lenet, "--config", "absent.toml", "--dry-run") == 2
    assert "absent.toml: cannot be read" in error_of(capsys)
