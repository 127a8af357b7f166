#!/usr/bin/env bash
# Installs a single-node SLURM for tests/slurm (Debian, Ubuntu; root). Starts nothing: the tests start their own, on
# loopback, in a temporary folder. Exits 3 with the reason where it cannot install.
set -euo pipefail

programs="slurmctld slurmd sinfo squeue sbatch srun scancel scontrol"

missing() {
  for program in $programs; do
    command -v "$program" > /dev/null || { echo "$program"; return; }
  done
}

[ -n "$(missing)" ] || { echo "SLURM is installed: $(slurmctld -V)"; exit 0; }
[ "$(id -u)" = 0 ] || { echo "SLURM cannot be installed: only root can ($(missing) is missing)" >&2; exit 3; }
command -v apt-get > /dev/null || { echo "SLURM cannot be installed: no apt-get here ($(missing) is missing)" >&2; exit 3; }

export DEBIAN_FRONTEND=noninteractive
{ apt-get update && apt-get install -y --no-install-recommends slurmctld slurmd slurm-client; } > /dev/null \
  || { echo "SLURM cannot be installed: apt-get could not get slurmctld, slurmd and slurm-client" >&2; exit 3; }
[ -z "$(missing)" ] || { echo "SLURM cannot be installed: $(missing) is missing still" >&2; exit 3; }
echo "installed $(slurmctld -V)"
