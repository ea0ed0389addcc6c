"""The table for Arm, cross-compiled and run under user-mode emulation: the bits of the scalar one."""

import fcntl
import importlib.util
import shutil
import subprocess
import sys
import sysconfig
from contextlib import suppress
from pathlib import Path

import pytest
from test_repo import isa_files, table_members

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "cross-aarch64"
PREFIX = "aarch64-linux-gnu-"
EMULATORS = ("qemu-aarch64", "qemu-aarch64-static")

# Of what csrc/tests/drivers.cc makes of its cases, on any processor: build the target afpq_table_test of csrc for the
# one at hand when the cases change.
CHECKSUM = "3e634408fa6712dc"


def emulator() -> str:
    found = next((path for name in EMULATORS if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip("needs qemu-aarch64 (Debian: qemu-user), which runs programs for Arm")
    return found


def arm_headers(headers: Path) -> Path:
    """A folder in which Debian's Python.h finds the part of it that is in a folder for each processor."""
    folder = BUILD / "headers"
    here = headers.parent / str(sysconfig.get_config_var("MULTIARCH")) / headers.name
    there = folder / "aarch64-linux-gnu" / headers.name
    there.parent.mkdir(parents=True, exist_ok=True)
    if here.is_dir():
        with suppress(FileExistsError):  # made before, or by a test beside this one
            there.symlink_to(here)
    return folder


def build(*targets: str) -> Path:
    """Targets of csrc/CMakeLists.txt for 64-bit Arm, warnings being errors; the folder that they are in."""
    if shutil.which(f"{PREFIX}g++") is None:
        pytest.skip(f"needs {PREFIX}g++ (Debian: g++-aarch64-linux-gnu), which compiles for Arm")
    for tool in ("cmake", "ninja"):
        if shutil.which(tool) is None:
            pytest.skip(f"needs {tool}, which builds the C++ code")
    headers = Path(sysconfig.get_path("include"))
    if importlib.util.find_spec("nanobind") is None or not (headers / "Python.h").exists():
        pytest.skip("needs nanobind and the headers of Python, which the build asks for")
    BUILD.mkdir(parents=True, exist_ok=True)
    options = {
        "CMAKE_CXX_FLAGS": f'-isystem "{arm_headers(headers)}"',
        "CMAKE_SYSTEM_NAME": "Linux",
        "CMAKE_SYSTEM_PROCESSOR": "aarch64",
        "CMAKE_CXX_COMPILER": f"{PREFIX}g++",
        "CMAKE_CXX_FLAGS_RELEASE": "-O2",
        "CMAKE_EXE_LINKER_FLAGS": "-static",  # so that the emulator needs no libraries for Arm
        "AFPQ_WERROR": "ON",
        "Python_EXECUTABLE": sys.executable,
        "Python_INCLUDE_DIR": str(headers),  # of this processor's Python: enough to compile
    }
    configure = ["cmake", "-S", str(ROOT / "csrc"), "-B", str(BUILD), "-G", "Ninja"]
    configure += [f"-D{name}={value}" for name, value in options.items()]
    with open(BUILD / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tests may run side by side
        for command in (configure, ["cmake", "--build", str(BUILD), "--target", *targets]):
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, f"{done.stdout[-8000:]}\n{done.stderr[-2000:]}"
    return BUILD


def run(cpu: str, isa: str = "") -> subprocess.CompletedProcess[str]:
    """The comparison of tables on an emulated processor, with AFPQ_ISA."""
    qemu = emulator()
    program = build("afpq_table_test") / "afpq_table_test"
    command = [qemu, "-cpu", cpu, "-E", f"AFPQ_ISA={isa}", str(program)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


def test_every_kernel_and_driver_gives_the_bits_of_scalar() -> None:
    done = run("max")
    assert done.returncode == 0, done.stdout + done.stderr
    first, *lines, last = done.stdout.splitlines()
    assert first == "isa: neon"
    names = {line.split(":")[0] for line in lines}
    assert names == {*table_members(), "matmul", "conv", "conv of bytes", "gather"}
    assert all(line.endswith(" compared, 0 different") for line in lines)
    assert last == f"checksum: {CHECKSUM}", "results differ from those of other processors"


@pytest.mark.parametrize("cpu", ["cortex-a53", "cortex-a72"])
def test_a_processor_without_dot_products_runs_scalar(cpu: str) -> None:
    forced = run(cpu, "neon")
    assert forced.returncode == 2
    assert "AFPQ_ISA: 'neon' is not an instruction set of this processor" in forced.stderr
    assert forced.stderr.rstrip().endswith("it has scalar")


def test_without_dot_products_the_drivers_give_the_same_bits() -> None:
    done = run("cortex-a53")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("isa: scalar\n")
    assert done.stdout.endswith(f"checksum: {CHECKSUM}\n")


def test_the_operator_library_is_built_for_arm() -> None:
    library = build("afpq_ort") / "libafpq_ort.so"
    header = library.read_bytes()[:20]
    assert header[:4] == b"\x7fELF" and int.from_bytes(header[18:20], "little") == 183  # EM_AARCH64


def test_objects_have_no_weak_symbols() -> None:
    folder = build("afpq_engine", "afpq_train")
    names = {f"{p.name}.o" for p in isa_files()}
    objects = [path for path in folder.rglob("*.cc.o") if path.name in names]
    assert {path.name for path in objects} == {
        "generic.cc.o",
        "neon.cc.o",
        "scalar.cc.o",
    }  # none of another processor
    for path in objects:
        listing = subprocess.run(
            [f"{PREFIX}nm", str(path)], capture_output=True, text=True, check=True
        ).stdout
        weak = [line for line in listing.splitlines() if line.split()[-2] in "WwVvu"]
        assert not weak, f"{path.name} has weak symbols: {weak}"


@pytest.mark.slow
def test_the_python_extension_compiles_for_arm() -> None:
    build("_core")
