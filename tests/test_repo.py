"""What keeps the repository in shape: layers, exports, kernel names, symbols, no stray paths."""

import ast
import importlib
import os
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"

# A module imports only modules of its own group or of groups before it (CONTRIBUTING, "Layers of the code"). Private
# modules (`_name`) are parts of the public ones that use them: what they import counts for those.
LAYERS = (
    ("errors",),
    ("floats", "formats", "journal"),
    ("packing",),
    ("rounding", "packed"),
    ("preprocess", "graph"),
    ("data", "runtime"),
    ("calibrate", "plan", "rates", "correct", "rewrite"),
    ("activations", "compensate", "restore"),
    ("equalize", "learn", "search"),
    ("bench", "doctor", "evaluate", "export", "quantize", "report", "simulate", "sweep", "verify"),
    ("cli", "torch"),
    ("train",),
)
RANKS = {name: rank for rank, group in enumerate(LAYERS) for name in group}

NEED_TORCH = {"learn", "torch", "train"}

# The same for C++: a folder includes only itself and folders before it; bindings and ort do not see each other.
INCLUDES = {
    "core": {"core"},
    "kernels": {"core", "kernels"},
    "drivers": {"core", "kernels", "drivers"},
    "train": {"core", "train"},
    "bindings": {"core", "kernels", "drivers", "train", "bindings"},
    "ort": {"core", "kernels", "drivers", "ort"},
    "tests": {"core", "kernels", "drivers", "tests"},
}
ISA_HEADERS = {"stddef.h", "stdint.h", "math.h", "string.h", "immintrin.h", "arm_neon.h"}

MODULES = sorted(p.stem for p in (ROOT / "afpq").glob("*.py") if not p.stem.startswith("__"))
PUBLIC = [name for name in MODULES if not name.startswith("_")]


@cache
def tree(module: str) -> ast.Module:
    return ast.parse((ROOT / "afpq" / f"{module}.py").read_text())


@cache
def imports(module: str) -> dict[str, set[str]]:
    """Modules of afpq that a module imports, each with the names taken from it."""
    result: dict[str, set[str]] = {}
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("afpq."):
                    result.setdefault(alias.name.split(".")[1], set())
        elif isinstance(node, ast.ImportFrom) and node.module == "afpq":
            for alias in node.names:
                result.setdefault(alias.name, set())
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("afpq."):
            home = str(node.module).split(".")[1]
            result.setdefault(home, set()).update(alias.name for alias in node.names)
    return {name: names for name, names in result.items() if name in MODULES}


@cache
def public_imports(module: str) -> frozenset[str]:
    """Public modules that a module reaches, straight or through private ones."""
    found: set[str] = set()
    seen: set[str] = set()
    pending = [module]
    while pending:
        for name in imports(pending.pop()):
            if name.startswith("_"):
                if name not in seen:
                    seen.add(name)
                    pending.append(name)
            else:
                found.add(name)
    return frozenset(found - {module})


@pytest.mark.parametrize("module", PUBLIC)
def test_every_public_module_has_a_layer(module: str) -> None:
    assert module in RANKS, f"give afpq/{module}.py its place in LAYERS of tests/test_repo.py"


@pytest.mark.parametrize("module", [name for name in PUBLIC if name in RANKS])
def test_imports_point_down(module: str) -> None:
    above = {name for name in public_imports(module) if RANKS.get(name, 0) > RANKS[module]}
    assert not above, f"afpq/{module}.py imports modules of higher layers: {sorted(above)}"


def test_imports_have_no_cycles() -> None:
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"import cycle: {' -> '.join([*path, module])}"
        if module not in done:
            for name in imports(module):
                visit(name, (*path, module))
            done.add(module)

    for module in MODULES:
        visit(module, ())


def exported(module: str) -> list[str]:
    for node in tree(module).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return list(ast.literal_eval(node.value))
    pytest.fail(f"afpq/{module}.py has no __all__")


def export_order(name: str) -> tuple[bool, bool, str]:
    """Constants, classes, functions; by name in each. The order that ruff wants."""
    return (not name.isupper(), not name[0].isupper(), name)


@pytest.mark.parametrize("module", ["__init__", *PUBLIC])
def test_exports_are_sorted_and_exist(module: str) -> None:
    names = exported(module)
    assert names == sorted(set(names), key=export_order)
    if module in NEED_TORCH:
        pytest.importorskip("torch")
    home = importlib.import_module("afpq" if module == "__init__" else f"afpq.{module}")
    missing = [name for name in names if not hasattr(home, name)]
    assert not missing, f"afpq/{module}.py exports names it does not have: {missing}"


@pytest.mark.parametrize("module", PUBLIC)
def test_exports_are_complete(module: str) -> None:
    # What another public module takes is public by that. Private modules belong to the inside of the package.
    used = {name for user in PUBLIC for name in imports(user).get(module, set()) if user != module}
    hidden = {name for name in used if not name.startswith("__")} - set(exported(module))
    assert not hidden, (
        f"other modules use {sorted(hidden)}: add them to __all__ of afpq/{module}.py"
    )


@pytest.mark.parametrize("module", PUBLIC)
def test_every_module_has_tests(module: str) -> None:
    assert (ROOT / "tests" / f"test_{module}.py").exists()


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = (
        "import sys, afpq\n"
        "heavy = {'numpy', 'scipy', 'onnx', 'onnxruntime', 'torch', 'click', 'rich'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert result.stdout.strip() == "[]"


def sources(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.suffix in {".cc", ".h", ".inc"})


def quoted_includes(path: Path) -> list[str]:
    return re.findall(r'^\s*#include "([^"]+)"', path.read_text(), re.M)


@pytest.mark.parametrize("path", sources(CSRC), ids=lambda p: str(p.relative_to(CSRC)))
def test_includes_point_down(path: Path) -> None:
    home = path.relative_to(CSRC).parts[0]
    for include in quoted_includes(path):
        folder = include.split("/")[0] if "/" in include else home
        assert folder in INCLUDES[home], f"{home} must not include {include}"


def isa_files() -> list[Path]:
    """The files that are compiled with the flags of one instruction set, and what they include."""
    shared = {"kernels.h", "dispatch.h", "dispatch.cc", "train.h", "train.cc"}
    folders = (CSRC / "kernels", CSRC / "train")
    return [p for folder in folders for p in sources(folder) if p.name not in shared]


@pytest.mark.parametrize("path", isa_files(), ids=lambda p: p.name)
def test_instruction_set_files_include_no_library_code(path: Path) -> None:
    # Code of the C++ library compiled with wider instructions could be linked into the portable path.
    system = set(re.findall(r"^\s*#include <([^>]+)>", path.read_text(), re.M))
    assert system <= ISA_HEADERS
    local = {Path(include).name for include in quoted_includes(path)}
    assert local <= {"kernels.h"} | {p.name for p in isa_files()}


TYPE = r"(?:u8|s8|s16|u16|s32|f32|afp)"
KERNEL = re.compile(rf"(?P<op>[a-z]+(?:_[a-z]+)?)(?P<types>(?:_{TYPE}){{1,3}})")


def table_members() -> list[str]:
    text = (CSRC / "kernels" / "kernels.h").read_text()
    struct = text.split("typedef struct AfpqKernels {")[1].split("} AfpqKernels;")[0]
    return re.findall(r"^  \w+ \(\*(\w+)\)\(", struct, re.M)


@pytest.mark.parametrize("name", table_members())
def test_kernel_names_follow_the_grammar(name: str) -> None:
    # <op>_<dst>[_<lhs>[_<rhs>]]
    assert re.fullmatch(KERNEL, name), name


def kernel_tables() -> list[tuple[str, str, list[str]]]:
    """Every table in the sources: C++ name, isa, functions. Numbers stand for preferences."""
    pattern = r'const AfpqKernels (kAfpqKernels\w+) = \{\s*"(\w+)",([^}]*)\}'
    return [
        (name, isa, re.findall(r"\b[a-z]\w+", body))
        for path in sources(CSRC / "kernels")
        for name, isa, body in re.findall(pattern, path.read_text())
    ]


@pytest.mark.parametrize("table", kernel_tables(), ids=lambda table: table[1])
def test_kernel_tables_are_full_and_named_after_their_members(
    table: tuple[str, str, list[str]],
) -> None:
    name, isa, functions = table
    assert name.removeprefix("kAfpqKernels").lower() == isa
    # <member>[_<mr>x<nr>]_<isa>
    expected = [rf"{member}(?:_\d+x\d+)?_{isa}" for member in table_members()]
    assert len(functions) == len(expected)
    for function, pattern in zip(functions, expected, strict=True):
        assert re.fullmatch(pattern, function), f"{function} stands where {pattern} belongs"


def test_every_declared_table_exists() -> None:
    declared = re.findall(
        r"extern const AfpqKernels (\w+);", (CSRC / "kernels" / "kernels.h").read_text()
    )
    assert sorted(declared) == sorted(name for name, _, _ in kernel_tables())


def nm(path: Path, *options: str) -> list[tuple[str, str]]:
    """Type letter and name of each symbol."""
    if shutil.which("nm") is None:
        pytest.skip("needs nm")
    output = subprocess.run(
        ["nm", *options, str(path)], capture_output=True, text=True, check=True
    ).stdout
    return [(line.split()[-2], line.split()[-1]) for line in output.splitlines() if line.strip()]


def isa_objects() -> list[Path]:
    names = {f"{p.name}.o" for p in isa_files()}
    found = (p for p in (ROOT / "build").rglob("*.cc.o") if p.name in names)
    return sorted(p for p in found if not {"asan", "cross-aarch64"} & set(p.parts))


def test_instruction_set_objects_have_no_weak_symbols() -> None:
    objects = isa_objects()
    if not objects:
        pytest.skip("needs a build folder")
    for path in objects:
        weak = [name for kind, name in nm(path) if kind in "WwVvu"]
        assert not weak, f"{path.name} has weak symbols: {weak}"


@pytest.mark.skipif(sys.platform != "linux", reason="reads ELF symbols")
def test_custom_op_library_exports_one_symbol() -> None:
    afpq = importlib.import_module("afpq")
    library = Path(afpq.ort_library_path())
    # A sanitized build exports the marks of the sanitizer too.
    exported = {
        name for _, name in nm(library, "-D", "--defined-only") if not name.startswith("__asan")
    }
    assert exported == {"RegisterCustomOps"}
    needed = subprocess.run(
        ["nm", "-D", "--undefined-only", str(library)], capture_output=True, text=True, check=True
    ).stdout
    assert "Ort" not in needed, "the library must reach the runtime through its table only"


def repository_files() -> list[Path]:
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("needs the git checkout")
    listing = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    ).stdout
    paths = [ROOT / name for name in listing.decode().split("\0") if name]
    return [path for path in paths if path.is_file()]


def test_no_file_names_a_path_of_one_machine() -> None:
    pattern = re.compile(rb"(?<![\w./-])/(?:home|root|work|Users|tmp|mnt|opt)/\w[\w./-]*")
    found = [
        f"{path.relative_to(ROOT)}: {match.group().decode()}"
        for path in repository_files()
        for match in pattern.finditer(path.read_bytes())
    ]
    assert not found


def test_no_file_is_large() -> None:
    large = [str(p.relative_to(ROOT)) for p in repository_files() if p.stat().st_size > 400_000]
    assert not large


def test_scripts_can_be_executed() -> None:
    for name in (".ci/run", "scripts/check", "scripts/demo", "scripts/test"):
        assert os.access(ROOT / name, os.X_OK), f"{name} is not executable"
