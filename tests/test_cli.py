"""The command line as a user meets it: results, exit codes, one-line errors, nothing half-written."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import afpq
from afpq._cli_output import StageProgress, format_bytes, format_change, parse_size, shorten_names
from afpq.cli import main

COMMANDS = [
    "bench",
    "compare",
    "doctor",
    "formats",
    "inspect",
    "quantize",
    "report",
    "sweep",
    "verify",
]


@pytest.fixture
def lenet(models: Path, tmp_path: Path) -> Path:
    """A float model in a folder of its own, to see what else appears there."""
    folder = tmp_path / "work"
    folder.mkdir()
    return Path(shutil.copy(models / "lenet5_digits.onnx", folder / "lenet.onnx"))


@pytest.fixture
def calibration(models: Path) -> Path:
    return models / "digits_calibration.npz"


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


# Results


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0

    text = capsys.readouterr().out
    assert [c for c in COMMANDS if f"\n  {c}" in text] == COMMANDS
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_of_80_columns(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(command, "-h") == 0

    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


def test_version_and_no_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--version") == 0
    assert capsys.readouterr().out == f"afpq {afpq.__version__}\n"
    assert run() == 0
    assert capsys.readouterr().out.startswith("Usage: afpq")


def test_quantize_writes_and_states_the_bytes(
    lenet: Path, calibration: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = lenet.with_name("out.onnx")

    code = run("quantize", lenet, "-o", out, "--calib", calibration, "--samples", 32, "--bits", 4)

    captured = capsys.readouterr()
    before, after = lenet.stat().st_size, out.stat().st_size
    assert code == 0
    last = captured.out.splitlines()[-1]
    assert last == f"{out}: {before:,} -> {after:,} bytes, {before / after:.2f}x smaller"
    assert "kept " in captured.out and "bias correction" in captured.out
    assert "restoring statistics: held-out loss " in captured.out
    assert "agreement" in captured.out
    assert "\x1b" not in captured.out + captured.err
    assert "calibrate: 24 done" in captured.err
    assert names(lenet.parent) == ["lenet.onnx", "out.onnx"]


def test_json_is_all_there_is_on_stdout(lenet: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = lenet.with_name("out.onnx")

    assert run("quantize", lenet, "-o", out, "--json") == 0

    result = json.loads(capsys.readouterr().out)
    assert result["size"]["output_bytes"] == out.stat().st_size
    assert result["goal_met"] is True
    assert result["command"].startswith("afpq ")


def test_defaults_are_stated(lenet: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("quantize", lenet, "-o", lenet.with_name("out.onnx")) == 0

    text = capsys.readouterr().err
    assert "budget: 5 bits per weight (none was given)" in text
    assert "no --calib: formats follow from weight error alone" in text


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


def test_dry_run_as_json(lenet: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("quantize", lenet, "--dry-run", "--json") == 0

    result = json.loads(capsys.readouterr().out)
    assert result["dry_run"] is True and len(result["plan"]["entries"]) == 5


def test_a_saved_plan_gives_the_same_file(lenet: Path) -> None:
    plan, one, two = (lenet.with_name(n) for n in ("p.json", "one.onnx", "two.onnx"))

    assert run("quantize", lenet, "-o", one, "--bits", 4.5, "--save-plan", plan) == 0
    assert run("quantize", lenet, "-o", two, "--plan", plan, "-j", 1) == 0

    assert one.read_bytes() == two.read_bytes()


def test_size_is_a_limit_for_the_file(lenet: Path) -> None:
    out = lenet.with_name("out.onnx")

    assert run("quantize", lenet, "-o", out, "--size", "40kB") == 0

    assert out.stat().st_size <= 40_000


def test_a_missed_goal_has_its_own_exit_code(
    lenet: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = lenet.with_name("out.onnx")
    # More room than there is: the file gets larger than asked for.
    monkeypatch.setattr(sys.modules["afpq._build"], "_rest_bytes", lambda *_: 0)

    assert run("quantize", lenet, "-o", out, "--size", 30_000) == 3

    assert "error: goal missed: " in capsys.readouterr().err
    assert out.exists()


def test_a_drop_is_kept_and_stated_with_its_uncertainty(
    lenet: Path, calibration: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, report = lenet.with_name("out.onnx"), lenet.with_name("r.md")
    options = ("--calib", calibration, "--samples", 64, "--mode", "quick", "--max-drop", 5)

    assert run("quantize", lenet, "-o", out, "--report", report, *options) == 0

    text = capsys.readouterr()
    assert "goal: at most 5 %; " in text.out and "points of top-1 lost (95%: " in text.out
    assert "16 held-out rows cannot exclude a larger drop" in text.err
    assert "## Goal" in report.read_text()
    assert run("quantize", lenet, "--dry-run", "--json", *options) == 0
    assert json.loads(capsys.readouterr().out)["goal"]["met"] is True


def test_a_missed_drop_has_the_exit_code_of_a_missed_goal(
    lenet: Path, calibration: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with np.load(calibration) as arrays:
        np.savez(tmp_path / "unlabelled.npz", input=arrays["input"])
    out = lenet.with_name("out.onnx")
    options = (
        "--samples",
        200,
        "--mode",
        "quick",
        "--no-bn-recal",
        "--max-drop",
        0,
        "--layer",
        "*=e0m1",
    )

    code = run("quantize", lenet, "-o", out, "--calib", tmp_path / "unlabelled.npz", *options)

    assert code == 3 and out.exists()
    assert "goal missed: " in capsys.readouterr().err


@pytest.mark.parametrize("suffix", ["md", "json"])
def test_reports_are_written_beside_the_model(lenet: Path, suffix: str) -> None:
    report = lenet.with_name(f"r.{suffix}")

    assert run("quantize", lenet, "-o", lenet.with_name("out.onnx"), "--report", report) == 0

    assert "out.onnx" in report.read_text()


def test_layer_options_are_obeyed(lenet: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = lenet.with_name("out.onnx")

    options = ["--layer", "*/Conv=e2m4", "--exclude", "/7/*", "--activations", "a8"]
    assert run("quantize", lenet, "-o", out, *options, "--bias", "integer", "--json") == 0

    layers = {e["name"]: e for e in json.loads(capsys.readouterr().out)["layers"]}
    assert layers["/0/Conv"]["format"] == layers["/3/Conv"]["format"] == "e2m4"
    assert "/7/Gemm" not in layers
    assert {(e["kind"], e["activations"]) for e in layers.values()} == {("integer", "a8")}


def test_inspect_shows_names_to_use_in_globs(
    lenet: Path, packed_lenet: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("inspect", lenet) == 0
    text = capsys.readouterr().out
    assert "/7/Gemm" in text and "input: float32 [batch, 1, 28, 28]" in text

    assert run("inspect", packed_lenet) == 0
    text = capsys.readouterr().out
    assert "/7/Gemm" in text and "bits per weight" in text
    assert text.splitlines()[-1].endswith(f"{format_bytes(packed_lenet.stat().st_size)}")


@pytest.mark.parametrize("packed", [False, True])
def test_inspect_as_json(
    lenet: Path, packed_lenet: Path, capsys: pytest.CaptureFixture[str], packed: bool
) -> None:
    assert run("inspect", packed_lenet if packed else lenet, "--json") == 0

    result = json.loads(capsys.readouterr().out)
    assert result["packed"] is packed and len(result["layers"]) == 5


def test_formats_lists_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("formats", "--json") == 0
    rows = {row["format"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["e2m1"] == {
        "format": "e2m1",
        "bits": 4,
        "values": 15,
        "max_integer": 12,
        "smallest": 1.0,
        "largest": 12.0,
        "kernel": "byte",
    }
    assert run("formats") == 0
    assert len(capsys.readouterr().out.splitlines()) > len(rows)


def test_compare_states_accuracy(
    lenet: Path, packed_lenet: Path, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = models / "digits_evaluation.npz"

    assert run("compare", lenet, packed_lenet, "--data", data, "--layers") == 0
    text = capsys.readouterr().out
    assert "top-1" in text and "KL" in text and "/3/Conv" in text
    assert "smaller" in text.splitlines()[-1]

    assert run("compare", lenet, packed_lenet, "--data", data, "--json") == 0
    assert json.loads(capsys.readouterr().out)["outputs"][0]["top1"] > 0.9


def test_compare_with_a_simulation(
    lenet: Path, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = models / "digits_evaluation.npz"
    with np.load(models / "digits_calibration.npz") as arrays:
        np.savez(tmp_path / "few.npz", input=arrays["input"][:16])
    common = ("--data", data, "--calib", tmp_path / "few.npz", "--samples", 40)

    assert run("compare", lenet, "--simulate", "w5a4.5", *common) == 0
    text = capsys.readouterr().out
    assert "top-1" in text and "simulated, nothing written: " in text.splitlines()[-1]

    assert run("compare", lenet, "--simulate", "w6a6", "--json", *common) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["bits_per_weight"] <= 6 and result["bits_per_activation"] <= 6
    assert result["quantized_bytes"] is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "give a second model, or --simulate"),
        (("other.onnx", "--simulate", "w5a5", "--calib", "x"), "give a second model"),
        (("--simulate", "w5a5"), "--simulate and --calib need each other"),
        (("other.onnx", "--calib", "x"), "--simulate and --calib need each other"),
        (("--simulate", "5", "--calib", "x"), "not of the form w5a5"),
        (("--simulate", "w5a5", "--calib", "x", "--layers"), "--layers needs a second model"),
    ],
)
def test_compare_refuses_half_a_simulation(
    lenet: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], message: str
) -> None:
    assert run("compare", lenet, *options, "--data", "x.npz") == 2
    assert message in capsys.readouterr().err


def test_bench_states_the_ratio(
    lenet: Path, packed_lenet: Path, calibration: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("bench", lenet, packed_lenet, "--seconds", 0.05, "-j", 1)

    assert run(*arguments) == 0
    assert "time ratio" in capsys.readouterr().out
    assert run(*arguments, "--json", "--data", calibration, "--batch", 2) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["num_rounds"] >= 20 and result["shapes"] == {"input": [2, 1, 28, 28]}


def test_verify_passes_and_fails(
    packed_lenet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("verify", packed_lenet) == 0
    assert capsys.readouterr().out.endswith("sound\n")

    damaged = tmp_path / "damaged.onnx"
    content = bytearray(packed_lenet.read_bytes())
    from afpq.packed import read_packed

    codes = read_packed(packed_lenet).layers[2].packed.tobytes()
    content[content.index(codes) + 5] ^= 0x10
    damaged.write_bytes(content)
    assert run("verify", damaged) == 1
    assert "FAILED  checksum  /7/Gemm" in capsys.readouterr().out
    assert run("verify", damaged, "--json") == 1
    assert json.loads(capsys.readouterr().out)["passed"] is False


def test_doctor_passes_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("doctor") == 0
    assert "self-test" in capsys.readouterr().out
    assert run("doctor", "--json") == 0
    assert json.loads(capsys.readouterr().out)["passed"] is True


def test_report_of_a_written_model(lenet: Path, packed_lenet: Path, models: Path) -> None:
    report = lenet.with_name("r.md")
    data = models / "digits_evaluation.npz"

    code = run(
        "report", packed_lenet, "-o", report, "--reference", lenet, "--data", data, "--samples", 50
    )

    assert code == 0
    text = report.read_text()
    assert "top1" in text and f"{lenet.stat().st_size:,}" in text


def test_report_of_several_models_has_a_page_for_a_default(
    packed_lenet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Path(shutil.copy(packed_lenet, tmp_path / "other.onnx"))
    monkeypatch.chdir(tmp_path)

    assert run("report", packed_lenet, other, "--no-bench") == 0

    text = (tmp_path / "lenet5.afpq.html").read_text()
    assert "Side by side" in text and "other.onnx" in text and "2 threads" not in text
    assert run("report", packed_lenet, other, "--no-bench") == 1  # it is there already


def test_report_finds_the_model_of_each_plan(lenet: Path, tmp_path: Path) -> None:
    report = tmp_path / "r.json"
    for bits in (4, 5):
        out, plan = tmp_path / f"{bits}.onnx", tmp_path / f"{bits}.json"
        assert run("quantize", lenet, "-o", out, "--bits", bits, "--save-plan", plan) == 0
    models, plans = (
        (tmp_path / "4.onnx", tmp_path / "5.onnx"),
        (tmp_path / "5.json", tmp_path / "4.json"),
    )

    code = run(
        "report", *models, "--plan", plans[0], "--plan", plans[1], "--no-bench", "-o", report
    )

    assert code == 0
    four, five = json.loads(report.read_text())["reports"]
    assert four["predicted_loss"] > five["predicted_loss"] > 0
    assert four["frontier"] == five["frontier"] != []


# Errors


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


# Helpers


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


# Sweeps


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
    ("arguments", "message"),
    [
        (("--formats", "e4m3", "--bits", 8), "give --formats or --bits, not both"),
        (("--formats", "e9m9"), "exponent_bits 9 is not in the range"),
        (("--formats", "ue2m5"), "ue2m5 is unsigned"),
        (("-o", "s.png"), "the supported suffixes are .svg, .md and .json"),
    ],
)
def test_a_wrong_sweep_is_refused(
    arguments: tuple[object, ...],
    message: str,
    models: Path,
    calibration: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    code = run("sweep", models / "lenet5_digits.onnx", "--data", calibration, *arguments)

    assert code in (1, 2)
    assert message in error_of(capsys)
