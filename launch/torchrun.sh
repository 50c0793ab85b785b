#!/usr/bin/env bash
# Start a run with torchrun, one process per visible GPU of this machine (one process where there is none).
#
#   launch/torchrun.sh model=small recipe.steps=1000
#
# What comes before `--` goes to torchrun, the rest to minimax-train:
#
#   launch/torchrun.sh --nproc-per-node=2 -- model=tiny
#   launch/torchrun.sh --max-restarts=3 -- model=small checkpoint.resume=auto
#
# Several machines, the same line on each:
#
#   launch/torchrun.sh --nnodes=2 --nproc-per-node=8 --rdzv-backend=c10d --rdzv-endpoint=node0:29500 -- model=medium
set -euo pipefail

options=()
if [[ " $* " == *" -- "* ]]; then
  while [[ $1 != "--" ]]; do
    options+=("$1")
    shift
  done
  shift
fi
if [[ -v CUDA_VISIBLE_DEVICES ]]; then
  gpus=$(grep -o '[^,]\+' <<<"$CUDA_VISIBLE_DEVICES" | wc -l) || true
else
  gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l) || true
fi
defaults=("--nproc-per-node=$((gpus > 0 ? gpus : 1))")
[[ " ${options[*]} " =~ \ --?(nnodes|rdzv|master|standalone) ]] || defaults+=(--standalone)

if [[ " ${options[*]} " =~ \ --?max[-_]restarts[=\ ][1-9] && " ${options[*]} " =~ \ --?nnodes[=\ ]([2-9]|[1-9][0-9]) &&
  ! " ${options[*]} " =~ c10d ]]; then
  echo "error: --max-restarts: over several machines needs --rdzv-backend=c10d --rdzv-endpoint=NODE:PORT, with which" \
    "machines agree on when to start again" >&2
  exit 2
fi

# Else processes that are started again meet in the store of those before them, and read what these left there.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# By default SIGUSR1 would end torchrun, and the run with it, at once.
options=(--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 "${defaults[@]}" "${options[@]}")

# A bad configuration is refused once, before any process is started, also for their number where numbers give it.
all=" ${options[*]} "
first=() processes="" nodes=1
[[ $all =~ .*\ --?nproc[-_]per[-_]node[=\ ]([^\ ]+) ]] && processes=${BASH_REMATCH[1]}
[[ $all =~ .*\ --?nnodes[=\ ]([^\ ]+) ]] && nodes=${BASH_REMATCH[1]}
if [[ "$processes $nodes" =~ ^[1-9][0-9]{0,5}\ [1-9][0-9]{0,5}$ ]]; then
  first=(RANK=0 "WORLD_SIZE=$((processes * nodes))" LOCAL_RANK=0 MASTER_ADDR=localhost MASTER_PORT=1)
fi
env "${first[@]}" minimax-train --cfg "$@" >/dev/null
exec torchrun "${options[@]}" --no-python minimax-train "$@"
