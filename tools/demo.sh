#!/usr/bin/env bash
# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
#
# From nothing to a detector: sets up the environment, see setup_env.sh, makes synthetic videos,
# learns a detector from them in all stages, evaluates it and draws what it found.
#
#   bash tools/demo.sh [KEY VALUE ...]     configuration keys, for example SEED 2
#
# Interrupted and run again, it goes on where it stopped.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"
cd "$ROOT"

DATA="$ROOT/datasets"
OUTPUT="output/demo"
export DETECTRON2_DATASETS="$DATA"
# Threads that spin while they wait take the cores from the process that reads the data.
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"
"$PYTHON" datasets/prepare_synthetic.py --output "$DATA/synthetic_av"
# Reading mp4 files again in every epoch would take most of the time.
"$PYTHON" tools/prepare_clips.py --clips "$DATA/synthetic_av/train.csv" --short-side 128 \
  --output "$DATA/synthetic_av/prepared"
"$PYTHON" tools/run_pipeline.py --config-file configs/quick_schedules/synthetic_pipeline.yaml \
  OUTPUT_DIR "$OUTPUT" DATASETS.PREPARED "$DATA/synthetic_av/prepared" "$@"
"$PYTHON" tools/visualize_results.py --run "$OUTPUT"
cat "$OUTPUT/table.md"
echo "This table is $OUTPUT/table.md; the page is $OUTPUT/report/index.html; the pictures are in $OUTPUT/pictures"
