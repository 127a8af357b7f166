#!/usr/bin/env bash
# One run: bash SSL_cifar/run_baselines.sh METHOD DATA [EPOCHS [SEED]] [-- FLAGS]. Re-running the command resumes.
#   bash SSL_cifar/run_baselines.sh rdm_simsiam cifar10 400 -- --pred_type poly --pred_location target --sigma -1
#   CONFIG=siamese_cpu bash SSL_cifar/run_baselines.sh simsiam cifar10 10 0 -- --batch_size 64 --lr 0.03 --pred_lr_factor 10
#   PROCESSES=4 bash SSL_cifar/run_baselines.sh simclr imagenet100 -- --data_path /data/imagenet
# DATA is cifar10, cifar100, imagenet100 or tiny; FLAGS go to SSL_cifar.main and win over everything here.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/python.sh

usage() {
    echo "error: $1; usage: bash SSL_cifar/run_baselines.sh METHOD DATA [EPOCHS [SEED]] [-- FLAGS]" >&2
    exit 2
}
words=()
while [ "$#" -gt 0 ] && [ "$1" != -- ]; do words+=("$1") && shift; done
[ "${#words[@]}" -ge 2 ] || usage "METHOD and DATA are missing"
[ "${#words[@]}" -le 4 ] || usage "flags come after --"
[ "$#" -eq 0 ] || shift
method="${words[0]}" data="${words[1]}"

case "$data" in
    cifar10) data_set=CIFAR10 suffix=cifar ;;
    cifar100) data_set=CIFAR100 suffix=cifar ;;
    imagenet100) data_set=IMNET100 suffix=imagenet100 ;;
    tiny) data_set=TINY suffix=cifar ;;
    *) usage "DATA $data is none of cifar10, cifar100, imagenet100, tiny" ;;
esac
case "$method" in # the recipe that the authors train it with
    simsiam* | rdm_simsiam) family=simsiam ;;
    byol | rdm_byol) family=byol ;;
    simclr* | moco | arcl) family=simclr ;;
    mae | cluster_mim) family=mae ;;
    *) family=ar ;;
esac
CONFIG="${CONFIG:-${family}_$suffix}" # a file of SSL_cifar/configs, without .yaml
PROCESSES="${PROCESSES:-1}"           # one per GPU
[ -f "SSL_cifar/configs/$CONFIG.yaml" ] || usage "there is no SSL_cifar/configs/$CONFIG.yaml for $method on $data: set CONFIG"

flags=(--method "$method" --data_set "$data_set" ${words[2]:+--epochs "${words[2]}"} ${words[3]:+--seed "${words[3]}"})
name="$(printf '%s' "${flags[*]} $*" | sed 's/--[a-z_]* //g' | tr -cs 'A-Za-z0-9.-' '_' | tail -c 80)"
OUTPUT_DIR="${OUTPUT_DIR:-out/ssl/$CONFIG-$name}"
launch=(-m)
if [ "$PROCESSES" -gt 1 ]; then launch=(-m torch.distributed.run --standalone --nproc-per-node="$PROCESSES" -m); fi
exec "$PYTHON" "${launch[@]}" SSL_cifar.main --config "SSL_cifar/configs/$CONFIG.yaml" "${flags[@]}" \
    --output_dir "$OUTPUT_DIR" "$@"
