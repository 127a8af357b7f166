#!/usr/bin/env bash
# Table 3: data sets x norms x depths x seeds, one command per line, through repro.sweep (done cells are skipped).
#   bash gnn/run_different_baselines.sh --dry-run
#   DATASETS=cora DEPTHS="2 4 8" SEEDS="0 1 2" bash gnn/run_different_baselines.sh
# Every baseline runs with and without the shared LayerNorm that ContraNorm's cells use: given to one side alone, its
# share of the gain would be credited to ContraNorm. Arguments go to repro.sweep.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/python.sh

DATASETS="${DATASETS:-cora citeseer chameleon squirrel}"
DEPTHS="${DEPTHS:-2 4 8 16 32}"
NORMS="${NORMS:-None LN PN PN-SI PN-SCS CN}"
SCALES="${SCALES:-0.2 0.5 0.8 1.0}" # of ContraNorm
SEEDS="${SEEDS:-0 1 2 3 4}"
PROTOCOL="${PROTOCOL:-reference}"
FLAGS="${FLAGS:-}" # appended to every line, e.g. "--probe"
RESULTS="${RESULTS:-results/table3/runs}"
JOBS="${JOBS:-2}"
# 1: one process for all seeds of a cell, which loads libraries and graph once. 0: one process per seed, in folders of
# their own. auto: as the sweep in RESULTS began, so that no run is repeated; else 1, unless there are so few cells that
# some of the JOBS processes would soon have nothing to do.
SEEDS_TOGETHER="${SEEDS_TOGETHER:-auto}"

cells() { # arguments: a flag for the seed or seeds, and its values
    local data depth norm scale seed line flag="$1"
    shift
    for data in $DATASETS; do for depth in $DEPTHS; do for norm in $NORMS; do for seed in "$@"; do
        line="python -m gnn.main --config gnn/configs/$data.yaml --protocol $PROTOCOL --nlayer $depth --norm_mode $norm"
        if [ "$norm" = CN ]; then
            for scale in $SCALES; do
                echo "$line --norm_scale $scale --use_layer_norm $flag $seed $FLAGS"
            done
        else
            echo "$line $flag $seed $FLAGS"
            echo "$line --use_layer_norm $flag $seed $FLAGS"
        fi
    done; done; done; done
}
one_by_one() { cells --seed $SEEDS; }
listed="$(echo $SEEDS | tr ' ' ',')"
together() { cells --seeds "$listed"; }
began() { grep -Eqs -e "$1" "$RESULTS/sweep.txt"; }
few() { [ "$(together | wc -l)" -lt $((4 * JOBS)) ] || [ "$(wc -w <<<"$SEEDS")" -lt 2 ]; }

case "$SEEDS_TOGETHER" in
    0) lines="$(one_by_one)" ;;
    1) lines="$(together)" ;;
    auto)
        if began " --seeds $listed( |\$)" || { ! began " --seed [0-9]" && ! few; }; then
            lines="$(together)"
        else
            lines="$(one_by_one)"
        fi
        ;;
    *) echo "error: SEEDS_TOGETHER is 0, 1 or auto, not $SEEDS_TOGETHER" >&2 && exit 2 ;;
esac
"$PYTHON" -m repro.sweep --results "$RESULTS" --jobs "$JOBS" --cluster "${CLUSTER:-local}" "$@" <<<"$lines"
