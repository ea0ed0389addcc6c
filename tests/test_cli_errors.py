"""The command line on what is wrong: one-line errors, exit codes, nothing half-written."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from commands import error_of, names, run

import afpq


def test_unreadable_models(lenet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.onnx"
    (tmp_path / "cut.onnx").write_bytes(lenet.read_bytes()[:5000])
    (tmp_path / "text.onnx").write_text("hello")
    expected = {
        "cut.onnx": "not an ONNX model, or cut short",
        "text.onnx": "not an ONNX model, or cut short",
        "none.onnx": "no such file",
        "work": "is a directory",
    }
    for name, message in expected.items():
        for command in (("quantize", tmp_path / name, "-o", out), ("inspect", tmp_path / name)):
            assert run(*command) == 1
            line = error_of(capsys)
            assert message in line and name in line
    assert not out.exists()


def test_weights_with_nan(lenet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = onnx.load(lenet)
    values = onnx.numpy_helper.to_array(model.graph.initializer[0]).copy()
    values.flat[0] = np.nan
    name = model.graph.initializer[0].name
    model.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(values, name))
    onnx.save(model, tmp_path / "nan.onnx")

    assert run("quantize", tmp_path / "nan.onnx", "-o", tmp_path / "out.onnx") == 1

    assert "NaN" in error_of(capsys)
    assert not (tmp_path / "out.onnx").exists()


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"picture": np.zeros((9, 1, 28, 28), np.float32)}, ("picture", "input")),
        ({"input": np.zeros((9, 3, 28, 28), np.float32)}, ("input", "3")),
        ({"input": np.zeros((9, 28), np.float32)}, ("input",)),
        ({"input": np.zeros((0, 1, 28, 28), np.float32)}, ("0 samples",)),
    ],
    ids=["name", "shape", "rank", "empty"],
)
def test_data_that_does_not_fit(
    lenet: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arrays: dict[str, Any],
    words: tuple[str, ...],
) -> None:
    np.savez(tmp_path / "data.npz", **arrays)

    code = run("quantize", lenet, "-o", tmp_path / "out.onnx", "--calib", tmp_path / "data.npz")

    assert code == 1
    line = error_of(capsys)
    assert all(word in line for word in words)
    assert not (tmp_path / "out.onnx").exists()


def test_empty_image_folder(
    lenet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "images").mkdir()
    options = ("--calib", tmp_path / "images", "--preprocess", "unit")

    assert run("quantize", lenet, "-o", tmp_path / "out.onnx", *options) == 1

    assert "has no images" in error_of(capsys)


@pytest.mark.parametrize("option", ["--include", "--exclude", "--layer"])
def test_a_glob_that_matches_nothing(
    lenet: Path, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    value = "/7/Gem=e2m1" if option == "--layer" else "/7/Gem"

    assert run("quantize", lenet, "-o", lenet.with_name("out.onnx"), option, value) == 1

    line = error_of(capsys)
    assert f"{option} '/7/Gem' matches no layer" in line and "nearest: /7/Gemm" in line


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--bits", "1"), 2, "1.0 is not in the range"),
        (("--bits", "2"), 1, "is impossible"),
        (("--size", "5kB"), 1, "a file of 5,000 bytes is impossible"),
        (("--size", "many"), 2, "'many' is not a size"),
        (("--bits", "4", "--size", "1MB"), 2, "--bits and --size exclude each other"),
        (("--layer", "x=e9m9"), 2, "e9m9"),
        (("--layer", "x"), 2, "is not GLOB=FORMAT"),
        (("--report", "r.pdf"), 2, "the supported suffixes are .html, .md and .json"),
        (("--preprocess", "unit"), 2, "need --calib"),
        (("--plan", "none.json"), 1, "none.json"),
        (("--plan", "p.json", "--bits", "4"), 2, "--plan already decides"),
        (("--dry-run", "--report", "r.md"), 2, "--dry-run writes none"),
        (("--dry-run", "--max-drop", "1", "--calib", "c.npz"), 2, "--dry-run measures nothing"),
        (("--activations", "a4"), 2, "a4"),
        (("--max-drop", "1"), 2, "--max-drop needs --calib"),
        (("--max-drop", "1", "--bits", "4"), 2, "--bits and --max-drop exclude each other"),
        (("--max-drop", "1", "--plan", "p.json"), 2, "leave out --max-drop"),
    ],
)
def test_wrong_options(
    lenet: Path,
    capsys: pytest.CaptureFixture[str],
    options: tuple[str, ...],
    code: int,
    message: str,
) -> None:
    assert run("quantize", lenet, "-o", lenet.with_name("out.onnx"), *options) == code

    assert message in error_of(capsys)
    assert names(lenet.parent) == ["lenet.onnx"]


@pytest.mark.parametrize("arguments", [("frobnicate",), ("quantize",), ("compare", "a", "b")])
def test_usage_errors(capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]) -> None:
    assert run(*arguments) == 2

    assert "--help)" in error_of(capsys)


def test_outputs_that_cannot_be_written(
    lenet: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = lenet.read_bytes()
    cases = {
        lenet.parent / "none" / "out.onnx": (1, "does not exist"),
        lenet / "out.onnx": (1, "is not a folder"),
        lenet.parent: (1, "is a folder"),
    }
    for path, (code, message) in cases.items():
        assert run("quantize", lenet, "-o", path, "--force") == code
        assert message in error_of(capsys)
    assert run("quantize", lenet, "-o", lenet, "--force") == 2
    assert "is an input" in error_of(capsys)
    monkeypatch.setattr(os, "access", lambda _, mode: not mode & os.W_OK)
    assert run("quantize", lenet, "-o", lenet.with_name("out.onnx")) == 1
    assert "is read-only" in error_of(capsys)
    assert lenet.read_bytes() == before and names(lenet.parent) == ["lenet.onnx"]


def test_existing_outputs_need_force(lenet: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = lenet.with_name("out.onnx")
    out.write_bytes(b"precious")

    assert run("quantize", lenet, "-o", out) == 1
    assert "--force replaces it" in error_of(capsys)
    assert out.read_bytes() == b"precious"

    assert run("quantize", lenet, "-o", out, "--force") == 0
    assert out.stat().st_size > 1000


def test_full_disk(
    lenet: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)

    assert run("quantize", lenet, "-o", lenet.with_name("out.onnx")) == 1

    assert "No space left" in error_of(capsys)
    assert names(lenet.parent) == ["lenet.onnx"]


def test_a_disk_that_is_full_in_the_end_loses_no_work(
    lenet: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = lenet.with_name("out.onnx")

    def full(source: Path, target: Path) -> None:
        if target == out:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        rename(source, target)

    rename = os.rename
    monkeypatch.setattr(os, "replace", full)
    assert run("quantize", lenet, "-o", out) == 1

    err = capsys.readouterr().err
    assert "No space left" in err and "with --resume goes on" in err
    assert names(lenet.parent) == ["lenet.onnx", "out.onnx.journal"]

    monkeypatch.undo()
    assert run("quantize", lenet, "-o", out, "--resume") == 0
    assert names(lenet.parent) == ["lenet.onnx", "out.onnx"]


def test_packed_models_are_not_quantized_again(
    packed_lenet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("quantize", packed_lenet, "-o", tmp_path / "out.onnx") == 1

    assert "already quantized" in error_of(capsys)


def test_a_plan_of_another_model_is_not_reported(
    lenet: Path, packed_lenet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = tmp_path / "p.json"
    assert run("quantize", lenet, "--dry-run", "--bits", 6, "--save-plan", plan, "--json") == 0
    capsys.readouterr()

    assert run("report", packed_lenet, "-o", tmp_path / "r.md", "--plan", plan) == 1

    assert "p.json: not the plan that" in error_of(capsys)


SLOW_DATA = """
import time
from pathlib import Path
import numpy as np

def samples():
    for number in range(64):
        yield {"input": np.zeros((1, 1, 28, 28), np.float32)}
        if number > 8:
            Path("started").touch()
            time.sleep(0.2)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT")
def test_control_c_stops_cleanly(lenet: Path) -> None:
    folder = lenet.parent
    (folder / "slow.py").write_text(SLOW_DATA)
    environment = {**os.environ, "PYTHONPATH": str(Path(afpq.__file__).parents[1])}
    command = [sys.executable, "-m", "afpq", "quantize", "lenet.onnx", "-o", "out.onnx"]
    with subprocess.Popen(
        [*command, "--calib", "slow:samples"],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background jobs, which tests may be, ignore the signal, and their children do.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        deadline = time.monotonic() + 60
        while not (folder / "started").exists() and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)

    assert process.returncode == 130, err
    assert out == "" and err.splitlines()[-1] == "interrupted"
    assert "Traceback" not in err
    assert "out.onnx" not in names(folder) and not [n for n in names(folder) if n[0] == "."]


@pytest.mark.skipif(sys.platform == "win32", reason="needs a POSIX shell")
def test_a_closed_pipe_is_no_traceback() -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(afpq.__file__).parents[1])}
    command = f"'{sys.executable}' -m afpq formats --json | head -1"

    done = subprocess.run(
        ["sh", "-c", command], capture_output=True, text=True, env=environment, timeout=60
    )

    assert done.stdout == "[\n" and done.stderr == ""
