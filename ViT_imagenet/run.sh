#!/usr/bin/env bash
# One run; arguments are passed on to ViT_imagenet.main and win over everything here. Re-running the command resumes.
#   bash ViT_imagenet/run.sh --scale 0.1
#   CONFIG=imagenet100_tiny PROCESSES=4 bash ViT_imagenet/run.sh --depth 24 --scale 0.1 --data-path /data/imagenet
#   bash ViT_imagenet/run.sh --norm vanilla          the vanilla DeiT
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/python.sh
CONFIG="${CONFIG:-cifar10_cpu}"    # a file of ViT_imagenet/configs, without .yaml
PROCESSES="${PROCESSES:-1}"        # one per GPU
words="$(printf '%s' "$*" | tr -cs 'A-Za-z0-9.' '_' | tail -c 80)"
OUTPUT_DIR="${OUTPUT_DIR:-out/vit/$CONFIG-$words}"

if [ "$PROCESSES" -gt 1 ]; then
    launch=(-m torch.distributed.run --standalone --nproc-per-node="$PROCESSES" -m)
else
    launch=(-m)
fi
exec "$PYTHON" "${launch[@]}" ViT_imagenet.main --config "ViT_imagenet/configs/$CONFIG.yaml" --output_dir "$OUTPUT_DIR" "$@"
