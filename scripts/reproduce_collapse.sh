#!/usr/bin/env bash
# The paper's collapse figures for graphs: a deep GCN on Cora, each norm with and without the LayerNorm, three seeds, every
# layer measured before and after training; then a figure of the metrics per layer, one of the last layer's singular
# values, and tables of its effective rank and of how many dimensions hold 90 % of them. MiniLM and DeiT are measured by
# the runs of scripts/reproduce_table1.sh and reproduce_table2.sh with PRESET=cpu.
# Takes the variables of gnn/run_different_baselines.sh; `--dry-run` prints the plan only. Re-running resumes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/python.sh
source scripts/records.sh
export DATASETS="${DATASETS:-cora}" DEPTHS="${DEPTHS:-16}" NORMS="${NORMS:-None LN PN-SI CN}" SEEDS="${SEEDS:-0 1 2}"
export SCALES="${SCALES:-1.0 10}" IMPLEMENTATION="${IMPLEMENTATION:-linear}" DEGREE="${DEGREE:-1}" FLAGS="${FLAGS:---probe}"
export RESULTS="${RESULTS:-results/collapse/runs}"
export RECORDS="${RECORDS-$(committed results/collapse)}"
folder="$(dirname "$RESULTS")"

status=0
ran bash gnn/run_different_baselines.sh "$@"
if plan_only "$@"; then exit "$status"; fi
records="$(all_records)"
for kind in collapse spectrum; do
    "$PYTHON" -m repro.report.figures --records "$records" --kind "$kind" --each data,depth --output "$folder/$kind"
done
for metric in {effective_rank,dimensions}{_untrained,}; do
    "$PYTHON" -m repro.report.tables --records "$records" --rows data,method --columns depth --metric "$metric" \
        --percent false --show cells --output "$folder/$metric.md"
done
exit "$status"
