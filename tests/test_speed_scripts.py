"""What scripts/bench_models uses to keep onnxruntime to AVX2, and what it says of lines between cores."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

from speed.avx2_only import hide_cpuid, write_answer
from speed.machine import told

PROGRAM = r"""
#include <cpuid.h>
#include <stdio.h>
int main(void) {
  unsigned a, b, c, d;
  __cpuid_count(1, 0, a, b, c, d);
  printf("%u %u", c, d);
  __cpuid_count(7, 0, a, b, c, d);
  printf(" %u %u\n", b, c);
}
"""


@pytest.mark.skipif(
    not (shutil.which("objdump") and shutil.which("cc")) or sys.platform != "linux",
    reason="needs objdump and a C compiler",
)
def test_a_program_whose_cpuid_is_replaced_sees_avx2_and_no_avx512(tmp_path: Path) -> None:
    source, program = tmp_path / "asks.c", tmp_path / "asks"
    source.write_text(PROGRAM)
    if subprocess.run(["cc", "-O1", source, "-o", program], capture_output=True).returncode:
        pytest.skip("the compiler does not compile for x86")

    def asked(**variables: str) -> list[int]:
        done = subprocess.run([program], capture_output=True, text=True, env=variables)
        return [int(word) for word in done.stdout.split()]

    truth = asked()
    assert hide_cpuid(program) == 2
    assert asked() == []  # it dies of an undefined instruction
    told = asked(LD_PRELOAD=str(write_answer(tmp_path)))
    assert told[:2] == truth[:2]  # leaf 1: AVX, FMA
    avx512_of_ebx = sum(1 << bit for bit in (16, 17, 21, 26, 27, 28, 30, 31))
    assert told[2] == truth[2] & ~avx512_of_ebx
    assert told[2] & 1 << 5 == truth[2] & 1 << 5  # AVX2
    assert not told[3] & 1 << 11  # VNNI


def test_lines_between_cores_are_told_as_they_were_before_and_behind() -> None:
    calm, far = {"own": 2.5, "read": 1.6, "shared": 7.4}, {"own": 2.5, "read": 6.5, "shared": 29.0}
    (text,) = told([calm, far])
    assert "1.6 and 6.5 ns to read" in text and "7.4 and 29.0 ns to write" in text
    assert told([]) == told([{}, {}]) == []
