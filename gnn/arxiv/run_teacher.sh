#!/usr/bin/env bash
# One teacher. Usage: bash gnn/arxiv/run_teacher.sh [any flag of gnn.arxiv]
#   bash gnn/arxiv/run_teacher.sh                                          ogbn-arxiv, without ContraNorm, seed 0
#   DATA=dblp SEED=1 bash gnn/arxiv/run_teacher.sh --norm ContraNorm --scale 1 --n_epochs 100
# OUTPUT_DIR is what run_student.sh then takes as TEACHER.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source scripts/python.sh

DATA="${DATA:-ogbn-arxiv}"
SEED="${SEED:-0}"
words="$(printf '%s' "$*" | tr -cs 'A-Za-z0-9.' '_')"
OUTPUT_DIR="${OUTPUT_DIR:-out/arxiv/teacher-$DATA-seed$SEED$words}"

exec "$PYTHON" -m gnn.arxiv --config "gnn/arxiv/configs/$DATA.yaml" --mode teacher --seed "$SEED" \
    --output_dir "$OUTPUT_DIR" "$@"
