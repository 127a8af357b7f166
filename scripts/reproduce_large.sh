#!/usr/bin/env bash
# Two graphs nearly as large as PubMed, on which ContraNorm is reported elsewhere to run out of memory from depth 8: DBLP
# (17,716 nodes) and Coauthor CS (18,333), at depth 2 to 32. Accuracy in linear time, three seeds; and, for three epochs,
# seconds of one and memory of the exact and the linear form. (Exact training of a deep network takes many hours on a
# CPU: DEPTHS=2 EXACT_EPOCHS=200 for one that does not.) Then a table of each. Takes DATASETS, DEPTHS, SEEDS, RESULTS,
# RECORDS; arguments go to repro.sweep.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/python.sh
source scripts/records.sh
export DATASETS="${DATASETS:-dblp coauthor_cs}" DEPTHS="${DEPTHS:-2 4 8 16 32}" DEGREE=1 FORMS=identity
export RESULTS="${RESULTS:-results/large/runs}" SCALES="${SCALES:-1.0}"
export RECORDS="${RECORDS-$(committed results/large results/benchmarks)}"

status=0
NORMS="None CN" IMPLEMENTATION=linear SEEDS="${SEEDS:-0 1 2}" ran bash gnn/run_different_baselines.sh "$@"
NORMS=CN IMPLEMENTATION="blocked linear" SEEDS=0 FLAGS="--epochs ${EXACT_EPOCHS:-3}" ran bash gnn/run_different_baselines.sh "$@"
if plan_only "$@"; then exit "$status"; fi
records="$(all_records)"
table() { "$PYTHON" -m repro.report.tables --records "$records" --rows data,method,implementation --columns depth --metric test_accuracy "$@"; }
table --where "{epochs: 200}" --output "$(dirname "$RESULTS")/large.md"
table --where "{epochs: ${EXACT_EPOCHS:-3}}" --show costs --output "$(dirname "$RESULTS")/large_costs.md"
exit "$status"
