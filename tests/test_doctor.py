"""The diagnosis of an installation."""

import os
import subprocess
import sys

import pytest

from afpq import _core, _selftest
from afpq import doctor as module
from afpq.errors import AfpqError, RuntimeUnavailableError


def test_everything_needed_works_here():
    checks = {check.name: check for check in module.doctor()}
    assert all(check.passed for check in checks.values()), checks
    assert {
        "native extension",
        "instruction sets",
        "custom-op library",
        "kernels",
        "layers",
    } <= set(checks)


def test_every_kernel_is_compared():
    bound = {n for n in dir(_core.kernels) if not n.startswith("_")}
    others = {"isa_names", "active_isa", "a8_byte_limit", "store_residual_f32"}
    assert bound - others == set(_selftest.kernel_names())


def test_a_kernel_that_gives_other_bits_is_named(monkeypatch):
    real = _core.kernels.store_f32

    class Broken:
        def __getattr__(self, name):
            return getattr(_core.kernels, name)

        def store_f32(self, isa, *args):
            real(isa, *args)
            if isa != "scalar":
                args[-1][0] += 1

    monkeypatch.setattr(_selftest, "_KERNELS", Broken())
    best = _core.kernels.isa_names()[0]
    assert set(_selftest.differing_kernels(best)) == ({"store_f32"} if best != "scalar" else set())


def test_peaks_are_measured(monkeypatch):
    monkeypatch.setattr(module, "_SECONDS", 0.0)
    checks, rates = module.measure()
    assert len(checks) == 16 and all(check.passed for check in checks), checks
    alone = module._num_processors() < 2
    numbers = [check for check in checks if not (alone and check.name == "two cores")]
    assert all(float(check.detail.split()[0]) > 0 for check in numbers)
    shown = {check.name: float(check.detail.split()[0]) for check in checks[4:]}

    assert shown == {f"{text} {mode}": rates[mode][text] for mode in rates for text in rates[mode]}


def test_lines_between_cores_need_two_processors_and_a_thread(monkeypatch):
    def no_thread(*_: int) -> None:
        raise RuntimeError("Resource temporarily unavailable")

    monkeypatch.setattr(module, "_num_processors", lambda: 2)
    monkeypatch.setattr(_core, "time_lines", no_thread)
    with pytest.raises(AfpqError, match="no second thread: Resource temporarily unavailable"):
        module.line_times()
    monkeypatch.setattr(module, "_num_processors", lambda: 1)
    with pytest.raises(AfpqError, match="only one processor"):
        module.line_times()


def test_halves_are_timed_of_even_numbers():
    with pytest.raises(ValueError, match="must be even"):
        _core.time_halves(3, 2, True, 1)
    with pytest.raises(ValueError, match="must be positive"):
        _core.time_halves(2, 0, True, 1)
    assert _core.time_halves(2, 2, False, 3) > 0


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
