#!/usr/bin/env bash
# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
#
# From nothing to a detector: sets up the environment, see setup_env.sh, makes synthetic videos,
# learns a detector from them in all stages, evaluates it and draws what it found.
#
#   bash tools/demo.sh [KEY VALUE ...]     configuration keys, for example SEED 1
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"
cd "$ROOT"

OUTPUT="output/demo"
"$PYTHON" datasets/prepare_synthetic.py --output datasets/synthetic_av
"$PYTHON" tools/run_pipeline.py --config-file configs/quick_schedules/synthetic_demo.yaml \
  OUTPUT_DIR "$OUTPUT" "$@"
"$PYTHON" tools/visualize_results.py "$OUTPUT"
