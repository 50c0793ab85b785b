"""Small runs for tests: a model of every ingredient, a corpus made on the spot."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from minimax_train.config import Config, load_config
from minimax_train.model import ModelConfig

# No size is a power of two, and heads times head dim is not the hidden size.
MODEL = {
    "vocab_size": 300,
    "hidden_size": 20,
    "num_layers": 4,
    "layer_pattern": "LLSL",
    "num_heads": 6,
    "num_kv_heads": 2,
    "head_dim": 6,
    "rotary_dim": 4,
    "rope_base": 100.0,
    "num_experts": 5,
    "experts_per_token": 2,
    "expert_hidden_size": 12,
}
# Heads, vocabulary and experts divide by 4 as well, for grids that split them.
DIVISIBLE = ["model.num_heads=12", "model.num_kv_heads=4", "model.vocab_size=308", "model.num_experts=8"]
DIVISIBLE += ["data.sequence_length=96"]
# Sizes that the GPU kernels take.
ON_GPU = ["device=cuda", "model.num_heads=4", "model.num_kv_heads=4", "model.head_dim=64", "model.rotary_dim=32"]
ON_GPU += ["model.vocab_size=308", "model.hidden_size=96", "model.num_experts=8", "model.expert_hidden_size=192"]
# Of a run that has stages.
UNSTAGED = ["recipe.steps=null", "recipe.decay_steps=null", "recipe.min_learning_rate=null"]
WORDS = "attention state decay token expert router norm gate lightning softmax ring".split()  # noqa: SIM905


def model_config(**changes) -> ModelConfig:
    return ModelConfig(**{**MODEL, **changes})


def write_corpus(folder: Path, documents: int = 60, seed: int = 0) -> Path:
    """JSON lines of random sentences, one to eighty words."""
    choose = random.Random(seed)
    path = folder / f"corpus-{seed}.jsonl"
    lines = (" ".join(choose.choices(WORDS, k=choose.randint(1, 80))) for _ in range(documents))
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return path


def overrides(folder: Path, *more: str) -> list[str]:
    """Command-line overrides of a run that takes a second per step or less."""
    folder.mkdir(parents=True, exist_ok=True)
    train, held_out = write_corpus(folder), write_corpus(folder, 10, seed=1)
    return [
        *(f"model.{key}={value}" for key, value in MODEL.items()),
        "data=files",
        "data.format=json",
        f"data.train_files=[{train}]",
        f"data.validation_files=[{held_out}]",
        "data.sequence_length=63",
        "data.num_streams=4",
        "data.num_workers=0",
        "data.shuffle_documents=8",
        "recipe.steps=6",
        "recipe.global_batch_size=4",
        "recipe.micro_batch_size=1",
        "recipe.warmup_steps=2",
        "recipe.decay_steps=2",
        "recipe.eval_interval=3",
        "recipe.eval_sequences=5",
        "device=cpu",
        "cache_dir=null",
        f"run_dir={folder}/run",
        *more,
    ]


def tiny_run(folder: Path, *more: str) -> Config:
    return load_config(overrides(folder, *more))


def all_whole(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors put together from what every rank holds of them, on the host; some may be on other ranks alone."""
    held = {}
    for name, x in tensors.items():
        part, offsets = x, (0,) * x.dim()
        if isinstance(x, DTensor):
            part = x.to_local()
            shape, offsets = compute_local_shape_and_global_offset(x.shape, x.device_mesh, x.placements)
            assert tuple(part.shape) == tuple(shape)
        held[name] = part.detach().cpu().clone(), offsets, x.shape
    every = [None] * dist.get_world_size()
    dist.all_gather_object(every, held)
    found: dict[str, Tensor] = {}
    for name, (piece, start, shape) in (item for of_rank in every for item in of_rank.items()):
        result = found.setdefault(name, torch.full(shape, torch.nan, dtype=piece.dtype))
        if piece.numel():
            result[tuple(slice(a, a + size) for a, size in zip(start, piece.shape, strict=True))] = piece
    return found


def whole(x: Tensor) -> Tensor:
    """A tensor put together from what every rank holds of it, on the host."""
    return all_whole({"": x})[""]


def weights_of(trainer) -> dict[str, Tensor]:
    """Master weights, whole, by parameter name; called by all ranks."""
    return all_whole(trainer.engine.snapshot()["model"])


def gradients_of(trainer) -> dict[str, Tensor]:
    """Those of the last ``engine.run``, summed over ranks, whole, by parameter name; called by all ranks."""
    return all_whole(trainer.engine.gradients())


def gradients_of_a_step(trainer) -> tuple[dict[str, float], float]:
    """Forward and backward passes of a trainer's next step: its sums over all ranks, and the gradient's norm.

    The engine keeps the gradients.
    """
    plan = trainer.plan()
    totals = trainer.engine.totals(trainer.engine.run(trainer.next_batches(plan), plan))
    gradients = gradients_of(trainer).values()
    sums = {name: float(value) for name, value in totals._asdict().items() if value.dim() == 0}
    sums["dropped"] = float(totals.dropped_L.sum())
    for name in ("entropy_L", "dropped_L"):
        sums |= {f"{name}/{i}": float(value) for i, value in enumerate(getattr(totals, name))}
    sums |= {f"loss_by_origin/{i}": float(loss) for i, loss in enumerate(totals.loss_by_origin_O)}
    sums |= {f"tokens_per_expert/{i}": float(n) for i, n in enumerate(totals.tokens_per_expert_LE.flatten())}
    return sums, float(sum(gradient.double().square().sum() for gradient in gradients)) ** 0.5
