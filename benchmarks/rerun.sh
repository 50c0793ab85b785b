#!/usr/bin/env bash
# The figures of docs/results.md that whole steps give, once more, on the GPUs of this machine.
#
#   benchmarks/rerun.sh FOLDER [PART...]
#
# One GPU:   training long slice engines checkpoints offload losses
# Several:   scaling engines pipeline checkpoints cluster faults restart
#
# It uses GPUS of them, all by default; without parts it runs all of that line. Each part prints the end of its log, which
# is in FOLDER with its JSON, and is ended after LIMIT seconds: 300 if not given, 600 of those that are made of many.
set -uo pipefail
out=${1:?usage: benchmarks/rerun.sh FOLDER [PART...]}; shift
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$out"; out=$(cd "$out" && pwd)
gpus=${GPUS:-$(python3 -c 'import torch; print(torch.cuda.device_count())')}
several=(python3 -m torch.distributed.run --standalone --nproc-per-node "$gpus")
many=("${several[@]}"); ((gpus > 1)) || many=(python3)

# Stages of equal layers, whose passes keep a GPU busy.
staged=(model=small model.num_layers=16 model.layer_pattern=LLLS model.hidden_size=2048 model.num_heads=16
  model.num_kv_heads=2 model.head_dim=128 model.num_experts=8 model.expert_hidden_size=4096 model.vocab_size=4096
  data.sequence_length=8192 data.num_streams=8 recipe.micro_batch_size=2 recipe.global_batch_size=16)

run() { # NAME COMMAND...: ended with all its processes after LIMIT seconds
  local name=$1 started=$SECONDS; shift
  echo "== $name"
  (cd "$out" && timeout --kill-after=10 "${LIMIT:-300}" "$@") >"$out/$name.log" 2>&1
  local status=$?
  grep -vE 'Warning|^\[W|^W[0-9]{4}|^\*+$|OMP_NUM_THREADS|generate_mlir|_warn_once|^note: reusing the tokenizer' "$out/$name.log" | tail -n "${LINES_SHOWN:-14}" | cut -c1-260
  echo "   status $status, $((SECONDS - started)) s"
}

part() {
  case $1 in
    training) run training python3 "$here/training.py" --models medium small --micro-batches 1 8 --json "$out/training.json" ;;
    long) run long python3 "$here/training.py" --models medium --micro-batches 1 --lengths 32768 131072 --json "$out/long.json" ;;
    slice) run slice python3 "$here/training.py" --models slice --micro-batches 1 8 --json "$out/slice.json" ;;
    scaling) LIMIT=${LIMIT:-600} run scaling python3 "$here/cluster.py" --parts weak apart axes cp --seconds 580 --json "$out/scaling.json" ;;
    engines) LIMIT=${LIMIT:-600} run engines "${many[@]}" "$here/engines.py" --model medium --micro-batches 8 --steps 6 --seconds 150 --json "$out/engines.json" \
      --engines zero1 megatron fsdp deepspeed-1 deepspeed-2 deepspeed-3 ;;
    pipeline) run pipeline "${several[@]}" "$here/pipeline.py" --measure --steps 3 --json "$out/pipeline.json" "${staged[@]}" ;;
    checkpoints) run checkpoints "${many[@]}" "$here/checkpoints.py" --model medium --micro-batches 8 --methods async dcp-async \
      --json "$out/checkpoints.json" ;;
    offload) run offload minimax-train model=medium model.num_experts=46 engine=deepspeed engine.stage=3 \
      engine.offload_optimizer=true data.sequence_length=8192 data.num_streams=32 recipe.micro_batch_size=4 \
      recipe.global_batch_size=32 recipe.eval_interval=0 checkpoint.interval=0 checkpoint.async_save=false "run_dir=$out/offload" ;;
    losses)
      local seed name how
      for seed in 1 2; do
        while read -r name how; do
          # shellcheck disable=SC2086
          run "losses-$name-$seed" minimax-train model=small model.num_layers=8 data.sequence_length=8192 data.num_streams=8 \
            recipe.micro_batch_size=2 recipe.global_batch_size=2 recipe.steps=300 recipe.learning_rate=1e-3 \
            recipe.min_learning_rate=1e-4 recipe.warmup_steps=50 recipe.decay_steps=1 recipe.eval_interval=0 checkpoint.interval=0 \
            seed=$seed $how "run_dir=$out/losses-$name-$seed"
          rm -rf "$out/losses-$name-$seed/checkpoints"
        done <<<$'zero1 engine=zero1\nfsdp engine=fsdp recipe.activation_checkpointing=full\nmoments engine=zero1 engine.moments=bfloat16'
      done ;;
    cluster) LIMIT=${LIMIT:-600} run cluster python3 "$here/cluster.py" --parts strong linear experts pp best layers --seconds 580 --json "$out/cluster.json" --picture "$out/cluster.svg" ;;
    faults) LINES_SHOWN=60 LIMIT=${LIMIT:-600} run faults env PYTHONPATH="$here/../tests/lib:${PYTHONPATH:-}" python3 "$here/../tests/lib/support/fault_drills.py" --device cuda --at-once 3 ;;
    restart) run restart env PYTHONPATH="$here/../tests/lib:${PYTHONPATH:-}" python3 "$here/../tests/lib/support/restart_time.py" --device cuda ;;
    *) echo "rerun.sh: unknown part '$1'" >&2; exit 2 ;;
  esac
}

if (($#)); then parts=("$@")
elif ((gpus > 1)); then parts=(scaling engines pipeline checkpoints cluster faults restart)
else parts=(training long slice engines checkpoints offload losses); fi
for each in "${parts[@]}"; do part "$each"; done
