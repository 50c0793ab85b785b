"""From stages to the plan of every step, and how long a run is."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from minimax_train.errors import ConfigError, require
from minimax_train.recipe.plan import Progress, StepPlan
from minimax_train.recipe.stages import Stage, naming, resolve_stages, warmup_steps

if TYPE_CHECKING:
    from minimax_train.config import Config, ParallelConfig

# Of the loss that decides on a larger batch: what each reported step leaves of the mean before it.
_KEPT = 0.9


@dataclass(frozen=True)
class Piece:
    """Steps of one stage with the same number of tokens.

    Attributes:
        stage: index.
        began: step and tokens at the stage's beginning.
        step, tokens: taken and trained on before the first of these steps.
        steps: how many.
        batch: tokens of each.
    """

    stage: int
    began: tuple[int, int]
    step: int
    tokens: int
    steps: int
    batch: int

    @property
    def end(self) -> tuple[int, int]:
        """Steps taken and tokens trained on after the last of them."""
        return self.step + self.steps, self.tokens + self.steps * self.batch


class _Place(NamedTuple):
    """What the state of a recipe says, of which :meth:`Recipe.place` makes JSON values.

    Attributes:
        stage: index.
        began: step and tokens at its beginning.
        doublings: how often the loss has doubled the batch.
        epoch_tokens: of one pass over the data; 0 where nobody needs them.
    """

    stage: int
    began: tuple[int, int]
    doublings: int
    epoch_tokens: int


class Recipe:
    """The plan of every step of a run.

    The state that its methods take and return is JSON, ``progress.policy`` in a checkpoint: ``stage`` (its name) and
    ``began`` (steps taken and tokens trained on when it did), so that stages may be measured in steps, tokens or epochs
    and batches may depend on the loss; with a critical batch ``batch_doublings`` and ``smoothed_loss``; with a length
    in epochs ``epoch_tokens``. An empty one is the beginning of the first stage. Methods change nothing: the same
    arguments give the same plan.

    Raises:
        ConfigError: naming the stage, its field, its value and what is accepted, when the schedule contradicts itself.
            What depends on the length of an epoch is found by :meth:`check`.
    """

    def __init__(self, config: Config) -> None:
        self.stages, self._config = resolve_stages(config), config.recipe
        self.warmup_steps = warmup_steps(config.recipe)
        self._end_of = functools.lru_cache(maxsize=64)(self._find_end)
        if not self.needs_epoch:
            self.check({})

    @property
    def needs_epoch(self) -> bool:
        """Whether a length is in epochs, so that ``epoch_tokens`` must be in the state."""
        return any(stage.epochs is not None for stage in self.stages)

    @property
    def notes(self) -> list[str]:
        """What the person watching should know."""
        late = ", ".join(name for name, stage in self._config.stages.items() if stage.late_weight)
        if not late or self._config.late_source is not None:
            return []
        return [f"recipe.late_source=null: no source is added at the end of {late}"]

    def at(self, progress: Progress, state: Mapping[str, Any]) -> StepPlan:
        """The plan of the step after ``progress``."""
        return self.within(progress, self.enter(progress, state))

    def enter(self, progress: Progress, state: Mapping[str, Any]) -> dict[str, Any]:
        """The state in which the step after ``progress`` is taken: of the next stage where one has ended. After the
        last there is none, and its state stays."""
        place = self._place(state)
        if place.stage + 1 < len(self.stages) and self._has_ended(progress, place):
            # Every stage has a step: the one that begins has not ended.
            place = place._replace(stage=place.stage + 1, began=(progress.step, progress.tokens))
        return {**state, "stage": self.stages[place.stage].name, "began": list(place.began)}

    def is_over(self, progress: Progress, state: Mapping[str, Any]) -> bool:
        """Whether no step is left."""
        place = self._place(state)
        return place.stage + 1 == len(self.stages) and self._has_ended(progress, place)

    def ends_stage(self, progress: Progress, state: Mapping[str, Any]) -> bool:
        """Whether the last step taken was the last of its stage."""
        return progress.step > 0 and self._has_ended(progress, self._place(state))

    def stage(self, state: Mapping[str, Any]) -> Stage:
        """That a state is in."""
        return self.stages[self._place(state).stage]

    def grid(self, state: Mapping[str, Any]) -> ParallelConfig:
        """Of the stage that a state is in."""
        return self.stage(state).parallel

    def within(self, progress: Progress, state: Mapping[str, Any]) -> StepPlan:
        """The plan of the step after ``progress``, as the stage that ``state`` names goes on."""
        place = self._place(state)
        stage = self.stages[place.stage]
        batch = stage.batch_at(progress.tokens) << place.doublings
        return StepPlan(
            learning_rate=self._learning_rate(stage, place, progress, batch),
            global_batch_size=batch // stage.sequence_length,
            micro_batch_size=stage.micro_batch_size,
            sequence_length=stage.sequence_length,
            rope_base=stage.rope_base,
            data_weights=self._mixture(stage, place, progress, batch),
            stage=stage.name,
        )

    def pieces(self, progress: Progress, state: Mapping[str, Any]) -> Iterator[Piece]:
        """What is to come after ``progress``, without going through every step; the batch as often doubled as now."""
        place = self._place(self.enter(progress, state))
        now = progress.step, progress.tokens
        while True:
            for piece in self._pieces(place, now):
                yield piece
                now = piece.end
            if place.stage + 1 == len(self.stages):
                return
            place = place._replace(stage=place.stage + 1, began=now)

    def batches(self) -> Iterator[tuple[Stage, int]]:
        """Every number of tokens per step that a stage may have; where the length of an epoch decides, as many as it
        names."""
        if self.needs_epoch:
            yield from ((stage, batch) for stage in self.stages for _, batch in stage.batches)
        else:
            yield from ((self.stages[piece.stage], piece.batch) for piece in self.pieces(Progress(), {}))

    def total_steps(self, progress: Progress, state: Mapping[str, Any]) -> int:
        """Of the whole run, those taken included; the batch as often doubled as now."""
        return self.end(progress, state)[0]

    def end(self, progress: Progress, state: Mapping[str, Any]) -> tuple[int, int]:
        """Steps taken and tokens trained on when the run is over; the batch as often doubled as now."""
        end = progress.step, progress.tokens
        for piece in self.pieces(progress, state):
            end = piece.end
        return end

    def samples(self, per_piece: int = 40, state: Mapping[str, Any] | None = None) -> Iterator[tuple[int, StepPlan]]:
        """The run in some steps, for a picture: the tokens before each, and its plan.

        Args:
            per_piece: about how many of every stage and batch size, its first and last among them.
            state: with ``epoch_tokens``, for a recipe that needs them.
        """
        state = dict(state or {})
        for piece in self.pieces(Progress(), state):
            at = {**state, "stage": self.stages[piece.stage].name, "began": list(piece.began)}
            every = max(1, piece.steps // per_piece)
            for i in sorted({*range(0, piece.steps, every), piece.steps - 1}):
                tokens = piece.tokens + i * piece.batch
                yield tokens, self.within(Progress(piece.step + i, tokens), at)

    def learn(self, progress: Progress, state: Mapping[str, Any], plan: StepPlan, loss: float) -> dict[str, Any]:
        """The state after a step that was reported: with a critical batch, the batch may double after it, but not
        during the warm-up, so that the tokens of the warm-up are known.

        Args:
            progress: that step included.
        """
        config = self._config
        if not config.critical_batch:
            return dict(state)
        smoothed = _KEPT * state.get("smoothed_loss", loss) + (1 - _KEPT) * loss
        doublings = state.get("batch_doublings", 0)
        critical = config.critical_batch_tokens * smoothed**-config.critical_batch_exponent
        if progress.step >= self.warmup_steps and critical >= 2 * plan.tokens:
            doublings += 1
        return {**state, "smoothed_loss": smoothed, "batch_doublings": doublings}

    def check(self, state: Mapping[str, Any]) -> None:
        """Refuse a schedule that contradicts itself.

        Args:
            state: with ``epoch_tokens``, for a recipe that needs them.

        Raises:
            ConfigError: naming the stage, its field, its value and what is accepted.
        """
        for piece in self.pieces(Progress(), {name: state[name] for name in state.keys() & {"epoch_tokens"}}):
            stage = self.stages[piece.stage]
            with naming(stage):
                stage.check_batch(piece.batch)
            if (piece.step, piece.tokens) == piece.began:
                self._check_lengths(piece.stage, piece.began, state.get("epoch_tokens", 0))

    def check_resumed(self, progress: Progress, where: str) -> None:
        """Refuse to go on from a checkpoint that this schedule cannot have come to.

        Args:
            where: the checkpoint, for messages.
        """
        state = progress.policy
        if not _is_state(state, progress):
            raise ConfigError(f"{where}: damaged: no state of a recipe: {dict(state)!r}")
        names = [stage.name for stage in self.stages]
        if state.get("stage", names[0]) not in names:
            raise ConfigError(
                f"recipe.stages={names}: {where} was saved in stage {state['stage']!r}; "
                f"that name must be among them, with the length it had: recipe.stages.{state['stage']}.steps=..."
            )
        place = self._place(state)
        stage = self.stages[place.stage]
        if stage.steps is not None:
            taken = progress.step - place.began[0]
            accepted = f"{where} has taken {taken} steps already; must be at least {taken}"
            require(taken <= stage.steps, f"{stage.path}.steps", stage.steps, accepted)
            return
        tokens = progress.tokens - place.began[1]
        last = stage.batch_at(progress.tokens) << place.doublings
        accepted = f"{where} has trained on {tokens} tokens already; must be at least "
        if stage.tokens is not None:
            require(tokens - last < stage.tokens, f"{stage.path}.tokens", stage.tokens, f"{accepted}{tokens}")
        elif place.epoch_tokens:
            fits = tokens - last < (self._tokens(place) or 0)
            accepted += f"{tokens / place.epoch_tokens:.6g}, of {place.epoch_tokens} tokens each"
            require(fits, f"{stage.path}.epochs", stage.epochs, accepted)

    def _place(self, state: Mapping[str, Any]) -> _Place:
        names = [stage.name for stage in self.stages]
        began = state.get("began", (0, 0))
        return _Place(
            names.index(state["stage"]) if "stage" in state else 0,
            (began[0], began[1]),
            state.get("batch_doublings", 0),
            state.get("epoch_tokens", 0),
        )

    def _tokens(self, place: _Place) -> int | None:
        """Length of a stage in tokens; None where it is in steps."""
        stage = self.stages[place.stage]
        if stage.epochs is None:
            return stage.tokens
        assert place.epoch_tokens > 0, "the tokens of an epoch are not known yet"
        return max(1, round(stage.epochs * place.epoch_tokens))

    def _has_ended(self, progress: Progress, place: _Place) -> bool:
        if progress.step <= place.began[0]:
            return False
        tokens, steps = self._tokens(place), self.stages[place.stage].steps
        if tokens is not None:
            return progress.tokens - place.began[1] >= tokens
        assert steps is not None
        return progress.step - place.began[0] >= steps

    def _pieces(self, place: _Place, now: tuple[int, int]) -> Iterator[Piece]:
        """From ``now``, steps and tokens, to the stage's end."""
        stage, tokens_of_stage = self.stages[place.stage], self._tokens(place)
        step, tokens = now
        while not self._has_ended(Progress(step, tokens), place):
            batch = stage.batch_at(tokens) << place.doublings
            if tokens_of_stage is None:
                assert stage.steps is not None
                steps = place.began[0] + stage.steps - step
            else:
                steps = -(-(place.began[1] + tokens_of_stage - tokens) // batch)
            edge = stage.next_batch_at(tokens)
            if edge is not None:
                steps = min(steps, -(-(edge - tokens) // batch))
            piece = Piece(place.stage, place.began, step, tokens, steps, batch)
            yield piece
            step, tokens = piece.end

    def _find_end(self, place: _Place) -> tuple[int, int]:
        """Steps and tokens at a stage's end."""
        end = place.began
        for piece in self._pieces(place, place.began):
            end = piece.end
        return end

    def _after_warmup(self, place: _Place) -> tuple[int, int]:
        """Steps and tokens where a stage's decay can begin."""
        if place.stage > 0 or self.warmup_steps == 0:
            return place.began
        place = place._replace(doublings=0)  # these come after the warm-up
        for piece in self._pieces(place, place.began):
            if piece.end[0] >= self.warmup_steps:
                return self.warmup_steps, piece.tokens + (self.warmup_steps - piece.step) * piece.batch
        return self._end_of(place)

    def _decay(self, place: _Place) -> tuple[int, float, int]:
        """What a stage's decay is measured in (0 steps, 1 tokens), where it begins, and how long it is."""
        stage, tokens = self.stages[place.stage], self._tokens(place)
        unit = 1 if stage.decay_tokens or (stage.decay_steps is None and tokens is not None) else 0
        planned = tokens if unit else stage.steps
        end = self._end_of(place)[unit] if planned is None else place.began[unit] + planned
        length = stage.decay_tokens or stage.decay_steps or end - self._after_warmup(place)[unit]
        return unit, end - length, length

    def _learning_rate(self, stage: Stage, place: _Place, progress: Progress, batch: int) -> float:
        """Warm-up, held, decay; a decay is at its end in the last step."""
        peak, floor = stage.learning_rate, stage.min_learning_rate
        if place.stage == 0 and progress.step < self.warmup_steps:
            return peak * (progress.step + 1) / self.warmup_steps
        if peak == floor:
            return peak
        unit, begin, length = self._decay(place)
        done = (progress.tokens + batch if unit else progress.step + 1) - begin
        if done <= 0:
            return peak
        part = min(1.0, done / length) if length > 0 else 1.0
        if stage.decay_shape == "exponential":
            return peak * (floor / peak) ** part
        if stage.decay_shape == "cosine":
            part = 0.5 - 0.5 * math.cos(math.pi * part)
        return peak + (floor - peak) * part

    def _mixture(self, stage: Stage, place: _Place, progress: Progress, batch: int) -> dict[str, float]:
        """Weights that move are those in the middle of the step."""
        tokens = self._tokens(place)
        done, length = (
            (progress.step - place.began[0], stage.steps)
            if tokens is None
            else (progress.tokens - place.began[1], tokens)
        )
        assert length is not None
        if stage.late is not None and length - done <= stage.late_part * length * (1 + 1e-9):
            return stage.late.components()
        moved = progress.tokens - place.began[1] + batch / 2
        if moved < stage.transition_tokens:
            return stage.before.towards(stage.mixture, moved / stage.transition_tokens).components()
        return stage.mixture.components()

    def _check_lengths(self, index: int, began: tuple[int, int], epoch_tokens: int) -> None:
        """Refuse a warm-up, decay or transition that does not fit in its stage."""
        place = _Place(index, began, 0, epoch_tokens)
        stage, end, warm = self.stages[index], self._end_of(place), self._after_warmup(place)
        if index == 0:
            accepted = f"must fit in {stage.length}, {end[0]} steps"
            decays = bool(stage.decay_steps or stage.decay_tokens)  # which names both, below
            require(decays or self.warmup_steps <= end[0], "recipe.warmup_steps", self.warmup_steps, accepted)
        with_warmup = f"with recipe.warmup_steps={self.warmup_steps} " if index == 0 and self.warmup_steps else ""
        accepted = f"{with_warmup}must fit in {stage.length}"
        if stage.decay_steps:
            warmup, steps = self.warmup_steps if index == 0 else 0, end[0] - began[0]
            shorter = warmup if warmup < steps else steps // 4
            of_both = f"recipe.warmup_steps={shorter} {stage.path}.decay_steps={steps - shorter}"
            does = of_both if shorter < warmup else f"{stage.path}.decay_steps={steps - warmup}"
            fits = warmup + stage.decay_steps <= steps
            require(fits, f"{stage.path}.decay_steps", stage.decay_steps, f"{accepted}; {does} would do")
        if stage.decay_tokens:
            require(stage.decay_tokens <= end[1] - warm[1], f"{stage.path}.decay_tokens", stage.decay_tokens, accepted)
        fits = stage.transition_tokens <= end[1] - began[1]
        require(fits, f"{stage.path}.transition_tokens", stage.transition_tokens, accepted)


def _is_state(state: Mapping[str, Any], progress: Progress) -> bool:
    """Whether it can be what a recipe left in a checkpoint."""
    began, doublings, epoch = (state.get(key, {}) for key in ("began", "batch_doublings", "epoch_tokens"))
    numbers = [n for n in (*(began if isinstance(began, list) else [began]), doublings, epoch) if n != {}]
    if not all(type(n) is int and n >= 0 for n in numbers) or epoch == 0:
        return False
    if ("stage" in state) != ("began" in state) or not isinstance(state.get("smoothed_loss", 0.0), float):
        return False
    if "stage" not in state:
        return True
    fits = isinstance(state["stage"], str) and isinstance(began, list) and len(began) == 2
    return fits and began[0] <= progress.step and began[1] <= progress.tokens
