#!/usr/bin/env bash
# One student, taught by a finished teacher of the same data and seed. Usage:
#   TEACHER=out/arxiv/teacher-ogbn-arxiv-seed0 bash gnn/arxiv/run_student.sh --norm ContraNorm --scale 1
#   TEACHER=... DATA=dblp SEED=1 bash gnn/arxiv/run_student.sh [any flag of gnn.arxiv]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source scripts/python.sh

DATA="${DATA:-ogbn-arxiv}"
SEED="${SEED:-0}"
TEACHER="${TEACHER:?name the folder of a finished teacher (see gnn/arxiv/run_teacher.sh)}"
words="$(printf '%s' "$*" | tr -cs 'A-Za-z0-9.' '_')"
OUTPUT_DIR="${OUTPUT_DIR:-out/arxiv/student-$DATA-seed$SEED$words}"

exec "$PYTHON" -m gnn.arxiv --config "gnn/arxiv/configs/$DATA.yaml" --mode student --teacher "$TEACHER" \
    --seed "$SEED" --output_dir "$OUTPUT_DIR" "$@"
