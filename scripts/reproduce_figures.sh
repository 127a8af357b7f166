#!/usr/bin/env bash
# Every figure again from the records in results/ (RESULTS names another folder): no training, a few seconds each.
#   graph runs        accuracy against depth per data set, each norm at its best scale by validation; against the
#                     step's scale where several were run; where runs were probed, collapse per layer
#   image runs        accuracy against depth per model; learning curves of more than one epoch; of the deepest,
#                     where probed, collapse per layer and spectrum
#   GLUE runs         where probed, the same for each task, ContraNorm at its best scale
#   self-supervised   for each file of records: spectra, learning curves, likelihood by prefix where there are tokens
# The figures are written beside the records, as SVG and PNG. results/flags holds single cells and results/table3_exact one
# method, which are not drawn. `python -m repro.report.check` tells whether they are up to date.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/python.sh
RESULTS="${RESULTS:-results}"

scales() { # of ContraNorm's graph runs
    grep -rhs --include=record.json --include=records.jsonl -A3 '"norm_mode": "CN"' "$folder" |
        grep -oE '"(norm_)?scale": [0-9.]+' | sort -u
}
holds() { grep -rqs --include=record.json --include=records.jsonl -e "$1" "$folder"; }
draw() { "$PYTHON" -m repro.report.figures --records "$folder" "$@"; }
probed() { for kind in collapse spectrum; do draw --kind "$kind" "$@" --output "$folder/$kind"; done; }

drawn=0
for folder in "$RESULTS"/*/; do
    folder="${folder%/}"
    case "${folder##*/}" in flags | table3_exact) continue ;; esac
    if [ "${folder##*/}" = rivals ]; then # settings differ from cell to cell
        draw --each data --x depth --label family --output "$folder/depth"
        drawn=1
        continue
    fi
    if [ "${folder##*/}" = collapse ]; then # one depth, two scales
        probed --each data,depth
        drawn=1
        continue
    fi
    if holds '"experiment": "gnn"'; then
        draw --each data --best scale --by validation_accuracy --output "$folder/depth"
        if [ "$(scales | wc -l)" -gt 1 ]; then
            draw --kind scale --each data --output "$folder/scale"
        fi
        # "collapse", and "probe" in records of schema 1
        if holds '"\(collapse\|probe\)": {'; then
            draw --kind collapse --each data,depth --output "$folder/collapse"
        fi
        drawn=1
    fi
    if holds '"experiment": "ViT_imagenet"'; then
        draw --each data,model --output "$folder/depth"
        if holds '"epochs": \([2-9]\|[1-9][0-9]\)' && { holds '"curve": {' || compgen -G "$folder/*/metrics.jsonl" > /dev/null; }; then
            draw --kind curves --each data,model --output "$folder/curves"
        fi
        if holds '"spectrum": \['; then
            deepest="$(grep -rhosE '"depth": [0-9]+' "$folder" | grep -oE '[0-9]+' | sort -n | tail -1)"
            probed --where "{depth: '$deepest'}" --each data,model
        fi
        drawn=1
    fi
    if holds '"experiment": "BERT_glue"' && holds '"spectrum": \['; then
        probed --each data --best scale --by score
        drawn=1
    fi
    for records in "$folder"/*/records.jsonl; do
        if grep -qs '"experiment": "SSL_cifar"' "$records"; then
            for kind in spectrum curves prefix; do
                if [ "$kind" != prefix ] || grep -q '"prefix_nll"' "$records"; then
                    "$PYTHON" -m repro.report.figures --records "$records" --kind "$kind" --output "${records%/records.jsonl}-$kind"
                fi
            done
            drawn=1
        fi
    done
done
if [ "$drawn" = 0 ]; then
    echo "no records of runs below $RESULTS: run a sweep first (scripts/reproduce_table3.sh)" >&2
    exit 2
fi
