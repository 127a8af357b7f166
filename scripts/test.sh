#!/usr/bin/env bash
# Every check: style, types, tests. Makes .venv first if it is missing; works from any folder.
#   bash scripts/test.sh                          10 to 15 minutes on 2 cores
#   bash scripts/test.sh tests/repro -x           other arguments go to pytest
#   bash scripts/test.sh --slurm                  the tests of real SLURM daemons too (installs them, when root)
#   bash scripts/test.sh --slow                   the long ones too
# The last line is pytest's; the exit code is 0 when all checks passed. JOBS test processes run side by side.
set -euo pipefail
scripts="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

slow="not slow" slurm="not slurm" arguments=()
for argument in "$@"; do
    case "$argument" in
        --slow) slow="" ;;
        --slurm) slurm="" && { bash "$scripts/install_slurm.sh" || true; } ;; # without it those tests skip, and say why
        *) arguments+=("$argument") ;;
    esac
done
marks="$slow${slow:+${slurm:+ and }}$slurm"

if [ -n "${CONTRANORM_DATA:-}" ]; then CONTRANORM_DATA="$(realpath -m "$CONTRANORM_DATA")"; export CONTRANORM_DATA; fi
timeout --foreground "${INSTALL_SECONDS:-1800}" bash "$scripts/setup.sh" # what is left for the sourced one: PYTHON, cd
source "$scripts/setup.sh"
export OMP_NUM_THREADS=1

status=0
check() {
    local seconds="$1"
    shift
    timeout --foreground "$seconds" "$PYTHON" -m "$@" || {
        status=$?
        echo "failed (exit code $status): $*"
    }
}
check 60 ruff check .
check 60 ruff format --check .
check 180 mypy
timeout --foreground --signal=INT --kill-after=30 "${TEST_SECONDS:-1800}" \
    "$PYTHON" -m pytest -q -n "${JOBS:-2}" --dist loadfile --no-loadscope-reorder -m "$marks" "${arguments[@]}" || status=$?
exit "$status"
