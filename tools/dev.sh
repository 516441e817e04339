#!/usr/bin/env bash
# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
#
# What a change goes through before it is committed: formats the code, mends what lint can, names
# the rest, and runs the quick tests.
#
#   bash tools/dev.sh          all quick tests
#   bash tools/dev.sh ...      anything goes to pytest, for example tests/data or -x
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"
cd "$ROOT"
"$PYTHON" -m ruff check --fix .
"$PYTHON" -m ruff format .
exec bash tools/test.sh "$@"
