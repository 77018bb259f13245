#!/usr/bin/env bash
# Several machines by torchrun: run this on every one of them, at about the same time.
#
#   RDZV=node0.example.org:29400 NNODES=2 configs/cluster/torchrun.sh CONFIG [key=value ...]
#
# RDZV is an address and port on one of the machines, the same for all. When a machine is lost, its
# peers stop within survival.timeout_seconds, and the agents meet again: NNODES=1:2 goes on with what
# is left (training.global_batch must divide), NNODES=2 waits for a replacement.
set -euo pipefail
: "${RDZV:?host:port of the rendezvous, the same on every machine}"
: "${NNODES:?number of machines, or least:most}"

exec torchrun \
  --nnodes "$NNODES" --nproc-per-node "${NPROC_PER_NODE:-gpu}" --max-restarts "${MAX_RESTARTS:-3}" \
  --rdzv-backend c10d --rdzv-endpoint "$RDZV" --rdzv-id "${RDZV_ID:-fastrepa}" \
  -m fastrepa train "$@"
