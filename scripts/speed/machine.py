"""What a timing depends on besides what is timed."""

import os
import platform
import subprocess
from pathlib import Path

import onnxruntime as ort

from afpq import _core
from afpq.doctor import line_times
from afpq.errors import AfpqError

__all__ = ["KEPT_TO_AVX2", "between_cores", "facts", "told"]

KEPT_TO_AVX2 = "AFPQ_BENCH_KEPT_TO_AVX2"  # set where the runtime is a copy of avx2_only.py's
ROOT = Path(__file__).resolve().parents[2]


def _processors() -> list[str]:
    """The name of each, with the numbers that tell apart what a name does not."""
    names = []
    for block in Path("/proc/cpuinfo").read_text().split("\n\n"):
        pairs = [line.partition(":") for line in block.splitlines()]
        said = {key.strip(): value.strip() for key, _, value in pairs}
        if "model name" in said:
            numbers = (
                f" (family {said['cpu family']}, model {said['model']})"
                if "cpu family" in said
                else ""
            )
            names.append(said["model name"] + numbers)
    return names


def facts() -> dict[str, object]:
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    )
    cpu = _processors()
    kept = " kept to AVX2" if KEPT_TO_AVX2 in os.environ else ""
    return {
        "machine": f"{cpu[0] if cpu else platform.processor()}, {len(cpu)} cores",
        "isa": _core.kernels.active_isa(),
        "onnxruntime": ort.__version__ + kept,
        "python": platform.python_version(),
        "commit": commit.stdout.strip(),
    }


def between_cores() -> dict[str, float]:
    """Nanoseconds a line of a cache, in the terms of `LineTimes`; nothing with one processor.

    It changes in the course of minutes, with the cores that a host gives to a machine.
    """
    try:
        return {name: 1e9 * seconds for name, seconds in line_times()._asdict().items()}
    except AfpqError:
        return {}


def told(lines: list[dict[str, float]]) -> list[str]:
    """What `between_cores` found before and behind a run, as a sentence."""
    found = [line for line in lines if line]
    if not found:
        return []

    def span(name: str) -> str:
        return " and ".join(f"{line[name]:.1f}" for line in found)

    return [
        f"Lines of a cache, before and behind the run: {span('read')} ns to read one that another core wrote, "
        f"{span('shared')} ns to write one that two have read."
    ]
