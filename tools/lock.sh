#!/usr/bin/env bash
# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
#
# Writes requirements/lock-py*.txt, which tools/setup_env.sh installs from: every package that
# setup.py and Detectron2 need, by version and by the hashes of its files; and constraints-py*.txt,
# the versions alone. To be run after a change of setup.py.
#
#   bash tools/lock.sh
#
# Versions in constraints-py*.txt stay: to get a newer one, change or delete its line before. Needs
# uv (pip install uv), which asks its own default index, or UV_DEFAULT_INDEX.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# What builds packages, finds Detectron2's source, and what Detectron2 needs.
others() {
  printf '%s\n' pip setuptools wheel unearth
  sed -n 's/^Requires-Dist: //p' tools/detectron2_pure/METADATA
}

for version in 3.10 3.11 3.12; do
  constraints="requirements/constraints-py${version/./}.txt"
  lock="requirements/lock-py${version/./}.txt"
  others | uv pip compile -q setup.py - --extra dev --constraints "$constraints" \
    --python-version "$version" --python-platform x86_64-manylinux_2_28 --generate-hashes \
    --no-annotate --custom-compile-command "bash tools/lock.sh" --output-file "$lock"
  {
    echo "# The versions in $(basename "$lock"), for other platforms, and for"
    echo "# pip install -c: under Python $version (Linux, x86-64) they were tested together."
    grep -o '^[^ #]*==[^ ]*' "$lock"
  } >"$constraints.part"
  mv "$constraints.part" "$constraints"
done
