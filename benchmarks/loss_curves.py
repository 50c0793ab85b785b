"""The same run in float32 on the CPU and in bfloat16 on the GPU: how far apart are the loss curves?

    python benchmarks/loss_curves.py [--steps 50] [--json FILE] [overrides]

Each run is `minimax-train` in a process of its own. The tolerance is on the loss of every step.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

RUNS = {
    "cpu float32": ("device=cpu", "engine.precision=float32"),
    "gpu float32": ("device=cuda", "engine.precision=float32"),
    "gpu bfloat16": ("device=cuda", "engine.precision=bfloat16"),
}
TOLERANCE = 0.02  # relative, of each step's loss in bfloat16 against float32 on the CPU


def train(folder: Path, overrides: list[str]) -> list[dict]:
    """Run and return the records of all steps."""
    subprocess.run(
        [sys.executable, "-m", "minimax_train", f"run_dir={folder}", *overrides], check=True, cwd=folder.parent
    )
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if "loss" in record]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--json", type=Path)
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    recipe = [f"recipe.steps={options.steps}", "recipe.warmup_steps=10", "recipe.decay_steps=10"]
    shared = ["experiment=demo", *recipe, "recipe.eval_interval=0", "checkpoint.interval=0", *options.overrides]
    with tempfile.TemporaryDirectory() as folder:
        curves = {name: train(Path(folder) / name.replace(" ", "-"), [*shared, *run]) for name, run in RUNS.items()}
    machine = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {platform.processor() or platform.machine()}"
    print(f"\n{machine}\nstep  " + "  ".join(f"{name:>12}" for name in RUNS))
    for rows in zip(*curves.values(), strict=True):
        if rows[0]["step"] == 1 or rows[0]["step"] % 5 == 0:
            print(f"{rows[0]['step']:4d}  " + "  ".join(f"{row['loss']:12.5f}" for row in rows))
    reference = [row["loss"] for row in curves["cpu float32"]]
    worst = {
        name: max(abs(row["loss"] - right) / right for row, right in zip(curve, reference, strict=True))
        for name, curve in curves.items()
    }
    print("\nlargest relative difference from cpu float32: " + ", ".join(f"{k} {v:.2e}" for k, v in worst.items()))
    if options.json:
        options.json.write_text(json.dumps({"machine": machine, "worst": worst, "curves": curves}))
    return int(worst["gpu bfloat16"] > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
