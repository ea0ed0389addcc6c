"""What a timing depends on besides what is timed."""

import platform
import subprocess
from pathlib import Path

import onnxruntime as ort

from afpq import _core

__all__ = ["facts"]

ROOT = Path(__file__).resolve().parents[2]


def facts() -> dict[str, object]:
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    )
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = [line.split(":", 1)[1].strip() for line in lines if "model name" in line]
    return {
        "machine": f"{cpu[0] if cpu else platform.processor()}, {len(cpu)} cores",
        "isa": _core.kernels.active_isa(),
        "onnxruntime": ort.__version__,
        "python": platform.python_version(),
        "commit": commit.stdout.strip(),
    }
