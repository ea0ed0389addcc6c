"""The command that exports: what it prints and writes, and what it refuses."""

import json
from pathlib import Path

import onnx
import pytest
from commands import error_of, names, run

import afpq


@pytest.fixture
def packed(models: Path, tmp_path: Path) -> Path:
    """LeNet-5 with a format for each way of being stored, in a folder of its own."""
    formats = {"*": "e2m3", "/0/*": "e3m4"}
    path = tmp_path / "packed.onnx"
    afpq.quantize(models / "lenet5_digits.onnx", bits=8, overrides=formats).save(path)
    return path


def test_an_export_prints_its_layers_and_says_that_it_ran(
    packed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = packed.with_name("float.onnx")

    assert run("export", packed, "--to", "float", "-o", out) == 0

    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["layer", "format", "type", "weights", "packed", "bytes"]
    layers = [line.split() for line in lines[1:6]]
    assert {layer[2] for layer in layers} == {"float32"}
    total = lines[6].split()
    assert total[:5] == ["total", "5", "of", "5", "exact"]
    assert int(total[5].replace(",", "")) == sum(int(x[4].replace(",", "")) for x in layers)
    assert int(total[6].replace(",", "")) == sum(int(x[5].replace(",", "")) for x in layers)
    assert "tensors: 5 float32" in lines
    assert "the file loads in onnxruntime and ran once: on made-up inputs" in lines
    assert lines[-1].startswith(f"{out}: {out.stat().st_size:,} bytes")
    assert f"the packed file has {packed.stat().st_size:,}" in lines[-1]


def test_nearest_types_are_reported_with_their_error(
    packed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = packed.with_name("qdq.onnx")
    command = ("export", packed, "--to", "qdq", "-o", out)

    assert run(*command) == 1
    message = error_of(capsys)
    assert "no standard type holds all values of layer '/0/Conv' (e3m4)" in message
    assert not out.exists()

    assert run(*command, "--inexact", "nearest") == 0
    text = capsys.readouterr().out
    assert "4 of 5 exact" in text and " dB" in text
    assert "tensors: 5 int8" in text


def test_an_export_that_is_not_run_here_says_so(
    packed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = packed.with_name("qonnx.onnx")

    assert run("export", packed, "--to", "qonnx", "-o", out) == 0

    text = capsys.readouterr().out
    assert "checked by onnx and not run: onnxruntime has no operators of qonnx" in text
    operators = [n.op_type for n in onnx.load(out).graph.node if n.domain.startswith("qonnx")]
    assert operators == ["FloatQuant"] * 5


def test_json_has_every_layer(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = packed.with_name("qdq.onnx")

    code = run("export", packed, "--to", "qdq", "-o", out, "--inexact", "nearest", "--json")

    result = json.loads(capsys.readouterr().out)
    assert code == 0
    assert (result["to"], result["path"]) == ("qdq", str(out))
    assert result["output_bytes"] == out.stat().st_size
    assert result["source_bytes"] == packed.stat().st_size
    assert [layer["exact"] for layer in result["layers"]] == [False, True, True, True, True]
    assert {layer["type"] for layer in result["layers"]} == {"int8"}
    assert result["checks"]["loaded"] is True


def test_static_activation_formats_are_named_as_left_out(
    models: Path, tmp_path: Path, calibration: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "packed.onnx"
    model = models / "lenet5_digits.onnx"
    afpq.quantize(model, data=calibration, samples=16, bits=6, mode="quick", activations="a8").save(
        path
    )

    assert run("export", path, "--to", "float", "-o", tmp_path / "f.onnx") == 0

    assert "rounding of activations is not part of the export" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("-o", "o.onnx"), 2, "missing option '--to'"),
        (("--to", "onnx", "-o", "o.onnx"), 2, "'onnx' is not one of"),
        (("--to", "float"), 2, "missing option '-o'"),
        (("--to", "float", "-o", "o.onnx", "--inexact", "nearest"), 2, "--inexact is for --to qdq"),
        (("--to", "float", "-o", "none/o.onnx"), 1, "the folder none does not exist"),
        (("--to", "float", "-o", "packed.onnx"), 2, "packed.onnx is an input"),
        (("--to", "float", "-o", "there.onnx"), 1, "there.onnx exists; --force replaces it"),
    ],
)
def test_a_wrong_export_is_refused(
    arguments: tuple[str, ...],
    code: int,
    message: str,
    packed: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(packed.parent)
    Path("there.onnx").write_text("old")
    before = names(packed.parent)

    assert run("export", "packed.onnx", *arguments) == code

    assert message in error_of(capsys)
    assert names(packed.parent) == before and Path("there.onnx").read_text() == "old"


def test_a_float_model_is_not_exported(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = models / "lenet5_digits.onnx"
    assert run("export", model, "--to", "float", "-o", tmp_path / "o.onnx") == 1
    assert "not a packed model" in error_of(capsys)
    assert names(tmp_path) == []
