#!/usr/bin/env bash
# Trains ReSSL on two nodes without a scheduler. Run the same command on both, in any order:
#
#     bash examples/two_nodes.sh HOST:PORT --preset imagenet --data-root /data/imagenet --out /shared/run
#
# HOST is the first node, by a name or address that the second one reaches, and PORT a free port there. The other
# arguments are options of `relssl train ressl`, the same on both nodes. --out must be a folder that both share,
# since every process reads the checkpoint there; images may lie on each. With a big queue add --shard-queue.
#
# Ctrl-C, TERM or USR1 to one of the launchers saves the step of all processes. The other launcher then waits for
# the stopped one: start that again to continue, or stop both.
#
# PROCESSES=4 in the environment sets the processes of a node, which are otherwise one for each GPU. Where a node
# has several networks, NCCL_SOCKET_IFNAME (on CPUs GLOO_SOCKET_IFNAME) names the interface that reaches the other.

set -euo pipefail

endpoint=${1:?"usage: bash two_nodes.sh HOST:PORT [options of relssl train ressl]"}
shift

# This is torchrun. If a process fails, those of both nodes start again, from the last checkpoint (--resume).
exec python -m torch.distributed.run \
    --nnodes 2 --nproc-per-node "${PROCESSES:-gpu}" --max-restarts 3 \
    --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \
    --rdzv-backend c10d --rdzv-endpoint "$endpoint" --rdzv-id relssl \
    -m relssl train ressl --resume "$@"
