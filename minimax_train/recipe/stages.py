"""The stages of a run, each with all that it takes over from the one before it, scaled."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from minimax_train.data.config import LENGTHS, OF_LENGTH, DataConfig
from minimax_train.errors import ConfigError, require
from minimax_train.parallel.grid import nearest_divisors
from minimax_train.recipe.config import ONLY_STAGE, RecipeConfig, StageConfig, parse_batches

if TYPE_CHECKING:
    from minimax_train.config import Config, ParallelConfig

Shares = Mapping[str, float]


@dataclass(frozen=True)
class Mixture:
    """What a stage asks of the data.

    Attributes:
        weights: share of each source; they sum to 1.
        lengths: share of each length bucket, likewise; None for documents as they come.
        buckets: of each source, those it may be asked for.
    """

    weights: Shares
    lengths: Shares | None
    buckets: Mapping[str, tuple[str, ...]]

    def towards(self, other: Mixture, part: float) -> Mixture:
        """On the way to another one: ``part`` of 1 is there. Length shares move only if both have some."""
        lengths = other.lengths
        if self.lengths is not None and lengths is not None:
            lengths = _between(self.lengths, lengths, part)
        return Mixture(_between(self.weights, other.weights, part), lengths, other.buckets)

    def with_source(self, source: str, share: float) -> Mixture:
        """With another source's share added, and the others' reduced to what is left."""
        weights = {name: weight * (1 - share) for name, weight in self.weights.items()}
        weights[source] = weights.get(source, 0.0) + share
        return dataclasses.replace(self, weights=weights)

    def components(self) -> dict[str, float]:
        """Share of each component, all above 0: of the sources, or of their length buckets. A source's share is divided
        among its own buckets alone.

        Raises:
            ConfigError: when a source has none of the lengths that are asked for.
        """
        found: dict[str, float] = {}
        for source, weight in self.weights.items():
            if weight == 0:
                continue
            if self.lengths is None:
                found[source] = weight
                continue
            own = {length: self.lengths.get(length, 0.0) for length in self.buckets[source]}
            total = sum(own.values())
            if total == 0:
                asked = ", ".join(length for length, share in self.lengths.items() if share)
                raise ConfigError(
                    f"lengths: only {asked} documents are asked for, and data.sources.{source}.lengths="
                    f"{list(self.buckets[source])} has none of these; give it a weight of 0 in this stage"
                )
            found |= {f"{source}{OF_LENGTH}{length}": weight * q / total for length, q in own.items() if q}
        return found


@dataclass(frozen=True)
class Stage:
    """One stage of a run.

    Attributes:
        path: dotted, of the group that says it, for messages: ``recipe.stages.NAME``, or ``recipe``.
        steps, tokens, epochs: its length, two of them None.
        batches: tokens per step, each after the tokens since the run began from which on it counts.
        batch_key, micro_batch_key, sequence_length_key: dotted, of the fields that say these, for messages.
        learning_rate, min_learning_rate: where it begins and ends; the same where it is held.
        decay_steps, decay_tokens: how much of the end the decay takes; both None for all that is not warm-up.
        before, mixture: what the stage before ended with, and what this one asks for after ``transition_tokens``.
        late: mixture of the stage's last ``late_part``.
        parallel: grid.
    """

    name: str
    path: str
    steps: int | None
    tokens: int | None
    epochs: float | None
    sequence_length: int
    rope_base: float
    micro_batch_size: int
    batches: tuple[tuple[int, int], ...]
    batch_key: str
    micro_batch_key: str
    sequence_length_key: str
    learning_rate: float
    min_learning_rate: float
    decay_steps: int | None
    decay_tokens: int | None
    decay_shape: str
    before: Mixture
    mixture: Mixture
    transition_tokens: int
    late: Mixture | None
    late_part: float
    parallel: ParallelConfig

    @property
    def length(self) -> str:
        """Its length, for messages."""
        given = {"steps": self.steps, "tokens": self.tokens, "epochs": self.epochs}
        return next(f"{self.path}.{unit}={value}" for unit, value in given.items() if value is not None)

    def batch_at(self, tokens: int) -> int:
        """Tokens of a step that begins when the run has trained on so many."""
        return next(batch for start, batch in reversed(self.batches) if start <= tokens)

    def next_batch_at(self, tokens: int) -> int | None:
        """The tokens after which the batch changes next; None if it does not."""
        return next((start for start, _ in self.batches if start > tokens), None)

    def check_batch(self, batch: int, ranks: int = 1) -> None:
        """Refuse tokens of a step that whole micro-batches of all ranks do not make up.

        Args:
            ranks: data-parallel ones.
        """
        length, together = self.sequence_length, self.micro_batch_size * ranks
        if batch and batch % (together * length) == 0:
            return
        micro = f"{self.micro_batch_key}={self.micro_batch_size}"
        multiple = f"a multiple of {together}: {f'{ranks} data-parallel ranks x ' if ranks > 1 else ''}{micro}"
        if not self.batch_key.endswith("global_batch_size"):
            sequences = f"{batch} tokens a step are {batch / length:g} packed sequences of {length}"
            raise ConfigError(f"{self.batch_key}: {sequences}; must be {multiple}")
        if ranks == 1:
            number = batch // length
            nearest = nearest_divisors(number, self.micro_batch_size)
            raise ConfigError(f"{micro}: must divide {self.batch_key}={number}; {nearest} would do")
        raise ConfigError(f"{self.batch_key}={batch // length}: must be {multiple}")


@contextmanager
def naming(stage: Stage) -> Iterator[None]:
    """Errors inside name the stage, in a run of several."""
    try:
        yield
    except ConfigError as error:
        if stage.path == "recipe" or str(error).startswith(f"{stage.path}."):
            raise
        raise ConfigError(f"{stage.path}: {error}") from error


def resolve_stages(config: Config) -> list[Stage]:
    """The stages of a run, in order.

    Raises:
        ConfigError: naming the field of a stage that names no source, gives no weight, or asks for a grid that cannot
            be.
    """
    recipe, data = config.recipe, config.data
    found: list[Stage] = []
    for path, given in recipe.paths:
        name = path.rpartition(".")[2] if recipe.stages else ONLY_STAGE
        before = found[-1] if found else None
        found.append(_resolve(config, _Given(name, path, given), before, _first_mixture(data)))
    return found


def stages_on_grid(config: Config) -> list[Stage]:
    """Those that run on the grid of the configuration; others are started on one of their own."""
    return [stage for stage in resolve_stages(config) if stage.parallel.sizes == config.parallel.sizes]


@dataclass(frozen=True)
class _Given:
    name: str
    path: str
    config: StageConfig


def _resolve(config: Config, given: _Given, before: Stage | None, first_mixture: Mixture) -> Stage:
    recipe, stage, path = config.recipe, given.config, given.path

    def value(name: str, first: Any) -> Any:
        own = getattr(stage, name)
        return own if own is not None else first if before is None else getattr(before, name)

    def key(name: str, attribute: str, first: str) -> str:
        if recipe.stages and getattr(stage, name) is not None:
            return f"{path}.{name}"
        return first if before is None else getattr(before, attribute)

    _check_epochs(path, stage, config.data)
    length = value("sequence_length", config.data.sequence_length)
    if before is None or stage.sequence_length is not None:
        length = max(1, round(length * recipe.length_scale))
    micro = value("micro_batch_size", recipe.micro_batch_size)
    batches, batch_key = _batches(config, given, before, length, micro)
    start = stage.learning_rate
    if start is None:
        start = recipe.learning_rate if before is None else before.min_learning_rate
    end, shape = stage.min_learning_rate, stage.decay_shape or recipe.decay_shape
    if end is not None:
        rate = "recipe.learning_rate" if before is None else f"{path}.learning_rate"
        accepted = f"must be at most {rate}={start}, and greater than 0 for exponential decay"
        require(end <= start and (end > 0 or shape != "exponential"), f"{path}.min_learning_rate", end, accepted)
    if end is None or stage.decay_steps == 0:
        end = start
    earlier = first_mixture if before is None else before.late or before.mixture
    mixture = _mixture(config, given, before, first_mixture)
    late = None
    if stage.late_weight and recipe.late_source is not None:
        accepted = f"there is no such source; there are {', '.join(mixture.buckets)}"
        require(recipe.late_source in mixture.buckets, "recipe.late_source", recipe.late_source, accepted)
        late = mixture.with_source(recipe.late_source, stage.late_weight)
    moving = earlier.towards(mixture, 0.5) if stage.transition_tokens else mixture
    for asked in (mixture, moving, late or mixture):
        try:
            asked.components()
        except ConfigError as error:
            raise ConfigError(f"{path}.{error}") from error
    return Stage(
        name=given.name,
        path=path,
        steps=_scaled_steps(recipe, stage.steps),
        tokens=_scaled(stage.tokens, recipe.scale),
        epochs=None if stage.epochs is None else stage.epochs * recipe.scale,
        sequence_length=length,
        rope_base=value("rope_base", config.model.rope_base),
        micro_batch_size=micro,
        batches=batches,
        batch_key=batch_key,
        micro_batch_key=key("micro_batch_size", "micro_batch_key", "recipe.micro_batch_size"),
        sequence_length_key=key("sequence_length", "sequence_length_key", "data.sequence_length"),
        learning_rate=start,
        min_learning_rate=end,
        decay_steps=_scaled_steps(recipe, stage.decay_steps),
        decay_tokens=_scaled(stage.decay_tokens, recipe.scale),
        decay_shape=shape,
        before=earlier,
        mixture=mixture,
        transition_tokens=round(stage.transition_tokens * recipe.scale),
        late=late,
        late_part=stage.late_part,
        parallel=_grid(config, path, stage, before),
    )


def _scaled(tokens: float | None, scale: float) -> int | None:
    return None if tokens is None else max(1, round(tokens * scale))


def _scaled_steps(recipe: RecipeConfig, steps: int | None) -> int | None:
    """In a run that is scaled, steps keep their share of it."""
    if not steps or recipe.scale == recipe.batch_scale:
        return steps
    return max(1, round(steps * recipe.scale / recipe.batch_scale))


def warmup_steps(recipe: RecipeConfig) -> int:
    return _scaled_steps(recipe, recipe.warmup_steps) or 0


def _check_epochs(path: str, stage: StageConfig, data: DataConfig) -> None:
    several = ", ".join(data.named_sources)
    accepted = f"an epoch is of one source, and data.sources has {several}; give {path}.tokens or {path}.steps"
    require(stage.epochs is None or len(data.named_sources) == 1, f"{path}.epochs", stage.epochs, accepted)


def _batches(
    config: Config, given: _Given, before: Stage | None, length: int, micro: int
) -> tuple[tuple[tuple[int, int], ...], str]:
    """Tokens per step, unscaled lists of the last stage that gave one, for this one's sequence length."""
    recipe = config.recipe
    path, source = "recipe", recipe
    unscaled_length = config.data.sequence_length
    for stage_path, stage in recipe.paths:
        unscaled_length = stage.sequence_length or unscaled_length
        if stage.global_batch_size is not None or stage.batch_tokens:
            path, source = stage_path, stage
        if stage_path == given.path:
            break
    unit = length * micro
    if source.global_batch_size is not None:
        # Packed sequences, whatever their length.
        raw, key = [(0.0, source.global_batch_size * unscaled_length)], f"{path}.global_batch_size"
    else:
        key = f"{path}.batch_tokens"
        raw = parse_batches(key, source.batch_tokens)
    scaled = recipe.batch_scale != 1 or recipe.length_scale != 1

    def tokens(batch: int) -> int:
        return max(1, round(batch * recipe.batch_scale / unit)) * unit if scaled else batch

    return tuple((round(start * recipe.scale), tokens(batch)) for start, batch in raw), key


def _first_mixture(data: DataConfig) -> Mixture:
    sources = data.named_sources
    weights = {name: float(getattr(source, "weight", 1.0)) for name, source in sources.items()}
    buckets = {name: tuple(getattr(source, "lengths", LENGTHS)) for name, source in sources.items()}
    return Mixture(_normalised(weights), None, buckets)


def _mixture(config: Config, given: _Given, before: Stage | None, first: Mixture) -> Mixture:
    stage, mixture = given.config, first if before is None else before.mixture
    if stage.mixture is not None:
        for name, weight in stage.mixture.items():
            accepted = f"there is no source {name} in data.sources; there are {', '.join(first.buckets)}"
            require(name in first.buckets, f"{given.path}.mixture.{name}", weight, accepted)
        positive = any(weight > 0 for weight in stage.mixture.values())
        require(positive, f"{given.path}.mixture", stage.mixture, "one weight must be above 0")
        mixture = dataclasses.replace(mixture, weights=_normalised(stage.mixture))
    if stage.lengths is not None:
        for name, share in stage.lengths.items():
            require(name in LENGTHS, f"{given.path}.lengths.{name}", share, f"lengths are {', '.join(LENGTHS)}")
        positive = any(share > 0 for share in stage.lengths.values())
        require(positive, f"{given.path}.lengths", stage.lengths, "one share must be above 0; null for as before")
        mixture = dataclasses.replace(mixture, lengths=_normalised(stage.lengths))
    return mixture


def _grid(config: Config, path: str, stage: StageConfig, before: Stage | None) -> ParallelConfig:
    parallel = config.parallel if before is None else before.parallel
    if not stage.parallel:
        return parallel
    for axis, size in stage.parallel.items():
        accepted = f"there is no such axis; there are {', '.join(parallel.sizes)}"
        require(axis in parallel.sizes, f"{path}.parallel.{axis}", size, accepted)
    sizes = {**parallel.sizes, **stage.parallel}
    # Experts that no ranks share have nothing to transfer in groups.
    groups = config.parallel.token_groups if sizes["ep"] * sizes["etp"] > 1 else 1
    try:
        return dataclasses.replace(
            config.parallel,
            pp=sizes["pp"],
            tp=sizes["tp"],
            cp=sizes["cp"],
            ep=sizes["ep"],
            etp=sizes["etp"],
            token_groups=groups,
        )
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def _normalised(shares: Mapping[str, float]) -> dict[str, float]:
    total = sum(shares.values())
    return {name: share / total for name, share in shares.items()}


def _between(before: Shares, after: Shares, part: float) -> dict[str, float]:
    if part >= 1:
        return dict(after)
    names = dict.fromkeys((*before, *after))
    return {name: (1 - part) * before.get(name, 0.0) + part * after.get(name, 0.0) for name in names}
