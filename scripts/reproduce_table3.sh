#!/usr/bin/env bash
# Table 3 of the paper: the whole sweep, then two tables (every scale of ContraNorm; the scale of best validation
# accuracy, the same for every scaled norm) and a figure per data set. Takes the variables of
# gnn/run_different_baselines.sh (DATASETS, DEPTHS, NORMS, SCALES, SEEDS, ...); `--dry-run` prints the plan only.
# Stopped in the middle, the same command goes on.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/python.sh
export RESULTS="${RESULTS:-results/table3/runs}"
folder="$(dirname "$RESULTS")"

status=0
bash gnn/run_different_baselines.sh "$@" || status=$?
for argument in "$@"; do case "$argument" in --dry-run | --dry_run | --status) exit "$status" ;; esac; done
if [ "$status" -gt 1 ]; then exit "$status"; fi # 1: some cells failed, and the rest make a table
"$PYTHON" -m repro.report.tables --preset table3 --records "$RESULTS" --output "$folder/table3.md"
"$PYTHON" -m repro.report.tables --preset table3 --records "$RESULTS" --output "$folder/table3_chosen.md" \
    --best scale --by validation_accuracy
"$PYTHON" -m repro.report.figures --records "$RESULTS" --kind depth --each data --output "$folder/depth.png"
exit "$status"
