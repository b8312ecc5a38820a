#!/usr/bin/env bash
# Trains ReSSL on several nodes of a Slurm cluster; the arguments are options of `relssl train ressl`:
#
#     sbatch --nodes 4 examples/slurm.sh --preset imagenet --data-root /shared/imagenet --out /shared/run
#
# --out must be a folder that all nodes share, since every process reads the checkpoint there. With a big queue
# add --shard-queue, so that each GPU keeps and compares a part of it. Fit the next lines to your cluster.
#
#SBATCH --job-name=relssl
#SBATCH --nodes=2
# One launcher per node, which starts a process for each of the node's GPUs:
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
# CPUs of a node, which its processes divide among their image workers:
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
# Two minutes before the end of that time Slurm sends USR1. B: sends it to this shell, which must know of it.
#SBATCH --signal=B:USR1@120
# The job may run again, after a preemption as after its own request below, and goes on in the same log.
#SBATCH --requeue
#SBATCH --open-mode=append

set -euo pipefail

# srun does not take this from sbatch: each launcher would get one CPU.
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK

# The launchers meet at the first node; jobs that share it have ports of their own.
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${hosts%%$'\n'*}
port=$((29500 + SLURM_JOB_ID % 1000))

step='' stopped=''
trap 'stopped=1; kill -USR1 $step || true' USR1 # srun passes it on to all launchers.

# --kill-on-bad-exit=0: after the signal the first launcher may end while another node still saves.
# --max-restarts: if a process fails, all of them start again without another wait in Slurm's queue.
# --signals-to-handle: USR1, too, is passed on to the processes, which then save their step. (The variable
#   TORCHELASTIC_SIGNALS_TO_HANDLE has no effect here: torchrun sets it.) Those that have not ended 30 seconds
#   later are killed; where a checkpoint takes longer, newer torchruns have --shutdown-timeout.
# --resume: each start continues from the last checkpoint, of which --save-every also writes some within epochs.
srun --kill-on-bad-exit=0 torchrun \
    --nnodes "$SLURM_NNODES" --nproc-per-node gpu --max-restarts 3 \
    --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \
    --rdzv-backend c10d --rdzv-endpoint "$head:$port" --rdzv-id "$SLURM_JOB_ID" \
    -m relssl train ressl --resume "$@" &
step=$!

# A shell runs a trap only between commands, or during `wait`, which then returns early: hence the loop.
status=0
wait "$step" || status=$?
while kill -0 "$step" 2>/dev/null; do
    status=0
    wait "$step" || status=$?
done

# torchrun's status after a signal is 1, like that of a failed run, which must not run again and again.
if [[ $stopped && $status -ne 0 ]]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
