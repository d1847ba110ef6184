# Sourced by the scripts in this folder: where the tree is, and how they speak.
# shellcheck shell=bash

set -euo pipefail
# shellcheck disable=SC2034  # used by the scripts
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
self=$(basename "$0")

say() { printf '%s: %s\n' "$self" "$*"; }
warn() { printf '%s: %s\n' "$self" "$*" >&2; }
die() {
  warn "$*"
  exit 1
}

# Prints the script's opening comment: its help text.
print_help() { awk 'NR > 1 && !/^#/ { exit } NR > 1 { sub(/^# ?/, ""); print }' "$0"; }

# nproc would answer OMP_NUM_THREADS where that is set.
cores() { env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc 2>/dev/null || echo 1; }

# Runs a command as root: directly, or through sudo. Fails when neither is possible.
as_root() {
  if [ "$(id -u)" -eq 0 ]; then
    "$@"
  elif command -v sudo >/dev/null; then
    sudo "$@"
  else
    warn "this needs root, and there is no sudo: $*"
    return 1
  fi
}

# Quiet apt-get that gives up soon when no mirror answers.
apt() {
  as_root env DEBIAN_FRONTEND=noninteractive apt-get -q -y -o Acquire::Retries=1 -o Acquire::http::Timeout=20 \
    -o Acquire::https::Timeout=20 -o DPkg::Lock::Timeout=120 "$@"
}

# run_stoppable SIGNAL COMMAND...: runs the command and passes on the first SIGINT, SIGTERM or SIGHUP that the script
# gets as SIGNAL, the second as SIGTERM. A session of its own keeps the terminal's Ctrl-C from the command.
run_stoppable() {
  local signal=$1 pid signals=0 before status
  shift
  setsid "$@" </dev/null &
  pid=$!
  trap 'signals=$((signals + 1))
    if [ "$signals" -gt 1 ]; then signal=TERM; fi
    kill -s "$signal" "$pid" || :' INT TERM HUP
  while :; do # wait returns early, with a status above 128, when a trap has run
    before=$signals status=0
    wait "$pid" || status=$?
    if [ "$signals" -eq "$before" ] || [ "$status" -le 128 ]; then break; fi
  done
  trap - INT TERM HUP
  return "$status"
}

# A precompiled header is found again by its content. No CCACHE_BASEDIR: with relative paths an object of one copy of
# the tree can be taken for that of another one whose precompiled header differs.
export CCACHE_SLOPPINESS=pch_defines,time_macros
