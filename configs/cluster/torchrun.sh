#!/usr/bin/env bash
# Several machines by torchrun: run this on every one of them, at about the same time.
#
#   RDZV=node0.example.org:29400 NNODES=2 configs/cluster/torchrun.sh CONFIG [key=value ...]
#
# RDZV is an address and port on one of the machines, the same for all. When a machine is lost, its
# peers stop within survival.timeout_seconds and their agents wait to meet again: NNODES=1:2 goes on
# with what is left (training.global_batch must divide), NNODES=2 waits for a replacement, which is
# this same command. A machine whose own agent fails (its link is down) starts it again.
#
# SIGTERM, SIGUSR1 or SIGHUP here, on any one machine, saves and ends the run on all of them. Exit codes:
# those of `fastrepa train`, 75 where the run is saved and to be queued again by whoever ran this;
# 76 where MAX_RESTARTS did not suffice. An error of the user's is not tried again.
set -uo pipefail
: "${RDZV:?host:port of the rendezvous, the same on every machine}"
: "${NNODES:?number of machines, or least:most}"
: "${MAX_RESTARTS:=10}"
: "${SAVE_SECONDS:=110}" # from the signal to a torchrun that kills its ranks

# torchrun ends with 1 whatever its ranks ended with: each of them notes its code here.
FASTREPA_EXIT_CODES=$(mktemp)
export FASTREPA_EXIT_CODES
trap 'rm -f "$FASTREPA_EXIT_CODES"' EXIT

agent='' asked=''
ask() {
  asked=$1
  [[ -z $agent ]] || kill -s "$1" "$agent" 2>/dev/null
}
trap 'ask INT' INT
trap 'ask TERM' TERM USR1 HUP

for ((start = 0; start <= MAX_RESTARTS; start++)); do
  : >"$FASTREPA_EXIT_CODES"
  # In a session of its own, so that Ctrl-C comes once, from here. Ranks that are started again must
  # not meet in the agent's store, which still holds their predecessors' addresses.
  TORCH_ELASTIC_SHUTDOWN_TIMEOUT=$SAVE_SECONDS TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 setsid torchrun \
    --nnodes "$NNODES" --nproc-per-node "${NPROC_PER_NODE:-gpu}" --max-restarts "$MAX_RESTARTS" \
    --rdzv-backend c10d --rdzv-endpoint "$RDZV" --rdzv-id "${RDZV_ID:-fastrepa}" \
    -m fastrepa train "$@" &
  agent=$!
  while wait "$agent"; code=$?; kill -0 "$agent" 2>/dev/null; do :; done
  agent=''
  noted=$(tail -n 1 "$FASTREPA_EXIT_CODES")
  # A code that was meant, or a command line that torchrun does not take.
  [[ -z $noted || $noted == 76 ]] || exit "$noted"
  [[ $code == 0 || $code == 2 || $code == 127 ]] && exit "$code"
  [[ -z $asked ]] || exit $((code ? code : 1))
  echo "torchrun ended with $code, a machine or its link was lost: start $((start + 1)) follows" >&2
done
exit 76
