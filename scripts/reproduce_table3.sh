#!/usr/bin/env bash
# Table 3 of the paper: the whole sweep, both conventions of ContraNorm's scale and as many scales for PN-SI where depth
# hurts it, then two tables (every scale; for each norm the scale of best validation accuracy) and a figure per data set.
# Takes the variables of gnn/run_different_baselines.sh (DATASETS, DEPTHS, NORMS, SCALES, SEEDS, ...); `--dry-run` prints
# the plan only. Re-running the command after a stop resumes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/python.sh
source scripts/records.sh
export FORMS="${FORMS:-identity eq6}" SCALES="${SCALES:-0.2 0.5 0.8 1.0 2 5 10 20 50}" \
    EQ6_SCALES="${EQ6_SCALES:-0.2 0.5 0.8 1.0}" DEEP_PN_SI_SCALES="${DEEP_PN_SI_SCALES:-0.2 0.5 0.8 2 5 10 20 50}"
export RESULTS="${RESULTS:-results/table3/runs}"
export RECORDS="${RECORDS-$(committed results/table3)}"
folder="$(dirname "$RESULTS")"

status=0
ran bash gnn/run_different_baselines.sh "$@"
if plan_only "$@"; then exit "$status"; fi

records="$(all_records)"
"$PYTHON" -m repro.report.tables --preset table3 --records "$records" --output "$folder/table3.md"
"$PYTHON" -m repro.report.tables --preset table3 --records "$records" --output "$folder/table3_chosen.md" \
    --best scale --by validation_accuracy
"$PYTHON" -m repro.report.figures --records "$records" --each data --best scale --by validation_accuracy \
    --output "$folder/depth.png"
exit "$status"
