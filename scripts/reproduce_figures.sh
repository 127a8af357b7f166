#!/usr/bin/env bash
# Every figure again from the records in results/ (RESULTS names another folder): no training, a few seconds each.
#   graph runs        accuracy against depth per data set; where runs were probed, collapse per layer
#   image runs        accuracy against depth per model; learning curves where metrics.jsonl is there
# The figures are written beside the records. results/flags holds one cell computed in several ways, which is no curve:
# `python -m benchmarks.flags` tabulates it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/python.sh
RESULTS="${RESULTS:-results}"

holds() { grep -rqs --include=record.json --include=records.jsonl -e "$1" "$folder"; }
draw() { "$PYTHON" -m repro.report.figures --records "$folder" "$@"; }

drawn=0
for folder in "$RESULTS"/*/; do
    folder="${folder%/}"
    if [ "${folder##*/}" = flags ]; then continue; fi
    if holds '"experiment": "gnn"'; then
        draw --each data --output "$folder/depth.png"
        # "collapse", and "probe" in records of schema 1
        if holds '"\(collapse\|probe\)": {'; then
            draw --kind collapse --each data,depth --output "$folder/collapse.png"
        fi
        drawn=1
    fi
    if holds '"experiment": "ViT_imagenet"'; then
        draw --each data,model --output "$folder/depth.png"
        for run in "$folder"/*/metrics.jsonl; do
            if [ -f "$run" ]; then "$PYTHON" -m ViT_imagenet.curves --runs "$folder"; fi
            break
        done
        drawn=1
    fi
done
if [ "$drawn" = 0 ]; then
    echo "no records of graph or image runs below $RESULTS: run a sweep first (scripts/reproduce_table3.sh)" >&2
    exit 2
fi
