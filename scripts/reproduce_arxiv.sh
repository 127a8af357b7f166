#!/usr/bin/env bash
# ogbn-arxiv: a teacher and a student for each arm and seed, then a table beside the published numbers and a figure of
# what D-ContraNorm does over training.
#   bash scripts/reproduce_arxiv.sh --dry-run                                  the published protocol: lines, GPU hours
#   DATA=dblp SEEDS="0 1 2" EPOCHS=120 FLAGS="--n_hidden 64" bash scripts/reproduce_arxiv.sh       on a laptop
# Arms: none; dcn (D-ContraNorm, s = 1, tau = 1, as published); dcn-scaled (this project's own: tau = N / D).
# A student's teacher is the one of its own arm and seed: the release does not say how its teachers were trained.
# Arguments go to repro.sweep. Stopped in the middle, the same command resumes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/python.sh
source scripts/records.sh

DATA="${DATA:-ogbn-arxiv}"
case "$DATA" in ogbn-arxiv) arms="none dcn" ;; *) arms="none dcn dcn-scaled" ;; esac
ARMS="${ARMS:-$arms}"
MODES="${MODES:-teacher student}"
SEEDS="${SEEDS:-0 1 2 3 4 5 6 7 8 9}"
EPOCHS="${EPOCHS:-1000}"
LAYERS="${LAYERS:-2}"
FLAGS="${FLAGS:-}" # appended to every line, e.g. "--probe"
RESULTS="${RESULTS:-results/arxiv_$DATA/runs}"
JOBS="${JOBS:-2}"
place="$(printf %q "$RESULTS")" # as a word of a line
TFLOPS="${TFLOPS:-5}" # what a GPU sustains in float32, for the estimate

norm_of() {
    case "$1" in
        none) echo "--norm none" ;;
        dcn) echo "--norm ContraNorm --scale 1" ;;
        dcn-scaled) echo "--norm ContraNorm --scale 1 --scaled_tau" ;;
        *) echo "error: ARMS knows none, dcn and dcn-scaled, not $1" >&2 && exit 2 ;;
    esac
}
lines() { # argument: teacher or student
    local arm norm seed run
    for arm in $ARMS; do
        norm="$(norm_of "$arm")"
        for seed in $SEEDS; do
            run="layers$LAYERS-$arm-seed$seed"
            line="python -m gnn.arxiv --config gnn/arxiv/configs/$DATA.yaml --mode $1 $norm --n_layers $LAYERS"
            line="$line --n_epochs $EPOCHS --seed $seed${FLAGS:+ $FLAGS} --output_dir $place/$1-$run"
            [ "$1" = teacher ] || line="$line --teacher $place/teacher-$run"
            echo "$line"
        done
    done
}
# Operations of a forward pass at 768 input features, in TFLOP: first layer 0.42, other 0.024, D-ContraNorm 0.40; each
# reversible block 0.20 and D-ContraNorm again. An epoch is about six forward passes, eight of a reversible block.
estimate() {
    local arm runs
    for arm in $ARMS; do
        runs=$(($(wc -w <<<"$SEEDS") * $(wc -w <<<"$MODES")))
        awk -v arm="$arm" -v runs="$runs" -v epochs="$EPOCHS" -v blocks="$((LAYERS - 2))" -v rate="$TFLOPS" 'BEGIN {
            norm = arm == "none" ? 0 : 0.40
            each = epochs * (6 * (0.444 + norm) + blocks * (8 * 0.20 + 6 * norm)) / rate / 3600
            printf "estimate, not measured: %s: %d runs of %.2f GPU hours (at %g TFLOP/s sustained): %.1f\n",
                arm, runs, each, rate, runs * each }'
    done
}

for arm in $ARMS; do norm_of "$arm" >/dev/null; done # an unknown one ends the script
status=0
for mode in $MODES; do # all teachers first
    ran "$PYTHON" -m repro.sweep --results "$RESULTS" --jobs "$JOBS" --cluster "${CLUSTER:-local}" "$@" <<<"$(lines "$mode")"
done
for argument in "$@"; do
    case "$argument" in
        --dry-run | --dry_run)
            if [ "$DATA" = ogbn-arxiv ]; then estimate; fi
            exit "$status"
            ;;
        --status) exit "$status" ;;
    esac
done
folder="$(dirname "$RESULTS")"
for metric in validation_accuracy test_accuracy; do
    "$PYTHON" -m repro.report.tables --preset arxiv --records "$RESULTS" --metric "$metric" --output "$folder/$metric.md"
done
case " $ARMS " in *" dcn"*) "$PYTHON" -m gnn.arxiv.activity --records "$RESULTS" --output "$folder/activity.png" ;; esac
exit "$status"
