#!/usr/bin/env bash
# Run a command in a network namespace of its own, where it may make hosts and partitions between
# them; all of it is gone when it ends. Needs root. Elsewhere says loudly that nothing was tested,
# and in CI fails.
#
#   tests/distributed/in_namespace.sh COMMAND...
set -euo pipefail
export PATH=$PATH:/usr/sbin:/sbin

refuse() {
  printf '\n!!! NOT TESTED: partitions between hosts: %s\n\n' "$1" >&2
  [ -z "${CI+set}" ] || exit 1
  exit 0
}

[ "$(id -u)" -eq 0 ] || refuse "needs root (network namespaces, and a user for PostgreSQL)"
for tool in unshare ip nft; do
  command -v "$tool" >/dev/null || refuse "no $tool; see make components"
done
unshare --net --mount true 2>/dev/null || refuse "this machine permits no network namespaces"

mkdir -p /run/netns
export OCHREDB_TEST_OWN_NETWORK=1
exec unshare --net --mount -- bash -c '
  mount -t tmpfs tmpfs /run/netns && ip link set lo up || exit 1
  exec "$@"
' in_namespace "$@"
