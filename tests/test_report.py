"""Reports: complete, true to the file, and written whole or not at all."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import afpq
from afpq._report_text import _goal as goal_section
from afpq.errors import AfpqError
from afpq.packed import read_packed
from afpq.report import (
    SUFFIXES,
    RunFacts,
    accuracy_facts,
    build_report,
    describe_gain,
    environment,
    file_facts,
    layer_facts,
    render_markdown,
    write_report,
    write_text,
)


@pytest.fixture(scope="module")
def written(
    models: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[afpq.QuantizedModel, Path]:
    out = tmp_path_factory.mktemp("report") / "small.onnx"
    model = afpq.quantize(
        models / "lenet5_digits.onnx",
        data=models / "digits_calibration.npz",
        samples=32,
        bits=5,
        exclude=["/0/Conv"],
    )
    model.save(out)
    return model, out


def test_json_report_is_complete(
    written: tuple[afpq.QuantizedModel, Path], models: Path, tmp_path: Path
) -> None:
    model, out = written
    model.report(tmp_path / "r.json")

    report = json.loads((tmp_path / "r.json").read_text())

    source = models / "lenet5_digits.onnx"
    assert report["source"] == file_facts(source)
    assert report["size"]["source_bytes"] == source.stat().st_size
    assert report["size"]["output_bytes"] == out.stat().st_size
    assert report["size"]["bits_per_weight"] <= 5
    assert report["size"]["quantizable_weights_before_bytes"] == 4 * (61_470 - 150)
    assert report["budget"] == "5 bits per weight"
    assert report["objective"] == "kl"
    assert [e["name"] for e in report["layers"]] == ["/3/Conv", "/7/Gemm", "/9/Gemm", "/11/Gemm"]
    assert sum(e["bytes"] for e in report["layers"]) == report["size"]["packed_weights_bytes"]
    for entry in report["layers"]:
        assert entry["sqnr_db"] > 10 and entry["predicted_loss"] >= 0
        assert entry["measured_loss"] >= 0 and entry["output_sqnr_db"] > 10
        assert 0 < entry["time_share"] < 1
        assert sum(entry["codebook_histogram"]["codes"]) == sum(
            entry["codebook_histogram"]["float"]
        )
        assert sum(entry["codebook_histogram"]["codes"]) == entry["num_weights"]
        assert entry["kernel"] in ("byte", "pair", "wide")
    assert report["left_float"][0]["name"] == "/0/Conv"
    assert "--exclude" in report["left_float"][0]["reason"]
    assert report["float_tensors"][0]["shape"] == [6, 1, 5, 5]
    assert report["calibration"]["samples"] == 24
    assert report["correction"]["kept"] in report["correction"]["losses"]
    assert report["accuracy"]["outputs"][0]["agreement"] > 0.8
    assert report["measured_loss"]["objective"] == "kl" and report["measured_loss"]["samples"] == 8
    assert report["speed"]["reference"]["median_ms"] > 0 and report["speed"]["rounds"] >= 5
    bits, losses = zip(*report["frontier"])
    assert list(bits) == sorted(bits) and list(losses) == sorted(losses, reverse=True)
    assert report["not_measured"] == {}
    assert report["checks"] == {"loaded": True, "run_once": "on a sample"}
    assert report["environment"]["onnxruntime"]


def test_markdown_report_has_every_section(written: tuple[afpq.QuantizedModel, Path]) -> None:
    model, out = written

    text = render_markdown(model.summary())

    assert text.startswith(f"# {out.name}\n")
    for title in (
        "Accuracy",
        "Other budgets",
        "Packed layers",
        "Left float",
        "Calibration",
        "How it was made",
    ):
        assert f"\n## {title}\n" in text
    assert f"{out.stat().st_size:,}" in text
    assert "### Correction" in text and "compensated rounding" in text
    assert "| /3/Conv | Conv | e" in text
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert tables and all(line.endswith("|") for line in tables)


def test_markdown_of_a_measured_model_has_speed_and_losses(
    written: tuple[afpq.QuantizedModel, Path], tmp_path: Path
) -> None:
    written[0].report(tmp_path / "r.md")

    text = (tmp_path / "r.md").read_text()

    assert "## Speed on this machine" in text and "Time ratio" in text
    row = next(line for line in text.splitlines() if line.startswith("| /3/Conv"))
    assert row.count("|") == 15 and " %" in row


def test_several_reports_share_one_file(
    written: tuple[afpq.QuantizedModel, Path], tmp_path: Path
) -> None:
    report = written[0].summary()

    for suffix in SUFFIXES:
        write_report([report, report], tmp_path / f"r{suffix}")

    assert len(json.loads((tmp_path / "r.json").read_text())["reports"]) == 2
    assert (tmp_path / "r.md").read_text().count("## Packed layers") == 2
    assert "Side by side" in (tmp_path / "r.html").read_text()


def test_lists_of_numbers_take_one_line_in_json(
    written: tuple[afpq.QuantizedModel, Path], tmp_path: Path
) -> None:
    report = {**written[0].summary(), "command": "a [\n 1 ]", "frontier": [[2.0, 0.5], [3.0, 0.25]]}

    write_report(report, tmp_path / "r.json")

    text = (tmp_path / "r.json").read_text()
    assert "    [2.0, 0.5],\n    [3.0, 0.25]\n" in text
    assert json.loads(text)["command"] == "a [\n 1 ]"


def test_every_table_row_has_as_many_cells_as_its_head(
    written: tuple[afpq.QuantizedModel, Path],
) -> None:
    text = render_markdown(written[0].summary())

    for block in re.findall(r"(?:^\|.*\n)+", text, re.M):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1


def test_a_report_from_the_file_alone_claims_nothing_else(
    written: tuple[afpq.QuantizedModel, Path],
) -> None:
    report = build_report(read_packed(written[1]))

    text = render_markdown(report)

    assert report["source"] is None and report["accuracy"] is None
    assert "Not measured" in text
    assert "Not known: this report was made from the file alone." in text


def test_without_data_the_report_says_so(models: Path, tmp_path: Path) -> None:
    model = afpq.quantize(models / "lenet5_digits.onnx")
    model.save(tmp_path / "out.onnx")

    text = render_markdown(model.summary())

    assert "Formats were chosen by weight error alone" in text
    assert "Accuracy was not measured." in text


def test_slow_paths_are_named(models: Path, tmp_path: Path) -> None:
    model = afpq.quantize(models / "lenet5_digits.onnx", overrides={"/7/Gemm": "e4m2"}, bits=8)
    model.save(tmp_path / "out.onnx")

    text = render_markdown(model.summary())

    assert "## Layers off the integer path" in text
    assert "| /7/Gemm | wide | e4m2 spans more than 16 bits: float multiply-add |" in text


def test_pipes_in_names_do_not_break_tables() -> None:
    report = {
        "output": {"path": "x.onnx"},
        "size": dict.fromkeys(
            ("source_bytes", "bits_per_weight"),
        )
        | dict.fromkeys(
            (
                "output_bytes",
                "quantizable_weights_before_bytes",
                "packed_weights_bytes",
                "float_tensors_bytes",
            ),
            1,
        ),
        "left_float": [{"name": "a|b", "op_type": "Conv", "num_weights": 3, "reason": "why"}],
    }
    empty: dict[str, Any] = dict.fromkeys(
        ("source", "budget", "objective", "predicted_loss", "accuracy", "goal", "calibration")
    )
    lists: dict[str, Any] = {"layers": [], "float_tensors": [], "frontier": []}
    lists |= {"command": None, "correction": None, "speed": None}
    maps: dict[str, Any] = {"checks": {}, "seconds": {}, "environment": {}, "not_measured": {}}

    assert "| a\\|b | Conv | 3 | why |" in render_markdown(empty | lists | maps | report)


def test_layer_facts_cover_every_layer_of_a_shared_tensor() -> None:
    entry = afpq.Plan(
        entries=(
            importable_entry(("a", "b"), 0.5),
            importable_entry(("c",), None),
        ),
        budget=None,
        objective="kl",
    ).entries

    facts = layer_facts(entry, {"w_a": 30.0})

    assert {name: (f.predicted_loss, f.sqnr_db) for name, f in facts.items()} == {
        "a": (0.5, 30.0),
        "b": (0.5, 30.0),
        "c": (None, None),
    }


def importable_entry(layers: tuple[str, ...], loss: float | None) -> Any:
    from afpq.plan import PlanEntry

    fmt = afpq.AfpFormat(2, 1)
    return PlanEntry(layers, f"w_{layers[0]}", 4, 4, fmt, predicted_loss=loss)


def test_accuracy_facts_name_the_data() -> None:
    assert accuracy_facts({"num_samples": 3}, "x.npz") == {"data": "x.npz", "num_samples": 3}


@pytest.mark.parametrize("suffix", [".htm", ".txt", ""])
def test_unknown_suffixes_are_refused(tmp_path: Path, suffix: str) -> None:
    with pytest.raises(AfpqError, match=re.escape(", ".join(SUFFIXES))):
        write_report({}, tmp_path / f"r{suffix}")


def test_text_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "r.md").write_text("before")
    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="No space left"):
        write_text(tmp_path / "r.md", "after")

    assert (tmp_path / "r.md").read_text() == "before"
    assert [p.name for p in tmp_path.iterdir()] == ["r.md"]


def test_environment_names_the_instruction_set() -> None:
    found = environment()

    assert found["isa"] and found["numpy"] == np.__version__
    assert found["processor"]
    assert "created" not in found  # a journal compares it: nothing in it may depend on the time
    assert found["afpq"] == afpq.__version__


def test_facts_default_to_unknown() -> None:
    assert RunFacts().accuracy is None and dict(RunFacts().layers) == {}


def test_a_goal_is_reported_with_its_trials() -> None:
    goal = {
        "max_drop": 1.0,
        "met": True,
        "text": "0.5 points of top-1 lost (95%: -1 to 2; 200 rows)",
        "trials": [
            {"bits_per_weight": 4.5, "percent": 0.5, "met": True},
            {"bits_per_weight": 3.25, "percent": 2.0, "met": False},
        ],
    }

    text = goal_section(goal)

    assert "A drop of at most 1 %: met, 0.5 points of top-1 lost (95%: -1 to 2; 200 rows)." in text
    rows = text.splitlines()[-2:]
    assert rows == ["| 3.250 | 2 | no |", "| 4.500 | 0.5 | yes |"]
    assert goal_section(None) == ""


def test_gains_are_described_in_percent_of_the_loss_before() -> None:
    gain = {"loss_before": 0.5, "loss_after": 0.25}

    assert describe_gain(gain) == "held-out loss 0.5 -> 0.25 (-50 %)"
    assert describe_gain({"loss_before": 0.0, "loss_after": 0.0}) == "held-out loss 0 -> 0"
