#!/usr/bin/env bash
# Table 1 of the paper: every GLUE task but WNLI, vanilla and ContraNorm at the paper's scales, BERT and ALBERT, then the
# table, with the best scale per task by the validation score and the average over tasks. Takes the variables of
# BERT_glue/run_different_baselines.sh (TASKS, SCALES, VARIANTS, SEEDS, FLAGS, CONTRANORM_FLAGS, RECORDS, JOBS, CLUSTER, ...), and
#   PRESET=cpu bash scripts/reproduce_table1.sh       MiniLM on the small tasks, two epochs, three seeds; needs no
#       download. Then, on RTE, every site, and padding in; and for vanilla and each task's best scale two seeds more
#       (RTE_SITES and MORE_SEEDS name them)
#   CONTRANORM_FLAGS=--include_padding bash scripts/reproduce_table1.sh     padding as the paper's code treats it
# `--dry-run` prints the plan only. Re-running the command resumes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/python.sh
source scripts/records.sh
PRESET="${PRESET:-paper}"
case "$PRESET" in
    paper) MODELS="${MODELS:-bert-base-uncased albert-base-v2}" ;;
    cpu)
        MODELS="${MODELS:-minilm}"
        export TASKS="${TASKS:-cola mrpc rte stsb}" SCALES="${SCALES:-vanilla 0.01 0.05 0.1 0.2}" SEEDS="${SEEDS:-0 1 2}"
        export CONFIG="${CONFIG:-BERT_glue/configs/minilm.yaml}"
        more_seeds="${MORE_SEEDS:-3 4}"
        ;;
    *) echo "error: PRESET knows paper and cpu, not $PRESET" >&2 && exit 2 ;;
esac
export RESULTS="${RESULTS:-results/table1/runs}"
export RECORDS="${RECORDS-$(committed results/table1)}"

status=0
for model in $MODELS; do
    case "$model" in
        *albert*) MODEL="$model" ran bash BERT_glue/run_different_baselines_al.sh "$@" ;;
        *) MODEL="$model" ran bash BERT_glue/run_different_baselines.sh "$@" ;;
    esac
done
if [ "$PRESET" = cpu ]; then
    rte_sites="${RTE_SITES:-layer_input attention_context attention_output attention_norm ffn_output ffn_sum ffn_norm}"
    export MODEL=minilm
    for site in $rte_sites; do TASKS=rte SCALES=0.05 SITES="$site" ran bash BERT_glue/run_different_baselines.sh "$@"; done
    TASKS=rte SCALES=0.05 CONTRANORM_FLAGS=--include_padding ran bash BERT_glue/run_different_baselines.sh "$@"
    if [ -z "$RECORDS" ] && ! has_runs "$RESULTS"; then
        echo "then seeds $more_seeds of vanilla and of each task's best scale, which is known when these have run" >&2
    else # the best by the seeds that all scales have, so that two seeds more of one do not change the choice
        best="$("$PYTHON" -m repro.report.best --records "$(all_records)" --each task_name --setting scale --by score \
            --where "{sites: '${SITES:-attention_sum}', include_padding: 'False'}")"
        while read -r task scale; do
            TASKS="$task" SCALES="vanilla $scale" SEEDS="$more_seeds" ran bash BERT_glue/run_different_baselines.sh "$@"
        done <<<"$best"
    fi
fi
if plan_only "$@"; then exit "$status"; fi
"$PYTHON" -m repro.report.tables --preset table1 --best scale --by score \
    --records "$(all_records)" --output "$(dirname "$RESULTS")/table1.md"
exit "$status"
