#!/usr/bin/env bash
# See deep GCNs collapse and ContraNorm hold: trains six norms at four depths, prints a table, draws two figures.
#   bash scripts/quickstart.sh                 # the embedded digits graph, nothing downloaded but packages
#   DATA=cora bash scripts/quickstart.sh       # Cora, from $CONTRANORM_DATA, else ../shared/data, else downloaded
# Works from any folder; the second time it installs nothing and repeats no finished run. Flags and their defaults:
#   --data digits  --depths 2 4 8 16  --seeds 2 (how many)  --epochs 100  --jobs (one per core)  --data_root FOLDER
#   --output_dir out/quickstart (from the repository root)
set -euo pipefail
data="${DATA:-digits}" depths="2 4 8 16" seeds=2 epochs=100 jobs="$(nproc)" output_dir=out/quickstart
data_root="${CONTRANORM_DATA:-}"
fail() { echo "error: $1" >&2 && exit 2; }

while [ $# -gt 0 ]; do
    case "$1" in
        --*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;;
        --depths)
            shift
            depths=""
            while [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; do depths+=" $1" && shift; done
            ;;
        --data | --seeds | --epochs | --jobs | --data_root | --output_dir)
            [ $# -gt 1 ] || fail "$1 needs a value"
            [ "$1" != --data_root ] || [ -d "$2" ] || fail "--data_root $2: no such folder"
            declare "${1#--}=$2"
            shift 2
            ;;
        -h | --help) sed -n '2,/^set/{/^set/!s/^# \?//p}' "${BASH_SOURCE[0]}" && exit ;;
        *) fail "$1 is no flag of the quickstart (see --help)" ;;
    esac
done
depths="$(tr -c '0-9\n' '\n' <<<"$depths" | sed '/^$/d' | sort -nru)" # the longest first
deepest="${depths%%$'\n'*}"
[ "${depths##*$'\n'}" -ge 2 ] 2>/dev/null || fail "--depths needs numbers of at least 2 (one hidden layer)"
[ "$seeds" -ge 1 ] 2>/dev/null && [ "$jobs" -ge 1 ] 2>/dev/null || fail "--seeds and --jobs must be at least 1"
if [ -n "$data_root" ]; then data_root="$(realpath -m "$data_root")"; fi

here="$(dirname "${BASH_SOURCE[0]}")"
[ -f "$here/../gnn/configs/$data.yaml" ] || fail "--data $data: gnn/configs has no such graph"
source "$here/setup.sh"
if [ -z "$data_root" ] && [ -d ../shared/data ]; then data_root=../shared/data; fi
if [ -n "$data_root" ]; then export CONTRANORM_DATA="$data_root"; fi
folder="$output_dir/$data"

for depth in $depths; do
    if [ "$depth" = "$deepest" ]; then probe=" --probe"; else probe=""; fi
    for norm in "CN --scale 1 --use_layer_norm" None "None --use_layer_norm" LN PN "PN --use_layer_norm"; do
        for seed in $(seq 0 $((seeds - 1))); do
            echo "python -m gnn.main --config gnn/configs/$data.yaml --nlayer $depth --norm_mode $norm --epochs $epochs" \
                "--device cpu --seed $seed$probe"
        done
    done
done | "$PYTHON" -m repro.sweep --results "$folder/runs" --jobs "$jobs" &
trap 'kill -TERM $! && wait $!' TERM INT # the sweep stops its cells
wait $!
trap - TERM INT

where="epochs: \"$epochs\""
"$PYTHON" -m repro.report.tables --records "$folder/runs" --where "{$where}" --rows method --columns depth \
    --metric test_accuracy
"$PYTHON" -m repro.report.figures --records "$folder/runs" --where "{$where}" --x depth --label method --kind depth \
    --output "$folder/depth.png"
"$PYTHON" -m repro.report.figures --records "$folder/runs" --where "{$where, depth: \"$deepest\"}" --label method \
    --kind collapse --output "$folder/collapse.png"
