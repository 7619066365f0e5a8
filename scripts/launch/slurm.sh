#!/usr/bin/env bash
# One process a node, each with all GPUs of its node; ``srun`` tells each which it is. Submit it with what to train:
#   sbatch --nodes 4 scripts/launch/slurm.sh --config smollm2_finetune --set run=/shared/runs/first --set mesh=fsdp=-1
# The run directory must lie on a file system that all nodes share. For one process a GPU: --ntasks-per-node 8.
#SBATCH --job-name=jaxsys
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --signal=USR1@120
#SBATCH --requeue
set -euo pipefail

# The signal before the time limit saves and stops within the grace time, as SIGTERM does, which comes when the job is
# preempted; a requeued job resumes. A process that fails ends the step: the others have said why by then.
exec srun --kill-on-bad-exit=1 --wait=120 jaxsys train --set checkpoint.grace_seconds=110 "$@"
