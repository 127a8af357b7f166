#!/usr/bin/env bash
# Table 3 of the paper: the whole sweep, then the table and the figure. Takes the variables of
# gnn/run_different_baselines.sh (DATASETS, DEPTHS, NORMS, SCALES, SEEDS, ...); `--dry-run` prints the plan only.
# Stopped in the middle, the same command goes on.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON="${PYTHON:-python}"
export PYTHON RESULTS="${RESULTS:-results/table3/runs}"

bash gnn/run_different_baselines.sh "$@"
for argument in "$@"; do [ "$argument" = --dry-run ] && exit 0; done
"$PYTHON" -m repro.tables table3 --results "$RESULTS" --output_dir "$(dirname "$RESULTS")"
"$PYTHON" -m repro.figures table3 --results "$RESULTS" --output_dir "$(dirname "$RESULTS")"
