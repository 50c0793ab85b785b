"""Checkpoints saved by all ranks, beside training or while it waits.

    plan    who writes what; all ranks together, once
    stage   copy the state to host memory that is shared with a writer process; the next optimizer step waits for it
    write   each rank's files, by its writer process
    finish  by the first rank's: index, progress, manifest, the name that says that it is complete

A synchronous save is not staged, and each rank itself writes, straight from the engine's tensors. After the plan
nothing is a collective: ranks leave what they have to tell each other in the store of the process group, and look
there between steps (:meth:`Saver.poll`).
"""

from __future__ import annotations

import json
import pickle
import socket
import time
from collections.abc import Callable, Generator
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from minimax_train.checkpoint.shards import SavePlanner, write_shards
from minimax_train.checkpoint.staging import StagingMemory, available_memory, lay_out
from minimax_train.checkpoint.store import CheckpointStore
from minimax_train.checkpoint.writer import Failure, WriterProcess, attempt
from minimax_train.errors import TrainingError
from minimax_train.first_rank import on_every_rank
from minimax_train.metrics.console import note, to_stderr
from minimax_train.recipe import Progress

_MOST_MEMORY = 0.9
"""Of the memory that a host can still give, for staging."""
_PAUSE_S = 0.005

Outcome = tuple[bool, Any]
"""Whether something was done, and its result, or why not."""


@dataclass
class _Save:
    """One that is under way.

    Attributes:
        step: whose state it is.
        began: seconds since the epoch.
        must_succeed: the run ends here.
        blocked_s: seconds that the ranks stood still for it, once that is known.
    """

    step: int
    began: float
    must_succeed: bool
    blocked_s: float | None = None


class Saver:
    """Saves checkpoints of a run, one at a time. All methods but :meth:`poll` and :meth:`close` are called by all ranks
    together, in the same order.

    Args:
        device: of the state.
        timeout_s: after which ranks that have not written are taken to hang, once they are waited for.
        say: tells the person watching, on the first rank.
    """

    def __init__(
        self, store: CheckpointStore, device: torch.device, timeout_s: float, say: Callable[[str], None]
    ) -> None:
        self._store, self._device, self._timeout_s, self._say = store, device, timeout_s, say
        self._planner = SavePlanner()
        self._memory: StagingMemory | None = None
        self._writer: WriterProcess | None = None
        self._saves = 0
        self._told: dist.PrefixStore | None = None  # what ranks say of the last save
        self._save: _Save | None = None
        self._course: Generator[None, None, Outcome] | None = None
        self._copied: torch.Event | None = None  # that the device's stream has not been told to wait for

    def prepare(self, state: dict[str, Any]) -> None:
        """Make saves beside training possible: plan, start the writer process, and have staging memory allocated.

        Where host memory does not suffice, that is told, and saves are synchronous.

        Args:
            state: one like those that will be saved.
        """
        if not self._planner.take(state):
            self._planner.plan()
        size = lay_out(self._planner.hand_over())[2]
        needed, available = dict[str, int](), dict[str, int]()
        for host, of_rank, free in on_every_rank(lambda: (socket.gethostname(), size, available_memory())):
            needed[host] = needed.get(host, 0) + of_rank
            available[host] = min(free, available.get(host, free))
        short = [host for host in needed if needed[host] > _MOST_MEMORY * available[host]]
        if short:
            host = short[0]
            self._say(
                f"checkpoint.async_save=true: staging takes {_size(needed[host])} on {host}, where "
                f"{_size(available[host])} of memory are available, {_MOST_MEMORY:.0%} of them at most for it: "
                "saves are synchronous"
            )
            return
        try:
            self._memory = StagingMemory(size, self._device)
            self._writer = WriterProcess(self._memory.descriptor, self._memory.size, dist.get_rank())
            self._writer.ask("plan", self._planner.items)
        except OSError as error:
            self._give_up(f"no checkpoint writer can be started: {error}")

    @property
    def is_ready(self) -> bool:
        """Whether this rank can save beside training; not yet, while memory is allocated and the process starts."""
        if self._memory is None or self._writer is None:
            return False
        problem = self._memory.failure or self._writer.ended
        if problem is not None:
            self._give_up(problem)
            return False
        return self._memory.is_ready and self._writer.is_ready

    @property
    def is_saving(self) -> bool:
        """Whether a save is under way."""
        return self._course is not None

    def save(self, progress: Progress, state: dict[str, Any], config: str, must_succeed: bool = False) -> None:
        """Save a checkpoint: beside training if it can be done and may fail, else now. Waits for the one before.

        A save that fails is told, and leaves the checkpoints before it as they were.

        Args:
            state: from :meth:`minimax_train.engines.Engine.snapshot`.
            config: YAML of the configuration at this step.
            must_succeed: the run ends here.

        Raises:
            TrainingError: on all ranks: when it must succeed and fails, or when a rank does not answer.
        """
        step, began = progress.step, time.time()
        waits_for = self._save
        self.wait()
        if waits_for is not None:
            self._say(
                f"checkpoint {self._store.path(step).name}: waited {time.time() - began:.2f} s for that of "
                f"step {waits_for.step} to be written"
            )
        save = self._save = _Save(step, began, must_succeed)
        fits = self._planner.take(state)

        def begin() -> tuple[bool, bool, Outcome]:
            begun: Outcome = attempt(self._store.begin, step) if dist.get_rank() == 0 else (True, None)
            return fits, fits and not must_succeed and self.is_ready, self._or_failure(step, begun)

        fit, ready, begun = zip(*on_every_rank(begin), strict=True)
        self._tell_anew()
        if not all(fit):
            self._planner.plan()
            if self._writer is not None:
                self._give_up("the state that is saved has another structure than at the start")
        if begun[0][0]:
            self._course = self._run(step, all(ready), json.dumps(asdict(progress)), config)
            self.poll()
            if not all(ready):
                self.wait()
            save.blocked_s = time.time() - began
        else:
            self._end(begun[0])

    def poll(self) -> None:
        """Go on with a save as far as it can without waiting; called between steps."""
        if self._course is not None:
            try:
                next(self._course)
            except StopIteration as done:
                self._end(done.value)

    def before_update(self) -> None:
        """Have the device wait until the state is copied, before it changes; the host does not wait."""
        if self._copied is not None:
            torch.cuda.current_stream().wait_event(self._copied)
            self._copied = None

    def wait(self) -> None:
        """Wait until the save that is under way, if one is, is complete or has failed.

        Raises:
            TrainingError: when it must succeed and fails; naming the ranks that have not answered in time.
        """
        deadline = time.monotonic() + self._timeout_s
        while self._course is not None:
            self.poll()
            if self._course is not None:
                if time.monotonic() > deadline:
                    raise self._overdue()
                time.sleep(_PAUSE_S)

    def close(self) -> None:
        """End the writer process. A save that is under way is dropped; the next start removes what it wrote."""
        if self._writer is not None:
            self._writer.close()
        if self._memory is not None and self._course is None:
            self._memory.close()
        self._writer = self._memory = None

    def _run(self, step: int, asynchronous: bool, progress: str, config: str) -> Generator[None, None, Outcome]:
        """The course of a save on this rank; where it has to wait, it yields."""
        draft, tensors, told = self._store.draft(step), self._planner.hand_over(), self._told
        rank, size = dist.get_rank(), dist.get_world_size()
        assert told is not None
        if asynchronous:
            assert self._memory is not None
            staged, result = attempt(self._memory.copy, tensors)
            if staged:
                places, copied = result
                self._copied = copied
                while copied is not None and not copied.query():
                    yield
                tensors = []
                written = yield from self._ask("write", draft, places)
            else:
                written = staged, result
        else:
            written = attempt(write_shards, draft, rank, self._planner.items, tensors)
        told.set(str(rank), cast(Any, pickle.dumps(written)))
        told.add("written", 1)
        if rank > 0:
            while not told.check(["outcome"]):
                yield
            return pickle.loads(told.get("outcome"))
        while told.add("written", 0) < size:
            yield
        parts: list[Outcome] = [pickle.loads(told.get(str(each))) for each in range(size)]
        for each in range(size):
            told.delete_key(str(each))
        outcome = next((part for part in parts if not part[0]), None)
        if outcome is None:
            shards = [part[1] for part in parts]
            finish = step, self._planner.metadata, shards, progress, config
            if asynchronous:
                outcome = yield from self._ask("finish", self._store, *finish)
            else:
                outcome = attempt(self._store.finish, *finish)
            if outcome[0]:
                outcome = True, (outcome[1], sum(file.size for part in shards for file in part.sealed.values()))
        outcome = self._or_failure(step, outcome)
        told.set("outcome", cast(Any, pickle.dumps(outcome)))
        return outcome

    def _ask(self, kind: str, *arguments: Any) -> Generator[None, None, Outcome]:
        """Have the writer process do something."""
        writer = self._writer
        assert writer is not None
        writer.ask(kind, *arguments)
        while not writer.answers():
            yield
        try:
            return True, writer.answer()
        except Failure as failure:
            return False, str(failure)

    def _or_failure(self, step: int, outcome: Outcome) -> Outcome:
        done, result = outcome
        return outcome if done else (False, self._store.not_saved(step, self._planner.total_bytes, result))

    def _tell_anew(self) -> None:
        """Have a place where ranks tell each other of the next save. All have read what became of the last."""
        if self._told is not None and dist.get_rank() == 0:
            for name in ("written", "outcome"):
                self._told.delete_key(name)
        self._saves += 1
        self._told = dist.PrefixStore(f"checkpoint/{self._saves}", _get_default_store())

    def _end(self, outcome: Outcome) -> None:
        """Tell what became of a save."""
        assert self._save is not None
        save, self._save, self._course = self._save, None, None
        done, result = outcome
        if done:
            complete, size = result
            blocked_s = time.time() - save.began if save.blocked_s is None else save.blocked_s
            seconds = complete - save.began
            self._say(
                f"checkpoint {self._store.path(save.step).name}: {_size(size)}, blocked {blocked_s:.2f} s, "
                f"written in {seconds:.2f} s ({_size(size / seconds)}/s)"
            )
        elif save.must_succeed:
            raise TrainingError(f"{result}; {self._store.to_go_on()}")
        elif dist.get_rank() == 0:
            to_stderr(f"error: {result}; training goes on, and tries again at the next save")

    def _overdue(self) -> TrainingError:
        assert self._save is not None and self._told is not None
        size = dist.get_world_size()
        missing = [rank for rank in range(size) if not self._told.check([str(rank)])] if dist.get_rank() == 0 else [0]
        who = f"ranks {', '.join(map(str, missing[:8]))} have not answered" if missing else "it is not complete"
        error = TrainingError(
            f"{self._store.path(self._save.step)}: the checkpoint is not saved after {self._timeout_s:g} s "
            f"(parallel.timeout_s): {who}; {self._store.to_go_on()}"
        )
        error.on_all_ranks = False
        return error

    def _give_up(self, why: str) -> None:
        note(f"rank {dist.get_rank()}: {why}: saves are synchronous from here on")
        self.close()


def _size(count: float) -> str:
    """Bytes as a person reads them."""
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"
