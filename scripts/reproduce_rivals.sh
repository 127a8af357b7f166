#!/usr/bin/env bash
# ContraNorm and its rivals on graphs under one protocol: every method gets TRIALS settings per data set and depth on a
# seed of its own, the best on validation is trained with SEEDS, then the table. Re-running the command resumes.
#   bash scripts/reproduce_rivals.sh --dry-run
#   DATASETS=digits DEPTHS="2 8" METHODS="vanilla gcnii contranorm" TRIALS=4 SEEDS="0 1 2" bash scripts/reproduce_rivals.sh
# METHODS are those of gnn/configs/tuning.yaml, which says what is searched. Arguments go to repro.sweep.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/python.sh
source scripts/records.sh

DATASETS="${DATASETS:-cora digits}"
DEPTHS="${DEPTHS:-2 8 16}"
METHODS="${METHODS:-vanilla layer_norm pair_norm dgn gcnii g2 half_hop initial jumping contranorm}"
TRIALS="${TRIALS:-8}"
TUNING_SEEDS="${TUNING_SEEDS:-100}"
SEEDS="${SEEDS:-0 1 2 3 4 5 6 7 8 9}"
FLAGS="${FLAGS:-}" # appended to every line, e.g. "--device cpu"
RESULTS="${RESULTS:-results/rivals}"
# Records whose cells are not run again, separated by commas.
RECORDS="${RECORDS-$(committed results/rivals)}"

tune() { # arguments of the second call
    # shellcheck disable=SC2086
    "$PYTHON" -m repro.tune --space gnn/configs/tuning.yaml --data $DATASETS --depths $DEPTHS --methods $METHODS \
        --trials "$TRIALS" --tuning_seeds $TUNING_SEEDS --seeds $SEEDS ${FLAGS:+"--flags=$FLAGS"} "$@"
}
places() { # the committed records and a folder's own
    local own=""
    if has_runs "$1"; then own="$1"; fi
    echo "[$RECORDS${RECORDS:+${own:+,}}$own]"
}
sweep() { # into a folder
    local folder="$1"
    shift
    "$PYTHON" -m repro.sweep --results "$folder" ${RECORDS:+--records "[$RECORDS]"} --jobs "${JOBS:-2}" \
        --cluster "${CLUSTER:-local}" "$@"
}

tune | sweep "$RESULTS/tuning" "$@"
if plan_only "$@"; then exit 0; fi

final="$(tune --choose "$(places "$RESULTS/tuning")" --output "$RESULTS/tuning.json")"
status=0
ran sweep "$RESULTS/runs" "$@" <<<"$final"
"$PYTHON" -m repro.report.tables --preset rivals --records "$(places "$RESULTS/runs")" --output "$RESULTS/table.md"
exit "$status"
