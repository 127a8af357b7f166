#!/usr/bin/env bash
# GLUE with BERT: tasks x {vanilla, ContraNorm at several scales, its rivals} x seeds, one command per line, through repro.sweep.
#   bash BERT_glue/run_different_baselines.sh --dry-run
#   MODEL=minilm TASKS="rte mrpc" SCALES="0.005 0.01" SEEDS="0 1 2" bash BERT_glue/run_different_baselines.sh
#   VARIANTS="none attn_scale gfsa neutreno resformer contranorm" bash BERT_glue/run_different_baselines.sh --dry-run
# Cells that are done are skipped. Arguments go to repro.sweep.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/python.sh
source scripts/records.sh
source scripts/variants.sh

MODEL="${MODEL:-bert-base-uncased}"
CONFIG="${CONFIG:-BERT_glue/configs/bert.yaml}"
TASKS="${TASKS:-cola mnli mrpc qnli qqp rte sst2 stsb}"  # all but WNLI, as in the paper
SCALES="${SCALES:-vanilla 0.005 0.01 0.05 0.1 0.2}"      # vanilla: no ContraNorm
SITES="${SITES:-attention_sum}"                          # names separated by commas; --pos 7 of BERT, 4 of ALBERT
VARIANTS="${VARIANTS:-contranorm}"                       # none is vanilla; contranorm takes SCALES; contranorm+gfsa is both; or a --variant
SEEDS="${SEEDS:-2021}"
FLAGS="${FLAGS:-}"                                       # appended to every line, e.g. "--group_by_length"
CONTRANORM_FLAGS="${CONTRANORM_FLAGS:-}"                 # to the lines with ContraNorm only, e.g. "--include_padding"
PROCESSES="${PROCESSES:-1}"                              # per cell, one per GPU: they share the batch of 32
RESULTS="${RESULTS:-results/table1/runs}"
RECORDS="${RECORDS-$(committed results/table1)}" # records whose cells are not run again, by commas

program="python -m BERT_glue.main"
if [ "$PROCESSES" -gt 1 ]; then
    if [ $((32 % PROCESSES)) != 0 ]; then echo "error: PROCESSES=$PROCESSES does not divide the batch of 32" >&2 && exit 2; fi
    program="torchrun --standalone --nproc-per-node=$PROCESSES -m BERT_glue.main"
    FLAGS="--per_device_train_batch_size $((32 / PROCESSES)) $FLAGS"
fi

for task in $TASKS; do methods "--pos 0" "--sites $SITES" "$CONTRANORM_FLAGS" | while read -r method; do for seed in $SEEDS; do
    echo "$program --config $CONFIG --model_name_or_path $MODEL --task_name $task $method --seed $seed $FLAGS"
done; done; done |
    "$PYTHON" -m repro.sweep --results "$RESULTS" ${RECORDS:+--records "[$RECORDS]"} --jobs "${JOBS:-2}" \
        --cluster "${CLUSTER:-local}" "$@"
