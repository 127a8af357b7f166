#!/usr/bin/env bash
# One GLUE run of ALBERT: run_glue_baselines.sh with albert-base-v2 and its table. POS is a digit of ALBERT, where the
# place that the paper takes in BERT (attention_sum, 7 there) has the digit 4.
set -euo pipefail
export MODEL="${MODEL:-albert-base-v2}" CONFIG="${CONFIG:-BERT_glue/configs/albert.yaml}"
exec bash "$(dirname "${BASH_SOURCE[0]}")/run_glue_baselines.sh" "$@"
