#!/usr/bin/env bash
# Depths x {vanilla, ContraNorm at each scale, its rivals} x seeds, one command per line, through repro.sweep (done cells
# are skipped).
#   bash ViT_imagenet/run_different_baselines.sh --dry-run
#   VARIANTS="none attn_scale feat_scale layer_scale gfsa neutreno resformer contranorm" bash ViT_imagenet/run_different_baselines.sh
#   CONFIG=cifar10_cpu DEPTHS="2 4 6" bash ViT_imagenet/run_different_baselines.sh
#   CONFIG=imagenet100_tiny PROCESSES=4 FLAGS="--data-path /data/imagenet" CLUSTER=slurm \
#       bash ViT_imagenet/run_different_baselines.sh --gpus_per_cell 4 --cpus 40
# Arguments go to repro.sweep.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/python.sh
source scripts/variants.sh

CONFIG="${CONFIG:-imagenet100_tiny}" # a file of ViT_imagenet/configs, without .yaml
DEPTHS="${DEPTHS:-12 16 24}"
SCALES="${SCALES:-vanilla 0.1 0.2 0.5 1.0}" # the paper does not say which scale its numbers have
VARIANTS="${VARIANTS:-contranorm}" # none is vanilla; contranorm takes SCALES; contranorm+gfsa is both; or a --variant
SEEDS="${SEEDS:-0}"
PROCESSES="${PROCESSES:-1}" # per cell, one per GPU
FLAGS="${FLAGS:-}"          # appended to every line, e.g. "--data-path /data/imagenet"
RESULTS="${RESULTS:-out/vit/$CONFIG}"
RECORDS="${RECORDS:-}"      # files or folders of records whose cells count as done, separated by commas

cells() {
    local depth method seed program="python -m ViT_imagenet.main"
    if [ "$PROCESSES" -gt 1 ]; then
        program="torchrun --standalone --nproc-per-node=$PROCESSES -m ViT_imagenet.main"
    fi
    for depth in $DEPTHS; do methods "--norm vanilla" | while read -r method; do for seed in $SEEDS; do
        echo "$program --config ViT_imagenet/configs/$CONFIG.yaml --depth $depth $method --seed $seed $FLAGS"
    done; done; done
}

cells | "$PYTHON" -m repro.sweep --results "$RESULTS" --jobs "${JOBS:-2}" --cluster "${CLUSTER:-local}" \
    ${RECORDS:+--records "[$RECORDS]"} "$@"
