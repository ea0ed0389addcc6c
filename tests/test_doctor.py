"""The diagnosis of an installation."""

import os
import subprocess
import sys

from afpq import doctor as module
from afpq.errors import RuntimeUnavailableError


def test_everything_needed_works_here():
    checks = {check.name: check for check in module.doctor()}
    assert all(check.passed for check in checks.values()), checks
    assert {"native extension", "instruction sets", "custom-op library", "self-test"} <= set(checks)


def test_a_library_that_does_not_load_is_a_failed_check(monkeypatch):
    def fail() -> str:
        raise RuntimeUnavailableError("libafpq_ort.so is missing")

    monkeypatch.setattr(module, "_check_library", fail)
    failed = [check for check in module.doctor() if not check.passed]
    assert [check.name for check in failed] == ["custom-op library"]
    assert "libafpq_ort.so is missing" in failed[0].detail


def test_a_forced_isa_is_reported():
    done = subprocess.run(
        [sys.executable, "-c", "from afpq.doctor import doctor; print(*doctor(), sep='\\n')"],
        capture_output=True,
        text=True,
        env={**os.environ, "AFPQ_ISA": "scalar"},
    )
    assert "scalar (forced by AFPQ_ISA" in done.stdout, done.stderr
