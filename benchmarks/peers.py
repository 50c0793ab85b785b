"""transformers' MiniMax, trained at one shape: its rate and memory, to compare with ours on the same GPU.

    python benchmarks/peers.py [--micro-batches 1 8] [--steps 8] [--json FILE] [--layers 8 --hidden 1024 ...]
    python benchmarks/training.py --models small --micro-batches 1 8 $(python benchmarks/peers.py --overrides)

The second line trains ours at the same shape. ``MiniMaxForCausalLM`` has its fastest settings: bfloat16 weights
without a float32 copy, fused AdamW, ``grouped_mm`` experts, ``sdpa`` attention, random tokens in rows of one document;
with and without gradient checkpointing. Every case is a process of its own, and its rate the median of the steps after
two. torchtitan, which needs a release of torch of its own, is not run from here: docs/results.md says how it was.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from timing import times

SHAPE = {
    "layers": 8,
    "hidden": 1024,
    "heads": 8,
    "kv_heads": 2,
    "head_dim": 128,
    "experts": 16,
    "expert_hidden": 2816,
    "vocabulary": 32000,
    "length": 8192,
    "rows": 4,
}
# The same in our configuration; rows are training.py's own default.
OURS = {
    "layers": "model.num_layers",
    "hidden": "model.hidden_size",
    "heads": "model.num_heads",
    "kv_heads": "model.num_kv_heads",
    "head_dim": "model.head_dim",
    "experts": "model.num_experts",
    "expert_hidden": "model.expert_hidden_size",
    "vocabulary": "model.vocab_size",
}
FULL_ATTENTION_EVERY = 8
WARM_UP = 2
COLUMNS = ("tokens/s", "ms", "GiB", "loss")


def minimax(shape: Mapping[str, int], device: str) -> Any:
    """The model, its weights in bfloat16 (on a CPU float32, and experts one by one)."""
    from transformers import MiniMaxConfig, MiniMaxForCausalLM

    kinds = [
        "linear_attention" if layer % FULL_ATTENTION_EVERY else "full_attention"
        for layer in range(1, shape["layers"] + 1)
    ]
    config = MiniMaxConfig(
        vocab_size=shape["vocabulary"],
        hidden_size=shape["hidden"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv_heads"],
        head_dim=shape["head_dim"],
        intermediate_size=shape["expert_hidden"],
        num_local_experts=shape["experts"],
        num_experts_per_tok=2,
        max_position_embeddings=shape["length"],
        layer_types=kinds,
        use_cache=False,
    )
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    with torch.device(device):
        model: Any = MiniMaxForCausalLM._from_config(config, attn_implementation="sdpa", dtype=dtype)
    if device == "cuda":
        model.set_experts_implementation("grouped_mm")
    return model.train()


def train(shape: Mapping[str, int], micro_batches: int, checkpointing: bool, steps: int) -> dict[str, float]:
    """One case, in this process."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    model = minimax(shape, device)
    if checkpointing:
        model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    batches = torch.randint(shape["vocabulary"], (micro_batches, shape["rows"], shape["length"]), device=device)
    losses = []

    def step() -> None:
        for tokens in batches:
            loss = model(input_ids=tokens, labels=tokens).loss / micro_batches
            loss.backward()
        losses.append(loss.detach() * micro_batches)
        optimizer.step()
        optimizer.zero_grad()

    ms = times(step, steps, WARM_UP) if device == "cuda" else host_times(step, steps)
    return {
        "tokens/s": 1e3 * batches.numel() / ms,
        "ms": ms,
        "GiB": torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else float("nan"),
        "loss": float(losses[-1]),
    }


def host_times(step: Callable[[], None], steps: int) -> float:
    """Median milliseconds, as ``timing.times`` measures them on a GPU."""
    marks = []
    for _ in range(WARM_UP + steps + 1):
        marks.append(time.perf_counter())
        step()
    return 1e3 * statistics.median(b - a for a, b in zip(marks[WARM_UP:], marks[WARM_UP + 1 :], strict=False))


def in_own_process(case: Mapping[str, Any]) -> dict[str, float] | str:
    """The figures of a case, or why there are none."""
    command = [sys.executable, __file__, "--case", json.dumps(case)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    if "OutOfMemoryError" in done.stderr:
        return "out of memory"
    return "failed: " + (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in SHAPE.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--micro-batches", nargs="+", type=int, default=[1])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--overrides", action="store_true", help="print our overrides for the shape and stop")
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case is not None:
        print(json.dumps(train(**options.case)))
        return 0
    shape = {name: getattr(options, name) for name in SHAPE}
    if options.overrides:
        print(*(f"{ours}={shape[name]}" for name, ours in OURS.items()))
        return 0
    import transformers

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"{name}, torch {torch.__version__}, transformers {transformers.__version__}")
    print(f"{'':40}" + "".join(f"{column:>11}" for column in COLUMNS), flush=True)
    results: dict[str, Any] = {}
    for count in options.micro_batches:
        for checkpointing in (True, False):
            case = {"shape": shape, "micro_batches": count, "checkpointing": checkpointing, "steps": options.steps}
            shown = f"transformers {shape['length']} x{count}{' checkpointing' if checkpointing else ''}"
            found = results[shown] = in_own_process(case)
            told = found if isinstance(found, str) else "".join(f"{found[column]:11,.1f}" for column in COLUMNS)
            print(f"{shown:40}{told}", flush=True)
    if options.json:
        options.json.write_text(json.dumps({"machine": name, "shape": shape, "results": results}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
