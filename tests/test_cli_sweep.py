"""The command that sweeps: what it prints and writes, and what it refuses."""

import errno
import json
import os
from pathlib import Path

import pytest
from commands import error_of, names, run


def test_a_sweep_prints_and_writes_what_it_finds(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outputs = [tmp_path / f"s{suffix}" for suffix in (".md", ".svg", ".json")]
    written = [word for path in outputs for word in ("-o", path)]

    code = run(
        *("sweep", models / "lenet5_digits.onnx", "--data", models / "digits_evaluation.npz"),
        *("--samples", 40, "--formats", "e4m3,e3m0", "-j", 1, *written),
    )

    captured = capsys.readouterr()
    assert code == 0
    assert "top-1 over 40 samples" in captured.out
    assert "e3m0 without a mantissa: weights only" in captured.err
    found = json.loads(outputs[2].read_text())
    kinds = [(curve["subject"], curve["format"]) for curve in found["curves"]]
    assert kinds == [("weights", "e4m3"), ("weights", "e3m0"), ("activations", "e4m3")]
    text = outputs[0].read_text()
    for curve in found["curves"]:
        first, last = curve["plateau"]
        assert f"| {first}..{last} | {last - first + 1} |" in text
    assert "](s.svg)" in text
    assert outputs[1].read_text().startswith("<svg ")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--formats", "e4m3", "--bits", 8), 2, "give --formats or --bits, not both"),
        (("--formats", "e9m9"), 2, "exponent_bits 9 is not in the range"),
        (("--formats", "ue2m5"), 1, "ue2m5 is unsigned"),
        (("-o", "s.png"), 2, "the supported suffixes are .svg, .md and .json"),
        (("--what", "activations", "--formats", "e3m0"), 2, "no format to sweep (e3m0)"),
    ],
)
def test_a_wrong_sweep_is_refused(
    arguments: tuple[object, ...],
    code: int,
    message: str,
    models: Path,
    calibration: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ("sweep", models / "lenet5_digits.onnx", "--data", calibration, *arguments)

    assert run(*arguments) == code
    assert message in error_of(capsys)


def test_a_sweep_leaves_no_half_of_a_file(
    models: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    data = models / "digits_evaluation.npz"

    code = run(
        *("sweep", models / "lenet5_digits.onnx", "--data", data, "--samples", 8),
        *("--formats", "e3m0", "-o", tmp_path / "s.svg", "-j", 1),
    )

    assert code == 1
    assert "No space left" in error_of(capsys)
    assert names(tmp_path) == []
