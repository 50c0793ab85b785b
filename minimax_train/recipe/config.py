"""The ``recipe`` group of the configuration."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields
from typing import Annotated, Any

from minimax_train.errors import ConfigError, require, require_choice
from minimax_train.fields import Range, check_fields
from minimax_train.kernels.dispatch import AUTO
from minimax_train.model.memory import RECOMPUTATIONS

DECAY_SHAPES = ("exponential", "linear", "cosine")
OUTLIER_POLICIES = ("ignore", "log", "skip", "rollback")
RENAMED_RECOMPUTATIONS = {"true": "full", "false": "none"}
LENGTH_UNITS = ("steps", "tokens", "epochs")
# The stage of a recipe that names none.
ONLY_STAGE = "pretraining"
# What a recipe with stages says in each of them.
_OF_STAGES = (*LENGTH_UNITS, "min_learning_rate", "decay_steps", "decay_tokens")
# What the first stage takes from the recipe.
_OF_RECIPE = ("micro_batch_size", "global_batch_size", "batch_tokens", "learning_rate")
_WITH_STAGES = ("scale", "batch_scale", "length_scale", "late_source")
_BATCH = re.compile(r"(\d{1,15})(?: from (\d+(?:\.\d*)?(?:[eE]\+?\d{1,2})?))?", re.ASCII)
_MOST_LENGTH = 2**31 - 1
_MOST_SEQUENCES = 2**24
_MOST_STEPS = 10**9
_MOST_TOKENS = 1e18


@dataclass
class StageConfig:
    """A stage of a run: what it changes. What is not given stays as the stage before it ended. The first stage begins
    with the recipe's batch, micro-batch and learning rate, and unless it says otherwise with the sequence length, RoPE
    base, weights of the sources and grid of the ``data``, ``model`` and ``parallel`` groups.

    Attributes:
        steps, tokens, epochs: how long it is; exactly one of them. Tokens are those of the stage, epochs are passes
            over the only data source. A stage ends with the step that reaches its length.
        sequence_length: tokens of a packed sequence.
        rope_base: base of the rotary frequencies.
        micro_batch_size: packed sequences a rank runs forward and backward at a time.
        global_batch_size: packed sequences per step over all ranks.
        batch_tokens: tokens per step instead, by the tokens trained on since the run began:
            ``[16777216, 33554432 from 69e9]``.
        learning_rate: held; or where its decay begins.
        min_learning_rate: reached at the last step of the stage, by a decay of ``decay_shape``; null for no decay.
        decay_steps, decay_tokens: over how much of the stage's end; without either, over all of it that is not warm-up.
        decay_shape: ``exponential``, ``linear`` or ``cosine``.
        mixture: weight of each data source; those not named get none.
        transition_tokens: through how many tokens at the stage's beginning the weights of the sources (and the shares
            of the lengths) move, linearly, from those of the stage before; 0 for at once.
        lengths: share of the tokens that come from ``short``, ``medium`` and ``long`` documents
            (``data.medium_length``, ``data.long_length``); null for documents as they come.
        late_weight: share of ``recipe.late_source`` that is added to the mixture in the last part of the stage, where
            the other sources share what is left.
        late_part: which part of the stage that is, counted from its end.
        parallel: sizes of the process grid, as in ``parallel``: pp, tp, cp, ep, etp. Where they differ from those of
            the stage before, the run saves and ends, and the next start goes on with these.
    """

    steps: Annotated[int | None, Range(1, _MOST_STEPS, null="tokens or epochs")] = None
    tokens: Annotated[float | None, Range(1, _MOST_TOKENS, null="steps or epochs")] = None
    epochs: Annotated[float | None, Range(1e-9, 1e9, null="steps or tokens")] = None
    sequence_length: Annotated[int | None, Range(1, _MOST_LENGTH, null="as before")] = None
    rope_base: Annotated[float | None, Range(1, 1e12, null="as before")] = None
    micro_batch_size: Annotated[int | None, Range(1, _MOST_SEQUENCES, null="as before")] = None
    global_batch_size: Annotated[int | None, Range(1, _MOST_SEQUENCES, null="as before")] = None
    batch_tokens: list[str] = field(default_factory=list)
    learning_rate: Annotated[float | None, Range(1e-12, 100, null="as before")] = None
    min_learning_rate: Annotated[float | None, Range(0, 100, null="no decay")] = None
    decay_steps: Annotated[int | None, Range(0, _MOST_STEPS, null="the whole stage")] = None
    decay_tokens: Annotated[float | None, Range(1, _MOST_TOKENS, null="the whole stage")] = None
    decay_shape: str | None = None
    mixture: Annotated[dict[str, float] | None, Range(0, 1e9)] = None
    transition_tokens: Annotated[float, Range(0, _MOST_TOKENS)] = 0.0
    lengths: Annotated[dict[str, float] | None, Range(0, 1e9)] = None
    late_weight: Annotated[float, Range(0, 1)] = 0.0
    late_part: Annotated[float, Range(1e-6, 1)] = 0.2
    parallel: Annotated[dict[str, int] | None, Range(1, 2**16)] = None

    def check(self, path: str) -> None:
        """Refuse what contradicts itself within the stage.

        Args:
            path: dotted, of the group that this stage is, for messages.
        """
        _one_of(path, self, LENGTH_UNITS, "the length is given once, in steps, in tokens or in epochs")
        _at_most_one_of(path, self, ("global_batch_size", "batch_tokens"))
        _at_most_one_of(path, self, ("decay_steps", "decay_tokens"))
        if self.decay_shape is not None:
            require_choice(f"{path}.decay_shape", self.decay_shape, DECAY_SHAPES)
        for name in ("decay_steps", "decay_tokens"):
            value = getattr(self, name)
            accepted = f"is read only with {path}.min_learning_rate, which the decay reaches"
            require(not value or self.min_learning_rate is not None, f"{path}.{name}", value, accepted)
        decays, added = self.min_learning_rate is not None, self.late_weight > 0
        accepted = f"is read only with {path}.min_learning_rate, which the decay reaches; leave it out here"
        require(decays or self.decay_shape is None, f"{path}.decay_shape", self.decay_shape, accepted)
        accepted = f"is read only with {path}.late_weight above 0, which is added there; leave it out here"
        require(added or self.late_part == StageConfig.late_part, f"{path}.late_part", self.late_part, accepted)
        parse_batches(f"{path}.batch_tokens", self.batch_tokens)


@dataclass(kw_only=True)
class RecipeConfig:
    """How a run trains: in one stage, or in ``stages``, whose first begins with what is given here.

    Attributes:
        steps, tokens, epochs: how long the run is, without stages; exactly one of them. Epochs are passes over the only
            data source. The run ends with the step that reaches its length.
        global_batch_size: packed sequences per step over all ranks.
        batch_tokens: tokens per step instead, by the tokens trained on since the run began:
            ``[16777216, 33554432 from 69e9]``.
        micro_batch_size: packed sequences a rank runs forward and backward at a time; gradients accumulate over the
            rest.
        learning_rate: reached after ``warmup_steps`` of linear warm-up and kept until the decay begins.
        min_learning_rate: reached at the last step of a run without stages, by a decay of ``decay_shape``; null for no
            decay.
        decay_steps, decay_tokens: how long that decay is, up to the end; without either, all of the run after the
            warm-up; 0 steps for no decay.
        decay_shape: ``exponential``, ``linear`` or ``cosine``; of every stage that says nothing else.
        stages: what changes in the course of a run, by name, in order.
        scale: of a recipe with stages: factor of every length in tokens or epochs, and of the tokens from which on
            batches are larger. Lengths in steps are multiplied by ``scale / batch_scale``, so that they keep their
            share of the run.
        batch_scale, length_scale: of a recipe with stages: factors of the tokens per step, which become whole
            micro-batches, and of the sequence lengths.
        late_source: of a recipe with stages: the data source that is added where a stage has a ``late_weight``; null to
            add none.
        critical_batch: whether the tokens per step double each time the critical batch size, of the loss smoothed over
            the reported steps, reaches twice what they are.
        critical_batch_tokens, critical_batch_exponent: the critical batch size in tokens is ``critical_batch_tokens *
            loss ** -critical_batch_exponent``, loss in nats (Kaplan et al. 2020, arXiv 2001.08361, equation 1.4).
        adam_beta1, adam_beta2, adam_eps: AdamW's decay rates of its two moments, and what is added to the root of the
            second.
        weight_decay: decoupled (AdamW), for matrices; norm weights are not decayed.
        gradient_clip: largest L2 norm of the whole model's gradient; null for no limit.
        outliers: what becomes of a step whose loss or gradient norm is more than ``outlier_sigmas`` standard deviations
            above the mean of the last ``outlier_window`` steps: ``ignore``; ``log``: it is told; ``skip``: its update
            is left out too, and its data are passed over; ``rollback``: the run goes back to its newest checkpoint, of
            a step before, and passes over the data of all steps since. The last two also where loss or gradient are not
            finite, for which the others end the run. Before half a window of steps is known, as after a resumption, no
            step is an outlier.
        outlier_limit: with ``skip``: more than so many within a window end the run; with ``rollback``: more than so
            many returns to the same checkpoint.
        activation_checkpointing: what a block's backward pass computes again rather than keep from the forward pass:
            ``none``; ``selective``: what is cheap (norms, SiLU of q, k and v, the attention's gate); ``full``: all but
            the block's input; ``auto``: of these for each layer the least whose estimated memory fits in the GPU
            (``minimax_train/model/memory.py``), ``none`` on a CPU.
        eval_interval, eval_sequences: every how many steps, and on how many held-out packed sequences; interval 0 for
            never. A stage's end is evaluated too.
    """

    steps: Annotated[int | None, Range(1, _MOST_STEPS, null="tokens, epochs or stages")] = None
    tokens: Annotated[float | None, Range(1, _MOST_TOKENS, null="steps, epochs or stages")] = None
    epochs: Annotated[float | None, Range(1e-9, 1e9, null="steps, tokens or stages")] = None
    global_batch_size: Annotated[int | None, Range(1, _MOST_SEQUENCES, null="batch_tokens")] = None
    batch_tokens: list[str] = field(default_factory=list)
    micro_batch_size: Annotated[int, Range(1, _MOST_SEQUENCES)]
    learning_rate: Annotated[float, Range(1e-12, 100)]
    min_learning_rate: Annotated[float | None, Range(0, 100, null="no decay")] = None
    warmup_steps: Annotated[int, Range(0, _MOST_STEPS)]
    decay_steps: Annotated[int | None, Range(0, _MOST_STEPS, null="all after the warm-up")] = None
    decay_tokens: Annotated[float | None, Range(1, _MOST_TOKENS, null="all after the warm-up")] = None
    decay_shape: str = "exponential"
    stages: dict[str, StageConfig] = field(default_factory=dict)
    scale: Annotated[float, Range(1e-15, 1)] = 1.0
    batch_scale: Annotated[float, Range(1e-15, 1)] = 1.0
    length_scale: Annotated[float, Range(1e-9, 1)] = 1.0
    late_source: str | None = None
    critical_batch: bool = False
    critical_batch_tokens: Annotated[float, Range(1, 1e15)] = 2e8
    critical_batch_exponent: Annotated[float, Range(0.01, 100)] = 1 / 0.21
    adam_beta1: Annotated[float, Range(0, 0.999999)] = 0.9
    adam_beta2: Annotated[float, Range(0, 0.999999)] = 0.95
    adam_eps: Annotated[float, Range(1e-20, 1e-2)] = 1e-8
    weight_decay: Annotated[float, Range(0, 100)] = 0.1
    gradient_clip: Annotated[float | None, Range(1e-6, 1e6, null="no limit")] = 1.0
    outliers: str = "ignore"
    outlier_sigmas: Annotated[float, Range(1, 1e6)] = 6.0
    outlier_window: Annotated[int, Range(4, 10**6)] = 128
    outlier_limit: Annotated[int, Range(1, 10**6)] = 8
    activation_checkpointing: str = AUTO
    eval_interval: Annotated[int, Range(0, 10**9)] = 100
    eval_sequences: Annotated[int, Range(1, 10**9)] = 64

    def __post_init__(self) -> None:
        check_fields("recipe", self)
        for name, stage in self.stages.items():
            check_fields(f"recipe.stages.{name}", stage)
        require_choice("recipe.decay_shape", self.decay_shape, DECAY_SHAPES)
        key, kind = "recipe.activation_checkpointing", self.activation_checkpointing
        renamed = RENAMED_RECOMPUTATIONS.get(kind.lower())
        require(renamed is None, key, kind, f"renamed: use {renamed!r}")
        require_choice(key, kind, (AUTO, *RECOMPUTATIONS))
        if self.stages:
            self._refuse_set(_OF_STAGES, "is for a run without recipe.stages; each stage says its own")
        else:
            self._refuse_set(_WITH_STAGES, "is read only with recipe.stages")
        accepted = "no stage has a late_weight; leave it out here"
        late = any(stage.late_weight for stage in self.stages.values())
        require(late or self.late_source is None, "recipe.late_source", self.late_source, accepted)
        if not self.critical_batch:
            read = ("critical_batch_tokens", "critical_batch_exponent")
            self._refuse_set(read, "is read only with recipe.critical_batch=true")
        require_choice("recipe.outliers", self.outliers, OUTLIER_POLICIES)
        if self.outliers == "ignore":
            self._refuse_set(
                ("outlier_sigmas", "outlier_window"), "is read only with recipe.outliers=log, skip or rollback"
            )
        if self.outliers not in ("skip", "rollback"):
            self._refuse_set(("outlier_limit",), "is read only with recipe.outliers=skip or rollback")
        for path, stage in self.paths:
            stage.check(path)
        _one_of("recipe", self, ("global_batch_size", "batch_tokens"), "in packed sequences or in tokens")
        for name, stage in list(self.stages.items())[:1]:
            for field_name, value in _given(stage, _OF_RECIPE):
                accepted = f"is recipe.{field_name} in the first stage; leave it out here"
                require(False, f"recipe.stages.{name}.{field_name}", value, accepted)
        parse_batches("recipe.batch_tokens", self.batch_tokens)
        self._check_critical_batch()

    def _refuse_set(self, names: tuple[str, ...], accepted: str) -> None:
        defaults = {f.name: f.default for f in fields(self)}
        for name in names:
            value = getattr(self, name)
            require(value == defaults[name], f"recipe.{name}", value, f"{accepted}; leave it out here")

    def _check_critical_batch(self) -> None:
        if not self.critical_batch:
            return
        accepted = "must be false where the batch is planned: one value of recipe.batch_tokens, and no stage's own"
        planned = any(_given(stage, ("global_batch_size", "batch_tokens")) for stage in self.stages.values())
        require(len(self.batch_tokens) <= 1 and not planned, "recipe.critical_batch", True, accepted)
        for path, stage in self.paths:
            by_steps = stage.steps is not None
            for name, fits in [("decay_steps", by_steps), ("decay_tokens", not by_steps)]:
                value, unit = getattr(stage, name), "steps" if by_steps else "tokens"
                accepted = f"with recipe.critical_batch=true a decay is measured as the length is, in {unit}"
                require(not value or fits, f"{path}.{name}", value, accepted)

    @property
    def paths(self) -> list[tuple[str, StageConfig]]:
        """The stages in order, each with the dotted name of its group: one where none are named."""
        if self.stages:
            return [(f"recipe.stages.{name}", stage) for name, stage in self.stages.items()]
        # Its decay_shape has a default, and is read where the stage says none.
        names = [f.name for f in fields(StageConfig) if f.name != "decay_shape"]
        own = {name: getattr(self, name) for name in names if hasattr(self, name)}
        return [("recipe", StageConfig(**own))]


def parse_batches(key: str, given: list[str]) -> list[tuple[float, int]]:
    """Tokens per step, each after the tokens from which on it counts: ``[(0, 16777216), (69e9, 33554432)]``.

    Raises:
        ConfigError: naming the key, and what it must look like.
    """
    found: list[tuple[float, int]] = []
    for text in given:
        match = _BATCH.fullmatch(text)
        accepted = "must be the tokens of a step, and from which tokens on: [16777216, 33554432 from 69e9]"
        require(match is not None and int(match[1]) > 0, key, text, accepted)
        assert match is not None
        start = float(match[2] or 0)
        fits = start == 0 if not found else start > found[-1][0]
        require(fits and start <= _MOST_TOKENS, key, text, "the first is from 0, and every other from later on")
        found.append((start, int(match[1])))
    return found


def _given(config: Any, names: tuple[str, ...]) -> list[tuple[str, Any]]:
    return [(name, getattr(config, name)) for name in names if getattr(config, name) not in (None, [])]


def _at_most_one_of(path: str, config: Any, names: tuple[str, ...]) -> None:
    given = _given(config, names)
    if len(given) > 1:
        (first, value), (second, other) = given[:2]
        none = "[]" if isinstance(other, list) else "null"
        raise ConfigError(f"{path}.{first}={value!r}: {path}.{second}={other!r} is given as well; {none} is for none")


def _one_of(path: str, config: Any, names: tuple[str, ...], why: str) -> None:
    _at_most_one_of(path, config, names)
    if not _given(config, names):
        others = " or ".join(f"{path}.{name}" for name in names[1:])
        raise ConfigError(f"{path}.{names[0]}={getattr(config, names[0])!r}: no value given, nor for {others}: {why}")
