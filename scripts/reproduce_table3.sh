#!/usr/bin/env bash
# Table 3 of the paper: the whole sweep, then its table and one figure per data set, beside the runs' folder. Takes the
# variables of gnn/run_different_baselines.sh (DATASETS, DEPTHS, NORMS, SCALES, SEEDS, ...) and the arguments of
# repro.sweep; `--dry-run` prints the plan only. Stopped in the middle, the same command goes on.
#   bash scripts/reproduce_table3.sh --dry-run
#   DATASETS=cora DEPTHS="2 8" SEEDS="0 1" RESULTS=out/table3/runs bash scripts/reproduce_table3.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/python.sh
export DATASETS="${DATASETS:-cora citeseer chameleon squirrel}" RESULTS="${RESULTS:-results/table3/runs}"
folder="$(dirname "$RESULTS")"

bash gnn/run_different_baselines.sh "$@"
for argument in "$@"; do
    case "$argument" in --dry-run | --dry_run | --status) exit 0 ;; esac
done
"$PYTHON" -m repro.tables --preset table3 --records "$RESULTS" --output "$folder/table3.md"
"$PYTHON" -m repro.tables --preset table3 --records "$RESULTS" --format csv --output "$folder/table3.csv"
# One ContraNorm row: per data set and depth, the scale with the best mean validation accuracy.
"$PYTHON" -m repro.tables --preset table3 --records "$RESULTS" --rows data,norm_mode,use_layer_norm \
    --best norm_scale --by validation_accuracy --output "$folder/table3_best_scale.md"
for data in $DATASETS; do
    "$PYTHON" -m repro.figures --records "$RESULTS" --where "{data: $data}" --title "$data" --output "$folder/$data.png"
done
