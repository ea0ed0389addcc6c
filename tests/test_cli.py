"""The command line as a user meets it: results and exit codes."""

import json
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from commands import names, run

import afpq
from afpq._cli_output import format_bytes

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
    assert result["command"] == shlex.join(
        ["afpq", "quantize", str(lenet), "-o", str(out), "--json"]
    )


def test_defaults_are_stated(lenet: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("quantize", lenet, "-o", lenet.with_name("out.onnx")) == 0

    text = capsys.readouterr().err
    assert "budget: 5 bits per weight (none was given)" in text
    assert "no --calib: formats follow from weight error alone" in text


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
    assert run("quantize", lenet, "-o", out, "--force", "--json", *options) == 0
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


def test_samples_limit_what_a_simulation_is_made_from(
    lenet: Path, calibration: Path, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = models / "digits_evaluation.npz"
    options = ("--data", data, "--calib", calibration, "--samples", 16)

    assert run("compare", lenet, "--simulate", "w5a5", *options) == 0

    assert "calibrate: 12 done" in capsys.readouterr().err  # a quarter is held out


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
    assert "give the bits of scalar" in capsys.readouterr().out
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
