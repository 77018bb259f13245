#!/usr/bin/env bash
# Several machines by the deepspeed launcher: run this on the first one of the hostfile.
#
#   configs/cluster/deepspeed.sh CONFIG [key=value ...]
#
# The machines share the environment's and the data's paths. A run that stopped to be continued is
# started again, MAX_RESTARTS times at most: 75, saved on a signal; 76, a rank was lost; 128 and more,
# a rank was killed (deepspeed makes 247 of SIGKILL) or a machine did not answer.
set -uo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
: "${HOSTFILE:=$here/hostfile}"

for ((start = 0; start <= ${MAX_RESTARTS:-3}; start++)); do
  deepspeed --hostfile "$HOSTFILE" --master_port "${MASTER_PORT:-29500}" ${LAUNCHER_ARGS:-} \
    --module fastrepa train "$@"
  code=$?
  [[ $code == 75 || $code == 76 || $code -ge 128 ]] || exit "$code"
done
exit "$code"
