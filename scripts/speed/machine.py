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


def facts() -> dict[str, object]:
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    )
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = [line.split(":", 1)[1].strip() for line in lines if "model name" in line]
    kept = " kept to AVX2" if KEPT_TO_AVX2 in os.environ else ""
    return {
        "machine": f"{cpu[0] if cpu else platform.processor()}, {len(cpu)} cores",
        "isa": _core.kernels.active_isa(),
        "onnxruntime": ort.__version__ + kept,
        "python": platform.python_version(),
        "commit": commit.stdout.strip(),
    }
