#!/usr/bin/env bash
# Table 3: data sets x depths x norms x seeds, one command per line, through repro.sweep (cells that are done are skipped).
#   bash gnn/run_different_baselines.sh --dry-run
#   DATASETS=cora DEPTHS="2 4 8" SEEDS="0 1 2" bash gnn/run_different_baselines.sh
# Every baseline runs with and without the shared LayerNorm that ContraNorm's cells use: given to one side alone, its
# share of the gain would be credited to ContraNorm. Arguments go to repro.sweep.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/python.sh
source scripts/records.sh

DATASETS="${DATASETS:-cora citeseer chameleon squirrel}"
DEPTHS="${DEPTHS:-2 4 8 16 32}"
NORMS="${NORMS:-None LN PN PN-SI PN-SCS CN}"
FORMS="${FORMS:-identity}"               # of ContraNorm: identity, (1+s)x - sAx as released; eq6, x - s'Ax as in the paper
SCALES="${SCALES:-0.2 0.5 0.8 1.0}"      # s of ContraNorm
EQ6_SCALES="${EQ6_SCALES:-$SCALES}"      # s' of its form eq6
IMPLEMENTATION="${IMPLEMENTATION:-auto}" # of ContraNorm, one or several: auto, plain and blocked are exact; linear is not
DEGREE="${DEGREE:-}"                     # of linear
PN_SCALES="${PN_SCALES:-1}"              # s of PN, PN-SI and PN-SCS
DEEP_PN_SI_SCALES="${DEEP_PN_SI_SCALES:-}" # further ones of PN-SI, at depth 16 and more
SEEDS="${SEEDS:-0 1 2 3 4}"
PROTOCOL="${PROTOCOL:-reference}"
FLAGS="${FLAGS:-}" # appended to every line, e.g. "--probe"
RESULTS="${RESULTS:-results/table3/runs}"
# Records whose cells are not run again, separated by commas; a cell is known by its flags, so that defaults are left out.
RECORDS="${RECORDS-$(committed results/table3)}"

declare -A form_flag=([identity]="" [eq6]=" --no_identity")
for form in $FORMS; do
    [ -n "${form_flag[$form]+known}" ] || { echo "error: FORMS may hold identity and eq6, not $form" >&2 && exit 2; }
done

variants() { # of one norm at one depth, a line of flags each
    local form scale how scales given
    case "$1" in
        CN) for form in $FORMS; do
            if [ "$form" = eq6 ]; then scales="$EQ6_SCALES"; else scales="$SCALES"; fi
            for scale in $scales; do for how in $IMPLEMENTATION; do
                if [ "$how" = auto ]; then given=""; else given=" --implementation $how"; fi
                if [ "$how" = linear ]; then given+="${DEGREE:+ --degree $DEGREE}"; fi
                echo "--norm_scale $scale${form_flag[$form]} --use_layer_norm$given"
            done; done
        done ;;
        PN*)
            scales="$PN_SCALES"
            if [ "$1" = PN-SI ] && [ "$2" -ge 16 ]; then scales+=" $DEEP_PN_SI_SCALES"; fi
            for scale in $scales; do
                if [ "$scale" = 1 ]; then given=""; else given="--norm_scale $scale "; fi
                printf '%s\n' "$given" "$given--use_layer_norm"
            done ;;
        *) printf '%s\n' "" "--use_layer_norm" ;;
    esac
}

for data in $DATASETS; do for depth in $DEPTHS; do for norm in $NORMS; do
    line="python -m gnn.main --config gnn/configs/$data.yaml --protocol $PROTOCOL --nlayer $depth --norm_mode $norm"
    variants "$norm" "$depth" | while read -r flags; do
        for seed in $SEEDS; do echo "$line $flags --seed $seed $FLAGS"; done
    done
done; done; done |
    "$PYTHON" -m repro.sweep --results "$RESULTS" ${RECORDS:+--records "[$RECORDS]"} --jobs "${JOBS:-2}" \
        --cluster "${CLUSTER:-local}" "$@"
