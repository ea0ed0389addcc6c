"""`afpq quantize --dry-run`: exact bytes, nothing measured, nothing written."""

import json
import sys
from pathlib import Path

import pytest
from commands import names, run


def test_dry_run_writes_nothing_and_is_exact(
    lenet: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = lenet.with_name("out.onnx")

    assert run("quantize", lenet, "--dry-run", "--bits", 4) == 0
    planned = capsys.readouterr().out.splitlines()[-1]
    assert names(lenet.parent) == ["lenet.onnx"]

    assert run("quantize", lenet, "-o", out, "--bits", 4) == 0
    written = capsys.readouterr().out.splitlines()[-1]
    assert planned.split(": ")[1] == written.split(": ")[1]


def test_dry_run_measures_nothing(
    lenet: Path,
    calibration: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def calibrate(*_: object, **__: object) -> None:
        raise AssertionError("samples were run")

    monkeypatch.setattr(sys.modules["afpq.quantize"], "calibrate", calibrate)
    assert run("quantize", lenet, "--dry-run", "--bits", 4, "--calib", calibration) == 0

    text = capsys.readouterr().out
    assert "measuring on --calib will move bits" in text
    assert text.splitlines()[-2] == "dry run: nothing measured, nothing written"


def test_dry_run_still_checks_its_inputs(lenet: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("quantize", lenet, "--dry-run", "--calib", "absent.npz") == 1
    assert "absent.npz does not exist" in capsys.readouterr().err


def test_dry_run_as_json(lenet: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("quantize", lenet, "--dry-run", "--json") == 0

    result = json.loads(capsys.readouterr().out)
    assert result["dry_run"] is True and len(result["plan"]["entries"]) == 5
