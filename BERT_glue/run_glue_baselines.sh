#!/usr/bin/env bash
# One GLUE run of BERT. Usage: bash BERT_glue/run_glue_baselines.sh TASK SCALE POS [DEVICE] [-- any other flag]
#   bash BERT_glue/run_glue_baselines.sh rte 0.005 7         the paper's site, on the GPU if there is one
#   bash BERT_glue/run_glue_baselines.sh rte 0 0 cpu         the vanilla model, on the CPU
#   MODEL=minilm bash BERT_glue/run_glue_baselines.sh rte 0.01 7 0 -- --seed 1
# SCALE 0 or POS 0 is the vanilla model. DEVICE is a GPU's number or `cpu`. POS is a digit of BERT, or a site's name.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/python.sh
MODEL="${MODEL:-bert-base-uncased}"
CONFIG="${CONFIG:-BERT_glue/configs/bert.yaml}"

positional=()
while [ $# -gt 0 ] && [ "$1" != "--" ]; do positional+=("$1"); shift; done
[ $# -gt 0 ] && shift
if [ ${#positional[@]} -lt 3 ] || [ ${#positional[@]} -gt 4 ]; then
    echo "usage: $0 TASK SCALE POS [DEVICE] [-- any other flag]" >&2
    exit 2
fi
TASK="${positional[0]}" SCALE="${positional[1]}" POS="${positional[2]}" DEVICE="${positional[3]:-}"

case "$DEVICE" in
    "") ;;
    cpu) export CUDA_VISIBLE_DEVICES="" ;;
    *) export CUDA_VISIBLE_DEVICES="$DEVICE" ;;
esac
case "$SCALE" in
    *[!0.]*) ;; # a number, or what BERT_glue.main refuses
    *) POS=0 ;;
esac
case "$POS" in
    0) site=(--pos 0) name=vanilla ;;
    *[!0-9]*) site=(--sites "$POS" --scale "$SCALE") name="$POS-scale$SCALE" ;;
    *) site=(--pos "$POS" --scale "$SCALE") name="pos$POS-scale$SCALE" ;;
esac
words="$(basename "$MODEL")-$TASK-$name$(printf '%s' "$*" | tr -cs 'A-Za-z0-9.' '_')"
OUTPUT_DIR="${OUTPUT_DIR:-out/glue/$words}"

exec "$PYTHON" -m BERT_glue.main --config "$CONFIG" --model_name_or_path "$MODEL" --task_name "$TASK" \
    "${site[@]}" --output_dir "$OUTPUT_DIR" "$@"
