#!/usr/bin/env bash
# Table 2: DeiT with and without ContraNorm (VARIANTS: or its rivals) at 12, 16 and 24 layers, tiny and small, on ImageNet-100 and ImageNet-1k; then the table.
#   bash scripts/reproduce_table2.sh --dry-run
#   IMAGENET=/data/imagenet PROCESSES=4 CLUSTER=slurm bash scripts/reproduce_table2.sh --gpus_per_cell 4
#   PRESET=cpu bash scripts/reproduce_table2.sh      a small DeiT of depth 6, 12 and 24 on CIFAR-10 and 100 classes of
#       Tiny-ImageNet, one epoch, three seeds
#   VARIANTS="none gfsa contranorm" bash scripts/reproduce_table2.sh      rivals of ContraNorm in the same table
# IMAGENET is the folder with train/ and val/; CONFIGS the list of settings. RECORDS names finished records: their cells
# are not trained again.
# Arguments go to repro.sweep.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/python.sh
source scripts/records.sh

case "${PRESET:-paper}" in
    paper) CONFIGS="${CONFIGS:-imagenet100_tiny imagenet100_small imagenet1k_tiny imagenet1k_small}" ;;
    cpu)
        CONFIGS="${CONFIGS:-cifar10_nano tiny_imagenet100_nano}"
        export DEPTHS="${DEPTHS:-6 12 24}" SCALES="${SCALES:-vanilla 0.1 0.5}" SEEDS="${SEEDS:-0 1 2}"
        ;;
    *) echo "error: PRESET knows paper and cpu, not $PRESET" >&2 && exit 2 ;;
esac
IMAGENET="${IMAGENET:-}"     # by default the data sets' folders below $CONTRANORM_DATA
CLASS_LIST="${CLASS_LIST:-}" # other classes than repro/images/imagenet100_classes.txt, one WordNet id per line
RESULTS="${RESULTS:-results/table2/runs}"
RECORDS="${RECORDS-$(committed results/table2)}"

status=0
for config in $CONFIGS; do
    flags="${FLAGS:-}"
    case "$config" in
        imagenet*) flags="$flags${IMAGENET:+ --data-path $(printf %q "$IMAGENET")}" ;;
    esac
    case "$config" in
        imagenet100*) flags="$flags${CLASS_LIST:+ --class-list $(printf %q "$CLASS_LIST")}" ;;
    esac
    CONFIG="$config" FLAGS="$flags" RESULTS="$RESULTS" RECORDS="$RECORDS" ran bash ViT_imagenet/run_different_baselines.sh "$@"
done
if plan_only "$@"; then exit "$status"; fi
records="$(all_records)"
"$PYTHON" -m repro.report.tables --preset table2 --records "$records" --output "$(dirname "$RESULTS")/table2.md"
exit "$status"
