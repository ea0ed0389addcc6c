"""onnxruntime as it would be on a processor without AVX-512, on one that has it.

onnxruntime asks the processor what it has and cannot be told otherwise. Here a copy of it asks a handler of signals:
its CPUID instructions (0f a2) become undefined ones (0f 0b), and what answers them hides AVX-512, AVX-VNNI and AMX and
is truthful otherwise. Every other instruction is the runtime's own. Needs objdump and a C compiler.
"""

import os
import shutil
import struct
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

from speed.machine import KEPT_TO_AVX2

__all__ = ["hide_cpuid", "keep_to_avx2", "write_answer"]

# Hidden are bits of leaf 7, subleaf 0 (ebx, ecx, edx) and subleaf 1 (eax, edx).
ANSWER = r"""
#define _GNU_SOURCE
#include <cpuid.h>
#include <signal.h>
#include <string.h>
#include <ucontext.h>

static void answer(int number, siginfo_t *info, void *state) {
  greg_t *registers = ((ucontext_t *)state)->uc_mcontext.gregs;
  const unsigned char undefined[2] = {0x0f, 0x0b};
  if (memcmp((void *)registers[REG_RIP], undefined, 2) != 0) {
    signal(number, SIG_DFL);
    return;
  }
  unsigned leaf = registers[REG_RAX], sub = registers[REG_RCX], a, b, c, d;
  __cpuid_count(leaf, sub, a, b, c, d);
  if (leaf == 7 && sub == 0) {
    b &= ~(1u << 16 | 1u << 17 | 1u << 21 | 1u << 26 | 1u << 27 | 1u << 28 | 1u << 30 | 1u << 31);
    c &= ~(1u << 1 | 1u << 6 | 1u << 11 | 1u << 12 | 1u << 14);
    d &= ~(1u << 2 | 1u << 3 | 1u << 8 | 1u << 22 | 1u << 23 | 1u << 24 | 1u << 25);
  }
  if (leaf == 7 && sub == 1) {
    a &= ~(1u << 4 | 1u << 5 | 1u << 21 | 1u << 23);
    d &= ~(1u << 4 | 1u << 5 | 1u << 10 | 1u << 19);
  }
  registers[REG_RAX] = a, registers[REG_RBX] = b, registers[REG_RCX] = c, registers[REG_RDX] = d;
  registers[REG_RIP] += 2;
}

__attribute__((constructor)) static void install(void) {
  struct sigaction action = {.sa_sigaction = answer, .sa_flags = SA_SIGINFO | SA_NODEFER};
  sigaction(SIGILL, &action, 0);
}
"""


def _file_offset(content: bytes, address: int) -> int:
    """Where a virtual address of a 64-bit ELF file lies in it."""
    table, size, count = (
        struct.unpack_from("<Q", content, 32)[0],
        *struct.unpack_from("<HH", content, 54),
    )
    for start in range(table, table + size * count, size):
        kind, _, offset, virtual, _, length = struct.unpack_from("<IIQQQQ", content, start)
        if kind == 1 and virtual <= address < virtual + length:
            return int(address - virtual + offset)
    raise ValueError(f"no segment holds address {address:#x}")


def hide_cpuid(library: Path) -> int:
    """Replaces the CPUID instructions of a library; how many there were."""
    listing = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", library], capture_output=True, text=True, check=True
    )
    content = bytearray(library.read_bytes())
    addresses = [
        int(line.split(":")[0], 16)
        for line in listing.stdout.splitlines()
        if line.rstrip().endswith("\tcpuid")
    ]
    for address in addresses:
        offset = _file_offset(bytes(content[:4096]), address)
        assert content[offset : offset + 2] == b"\x0f\xa2", f"{library}: no CPUID at {address:#x}"
        content[offset : offset + 2] = b"\x0f\x0b"
    library.write_bytes(content)
    return len(addresses)


def write_answer(folder: Path) -> Path:
    """A library, to be preloaded, that answers what `hide_cpuid` replaced."""
    source, library = folder / "answer.c", folder / "answer.so"
    source.write_text(ANSWER)
    compiler = os.environ.get("CC", "cc")
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", source, "-o", library], check=True)
    return library


def keep_to_avx2(command: list[str]) -> int:
    """Runs a Python script in a process whose onnxruntime is such a copy and whose afpq uses AVX2; its exit status."""
    spec = find_spec("onnxruntime")
    assert spec is not None and spec.origin is not None
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy = folder / "onnxruntime"
        shutil.copytree(Path(spec.origin).parent, copy)
        (library,) = (copy / "capi").glob("onnxruntime_pybind11_state*.so")
        if not hide_cpuid(library):
            raise RuntimeError(f"{library} asks nothing of the processor")
        paths = [name, *filter(None, [os.environ.get("PYTHONPATH")])]
        variables = {
            "AFPQ_ISA": "avx2",
            "LD_PRELOAD": str(write_answer(folder)),
            "PYTHONPATH": os.pathsep.join(paths),
            KEPT_TO_AVX2: "1",
        }
        return subprocess.run([sys.executable, *command], env=os.environ | variables).returncode
