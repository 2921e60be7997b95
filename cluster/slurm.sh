#!/usr/bin/env bash
# A Ray cluster for the length of one Slurm job; whole nodes, a shared home. Not yet run.
#   sbatch --nodes=4 cluster/slurm.sh train --preset smollm2 --run.root /shared/runs
#SBATCH --job-name=distrl
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --output=distrl-%j.log
set -euo pipefail

[[ $# -gt 0 ]] || { echo "usage: sbatch cluster/slurm.sh train --preset NAME ..." >&2; exit 2; }
[[ -x .venv/bin/distrl ]] || { echo "submit it from the repository, after make setup" >&2; exit 2; }
PATH="$PWD/.venv/bin:$PATH"

export RAY_AUTH_MODE=token
(umask 077; ray get-auth-token --generate >/dev/null)

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# The head starts Ray, waits for the others, runs the command and stops Ray everywhere.
srun ray symmetric-run --address "$head:6379" --min-nodes "$SLURM_JOB_NUM_NODES" -- \
    distrl "$@" --cluster.address auto
