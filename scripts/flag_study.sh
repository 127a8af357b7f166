#!/usr/bin/env bash
# What each speed flag does to the metric: small runs with every such flag off, with one of them on, and with all on,
# several seeds each, then a table with the differences. About an hour of one core.
#   PARTS="gnn glue" SEEDS="0 1 2 3 4" bash scripts/flag_study.sh
# Arguments go to repro.sweep: --dry-run prints the plan. Re-running the command resumes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/python.sh
source scripts/records.sh
PARTS="${PARTS:-gnn vit glue}"
SEEDS="${SEEDS:-0 1 2}"
DATA_ROOT="${DATA_ROOT:-${CONTRANORM_DATA:-data}}"
DATA_ROOT="$(printf %q "$DATA_ROOT")" # as a word of a line
RESULTS="${RESULTS:-results/flags/runs}"

gnn() { # Cora, depth 8: every way to compute the layer; in the slow one also a validation pass every epoch
    local line="python -m gnn.main --config gnn/configs/cora.yaml --nlayer 8 --norm_mode CN --norm_scale 1.0"
    line="$line --use_layer_norm --data_root $DATA_ROOT"
    for flags in "--implementation plain --eval_every 1" "--implementation blocked" \
        "--implementation linear --degree 1" "--implementation linear --degree 2"; do
        for seed in $SEEDS; do echo "$line $flags --seed $seed"; done
    done
}

vit() { # CIFAR-10, the first images of it
    local line="python -m ViT_imagenet.main --config ViT_imagenet/configs/cifar10_cpu.yaml --scale 0.1 --epochs 4"
    line="$line --data-path $DATA_ROOT/images/cifar10 --max-train-samples 5000 --max-test-samples 2000"
    for flags in "--no-cache --no-fused-optimizer" "--cache --no-fused-optimizer" "--no-cache --fused-optimizer" \
        "--no-cache --no-fused-optimizer --channels-last" "--no-cache --no-fused-optimizer --mixed-precision bf16"; do
        for seed in $SEEDS; do echo "$line $flags --seed $seed"; done
    done
}

glue() { # SST-2, a few steps: MiniLM learns it fast
    local line="python -m BERT_glue.main --model_name_or_path minilm --task_name sst2 --pos 7 --scale 0.01"
    line="$line --learning_rate 1e-4 --max_train_steps 40 --data_root $DATA_ROOT"
    line="$line --no_group_by_length --no_compact_embeddings --no_skip_unread_tokens --no_fused_optimizer"
    line="$line --no_cheap_dropout"
    for flags in "" "--group_by_length" "--compact_embeddings" "--skip_unread_tokens" "--fused_optimizer" \
        "--cheap_dropout" "--group_by_length --compact_embeddings --skip_unread_tokens --fused_optimizer --cheap_dropout"; do
        for seed in $SEEDS; do echo "$line $flags --seed $seed"; done
    done
}

for part in $PARTS; do "$part"; done |
    "$PYTHON" -m repro.sweep --results "$RESULTS" --jobs "${JOBS:-2}" --cluster "${CLUSTER:-local}" "$@"
if plan_only "$@"; then exit; fi
"$PYTHON" -m benchmarks.flags --records "$RESULTS"
