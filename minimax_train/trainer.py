"""The training loop: load, step, log, evaluate, save."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import record_function

from minimax_train.checkpoint.store import CheckpointStore, Progress, find_checkpoint, load_weights
from minimax_train.config import Config, flatten
from minimax_train.data import MicroBatch, build_train_loader, build_validation_rows, merge_states
from minimax_train.diagnosis import describe_non_finite
from minimax_train.engines import FSDPEngine
from minimax_train.errors import TrainingError
from minimax_train.evaluation import evaluate, run_model
from minimax_train.metrics.log import MetricLog
from minimax_train.metrics.router import router_metrics
from minimax_train.parallel.grid import WORLD, ProcessGrid
from minimax_train.parallelize import build_model
from minimax_train.run_dir import prepare_run_dir


class Trainer:
    """One process of a training run.

    The phases of a step (data, forward, backward, reduce, optimizer) have the same names in the metrics
    (``seconds/<phase>``, host time) and in profiler traces.
    """

    def __init__(self, config: Config, grid: ProcessGrid, device: torch.device) -> None:
        self.config, self.grid, self.device = config, grid, device
        self.run_dir = Path(config.run_dir)
        self.store = CheckpointStore(self.run_dir, config.checkpoint.keep, is_first=grid.is_first)
        self.tokenizer = prepare_run_dir(config, grid, self.store)
        self.model = build_model(config, grid, device)
        self.engine = FSDPEngine(self.model, config.recipe, grid)
        self.loader = build_train_loader(
            config.data, self.tokenizer, dp_rank=grid.rank("dp"), dp_size=grid.size("dp"), seed=config.seed
        )
        self.validation: list[MicroBatch] = []
        if config.data.has_validation and config.recipe.eval_interval:
            held_out = build_validation_rows(
                config.data,
                self.tokenizer,
                rows=config.recipe.eval_rows,
                dp_rank=grid.rank("dp"),
                dp_size=grid.size("dp"),
            )
            batches = held_out.micro_batches(config.recipe.micro_batch_size)
            self.validation = [batch.split(config.layout, grid.rank("cp")) for batch in batches]
        self.progress = self._restore()
        self.seconds: dict[str, float] = defaultdict(float)
        self.log = MetricLog(
            config.logging,
            self.run_dir,
            flatten(config),
            total_steps=config.recipe.steps,
            first_step=self.progress.step,
            enabled=grid.is_first,
        )

    def train(self) -> None:
        """Train to the last step of the recipe."""
        recipe, checkpoint = self.config.recipe, self.config.checkpoint
        if recipe.eval_interval and not self.validation:
            self.log.say("no held-out documents are configured: no evaluation")
        try:
            while self.progress.step < recipe.steps:
                metrics = self.train_step()
                step = self.progress.step
                last = step == recipe.steps
                if step % self.config.logging.interval == 0 or last:
                    self.log.report(step, metrics)
                if self.validation and (step % recipe.eval_interval == 0 or last):
                    with self.phase("evaluate"):
                        self.log.report(step, evaluate(self.model, self.validation, self.grid, self.device))
                if last or (checkpoint.interval and step % checkpoint.interval == 0):
                    with self.phase("checkpoint"):
                        self.save()
            self.log.finish()
            self.log.say(
                f"done: {self.progress.tokens:,} tokens; checkpoint {self.store.latest()}; {self.run_dir}/loss.png"
            )
        finally:
            self.log.close()
            self.loader.close()

    def train_step(self) -> dict[str, float]:
        """One optimizer step over the global batch. Returns its metrics."""
        started, step = time.perf_counter(), self.progress.step
        with self.phase("data"):
            batches = self.next_batches()
        sums = self.accumulate_gradients(batches)
        with self.phase("optimizer"):
            gradient_norm = self.engine.gradient_norm()
            if not (math.isfinite(sums["loss"]) and math.isfinite(gradient_norm)):
                problem = f"step {step + 1}: loss {sums['loss']}, gradient norm {gradient_norm}"
                raise TrainingError(f"{problem}; {describe_non_finite(self.model, self.engine.parameters, batches)}")
            learning_rate = self.config.recipe.learning_rate_at(step)
            self.engine.step(learning_rate, gradient_norm)
        tokens = self.config.recipe.global_batch_size * self.config.data.sequence_length
        self.progress = Progress(step + 1, self.progress.tokens + tokens)
        elapsed = time.perf_counter() - started
        # With those of an evaluation or a checkpoint that came after the step before.
        seconds = {f"seconds/{name}": value for name, value in self.seconds.items()}
        self.seconds.clear()
        return {
            **sums,
            "grad_norm": gradient_norm,
            "learning_rate": learning_rate,
            "tokens": self.progress.tokens,
            "tokens_per_second": tokens / elapsed,
            "seconds": elapsed,
            **self._memory(),
            **seconds,
        }

    def next_batches(self) -> list[MicroBatch]:
        """This rank's micro-batches of the next step."""
        recipe = self.config.recipe
        per_rank = recipe.global_batch_size // (recipe.micro_batch_size * self.grid.size("dp"))
        batches = self.loader.next_micro_batches(recipe.micro_batch_size, per_rank)
        return [batch.split(self.config.layout, self.grid.rank("cp")).to(self.device) for batch in batches]

    def accumulate_gradients(self, batches: list[MicroBatch]) -> dict[str, float]:
        """Forward and backward passes of a step. Returns sums over the global batch, the same on all ranks.

        Losses are divided by the targets and rows of the whole batch, so that neither they nor the gradient depend on
        how the batch is split over ranks and micro-batches.
        """
        config = self.config
        targets = torch.tensor(sum(batch.num_targets for batch in batches))
        dist.all_reduce(targets, group=self.grid.group("dp_cp"))
        sums, load_LE = [], []
        for batch in batches:
            with self.phase("forward"):
                out = run_model(self.model, batch)
                loss = out.token_loss / max(1, int(targets))
                aux_loss = out.aux_loss / config.recipe.global_batch_size
            with self.phase("backward"):
                self.engine.backward(loss + config.model.aux_loss_coefficient * aux_loss)
            sums.append(torch.stack([x.detach().double() for x in (loss, aux_loss, out.dropped, out.entropy)]))
            load_LE.append(out.tokens_per_expert_LE)
        with self.phase("reduce"):
            total, load = torch.stack(sums).sum(0), torch.stack(load_LE).sum(0)
            dist.all_reduce(total, group=self.grid.group(WORLD))
            dist.all_reduce(load, group=self.grid.group(WORLD))
            loss, aux_loss, dropped, entropy = total.tolist()
        router = router_metrics(
            load,
            entropy=entropy,
            dropped=dropped,
            experts_per_token=config.model.experts_per_token,
            per_expert=config.logging.expert_load,
        )
        balance = {"aux_loss": aux_loss} if config.model.aux_loss_coefficient > 0 else {}
        return {"loss": loss, **balance, **router}

    def _memory(self) -> dict[str, float]:
        """Most GPU memory ever allocated on this rank, in GiB."""
        on_gpu = self.device.type == "cuda"
        return {"peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30} if on_gpu else {}

    def save(self) -> None:
        """Write a checkpoint of everything the run needs to go on."""
        streams: list[Any] = [None] * self.grid.size("dp")
        dist.all_gather_object(streams, self.loader.state_dict(), group=self.grid.group("dp"))
        self.progress.data = merge_states(streams)
        self.store.save(self.progress, self.model, self.engine.optimizer_state())

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A named part of a step, for the profiler and the metrics."""
        started = time.perf_counter()
        with record_function(name):
            yield
        self.seconds[name] += time.perf_counter() - started

    def _restore(self) -> Progress:
        checkpoint = self.config.checkpoint
        # One rank looks: on a network file system the others may not see the same folder yet.
        found = [self.store.latest() if self.grid.is_first else None]
        dist.broadcast_object_list(found, src=0)
        latest = found[0]
        if latest is not None:
            progress = self.store.load(latest, self.model, self.engine.optimizer_state())
            self.loader.load_state_dict(progress.data)
            return progress
        if checkpoint.initial_weights is not None:
            load_weights(find_checkpoint(checkpoint.initial_weights), self.model)
        return Progress()
