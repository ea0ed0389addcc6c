# Sourced by the other scripts: finds Python, keeps `.venv` up to date, holds what they share.
#
# `setup demo` installs afpq and what it needs; `setup dev` adds the tools of tests and checks. Both do nothing when
# neither the sources of the extension nor pyproject.toml changed since the last time.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

BUILD_TOOLS=("scikit-build-core>=0.11" "nanobind>=2.4" cmake ninja)
TORCH="torch==2.13.0"

say() { printf '\n== %s\n' "$*" >&2; }
fail() { printf 'error: %s\n' "$*" >&2; exit 1; }

# The interpreter named by $PYTHON, else `python3`, else the newest one that is installed.
find_python() {
  local candidate
  for candidate in ${PYTHON:-} python3 python3.13 python3.12 python3.11 python3.10; do
    if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' \
        2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  fail "no Python 3.10 or newer with the venv module was found; set PYTHON to one"
}

# A virtual environment with pip in folder $1, made only when it is not there.
make_venv() {
  if [[ ! -x "$1/bin/python" ]]; then
    "$(find_python)" -m venv "$1"
  fi
  "$1/bin/python" -m pip --version >/dev/null 2>&1 || "$1/bin/python" -m ensurepip --upgrade >/dev/null
}

# One line that changes whenever an installation has to be repeated.
fingerprint() {
  "$1" - <<'PY'
import hashlib, pathlib, sys

digest = hashlib.sha256(f"{sys.version} {pathlib.Path.cwd()}".encode())
files = [pathlib.Path("pyproject.toml")]
files += (p for p in pathlib.Path("csrc").rglob("*") if p.is_file())
for path in sorted(files):
    digest.update(str(path).encode() + b"\0" + path.read_bytes())
print(digest.hexdigest())
PY
}

pip_install() { "$PY" -m pip install -qq --disable-pip-version-check "$@"; }

# torch is optional. It is installed only where pip finds a build for the processor alone: the default one of Linux
# brings gigabytes that nothing here uses.
install_torch() {
  "$PY" -c 'import torch' 2>/dev/null && return
  local found
  found=$("$PY" -m pip install -qq --disable-pip-version-check --dry-run --no-deps \
    --only-binary :all: --report - "$TORCH" 2>/dev/null | "$PY" -c '
import json, sys
try:
    print(json.load(sys.stdin)["install"][0]["download_info"]["url"])
except (ValueError, LookupError):
    print("none")' || true)
  if [[ $found == *cpu* || $(uname) == Darwin ]]; then
    pip_install "$TORCH"
  else
    say "torch: no build without CUDA at hand, tests that need it are skipped"
  fi
}

setup() {
  local level=$1 extra="" stamp=afpq-setup now
  if [[ -n ${VIRTUAL_ENV:-} && -x $VIRTUAL_ENV/bin/python ]]; then
    VENV=$VIRTUAL_ENV
  else
    VENV=$PWD/.venv
    make_venv "$VENV"
  fi
  PY=$VENV/bin/python
  "$PY" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || fail "$VENV has a Python before 3.10"
  export PATH=$VENV/bin:$PATH
  now=$(fingerprint "$PY")
  if grep -qsx -e "$now $level" -e "$now dev" "$VENV/$stamp"; then
    return
  fi
  command -v "${CXX:-c++}" >/dev/null || fail "no C++ compiler (${CXX:-c++}) was found; set CXX to one"
  say "setting up ${VENV#"$PWD/"} with $("$PY" --version)"
  rm -f "$VENV/$stamp"
  [[ $level == dev ]] && extra="[dev]"
  pip_install "${BUILD_TOOLS[@]}"
  # Installed in place: Python files are used where they lie, the extension is built again when its sources change.
  pip_install --no-build-isolation -e ".$extra"
  [[ $level == dev ]] && install_torch
  echo "$now $level" >"$VENV/$stamp"
}

# Everything that reads the sources without running them.
lint() {
  say "ruff, mypy, clang-format, codespell"
  ruff check .
  ruff format --check .
  mypy
  find csrc -name '*.cc' -o -name '*.h' -o -name '*.inc' | xargs clang-format --dry-run -Werror
  codespell
}
