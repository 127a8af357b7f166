#!/usr/bin/env bash
# Methods x data sets x backbones x seeds, and for each method its own knob, one command a line, through repro.sweep.
#   bash SSL_cifar/run_different_baselines.sh --dry-run
#   METHODS=rdm_simsiam SIGMAS="0 -0.5 -1" PRED_LOCATIONS=target CONFIG=siamese_cpu bash SSL_cifar/run_different_baselines.sh
#   METHODS="simclr simclr_attn" BETAS="1 4" CONFIG=contrast_cpu SEEDS="0 1 2" bash SSL_cifar/run_different_baselines.sh
# Arguments go to repro.sweep; done cells are skipped, interrupted ones resume.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/python.sh

METHODS="${METHODS:-simsiam simsiam_multi rdm_simsiam}"
DATASETS="${DATASETS:-CIFAR10}"
BACKBONES="${BACKBONES:-resnet18}"
SEEDS="${SEEDS:-0 1 2}"
CONFIG="${CONFIG:-simsiam_cifar}" # a file of SSL_cifar/configs, without .yaml
FLAGS="${FLAGS:-}"                # appended to every line
RESULTS="${RESULTS:-out/ssl/$CONFIG}"
PROCESSES="${PROCESSES:-1}" # per cell, one per GPU
# Knobs. RDM: a σ that collapses on its side is left out (contranorm has the other signs than poly); log filters have
# none, and stand online only.
SIGMAS="${SIGMAS:--1 -0.7 -0.5 -0.3 1}"
PRED_LOCATIONS="${PRED_LOCATIONS:-online target}"
PRED_TYPES="${PRED_TYPES:-poly log_1}"
LAMBDAS="${LAMBDAS:-0.5}" # SimSiam-Multi
BETAS="${BETAS:-1}"       # SimCLR-Attn
VIEWS="${VIEWS:-2 4}"     # ArCL
for name in $PRED_TYPES; do
    case "$name" in poly | log | log_1 | log_2 | contranorm) ;; *)
        echo "error: PRED_TYPES knows poly, log, log_1, log_2 and contranorm, not $name" >&2 && exit 2 ;;
    esac
done
for name in $PRED_LOCATIONS; do
    case "$name" in online | target) ;; *)
        echo "error: PRED_LOCATIONS knows online and target, not $name" >&2 && exit 2 ;;
    esac
done

knobs() {
    local value side kind
    case "$1" in
        simsiam_multi) for value in $LAMBDAS; do echo "--lam $value"; done ;;
        simclr_attn) for value in $BETAS; do echo "--beta $value"; done ;;
        arcl) for value in $VIEWS; do echo "--num_views $value"; done ;;
        rdm_*)
            for kind in $PRED_TYPES; do for side in $PRED_LOCATIONS; do
                case "$kind $side" in
                    log*online) echo "--pred_type $kind --pred_location online" ;;
                    poly* | contranorm*)
                        for value in $SIGMAS; do
                            case "$kind $side $value" in
                                "poly online -"* | poly\ target\ [1-9]* | poly\ target\ 0.[0-9]*) ;;
                                "contranorm target -"* | contranorm\ online\ [1-9]* | contranorm\ online\ 0.[0-9]*) ;;
                                *) echo "--pred_type $kind --pred_location $side --sigma $value" ;;
                            esac
                        done
                        ;;
                esac
            done; done
            ;;
        *) echo "" ;;
    esac
}

cells() {
    local data backbone method knob seed program="python -m SSL_cifar.main"
    if [ "$PROCESSES" -gt 1 ]; then
        program="torchrun --standalone --nproc-per-node=$PROCESSES -m SSL_cifar.main"
    fi
    for data in $DATASETS; do for backbone in $BACKBONES; do for method in $METHODS; do
        knobs "$method" | while IFS= read -r knob; do
            for seed in $SEEDS; do
                echo "$program --config SSL_cifar/configs/$CONFIG.yaml --method $method --data_set $data" \
                    "--backbone $backbone $knob --seed $seed $FLAGS"
            done
        done
    done; done; done
}

cells | "$PYTHON" -m repro.sweep --results "$RESULTS" --jobs "${JOBS:-2}" --cluster "${CLUSTER:-local}" "$@"
