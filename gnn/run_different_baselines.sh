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

cells() {
    local data depth norm scale seed line
    for data in $DATASETS; do for depth in $DEPTHS; do for norm in $NORMS; do for seed in $SEEDS; do
        line="python -m gnn.main --config gnn/configs/$data.yaml --protocol $PROTOCOL --nlayer $depth --norm_mode $norm"
        if [ "$norm" = CN ]; then
            for scale in $SCALES; do
                echo "$line --norm_scale $scale --use_layer_norm --seed $seed $FLAGS"
            done
        else
            echo "$line --seed $seed $FLAGS"
            echo "$line --use_layer_norm --seed $seed $FLAGS"
        fi
    done; done; done; done
}

cells | "$PYTHON" -m repro.sweep --results "$RESULTS" --jobs "${JOBS:-2}" --cluster "${CLUSTER:-local}" "$@"
