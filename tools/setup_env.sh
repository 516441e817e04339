# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
#
# Makes the environment that everything runs in. Sourced by demo.sh and test.sh, it names its Python
# in $PYTHON; run by itself, it does no more.
# What was done before is skipped. Outside the checkout nothing is written but pip's own cache.
# Every package is of the version, and has the hash, that requirements/lock-py*.txt says.
#
#   AVDET2_BASE_PYTHON=PATH  makes .venv with this Python; otherwise a Python 3.10-3.12 is looked for
#   AVDET2_PYTHON=PATH       uses the environment of this Python, which has PyTorch and Detectron2
#                            already, in place of .venv, and installs only avdet2 there; where
#                            other packages are missing, it says how to install them, and stops
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="$ROOT/.venv"
STAMPS="$VENV/.avdet2-stamps"
# Matplotlib would keep its list of fonts in the home folder.
export MPLCONFIGDIR="${MPLCONFIGDIR:-$ROOT/.cache/matplotlib}"
export PIP_DISABLE_PIP_VERSION_CHECK=1

say() { printf 'set-up: %s\n' "$*" >&2; }

fail() {
  say "$@"
  exit 1
}

is_supported() {
  "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null
}

find_base_python() {
  local candidate module
  if [[ -n "${AVDET2_BASE_PYTHON:-}" ]]; then
    is_supported "$AVDET2_BASE_PYTHON" ||
      fail "AVDET2_BASE_PYTHON=$AVDET2_BASE_PYTHON is not a Python 3.10, 3.11 or 3.12"
    BASE_PYTHON="$AVDET2_BASE_PYTHON"
    return
  fi
  # Some systems' Python comes without ensurepip: one that has it goes first.
  for module in ensurepip sys; do
    for candidate in python3.11 python3.12 python3.10 python3 python; do
      if is_supported "$candidate" && "$candidate" -c "import $module" 2>/dev/null; then
        BASE_PYTHON="$candidate"
        return
      fi
    done
  done
  fail "no Python 3.10, 3.11 or 3.12 was found: install one, or name it in AVDET2_BASE_PYTHON"
}

# lock_of PYTHON: the file that says what is installed for it.
lock_of() {
  printf '%s/requirements/lock-py%s.txt' "$ROOT" \
    "$("$1" -c 'import sys; print("%d%d" % sys.version_info[:2])')"
}

# The part of a lock file by which packages without wheels are built.
build_tools() {
  awk '/^[^ #]/ {kept = /^(packaging|pip|setuptools|wheel)==/} kept' "$1"
}

make_venv() {
  find_base_python
  say "making .venv with $("$BASE_PYTHON" --version)"
  if "$BASE_PYTHON" -c 'import ensurepip' 2>/dev/null; then
    "$BASE_PYTHON" -m venv "$VENV"
  elif "$BASE_PYTHON" -m pip --version >/dev/null 2>&1; then
    "$BASE_PYTHON" -m venv --without-pip "$VENV"
    "$BASE_PYTHON" -m pip --python "$VENV/bin/python" install -q --require-hashes \
      -r <(build_tools "$(lock_of "$BASE_PYTHON")")
  else
    fail "$BASE_PYTHON has neither ensurepip nor pip: run \`sudo apt install python3-venv\`," \
      "or name another Python in AVDET2_BASE_PYTHON"
  fi
}

# digest FILE...: a hash of the files' contents and of the place of this checkout.
digest() {
  { printf '%s\n' "$ROOT" && cat "$@"; } | sha256sum
}

# step NAME DIGEST COMMAND...: runs the command unless it was done with the same digest before.
step() {
  local stamp="$STAMPS/$1" digest="$2"
  if [[ -f "$stamp" && "$(<"$stamp")" == "$digest" ]]; then
    return
  fi
  say "installing $1"
  shift 2
  "$@"
  mkdir -p "$STAMPS"
  printf '%s\n' "$digest" >"$stamp"
}

# Packages without wheels are built with the locked setuptools, hence no build isolation.
pip_install() {
  "$PYTHON" -m pip install -qq --no-build-isolation "$@"
}

install_build_tools() {
  pip_install --require-hashes -r <(build_tools "$LOCK")
}

install_detectron2() {
  # What an older state of the installer made is replaced; any other that works stays.
  if [[ -f "$STAMPS/detectron2" &&
    "$("$PYTHON" -m pip show detectron2 2>/dev/null)" == *"Version: 0.6+pure"* ]]; then
    "$PYTHON" -m pip uninstall -q -y detectron2
  fi
  "$PYTHON" "$ROOT/tools/install_detectron2.py" -- -q --no-deps
}

install_avdet2() {
  pip_install --no-deps -e "$ROOT"
  "$PYTHON" -m pip check
}

use_venv() {
  local tools="$ROOT/tools"
  PYTHON="$VENV/bin/python"
  [[ -d "$VENV" ]] || make_venv
  # One whose making was interrupted has no pip.
  { is_supported "$PYTHON" && "$PYTHON" -c 'import pip' 2>/dev/null; } ||
    fail "$VENV is not a working environment of Python 3.10-3.12: delete it and run this again"
  LOCK="$(lock_of "$PYTHON")"
  step pip "$(digest "$LOCK")" install_build_tools
  step packages "$(digest "$LOCK")" pip_install --require-hashes -r "$LOCK"
  step detectron2 \
    "$(digest "$LOCK" "$tools/install_detectron2.py" "$tools/detectron2_pure/"*)" install_detectron2
  step avdet2 "$(digest "$LOCK" "$ROOT/setup.py" "$ROOT/setup.cfg")" install_avdet2
}

# missing_packages EXTRA: prints what avdet2 (EXTRA "") or its tests (EXTRA dev) need and this
# environment lacks, as words for `pip install`. The PyTorch, NumPy and OpenCV that are there stand
# among them: pip then refuses what does not go with them, and leaves them as they are.
missing_packages() {
  "$PYTHON" - "$1" <<'END'
import importlib.metadata
import importlib.util
import shlex
import sys

try:
    from packaging.requirements import Requirement
except ImportError:
    from pip._vendor.packaging.requirements import Requirement

installed = {d.metadata["Name"].lower(): d.version for d in importlib.metadata.distributions()}
missing = []
for requirement in map(Requirement, importlib.metadata.requires("avdet2")):
    name, marker = requirement.name.lower(), requirement.marker
    # The other builds of OpenCV, such as opencv-python, serve as well.
    has_opencv = name.startswith("opencv") and importlib.util.find_spec("cv2")
    wanted = not marker or marker.evaluate({"extra": sys.argv[1]})
    version = installed.get(name)
    if has_opencv or not wanted or (version and requirement.specifier.contains(version, True)):
        continue
    if name == "torchaudio":
        missing.append("torchaudio==" + installed["torch"].partition("+")[0])
    else:
        missing.append(requirement.name + str(requirement.specifier))
kept = [f"{name}=={version}" for name, version in sorted(installed.items())
        if name in ("torch", "torchvision", "numpy") or name.startswith("opencv")]
if missing:
    print(shlex.join(missing + kept))
END
}

use_own_environment() {
  local error origin missing options=(-qq --no-deps)
  is_supported "$AVDET2_PYTHON" ||
    fail "AVDET2_PYTHON=$AVDET2_PYTHON is not a Python 3.10, 3.11 or 3.12"
  PYTHON="$("$AVDET2_PYTHON" -c 'import sys; print(sys.executable)')"
  if ! error="$(cd / && "$PYTHON" -c 'import detectron2.config' 2>&1)"; then
    fail "Detectron2 does not work in the environment AVDET2_PYTHON=$AVDET2_PYTHON" \
      "(${error##*$'\n'}): install it there, for example with tools/install_detectron2.py"
  fi
  origin="$(cd / && "$PYTHON" -c 'import importlib.util
spec = importlib.util.find_spec("avdet2")
print(spec.origin if spec else "")')"
  if [[ ! "$origin" -ef "$ROOT/avdet2/__init__.py" ]]; then
    say "installing avdet2 in the environment of $PYTHON"
    # Without isolation, where possible, it needs no network.
    "$PYTHON" -c 'import setuptools, wheel' 2>/dev/null && options+=(--no-build-isolation)
    "$PYTHON" -m pip install "${options[@]}" -e "$ROOT"
  fi
  missing="$(missing_packages "")"
  [[ -z "$missing" ]] ||
    fail "packages are missing in the environment of $PYTHON. Run: $PYTHON -m pip install $missing"
  missing="$(missing_packages dev)"
  [[ -z "$missing" ]] ||
    say "for all tests, run: $PYTHON -m pip install $missing"
}

if [[ -n "${AVDET2_PYTHON:-}" ]]; then
  use_own_environment
else
  use_venv
fi
