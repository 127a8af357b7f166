#!/usr/bin/env bash
# See deep GCNs collapse and ContraNorm hold: trains five norms at four depths, prints a table, draws two figures.
#   bash scripts/quickstart.sh                 # the embedded digits graph, nothing downloaded but packages
#   DATA=cora bash scripts/quickstart.sh       # Cora, from $CONTRANORM_DATA, else ../shared/data, else downloaded
# Works from any folder; the second time it installs nothing and repeats no finished run. Other flags go to
# gnn.quickstart (--help).
set -euo pipefail
if [ -n "${CONTRANORM_DATA:-}" ]; then CONTRANORM_DATA="$(realpath -m "$CONTRANORM_DATA")"; export CONTRANORM_DATA; fi
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
if [ -z "${CONTRANORM_DATA:-}" ] && [ -d ../shared/data ]; then export CONTRANORM_DATA=../shared/data; fi
exec "$PYTHON" -m gnn.quickstart --data "${DATA:-digits}" "$@"
