#!/usr/bin/env bash
# GLUE with ALBERT: run_different_baselines.sh with albert-base-v2 and its table; the same variables and arguments.
set -euo pipefail
export MODEL="${MODEL:-albert-base-v2}" CONFIG="${CONFIG:-BERT_glue/configs/albert.yaml}"
exec bash "$(dirname "${BASH_SOURCE[0]}")/run_different_baselines.sh" "$@"
