"""The training loop: load, step, log, evaluate, save."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from minimax_train.checkpoint.store import CheckpointStore, find_checkpoint, load_weights
from minimax_train.config import Config, config_at, flatten, to_yaml
from minimax_train.data import SKIP, MicroBatch, build_train_loader, merge_states
from minimax_train.engines import StepReport, StepSums
from minimax_train.errors import ConfigError, TrainingError
from minimax_train.evaluation import VALIDATION_LOSS, Evaluation
from minimax_train.first_rank import on_every_rank, on_first_rank
from minimax_train.guard import StepGuard, TakenStep, to_host
from minimax_train.metrics.flops import peak_flops_per_s, training_flops
from minimax_train.metrics.log import MetricLog
from minimax_train.metrics.router import router_metrics
from minimax_train.parallel.grid import ProcessGrid
from minimax_train.parallelize import build_engine
from minimax_train.phases import Phases
from minimax_train.recipe import Progress, Recipe, StepPlan
from minimax_train.run_dir import prepare_run_dir


class Trainer:
    """One process of a training run."""

    def __init__(self, config: Config, grid: ProcessGrid, device: torch.device) -> None:
        self.config, self.grid, self.device = config, grid, device
        self.run_dir = Path(config.run_dir)
        self.store = CheckpointStore(self.run_dir, config.checkpoint.keep)
        self.tokenizer, resumed = prepare_run_dir(config, self.store)
        self.recipe, self.phases = Recipe(config), Phases()
        self.peak_flops_per_s = peak_flops_per_s(device)
        # Before the model: worker processes open the data while it is built.
        self.loader = build_train_loader(
            config.data,
            self.tokenizer,
            dp_rank=grid.rank("dp"),
            dp_size=grid.size("dp"),
            seed=config.seed,
            peers=grid.group("cp_tp"),
            timeout_s=config.parallel.timeout_s,
        )
        self.engine = build_engine(config, grid, device, self.phases)
        self.guard = StepGuard(self.engine)
        self._compare_data(on_every_rank(self.loader.open))
        self.progress = self._restore(resumed)
        self.first_step = self.progress.step  # taken before this process
        self.evaluation: Evaluation | None = None
        if config.data.has_validation and config.recipe.eval_interval:
            on_every_rank(self._open_evaluation)
        self.stage = self.plan().stage
        # Of the step reported last: its time, later by what evaluations and checkpoints have taken since; what it was.
        self.reported_at, self.reported = time.perf_counter(), (self.progress.step, self.progress.tokens)
        self.log = MetricLog(
            config.logging,
            self.run_dir,
            flatten(config),
            total_steps=config.recipe.steps,
            first_step=self.first_step,
            enabled=grid.is_first,
        )

    def train(self) -> None:
        """Train to the last step of the recipe."""
        recipe, checkpoint = self.config.recipe, self.config.checkpoint
        if recipe.eval_interval and self.evaluation is None:
            self.log.say("no held-out documents are configured: no evaluation")
        if self.progress.step == recipe.steps:
            self.log.say(f"all {recipe.steps} steps were taken before: nothing is left to train")
        held_out = [] if self.evaluation is None else self.evaluation.notes
        for note in [*self.loader.take_notes(), *held_out]:
            self.log.say(note)
        late: TakenStep | None = None
        with closing(self.loader), self.log:
            # A run that ended between a step's checkpoint and its evaluation.
            if self.evaluates(self.progress.step) and not self.log.holds(self.progress.step, VALIDATION_LOSS):
                self.log.report(self.progress.step, self.evaluate(self.plan()))
            while self.progress.step < recipe.steps:
                taken = self.train_step()
                if late is not None:  # its results, now that the device has the next step to work on
                    self.report(late)
                step = taken.number
                last = step == recipe.steps
                evaluates = self.evaluates(step)
                saves = last or (checkpoint.interval and step % checkpoint.interval == 0)
                late = taken if step % self.config.logging.interval == 0 or last else None
                # Decided alike on all ranks: a step that was not applied makes them all look why, in the same place.
                if late is not None and (self.device.type == "cpu" or evaluates or saves):
                    self.report(late)
                    late = None
                if saves:  # first: whatever happens in an evaluation, no step is lost
                    self.save(taken.plan)
                if evaluates:
                    self.log.report(step, self.evaluate(taken.plan))
            self.log.finish()
            self.log.say(
                f"done: {self.progress.tokens:,} tokens; checkpoint {self.store.latest()}; {self.run_dir}/loss.png"
            )

    def evaluates(self, step: int) -> bool:
        """Whether an evaluation follows a step."""
        recipe = self.config.recipe
        if self.evaluation is None or step == 0:
            return False
        return step == recipe.steps or step % recipe.eval_interval == 0

    def plan(self) -> StepPlan:
        """Of the step to come."""
        return self.recipe.at(self.progress, self.progress.policy)

    def train_step(self) -> TakenStep:
        """One optimizer step over the global batch. The host does not wait for the device to take it."""
        plan = self.plan()
        if plan.stage != self.stage:
            self.log.say(f"step {self.progress.step + 1}: stage {plan.stage}")
            self.stage = plan.stage
        with self.phases("data"):
            try:
                batches = self.next_batches(plan)
            except ConfigError as error:
                raise self._stopped(error) from error
        totals = self.engine.totals(self.engine.run(batches, plan))
        report = self.engine.step(plan.learning_rate)
        self.progress.step += 1
        self.progress.tokens += plan.tokens
        results = StepSums(*map(to_host, totals)), StepReport(*map(to_host, report))
        copied = torch.cuda.current_stream().record_event() if self.device.type == "cuda" else None
        taken = TakenStep(self.progress.step, self.progress.tokens, time.perf_counter(), plan, *results, copied)
        self.guard.watch(taken, batches)
        return taken

    def next_batches(self, plan: StepPlan) -> list[MicroBatch]:
        """This rank's micro-batches of the next step."""
        batches = self.loader.next_micro_batches(plan)
        return [batch.split(self.config.layout, self.grid.rank("cp")).to(self.device) for batch in batches]

    def report(self, taken: TakenStep) -> None:
        """Log the metrics of a step, and what there is to say about its data."""
        self.log.report(taken.number, self.metrics(taken) | self.skipped_documents())
        for note in self.loader.take_notes():
            self.log.say(note)

    def skipped_documents(self) -> dict[str, int]:
        """Bad documents passed over in the run so far, over all ranks; nothing where they are errors."""
        if self.config.data.bad_documents != SKIP:
            return {}
        total = torch.tensor(self.loader.skipped)
        dist.all_reduce(total, group=self.grid.group("dp"))
        return {"skipped_documents": int(total)}

    def metrics(self, taken: TakenStep) -> dict[str, float]:
        """Of a step, when the device is done with it; its seconds are the mean since the step reported before.

        Raises:
            TrainingError: when a loss, gradient or weight was not finite, in this step or since the last report.
        """
        model = self.config.model
        with self.phases("report"):
            self.guard.check(taken.number)
            taken.wait()
            totals = taken.totals
        router = router_metrics(
            totals.tokens_per_expert_LE,
            entropy=float(totals.entropy),
            dropped=float(totals.dropped),
            experts_per_token=model.experts_per_token,
            per_expert=self.config.logging.expert_load,
        )
        balance = {"aux_loss": float(totals.aux_loss)} if model.aux_loss_coefficient > 0 else {}
        steps, tokens = taken.number - self.reported[0], taken.tokens - self.reported[1]
        elapsed = taken.at - self.reported_at
        self.reported_at, self.reported = taken.at, (taken.number, taken.tokens)
        # With those of an evaluation or a checkpoint that came after the report before.
        seconds = {f"seconds/{name}": value / steps for name, value in self.phases.take().items()}
        flops = training_flops(model, taken.plan.tokens, float(totals.scores)) * steps / elapsed / dist.get_world_size()
        mfu = {} if self.peak_flops_per_s is None else {"mfu": flops / self.peak_flops_per_s}
        return {
            "loss": float(totals.loss),
            **balance,
            **router,
            "grad_norm": float(taken.report.gradient_norm),
            "learning_rate": taken.plan.learning_rate,
            "tokens": taken.tokens,
            "tokens_per_second": tokens / elapsed,
            "tflops_per_rank": flops / 1e12,
            **mfu,
            "seconds": elapsed / steps,
            **self.engine.figures(taken.plan),
            **seconds,
        }

    def evaluate(self, plan: StepPlan) -> dict[str, float]:
        """Loss on the held-out documents, of a run that evaluates."""
        assert self.evaluation is not None
        self.guard.check()
        with self.between_steps("evaluate"):
            return self.evaluation.run(self.engine, plan)

    def save(self, plan: StepPlan) -> None:
        """Write a checkpoint of everything the run needs to go on."""
        self.guard.check()
        with self.between_steps("checkpoint"):
            state = self.loader.state_dict()
            streams: list[Any] = [None] * self.grid.size("dp")
            # Digests of all files stay where they are: every rank would receive as much as the longest state has.
            shards = {"shards": state.pop("shards")} if "shards" in state else {}
            dist.all_gather_object(streams, state, group=self.grid.group("dp"))
            self.progress.data = {**merge_states(streams), **shards}
            self.store.save(self.progress, self.engine.snapshot(), to_yaml(config_at(self.config, plan)))

    @contextmanager
    def between_steps(self, phase: str) -> Iterator[None]:
        """A phase whose time is not the steps'."""
        started = time.perf_counter()
        with self.phases(phase):
            yield
        self.reported_at += time.perf_counter() - started

    def _stopped(self, error: ConfigError) -> Exception:
        """What a run says that has trained when its data turn out to be bad, on the rank that reads them."""
        if self.progress.step == self.first_step:
            return error
        stopped = TrainingError(f"after step {self.progress.step}: {error}; {self.store.to_go_on()}")
        stopped.on_all_ranks = False
        return stopped

    def _open_evaluation(self) -> None:
        self.evaluation = Evaluation(self.config, self.tokenizer, self.grid, self.plan())

    def _compare_data(self, fingerprints: list[str]) -> None:
        """Refuse ranks that see other training data: documents would be doubled or lost."""
        others = [rank for rank, fingerprint in enumerate(fingerprints) if fingerprint != fingerprints[0]]
        if others:
            error = ConfigError(
                f"data: {len(others)} ranks, the first of them rank {others[0]}, see other training files than rank 0: "
                "their number, order, names and sizes must be the same on every machine"
            )
            error.on_all_ranks = True
            raise error

    def _restore(self, resumed: Path | None) -> Progress:
        state, weights = self.engine.snapshot(), self.config.checkpoint.initial_weights
        if resumed is not None:
            progress = self.store.load(resumed, state)
            self.engine.restore(state)
            try:
                on_every_rank(lambda: self.loader.load_state_dict(progress.data or {}))
            except (KeyError, TypeError, AttributeError) as error:
                raise ConfigError(f"{resumed}: damaged: no position in the training data: {error!r}") from error
            return progress
        if weights is not None:
            # One rank looks: on a network file system the others may not see the same folder yet.
            load_weights(on_first_rank(lambda: find_checkpoint(weights)), state["model"])
            self.engine.restore({"model": state["model"]})
        return Progress()
