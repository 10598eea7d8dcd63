#!/usr/bin/env bash
# Install what the distributed tests run against, where it is missing: PostgreSQL, Ceph (monitor,
# OSD, RADOS gateway), Redis, nftables, iproute2. One call of Debian's own client; nothing is
# started, and nothing is done where all of it is there.
#
#   tests/components/install.sh           install what is missing
#   tests/components/install.sh --check   only say what is missing; exit code 1 if anything is
set -euo pipefail

# What is looked for, and the package that brings it.
WANTED=(
  postgres:postgresql
  ceph-mon:ceph-mon
  ceph-osd:ceph-osd
  radosgw:radosgw
  ceph:ceph-common
  redis-server:redis-server
  nft:nftables
  ip:iproute2
)

there() {
  command -v "$1" >/dev/null 2>&1 || [ -x "/usr/sbin/$1" ] || [ -x "/sbin/$1" ] \
    || compgen -G "/usr/lib/postgresql/*/bin/$1" >/dev/null
}

missing=()
for pair in "${WANTED[@]}"; do
  there "${pair%%:*}" || missing+=("${pair#*:}")
done

if [ ${#missing[@]} -eq 0 ]; then
  echo "components: PostgreSQL, Ceph, Redis, nftables and iproute2 are there"
  exit 0
fi
if [ "${1:-}" = --check ]; then
  echo "components: missing: ${missing[*]}"
  exit 1
fi
if ! command -v apt-get >/dev/null 2>&1; then
  echo "components: missing: ${missing[*]}. This script knows Debian and Ubuntu (apt-get);" \
    "elsewhere install PostgreSQL 13 or newer, Ceph's mon, osd and radosgw 16 or newer, Redis 6" \
    "or newer, nftables and iproute2 by the system's own means" >&2
  exit 1
fi
as_root=()
if [ "$(id -u)" -ne 0 ]; then
  command -v sudo >/dev/null 2>&1 || {
    echo "components: missing: ${missing[*]}; run this as root, or install sudo" >&2
    exit 1
  }
  as_root=(sudo)
fi

echo "components: installing with apt-get: ${missing[*]}"
export DEBIAN_FRONTEND=noninteractive
log=$(mktemp)
trap 'rm -f "$log"' EXIT
# The servers are started by the tests, on ports of their own: keep packages from starting them.
policy=/usr/sbin/policy-rc.d
install_quietly() {
  "${as_root[@]}" apt-get update -qq
  if [ ! -e "$policy" ]; then
    printf '#!/bin/sh\nexit 101\n' | "${as_root[@]}" tee "$policy" >/dev/null
    "${as_root[@]}" chmod 755 "$policy"
    trap '"${as_root[@]}" rm -f "$policy"; rm -f "$log"' EXIT
  fi
  "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
    apt-get install -y -qq --no-install-recommends "${missing[@]}"
}
install_quietly >"$log" 2>&1 </dev/null || {
  tail -n 20 "$log" >&2
  echo "components: apt-get failed; its last lines are above" >&2
  exit 1
}
echo "components: installed in $SECONDS s"
