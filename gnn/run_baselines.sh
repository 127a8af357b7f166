#!/usr/bin/env bash
# One cell of Table 3. Usage: bash gnn/run_baselines.sh [DATA [NLAYER [NORM [SCALE [SEED]]]]] [-- any other flag of gnn.main]
#   bash gnn/run_baselines.sh cora 8 CN 1.0 0 -- --use_layer_norm
#   DATA=texas NLAYER=16 NORM=PN bash gnn/run_baselines.sh
# SCALE may be left empty ("") for norms without one.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/python.sh

positional=()
while [ $# -gt 0 ] && [ "$1" != "--" ]; do positional+=("$1"); shift; done
[ $# -gt 0 ] && shift
if [ ${#positional[@]} -gt 5 ]; then echo "error: ${positional[5]}: other flags of gnn.main stand after --" >&2 && exit 2; fi
DATA="${positional[0]:-${DATA:-cora}}"
NLAYER="${positional[1]:-${NLAYER:-2}}"
NORM="${positional[2]:-${NORM:-None}}"
SCALE="${positional[3]:-${SCALE:-}}"
SEED="${positional[4]:-${SEED:-0}}"
words="$DATA-nlayer$NLAYER-$NORM${SCALE:+-scale$SCALE}-seed$SEED$(printf '%s' "$*" | tr -cs 'A-Za-z0-9.' '_')"

exec "$PYTHON" -m gnn.main --config "gnn/configs/$DATA.yaml" --nlayer "$NLAYER" --norm_mode "$NORM" \
    ${SCALE:+--scale "$SCALE"} --seed "$SEED" --output_dir "${OUTPUT_DIR:-out/gnn/$words}" "$@"
