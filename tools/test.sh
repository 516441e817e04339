#!/usr/bin/env bash
# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
#
# Sets up the environment, see setup_env.sh, and runs the tests.
#
#   bash tools/test.sh               the quick ones
#   bash tools/test.sh --slow        all
#   bash tools/test.sh [--slow] ...  anything else goes to pytest, for example tests/data or -x
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"
cd "$ROOT"

marks=(-m "not slow")
if [[ "${1:-}" == "--slow" ]]; then
  marks=()
  shift
fi
# The tensors are small, and tests start processes of their own.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# Two processes: tests of a file share what they have made, so a file stays in one of them.
exec "$PYTHON" -m pytest -q -n 2 --dist loadfile "${marks[@]}" "$@"
