"""What a timing depends on besides what is timed."""

import os
import platform
import subprocess
from pathlib import Path

import onnxruntime as ort

from afpq import _core

__all__ = ["KEPT_TO_AVX2", "facts"]

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
