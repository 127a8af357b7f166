#!/usr/bin/env bash
# Table 1 of the paper: every GLUE task but WNLI, vanilla and ContraNorm at the paper's scales, BERT and ALBERT, then the
# table, with the best scale per task by the validation score and the average over tasks. Takes the variables of
# BERT_glue/run_different_baselines.sh (TASKS, SCALES, VARIANTS, SEEDS, FLAGS, CONTRANORM_FLAGS, RECORDS, JOBS, CLUSTER, ...), and
#   PRESET=cpu bash scripts/reproduce_table1.sh       MiniLM on the small tasks, three seeds; needs no download
#                                                     then, on RTE, every site, and padding in
#   CONTRANORM_FLAGS=--include_padding bash scripts/reproduce_table1.sh     padding as the paper's code treats it
# `--dry-run` prints the plan only. Re-running the command resumes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/python.sh
PRESET="${PRESET:-paper}"
case "$PRESET" in
    paper) MODELS="${MODELS:-bert-base-uncased albert-base-v2}" ;;
    cpu)
        MODELS="${MODELS:-minilm}"
        export TASKS="${TASKS:-cola mrpc rte stsb}" SCALES="${SCALES:-vanilla 0.01 0.05 0.1 0.2}" SEEDS="${SEEDS:-0 1 2}"
        export FLAGS="${FLAGS:---group_by_length}"
        ;;
    *) echo "error: PRESET knows paper and cpu, not $PRESET" >&2 && exit 2 ;;
esac
export RESULTS="${RESULTS:-results/table1/runs}"
export RECORDS="${RECORDS-$(compgen -G 'results/table1/*.jsonl' | paste -sd, || true)}"

status=0
for model in $MODELS; do
    case "$model" in
        *albert*) MODEL="$model" bash BERT_glue/run_different_baselines_al.sh "$@" || status=$? ;;
        *) MODEL="$model" bash BERT_glue/run_different_baselines.sh "$@" || status=$? ;;
    esac
done
if [ "$PRESET" = cpu ]; then
    sites="${SITES:-layer_input attention_context attention_output attention_norm ffn_output ffn_sum ffn_norm}"
    export TASKS=rte SCALES=0.05 MODEL=minilm
    for site in $sites; do SITES="$site" bash BERT_glue/run_different_baselines.sh "$@" || status=$?; done
    CONTRANORM_FLAGS=--include_padding bash BERT_glue/run_different_baselines.sh "$@" || status=$?
fi
for argument in "$@"; do case "$argument" in --dry-run | --dry_run | --status) exit "$status" ;; esac; done
"$PYTHON" -m repro.report.tables --preset table1 --best scale --by score \
    --records "${RECORDS:+[$RECORDS,}$RESULTS${RECORDS:+]}" --output "$(dirname "$RESULTS")/table1.md"
exit "$status"
