#!/bin/bash
# Before a pod stops: ask Ray to drain its node, and wait until Serve's replicas here have left, at most $1 seconds.
#
# Serve then starts their successors elsewhere, routers end the answers they have begun, and shards hand on experts that
# only they hold. Ends at once where no raylet runs, and early where the cluster's head does not answer: a cluster that
# goes as a whole has nowhere to move anything. Always exits 0, since Kubernetes stops the pod in any case.
set -u
limit_s=${1:?seconds to wait at most}
deadline=$((SECONDS + limit_s))

flag_of_raylet() {
  local pid
  pid=$(pgrep -o -x raylet) || return 1
  tr '\0' '\n' < "/proc/$pid/cmdline" | sed -n "s/^--$1=//p" | head -n 1
}

node_id=$(flag_of_raylet node_id) || { echo "no raylet runs here: nothing to drain"; exit 0; }
address=$(flag_of_raylet gcs-address)
echo "draining node $node_id of $address, for at most $limit_s s"
timeout 30 ray drain-node --address "$address" --node-id "$node_id" --reason DRAIN_NODE_REASON_PREEMPTION \
  --reason-message "the pod is stopping" --deadline-remaining-seconds "$limit_s" \
  || { echo "the head did not take it: stopping without a drain"; exit 0; }

misses=0
while pgrep -f '^ray::ServeReplica' > /dev/null && ((SECONDS < deadline)); do
  sleep 2
  if timeout 10 bash -c "exec 3<> /dev/tcp/${address%:*}/${address##*:}" 2> /dev/null; then
    misses=0
  elif ((++misses >= 5)); then
    echo "the head has gone: stopping"
    exit 0
  fi
done
echo "replicas left: $(pgrep -c -f '^ray::ServeReplica')"
exit 0
