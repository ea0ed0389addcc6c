"""Journals: a step is kept as a whole or not at all, other runs are refused, stopped runs end in the same bytes."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import afpq
from afpq._way import Way
from afpq.errors import JournalError
from afpq.formats import AfpFormat
from afpq.journal import Journal
from afpq.packing import PackedTensor, packed_bytes
from afpq.quantize import quantize

RUN: dict[str, Any] = {"bits": 4, "version of": {"afpq": "1"}}


def write(text: str, path: Path) -> None:
    path.write_text(text)


def never() -> str:
    raise AssertionError("made again")


def test_a_finished_step_is_not_made_again(tmp_path: Path) -> None:
    first = Journal.open(tmp_path / "j", RUN).step("one", lambda: "made", write, Path.read_text)
    again = Journal.open(tmp_path / "j", RUN).step("one", never, write, Path.read_text)

    assert first == again == "made"


def test_without_a_folder_nothing_is_kept() -> None:
    journal = Journal()

    assert journal.step("one", lambda: "made", write, Path.read_text) == "made"
    assert journal.find("one") is None and journal.steps() == []


def test_parts_of_a_run_have_steps_of_their_own(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path / "j", RUN)
    journal.keep("one", lambda path: write("whole", path))
    journal.scoped("part").keep("one", lambda path: write("part", path))

    assert journal.steps() == ["one", "part, one"]
    found = journal.scoped("part").find("one")
    assert found is not None and found.read_text() == "part"


def test_what_was_being_written_when_the_process_died_is_no_step(tmp_path: Path) -> None:
    """SIGKILL half-way through the file of a step: no clean-up of any kind runs."""
    script = """
import os, signal, sys
from pathlib import Path
from afpq.journal import Journal

def save(path):
    path.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)

journal = Journal.open(Path(sys.argv[1]), {})
journal.keep("one", lambda path: path.write_text("whole"))
journal.keep("two", save)
"""
    done = subprocess.run([sys.executable, "-c", script, tmp_path / "j"], env=environment())

    assert done.returncode == -signal.SIGKILL
    assert Journal.open(tmp_path / "j", {}).steps() == ["one"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({**RUN, "bits": 5}, r"bits changed \(4 -> 5\)"),
        ({**RUN, "version of": {"afpq": "2"}}, r'version of afpq changed \("1" -> "2"\)'),
        ({**RUN, "seed": 1}, r"seed changed \(null -> 1\)"),
        ({"bits": 4}, "version of changed"),
    ],
)
def test_other_runs_are_refused(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    Journal.open(tmp_path / "j", RUN)

    with pytest.raises(JournalError, match=message):
        Journal.open(tmp_path / "j", changed)


def test_one_process_at_a_time(tmp_path: Path) -> None:
    script = """
import sys
from pathlib import Path
from afpq.journal import Journal

journal = Journal.open(Path(sys.argv[1]), {})
print("open", flush=True)
sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-c", script, tmp_path / "j"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment(),
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == b"open\n"
        with pytest.raises(JournalError, match="another process uses it"):
            Journal.open(tmp_path / "j", {})
        with pytest.raises(JournalError, match="another process uses it"):
            Journal.discard(tmp_path / "j")
        other.communicate()

    assert Journal.open(tmp_path / "j", {}).steps() == []


def test_a_damaged_step_is_named(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path / "j", {})
    journal.keep("way", lambda path: write("no zip file", path))

    with pytest.raises(JournalError, match="way: damaged, start over"):
        journal.step("way", never, lambda value, path: None, Way.load)


def test_a_damaged_identity_is_named(tmp_path: Path) -> None:
    Journal.open(tmp_path / "j", RUN)
    (tmp_path / "j/identity.json").write_text("{")

    with pytest.raises(JournalError, match=r"identity\.json is damaged"):
        Journal.open(tmp_path / "j", RUN)


def test_only_journals_are_deleted(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path / "j", {})
    journal.keep("one", lambda path: write("text", path))
    Journal.discard(tmp_path / "j")
    assert not (tmp_path / "j").exists()

    (tmp_path / "j").mkdir()
    (tmp_path / "j/thesis.txt").write_text("three years")
    with pytest.raises(JournalError, match="not a journal"):
        Journal.discard(tmp_path / "j")
    assert (tmp_path / "j/thesis.txt").exists()


def test_a_way_is_read_as_it_was_written(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    fmt = AfpFormat(2, 1)
    data = rng.integers(0, 256, packed_bytes(20, 7, fmt.bits), np.uint8)
    scale = np.exp2(rng.integers(-5, 5, 20)).astype(np.float32)
    way = Way(
        {"w/1": PackedTensor(fmt, 20, 7, data, scale, "integer")},
        {"conv": rng.normal(size=20).astype(np.float32)},
        {"w/1": 1 / 3},
        {"mean": rng.normal(size=3).astype(np.float32)},
        ("gather",),
    )
    way.save(tmp_path / "way")
    read = Way.load(tmp_path / "way")

    tensor = read.tensors["w/1"]
    assert (tensor.format, tensor.n, tensor.k, tensor.kind) == (fmt, 20, 7, "integer")
    np.testing.assert_array_equal(tensor.data, data)
    np.testing.assert_array_equal(tensor.scale, scale)
    np.testing.assert_array_equal(read.biases["conv"], way.biases["conv"])
    np.testing.assert_array_equal(read.constants["mean"], way.constants["mean"])
    assert (read.sqnr, read.left) == (way.sqnr, way.left)


# Whole runs


class Died(BaseException):
    pass


def runs(models: Path) -> Iterator[tuple[str, Callable[[Path | None], afpq.QuantizedModel]]]:
    def run(**options: Any) -> Callable[[Path | None], afpq.QuantizedModel]:
        source, data = models / "lenet5_digits.onnx", models / "digits_calibration.npz"
        common: dict[str, Any] = {"data": data, "samples": 48, "threads": 1}
        return lambda journal: quantize(source, journal=journal, **common, **options)

    yield "default", run(bits=3)
    yield "equalize", run(bits=3, equalize=True)
    yield "a8", run(bits=3, activations="a8", mode="quick")
    yield "max_drop", run(max_drop=5.0, mode="quick")


@pytest.mark.parametrize("kind", ["default", "equalize", "a8", "max_drop"])
def test_a_run_goes_on_after_every_step(
    kind: str, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process dies once after each step; in the end there is what a run without a journal makes."""
    run = dict(runs(models))[kind]
    run(None).save(tmp_path / "expected.onnx")
    keep = Journal.keep

    def dies(journal: Journal, name: str, save: Callable[[Path], object]) -> None:
        keep(journal, name, save)
        if journal.folder is not None:
            raise Died

    monkeypatch.setattr(Journal, "keep", dies)
    for count in range(1, 60):
        try:
            model = run(tmp_path / "j")
            break
        except Died:
            assert len(Journal.open(tmp_path / "j", identity(tmp_path)).steps()) == count
    model.save(tmp_path / "found.onnx")

    assert count > {"default": 4, "equalize": 6, "a8": 3, "max_drop": 3}[kind]
    expected, found = (tmp_path / f"{n}.onnx" for n in ("expected", "found"))
    assert found.read_bytes() == expected.read_bytes()


def identity(folder: Path) -> Any:
    return json.loads((folder / "j/identity.json").read_text())


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(afpq.__file__).parents[1])}


def command(models: Path, *options: object) -> list[str]:
    head = [sys.executable, "-m", "afpq", "quantize", models / "lenet5_digits.onnx"]
    head += ["--calib", models / "digits_calibration.npz", "--samples", "64"]
    return [str(x) for x in (*head, *options)]


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGKILL")
def test_the_command_resumes(models: Path, tmp_path: Path) -> None:
    out, journal = tmp_path / "out.onnx", tmp_path / "out.onnx.journal"
    whole = subprocess.run(
        command(models, "-o", tmp_path / "whole.onnx"), env=environment(), capture_output=True
    )
    assert whole.returncode == 0, whole.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["whole.onnx"]

    with subprocess.Popen(command(models, "-o", out), env=environment()) as process:
        deadline = time.monotonic() + 120
        while not (journal / "plan").exists() and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL and not out.exists()

    def resumed(*options: object) -> subprocess.CompletedProcess[str]:
        parts = command(models, "-o", out, "--resume", *options)
        return subprocess.run(parts, env=environment(), capture_output=True, text=True)

    other = resumed("--bits", "3")
    assert other.returncode == 1
    assert "bits changed (5.0 -> 3.0)" in other.stderr and journal.exists()
    done = resumed()

    assert done.returncode == 0, done.stderr
    assert "calibrate" not in done.stderr and "compensate" in done.stderr
    assert out.read_bytes() == (tmp_path / "whole.onnx").read_bytes()
    assert not journal.exists()

    nothing = resumed("--force")
    assert nothing.returncode == 0 and "nothing to resume" in nothing.stderr
