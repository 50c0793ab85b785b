"""Kernels compiled by several processes at once, where ``cache_dir`` does not have those of a model yet.

A run compiles one kernel after the other, as its first step comes to them, which takes most of a first start. Here a
process for each kind of attention, one for the experts and one for all else run that part of a layer forward and
backward, on random numbers, at about the sizes of one rank, and end. The run then finds their kernels on disk. It waits
for the processes before its model takes memory of the GPU. What they leave out (AdamW, what only ranks that share
tokens or experts run, later stages' sizes), and what fails in them, the run compiles as it comes to it.
"""

from __future__ import annotations

import gc
import hashlib
import os
import pickle
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import IO, TYPE_CHECKING

import torch
from torch import Tensor, nn

from minimax_train import kernels
from minimax_train.deterministic import use_deterministic_algorithms
from minimax_train.documents import Documents
from minimax_train.engines import ENGINES
from minimax_train.kernels.accumulation import set_accumulator
from minimax_train.kernels.compile_cache import NO_COMPILE
from minimax_train.kernels.rope import rotary_table
from minimax_train.metrics.console import note
from minimax_train.model import HybridModel, KernelConfig, ModelConfig, ModelLoss, ModelPart
from minimax_train.model.attention.context import TokenContext
from minimax_train.model.model import Block
from minimax_train.parallel.environment import end_with_parent, start_main
from minimax_train.parallel.grid import AxisSizes
from minimax_train.recipe import resolve_stages

if TYPE_CHECKING:
    from minimax_train.config import Config

_EXIT_TIMEOUT_S = 5.0
_LIBRARIES = ("torch", "triton", "quack-kernels", "flash-attn-4")


@dataclass(frozen=True)
class Sizes:
    """What the kernels are compiled for.

    Attributes:
        model: of one layer of each kind of attention, with one rank's share of heads, vocabulary and
            experts' columns.
        experts: on one rank.
        kernels: which implementations run.
        dtype: of compute.
        lengths: tokens of each packed sequence of a micro-batch on a rank.
        adds_in_gemms: whether the experts' GEMMs add up gradients, in float32.
        adds_often: whether a step has several micro-batches.
        deterministic: of the run.
    """

    model: ModelConfig
    experts: int
    kernels: KernelConfig
    dtype: torch.dtype
    lengths: tuple[int, ...]
    adds_in_gemms: bool
    adds_often: bool
    deterministic: bool

    @classmethod
    def of(cls, config: Config, grid: AxisSizes) -> Sizes:
        """Those of the first stage of a run on GPUs.

        A model of one layer of each kind has the kernels of any number of them.
        """
        stage, tp = resolve_stages(config)[0], grid.size("tp")
        heads, kv_heads = config.model.num_heads // tp, config.model.num_kv_heads // tp
        kinds = "".join(dict.fromkeys(config.model.layer_pattern))
        return cls(
            replace(
                config.model,
                layer_pattern=kinds,
                vocab_size=config.model.vocab_size // tp,
                num_layers=len(kinds),
                residual_scale=None,
                num_heads=heads,
                # Where no attention has key-value heads, any number of them was accepted.
                num_kv_heads=kv_heads if kv_heads and heads % kv_heads == 0 else heads,
                expert_hidden_size=config.model.expert_hidden_size // grid.size("etp"),
            ),
            max(config.model.experts_per_token, config.model.num_experts // grid.size("ep")),
            config.kernels,
            config.engine.compute_dtype("cuda"),
            (max(1, stage.sequence_length // grid.size("cp")),) * stage.micro_batch_size,
            ENGINES[config.engine.name].adds_in_gemms,
            stage.batch_at(0) > stage.micro_batch_size * stage.sequence_length * grid.size("dp"),
            config.deterministic,
        )

    @property
    def parts(self) -> list[str]:
        """One for each process: the attention of a layer, by its number; ``experts``; ``rest``, which is norms, router,
        embedding and loss."""
        return [*map(str, range(self.model.num_layers)), "experts", "rest"]

    def key(self) -> str:
        """Changes with whatever changes a kernel."""
        found = hashlib.sha256(repr(self).encode())
        for library in _LIBRARIES:
            try:
                found.update(f"{library} {metadata.version(library)};".encode())
            except metadata.PackageNotFoundError:
                continue
        for path in sorted(Path(kernels.__path__[0]).rglob("*.py")):
            found.update(path.read_bytes())
        return found.hexdigest()[:32]


@contextmanager
def compiled_ahead(config: Config, grid: AxisSizes, folder: Path | None, device: torch.device) -> Iterator[None]:
    """Start the processes, do what is inside, and wait until all have ended; on the first GPU of each machine, if it
    has a CPU core for each, and once for all runs of the same sizes. Other ranks go on, and wait at what all do next.

    Nothing that goes wrong stops the run: it is told in a note.

    Args:
        folder: of compiled kernels, for GPUs of this kind; None where they are not kept.
    """
    if folder is None or device.type != "cuda" or device.index:
        yield
        return
    sizes = Sizes.of(config, grid)
    done = folder / "ahead" / sizes.key()
    timeout_s = config.parallel.timeout_s / 2  # other ranks take one that is late by that for lost
    end = time.monotonic() + timeout_s
    processes: dict[str, tuple[subprocess.Popen, IO[bytes]]] = {}
    problems: dict[str, str] = {}  # by part
    with ExitStack() as stack:
        try:
            if not done.exists() and len(os.sched_getaffinity(0)) >= len(sizes.parts):
                for part in sizes.parts:
                    told = stack.enter_context(tempfile.TemporaryFile())
                    processes[part] = _start(sizes, part, device, told), told
                    stack.callback(_end, processes[part][0])
        except OSError as error:
            problems["processes"] = str(error)
        yield
        for part, (process, told) in processes.items():
            try:
                process.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                problems[part] = f"took longer than {timeout_s:g} s"
                continue
            if process.returncode:
                problems[part] = f"status {process.returncode}, {_last_line(told)}"
        try:
            if processes:
                done.parent.mkdir(parents=True, exist_ok=True)
                done.touch()
        except OSError as error:
            problems["folder"] = str(error)
    if problems:
        what = "; ".join(f"{part}: {why}" for part, why in problems.items())
        note(f"kernels are not all compiled ahead on {socket.gethostname()} ({what}): the run compiles them")


def _last_line(file: IO[bytes]) -> str:
    file.seek(0)
    lines = file.read().decode(errors="replace").split("\n")
    return next((line for line in reversed(lines) if line.strip()), "without a word")


def _end(process: subprocess.Popen) -> None:
    process.kill()
    with suppress(subprocess.TimeoutExpired):
        process.wait(_EXIT_TIMEOUT_S)


def _start(sizes: Sizes, part: str, device: torch.device, told: IO[bytes]) -> subprocess.Popen:
    """A process, which writes its errors to a file."""
    with tempfile.TemporaryFile() as given:
        pickle.dump((sizes, part, device), given)
        given.seek(0)
        return start_main(__name__, environ={NO_COMPILE: "1"}, stdin=given, stdout=subprocess.DEVNULL, stderr=told)


def main() -> None:
    """One of the processes."""
    end_with_parent(int(sys.argv[1]))
    gc.disable()  # nothing that it makes is large, and it ends soon
    sizes, part, device = pickle.load(sys.stdin.buffer)
    if sizes.deterministic:
        use_deterministic_algorithms()
    torch.cuda.set_device(device)
    run(sizes, part, device)
    torch.cuda.synchronize()


def run(sizes: Sizes, part: str, device: torch.device) -> None:
    """The forward and backward pass of a part of a layer, twice where GEMMs add to what the first has made."""
    config, layer = sizes.model, int(part) if part.isdecimal() else 0
    if part == "experts":
        config = replace(config, num_experts=sizes.experts)
    with torch.device("meta"):
        model = HybridModel(config, sizes.kernels, None, [ModelPart(range(layer, layer + 1))])
    block = model.layers.get_submodule(str(layer))
    assert isinstance(block, Block)
    documents = Documents.from_lengths(sizes.lengths, device)
    T = documents.num_tokens
    x_TD = torch.randn(T, config.hidden_size, device=device, dtype=sizes.dtype, requires_grad=True)
    if part == "experts":
        weights_TK = torch.rand(T, config.experts_per_token, device=device, requires_grad=True)
        experts_TK = torch.randint(config.num_experts, weights_TK.shape, device=device)
        runs, inputs = block.experts.mlp, (x_TD, weights_TK, experts_TK, config.alpha)
    elif part == "rest":
        block.add_module("attention", _Nothing())
        block.experts.add_module("mlp", _WeightedOnly())
        tokens_T = torch.randint(config.vocab_size, (T,), device=device)
        runs, inputs = _LossOf(model, len(sizes.lengths)), (tokens_T, documents)
    else:
        tables = rotary_table(documents.positions_T, config.rotary_dim, config.rope_base)
        runs, inputs = block.attention, (x_TD, TokenContext(documents, None, *tables))
    runs.to_empty(device=device).to(sizes.dtype)
    adds = part == "experts" and sizes.adds_in_gemms
    for parameter in runs.parameters():
        nn.init.normal_(parameter, std=0.02)
        if adds:
            set_accumulator(parameter, _Sum(parameter))
    for _ in range(1 + (adds and sizes.adds_often)):
        runs(*inputs).sum().backward()


class _Nothing(nn.Module):
    """In the place of attention."""

    def forward(self, x_TD: Tensor, context: object) -> Tensor:
        return x_TD


class _WeightedOnly(nn.Module):
    """In the place of experts: the router has a gradient."""

    def forward(self, x_TD: Tensor, weights_TK: Tensor, experts_TK: Tensor, residual: float) -> Tensor:
        return x_TD * weights_TK.sum(1, keepdim=True).to(x_TD.dtype)


class _LossOf(nn.Module):
    """A model's loss, to differentiate."""

    def __init__(self, model: HybridModel, num_sequences: int) -> None:
        super().__init__()
        self.model, self.num_sequences = model, num_sequences

    def forward(self, tokens_T: Tensor, documents: Documents) -> Tensor:
        out = self.model(tokens_T, documents, tokens_T, num_sequences=self.num_sequences)
        assert isinstance(out, ModelLoss)
        return out.token_loss + self.model.config.aux_loss_coefficient * out.aux_loss


class _Sum:
    """Where GEMMs add up a parameter's gradients (``kernels/accumulation.py``)."""

    def __init__(self, parameter: nn.Parameter) -> None:
        self.total, self.adds = torch.zeros_like(parameter, dtype=torch.float32), False

    def sum(self) -> tuple[Tensor, bool]:
        return self.total, self.adds

    def added(self) -> None:
        self.adds = True
