"""The training loop: load, step, log, evaluate, save."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from minimax_train.cache import find_cache, use_kernel_cache
from minimax_train.checkpoint.initial_weights import load_weights
from minimax_train.checkpoint.remote import Folder
from minimax_train.checkpoint.retention import step_of
from minimax_train.checkpoint.saving import Saver
from minimax_train.checkpoint.store import CheckpointStore
from minimax_train.compile_ahead import compiled_ahead
from minimax_train.config import Config, config_at, flatten, to_yaml
from minimax_train.data import MicroBatch, build_train_loader, merge_states
from minimax_train.data.count import count_tokens
from minimax_train.engines import StepReport, StepSums
from minimax_train.errors import ConfigError, GridChange, Saved, SuspiciousStep, TrainingError
from minimax_train.evaluation import VALIDATION_LOSS, Evaluation
from minimax_train.first_rank import on_every_rank, on_first_rank
from minimax_train.guard import StepGuard, TakenStep, to_host
from minimax_train.kernels.compile_cache import import_compilers
from minimax_train.leave import Leave
from minimax_train.metrics.console import billions
from minimax_train.metrics.flops import peak_flops_per_s
from minimax_train.metrics.log import MetricLog
from minimax_train.metrics.step import StepMetrics
from minimax_train.metrics.traces import Tracer
from minimax_train.model.config import count_parameters
from minimax_train.parallel.grid import SAME_SEQUENCES, ProcessGrid
from minimax_train.parallelize import build_engine, whole_layouts
from minimax_train.phases import Phases
from minimax_train.recipe import Progress, Recipe, StepPlan
from minimax_train.replicas import check_replicas
from minimax_train.run_dir import prepare_run_dir
from minimax_train.startup import Startup, no_collection


class Trainer:
    """One process of a training run.

    Args:
        startup: of this process, with what was done before; told after the first step.
        leave: what signals ask of the run; none is asked of one without.
        phases: in which a run tells where it is.
    """

    def __init__(
        self,
        config: Config,
        grid: ProcessGrid,
        device: torch.device,
        startup: Startup | None = None,
        leave: Leave | None = None,
        phases: Phases | None = None,
    ) -> None:
        self.startup = Startup() if startup is None else startup
        self.leave = Leave() if leave is None else leave
        kept = use_kernel_cache(find_cache(config.cache_dir, says=grid.is_first), device)
        self.config, self.grid, self.device = config, grid, device
        self.run_dir = Path(config.run_dir)
        self.store = CheckpointStore(self.run_dir, config.checkpoint.retention, config.checkpoint.folder)
        with compiled_ahead(config, grid, kept, device):
            self.tokenizer, resumed, weights = prepare_run_dir(config, self.store)
            self.recipe, self.phases = Recipe(config), Phases(device) if phases is None else phases
            self.peak_flops_per_s = peak_flops_per_s(device)
            # Before the model: worker processes open the data while it is built.
            self.loader = build_train_loader(
                config.data,
                self.tokenizer,
                dp_rank=grid.rank("dp"),
                dp_size=grid.size("dp"),
                seed=config.seed,
                peers=grid.group(SAME_SEQUENCES),
                timeout_s=config.parallel.timeout_s,
            )
            self.startup.mark("tokenizer")
            if device.type == "cuda":
                with no_collection():
                    import_compilers()
                self.startup.mark("imports")
        if kept is not None:
            self.startup.mark("kernels")
        self.engine = build_engine(config, grid, device, self.phases)
        self.guard = StepGuard(self.engine, config.recipe)
        self.startup.mark("model")
        self._compare_data(on_every_rank(self.loader.open))
        self.startup.mark("waiting for data")
        self.progress = self._restore(resumed, weights)
        self.first_step = self.progress.step  # taken before this process
        self.gone_back_to: list[int] = []  # steps of checkpoints, by rollbacks
        self.has_started = False
        self.notes = self._count_epoch()
        self.evaluation: Evaluation | None = None
        if config.data.has_validation and config.recipe.eval_interval:
            on_every_rank(self._open_evaluation)
        self.stage: str | None = None
        self.step_metrics = StepMetrics(config, self.engine, self.phases, self.peak_flops_per_s, self.progress)
        self.tracer = Tracer(config.logging, self.run_dir, device)
        self.log = MetricLog(
            config.logging,
            self.run_dir,
            flatten(config),
            total_steps=self.recipe.total_steps(self.progress, self.progress.policy),
            first_step=self.first_step,
            enabled=grid.is_first,
        )
        self.saver = Saver(
            self.store,
            device,
            config.parallel.timeout_s,
            lambda text: self.log.event("checkpoint", self.progress.step, text),
        )

    def train(self) -> None:
        """Train to the end of the recipe.

        Raises:
            GridChange: on all ranks, when the next stage needs another process grid; the run is saved.
            Saved: on all ranks, when a signal had the run save and leave.
        """
        recipe = self.config.recipe
        if recipe.eval_interval and self.evaluation is None:
            self.log.say("no held-out documents are configured: no evaluation")
        if self.is_over:
            self.log.say(f"all {self.progress.step} steps were taken before: nothing is left to train")
        held_out = [] if self.evaluation is None else self.evaluation.notes
        untraced = self.tracer.beyond(self.recipe.total_steps(self.progress, self.progress.policy))
        for note in [*self.recipe.notes, *self.notes, *held_out, *untraced]:
            self.log.say(note)
        self._say_notes()
        late: TakenStep | None = None
        with closing(self.loader), closing(self.saver), self.log:
            ranks = f"{world} ranks" if (world := dist.get_world_size()) > 1 else "1 rank"
            where = f"{ranks}, {self.config.parallel.shown}; after step {self.first_step}"
            self.log.event("start", self.first_step, where, says=False)
            if not self.is_over:
                self.log.say(f"{self._description()}; {where}")
            self._evaluate_if_left_out()
            self.startup.mark("checkpoint")
            if not self.is_over:
                # The grid was chosen for the newest checkpoint, which may have been damaged.
                self._stop_for_another_grid()
            self.leave.begin(self.config.checkpoint.leave_within_s, self.store.to_go_on)
            while not self.is_over:
                try:
                    late = self._go_on(late)
                except SuspiciousStep as found:
                    if recipe.outliers != "rollback":
                        raise
                    self._roll_back(found)
                    late = None
            self.saver.wait()
            self.log.finish()
            text = f"done: {self.progress.tokens:,} tokens; checkpoint {self.store.path(self.progress.step)}; "
            self.log.event("done", self.progress.step, f"{text}{self.run_dir}/loss.png")

    def _go_on(self, late: TakenStep | None) -> TakenStep | None:
        """Take a step, and report, save and evaluate as is due.

        Args:
            late: the step before, if it is still to be reported.

        Returns:
            This step, if it is.
        """
        with self.tracer.step(self.progress.step + 1):
            taken = self.train_step()
        if not self.has_started:
            self._tell_startup(taken)
            self._prepare_saves()
            self.has_started = True
        if (every := self.config.parallel.check_replicas) and taken.number % every == 0:
            check_replicas(self.engine.replicas(), self.grid, taken.number)
        if late is not None:  # its results, now that the device has the next step to work on
            self.report(late)
        step, ends, interval = taken.number, self.ends_stage, self.config.checkpoint.interval
        leaves = not ends and self.leave.agreed()  # after the end of a stage a step later
        evaluates = self.evaluates() and not leaves  # else when the run goes on
        saves = ends or leaves or (interval and step % interval == 0)
        late = taken if step % self.config.logging.interval == 0 or self.is_over else None
        # Decided alike on all ranks: a step that was not applied makes them all look why, in the same place.
        # The loss of a step may decide on the batch of the next.
        at_once = self.device.type == "cpu" or evaluates or saves or self.config.recipe.critical_batch
        if late is not None and at_once:
            self.report(late)
            late = None
        if saves:  # first: whatever happens in an evaluation, no step is lost
            self.save(taken.plan, must_succeed=bool(ends or leaves))
        if evaluates:
            self.log.report(step, self.evaluate(taken.plan))
        if leaves:
            self.log.finish()
            text = f"{signal.Signals(leaves).name} after step {step}: {self.store.to_go_on()}"
            self.log.event("saved", step, text, says=False)
            raise Saved(text)
        if ends:
            self._stop_for_another_grid()
        return late

    def _roll_back(self, found: SuspiciousStep) -> None:
        """Go back to the newest checkpoint, which is of a step before the suspicious one; the loader stays where it is.

        Raises:
            TrainingError: when there is none, or it was gone back to as often as the recipe allows.
        """
        policy, limit, last = "recipe.outliers=rollback", self.config.recipe.outlier_limit, self.progress.step
        with self.between_steps("checkpoint"):
            self.saver.wait()
            checkpoint = self.store.newest_whole()
            if checkpoint is None:
                raise TrainingError(f"{found}; {policy}: there is no checkpoint to go back to")
            if (times := self.gone_back_to.count(step_of(checkpoint))) >= limit:
                again = f"gone back to {checkpoint} {times} times (recipe.outlier_limit={limit})"
                raise TrainingError(f"{found}; {policy}: {again}")
            state = self.engine.snapshot()
            progress = self.store.load(checkpoint, state)
            self.engine.go_back(state, last - progress.step)
        self.gone_back_to.append(progress.step)
        self.progress = Progress(progress.step, progress.tokens, policy=progress.policy)
        self.step_metrics.restart(progress)
        self.guard.forget()
        self.log.go_back(progress.step)
        text = (
            f"{found}; {policy}: back to {checkpoint}; the data of {last - progress.step} steps since are passed over"
        )
        self.log.event("rollback", progress.step, text)
        self._stop_for_another_grid()

    @property
    def is_over(self) -> bool:
        """Whether the recipe has no step left."""
        return self.recipe.is_over(self.progress, self.progress.policy)

    @property
    def ends_stage(self) -> bool:
        """Whether the last step taken was the last of a stage: it is saved, and evaluated."""
        return self.recipe.ends_stage(self.progress, self.progress.policy)

    def writes_norms(self, step: int) -> bool:
        """Whether the norms of groups of parameters are among the metrics of a step."""
        logging = self.config.logging
        return logging.norms > 0 and step % (logging.interval * logging.norms) == 0

    def evaluates(self) -> bool:
        """Whether an evaluation follows the last step taken."""
        step = self.progress.step
        if self.evaluation is None or step == 0:
            return False
        return self.ends_stage or step % self.config.recipe.eval_interval == 0

    def plan(self) -> StepPlan:
        """Of the step to come."""
        return self.recipe.at(self.progress, self.progress.policy)

    def plan_after(self, plan: StepPlan) -> StepPlan | None:
        """Of the step after the one to come, as far as it is known; None if this process does not take it."""
        after = Progress(self.progress.step + 1, self.progress.tokens + plan.tokens)
        state = self.recipe.enter(after, self.progress.policy)
        if self.recipe.is_over(after, state) or self.recipe.grid(state).sizes != self.config.parallel.sizes:
            return None
        return self.recipe.within(after, state)

    def train_step(self) -> TakenStep:
        """One optimizer step over the global batch. The host does not wait for the device to take it."""
        self.saver.poll()
        self.progress.policy = self.recipe.enter(self.progress, self.progress.policy)
        plan = self.plan()
        self._tell_stage(plan)
        self.phases.begin_step(self.progress.step + 1)
        with self.phases("data"):
            try:
                batches = self.next_batches(plan)
            except ConfigError as error:
                raise self._stopped(error) from error
        sums = self.engine.run(batches, plan)
        totals = self.engine.totals(sums)
        norms_2G = self.engine.norms() if self.writes_norms(self.progress.step + 1) else None
        self.saver.before_update()
        report = self.engine.step(plan.learning_rate)
        self.progress.step += 1
        self.progress.tokens += plan.tokens
        results = StepSums(*map(to_host, totals)), StepReport(*map(to_host, report)), to_host(sums.loss)
        norms_2G = None if norms_2G is None else to_host(norms_2G)
        copied = None
        if self.device.type == "cuda":
            copied = torch.cuda.current_stream().record_event(torch.cuda.Event(enable_timing=True))
        at, paused_s = self.step_metrics.clock(), self.step_metrics.paused_s
        taken = TakenStep(self.progress.step, self.progress.tokens, at, paused_s, plan, *results, norms_2G, copied)
        self.guard.watch(taken, batches)
        return taken

    def next_batches(self, plan: StepPlan) -> list[MicroBatch]:
        """This rank's micro-batches of the next step."""
        batches = self.loader.next_micro_batches(plan, self.plan_after(plan))
        return [batch.split(self.config.layout, self.grid.rank("cp")).to(self.device) for batch in batches]

    def report(self, taken: TakenStep) -> None:
        """Log the metrics of a step, and what there is to say about its data; what the recipe learns from them."""
        metrics = self.metrics(taken)
        if self.config.recipe.outliers == "rollback":
            metrics["rollbacks"] = len(self.gone_back_to)
        elif self.config.recipe.outliers != "ignore":
            outliers = self.guard.take_outliers(taken.number)
            metrics["outliers"] = len(outliers)
            for line in outliers:
                self.log.event("outlier", taken.number, line)
        self.log.report(taken.number, metrics | self.loader.figures(self.grid.group("dp")))
        if taken.number % self.config.logging.interval == 0:  # not where a run ends that may be extended
            self.progress.policy = self.recipe.learn(self.progress, self.progress.policy, taken.plan, metrics["loss"])
        self._say_notes()

    def _say_notes(self) -> None:
        for note in [*self.loader.take_notes(), *self.engine.notes]:
            self.log.say(note)
        self.engine.notes.clear()

    def metrics(self, taken: TakenStep) -> dict[str, float]:
        """Of a step, when the device is done with it; its seconds are the mean since the step reported before.

        Raises:
            TrainingError: when a loss, gradient or weight was not finite, in this step or since the last report.
        """
        with self.phases("report"):
            self.guard.check(taken.number)
            taken.wait()
        _, tokens = self.recipe.end(self.progress, self.progress.policy)
        return self.step_metrics.of(taken, end=tokens)

    def evaluate(self, plan: StepPlan) -> dict[str, float]:
        """Loss on the held-out documents, of a run that evaluates."""
        assert self.evaluation is not None
        self.guard.check()
        with self.between_steps("evaluate"):
            return self.evaluation.run(self.engine, plan)

    def save(self, plan: StepPlan, must_succeed: bool = False) -> None:
        """Save a checkpoint of everything the run needs to go on; it may be complete only some steps later.

        Raises:
            TrainingError: when it must succeed, as where the run ends, and fails.
        """
        self.guard.check()
        with self.between_steps("checkpoint"):
            state = self.loader.state_dict()
            streams: list[Any] = [None] * self.grid.size("dp")
            # Digests of all files stay where they are: every rank would receive as much as the longest state has.
            shards = {"shards": state.pop("shards")} if "shards" in state else {}
            dist.all_gather_object(streams, state, group=self.grid.group("dp"))
            self.progress.data = {**merge_states(streams), **shards}
            config = to_yaml(config_at(self.config, plan))
            self.saver.save(self.progress, self.engine.snapshot(), config, must_succeed)

    @contextmanager
    def between_steps(self, phase: str) -> Iterator[None]:
        """A phase whose time is not the steps'."""
        started = time.perf_counter()
        with self.phases(phase):
            yield
        self.step_metrics.paused_s += time.perf_counter() - started

    def _tell_stage(self, plan: StepPlan) -> None:
        """Say which stage begins, in a run of several, and what has changed the number of steps."""
        several = len(self.recipe.stages) > 1
        if several and plan.stage != self.stage:
            text = (
                f"step {self.progress.step + 1}: stage {plan.stage}: {plan.global_batch_size} packed sequences of "
                f"{plan.sequence_length} tokens a step, RoPE base {plan.rope_base:g}"
            )
            self.log.event("stage", self.progress.step, text)
        if plan.stage != self.stage or self.config.recipe.critical_batch:
            self.log.plan(self.recipe.total_steps(self.progress, self.progress.policy), plan.stage if several else "")
        self.stage = plan.stage

    def _description(self) -> str:
        """Of what is trained, on what, and of a step."""
        count, plan, engine = count_parameters(self.config.model), self.plan(), self.config.engine
        device = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"
        dtype = str(engine.compute_dtype(self.device.type)).removeprefix("torch.")
        return (
            f"{billions(count.total)} parameters, {billions(count.active)} active for a token; {device}, {dtype}, "
            f"engine={engine.name}; steps of {plan.tokens:,} tokens, packed sequences of {plan.sequence_length:,}"
        )

    def _tell_startup(self, first: TakenStep) -> None:
        first.wait()
        self.startup.mark("first step")
        self.log.say(str(self.startup))

    def _prepare_saves(self) -> None:
        """Have what saves beside training need, if there will be any: the last one is synchronous."""
        checkpoint, step = self.config.checkpoint, self.progress.step
        if checkpoint.async_save and checkpoint.interval:
            next_save = (step // checkpoint.interval + 1) * checkpoint.interval
            if next_save < self.recipe.total_steps(self.progress, self.progress.policy):
                with self.between_steps("checkpoint"):
                    self.saver.prepare(self.engine.snapshot())

    def _evaluate_if_left_out(self) -> None:
        """Of a run that ended between a step's checkpoint and its evaluation."""
        here = self.recipe.grid(self.progress.policy).sizes == self.config.parallel.sizes
        if here and self.evaluates() and not self.log.holds(self.progress.step, VALIDATION_LOSS):
            plan = self.recipe.within(self.progress, self.progress.policy)
            self.log.report(self.progress.step, self.evaluate(plan))

    def _stop_for_another_grid(self) -> None:
        state = self.recipe.enter(self.progress, self.progress.policy)
        grid = self.recipe.grid(state)
        if grid.sizes != self.config.parallel.sizes:
            self.log.finish()
            raise GridChange(
                f"after step {self.progress.step}: stage {state['stage']} runs on another grid, {grid.shown}; the run "
                f"is saved in {self.store.path(self.progress.step)}: start the same command on processes for that grid "
                "to go on"
            )

    def _count_epoch(self) -> list[str]:
        """Learn the tokens of one pass over the data, if the recipe needs them and the run does not know them yet; what
        there is to say of it."""
        if not self.recipe.needs_epoch:
            return []
        policy, notes = self.progress.policy, []
        if "epoch_tokens" not in policy:
            started = time.perf_counter()
            policy["epoch_tokens"] = on_first_rank(lambda: count_tokens(self.config.data, self.tokenizer))
            seconds = time.perf_counter() - started
            notes = [f"data: one epoch is {policy['epoch_tokens']:,} tokens, counted in {seconds:.1f} s"]
        self.recipe.check(policy)
        return notes

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

    def _restore(self, resumed: Folder | None, weights: Folder | None) -> Progress:
        """Take over a checkpoint, or the weights of one, or neither."""
        if resumed is None and weights is None:  # nor is a snapshot taken, for which some engines need memory
            return Progress()
        state = self.engine.snapshot()
        if resumed is not None:
            progress = self.store.load(resumed, state)
            self.engine.restore(state)
            try:
                on_every_rank(lambda: self.loader.load_state_dict(progress.data or {}))
            except (KeyError, TypeError, AttributeError) as error:
                raise ConfigError(f"{resumed}: damaged: no position in the training data: {error!r}") from error
            return progress
        assert weights is not None
        shapes = {name: layout.shape for name, layout in whole_layouts(self.config.model).items()}
        strict = self.config.checkpoint.initial_weights_strict
        load_weights(weights, state["model"], strict=strict, shapes=shapes)
        self.engine.restore({"model": state["model"]})
        return Progress()
