"""The configuration of a run: Hydra's groups, typed, checked as a whole before any process is started."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from omegaconf import OmegaConf

from minimax_train.checkpoint.config import CheckpointConfig
from minimax_train.checkpoint.remote import MEMORY
from minimax_train.compose import Tree, compose_tree, read_yaml
from minimax_train.data.config import DataConfig
from minimax_train.engines import ENGINES, Engine, EngineConfig
from minimax_train.errors import ConfigError, require, require_choice
from minimax_train.fields import PATH, Range, check_fields, fields_of, from_text, show
from minimax_train.files import replace_text
from minimax_train.hints import RENAMED_KEYS, unknown_key
from minimax_train.kernels.dispatch import AUTO, RENAMED
from minimax_train.metrics.config import LoggingConfig
from minimax_train.model import KernelConfig, ModelConfig
from minimax_train.model.attention import ATTENTIONS
from minimax_train.model.config import RENAMED_SCOPES
from minimax_train.parallel.context.layout import LAYOUTS, SequenceLayout
from minimax_train.parallel.grid import GridSizes, check_sizes, divisors, nearest_divisors
from minimax_train.parallel.pipeline import SCHEDULES
from minimax_train.recipe import Recipe, RecipeConfig, Stage, StepPlan, naming, resolve_stages, stages_on_grid
from minimax_train.recipe.config import RENAMED_RECOMPUTATIONS

# In a file: a key that must be given on the command line.
MISSING = "???"
# Offsets of tokens and documents are int32.
MOST_TOKENS = 2**31 - 1


@dataclass
class ParallelConfig:
    """How ranks work together.

    Attributes:
        tp: tensor-parallel size: how many ranks share the heads of an attention, and the vocabulary.
        cp: context-parallel size: how many ranks share each packed sequence.
        ep: expert-parallel size: how many ranks share the experts of a layer.
        etp: expert-tensor-parallel size: how many ranks share each expert's hidden size. What is left over of the
            number of processes is data-parallel, for the dense part and for the experts each by itself.
        pp: pipeline-parallel size: in how many stages ranks share the layers (docs/pipeline-parallelism.md).
        pp_schedule: in which order a rank runs its micro-batches: ``1f1b``; ``interleaved_1f1b`` with several stages
            on every rank; ``zero_bubble`` (ZBV) and ``dualpipe_v``, which compute gradients of weights where a rank
            would wait.
        pp_layers: how many layers each stage has, in the order of the model; empty for a split by cost, but with
            ``1f1b`` into two stages on every rank. Stage s lies on pipeline rank s modulo ``pp``; with ``zero_bubble``
            and ``dualpipe_v`` those of a rank form a V, stages r and ``2 pp - 1 - r`` on rank r.
        token_groups: in how many groups a rank's tokens go through the experts, so that one group's communication
            runs beside another's computation; 1 where nothing is communicated (``ep * etp`` = 1), and never more
            than the rank has tokens, or there would be groups of none. How many: docs/expert-parallelism.md.
        layout: which tokens each of them holds, ``zigzag`` or ``contiguous`` (docs/context-parallelism.md).
        linear_cp: how lightning attention crosses ranks: ``lasp_plus``, ``scan``, ``ring``, or ``auto`` by cost.
        softmax_cp: how softmax attention does: ``ring``, ``allgather``, or ``auto`` by cost.
        check_replicas: every so many steps, compare bit by bit the weights that several ranks hold; 0 for never.
        timeout_s: how many seconds ranks wait for each other, or for a data worker, before the run ends with an error.
    """

    tp: Annotated[int, Range(1, 2**16)] = 1
    cp: Annotated[int, Range(1, 2**16)] = 1
    ep: Annotated[int, Range(1, 2**16)] = 1
    etp: Annotated[int, Range(1, 2**16)] = 1
    pp: Annotated[int, Range(1, 2**12)] = 1
    pp_schedule: str = "1f1b"
    pp_layers: list[str] = field(default_factory=list)
    token_groups: Annotated[int, Range(1, 2**16)] = 1
    layout: str = "zigzag"
    linear_cp: str = "auto"
    softmax_cp: str = "auto"
    check_replicas: Annotated[int, Range(0, 10**9)] = 0
    timeout_s: Annotated[float, Range(1, 10**7)] = 600.0

    def __post_init__(self) -> None:
        check_fields("parallel", self)
        alone = self.ep * self.etp == 1
        accepted = "must be 1 with parallel.ep=1 and parallel.etp=1: no transfer to run beside the GEMMs"
        require(not alone or self.token_groups == 1, "parallel.token_groups", self.token_groups, accepted)
        require_choice("parallel.layout", self.layout, LAYOUTS)
        require_choice("parallel.pp_schedule", self.pp_schedule, tuple(SCHEDULES))
        numbers = all(text.isascii() and text.isdecimal() and int(text) > 0 for text in self.pp_layers)
        accepted = "must be whole numbers of layers, at least 1 of each stage: a stage without layers computes nothing"
        require(numbers, "parallel.pp_layers", self.pp_layers, accepted)
        for kind in ATTENTIONS.values():
            for key, methods in (kind.cp or {}).items():
                require_choice(f"parallel.{key}", getattr(self, key), (AUTO, *methods))

    @property
    def sizes(self) -> dict[str, int]:
        """Of the axes of the process grid."""
        return {"pp": self.pp, "tp": self.tp, "cp": self.cp, "ep": self.ep, "etp": self.etp}

    @property
    def grid(self) -> dict[str, int]:
        """What :meth:`minimax_train.parallel.grid.ProcessGrid.create` takes."""
        return self.sizes | {"token_groups": self.token_groups}

    @property
    def stages_of_rank(self) -> int:
        """Pipeline stages on every rank."""
        return len(self.pp_layers) // self.pp if self.pp_layers else SCHEDULES[self.pp_schedule].parts

    @property
    def shown(self) -> str:
        """The sizes above 1, for messages."""
        above = [f"parallel.{axis}={size}" for axis, size in self.sizes.items() if size > 1]
        return ", ".join(above) or "parallel sizes of 1"


@dataclass
class Config:
    """Everything a run is.

    Attributes:
        run_dir: where the run keeps its configuration, tokenizer, checkpoints, metrics and pictures; a leading ``~``,
            here and in every other path, is the home folder.
        seed: of initial weights and data order.
        device: ``cuda``, ``cpu``, or ``auto`` for the GPU where there is one.
        deterministic: whether runs of the same configuration on the same grid of GPUs give the same bits, which costs
            time (docs/cluster.md). On CPUs they do.
        kernels: which implementation of each op runs.
        cache_dir: where compiled kernels and trained tokenizers are kept for later runs, shared by all runs and ranks;
            ``auto`` for ``minimax_train`` in ``$XDG_CACHE_HOME`` or ``~/.cache``, null for none.
    The other fields are the groups, each documented at its own dataclass.
    """

    model: ModelConfig
    data: DataConfig
    parallel: ParallelConfig
    engine: EngineConfig
    recipe: RecipeConfig
    checkpoint: CheckpointConfig
    logging: LoggingConfig
    kernels: KernelConfig = field(default_factory=KernelConfig)
    run_dir: Annotated[str, PATH] = "runs/default"
    seed: Annotated[int, Range(0, 2**63 - 1)] = 0
    device: str = "auto"
    deterministic: bool = False
    cache_dir: Annotated[str | None, PATH] = AUTO

    def __post_init__(self) -> None:
        check_fields("", self)
        require_choice("device", self.device, ("auto", "cpu", "cuda"))
        accepted = "its backward pass adds up in no fixed order: with deterministic=true it must be flash, or auto"
        ordered = not self.deterministic or self.kernels.softmax != "flash4"
        require(ordered, "kernels.softmax", self.kernels.softmax, accepted)
        evaluates = self.data.has_validation and self.recipe.eval_interval > 0
        accepted = "must be 0 in a run without evaluation (recipe.eval_interval, held-out documents)"
        best = self.checkpoint.keep_best
        require(evaluates or best == 0, "checkpoint.keep_best", best, accepted)
        holds_replicas = ENGINES[self.engine.name].replicas is not Engine.replicas
        accepted = f"must be 0 with engine={self.engine.name}, which compares no weights"
        every = self.parallel.check_replicas
        require(holds_replicas or every == 0, "parallel.check_replicas", every, accepted)
        stages = Recipe(self).stages
        for before, stage in zip([stages[0], *stages], stages, strict=False):
            with naming(stage):
                self._check_stage(stage)
            accepted = f"must be auto: at stage {stage.name}, of another grid, the run ends and is started again"
            goes_on = before.parallel.sizes == stage.parallel.sizes or self.checkpoint.resume == "auto"
            require(goes_on, "checkpoint.resume", self.checkpoint.resume, accepted)

    @property
    def has_other_grids(self) -> bool:
        """Whether a stage of the recipe names another process grid than ``parallel``."""
        return any(stage.parallel.sizes != self.parallel.sizes for stage in resolve_stages(self))

    def _check_stage(self, stage: Stage) -> None:
        """Refuse a stage whose sizes do not go together, whatever the number of processes."""
        tokens = stage.micro_batch_size * stage.sequence_length
        accepted = f"times {stage.sequence_length_key}={stage.sequence_length} must be at most {MOST_TOKENS} tokens"
        require(tokens <= MOST_TOKENS, stage.micro_batch_key, stage.micro_batch_size, accepted)
        try:
            SequenceLayout(stage.parallel.layout, stage.parallel.cp).check_length(stage.sequence_length)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        self._check_splits(stage)
        self._check_pipeline(stage.parallel)
        of_rank = tokens // (stage.parallel.cp * stage.parallel.tp)  # between attention layers
        accepted = f"must be at most {of_rank}, the tokens of a rank's micro-batch"
        groups = stage.parallel.token_groups
        require(groups <= of_rank, "parallel.token_groups", groups, accepted)
        # Of all ranks' tokens: in check_world_size, for how many they are is not known before.
        if self.model.capacity_scope == "sequence":
            self._check_capacity(stage.sequence_length, "a packed sequence")
        elif self.model.capacity_scope == "rank":
            self._check_capacity(of_rank, "a rank's micro-batch")

    def _check_capacity(self, tokens: int, pool: str) -> None:
        """Refuse a capacity factor that drops every assignment of the tokens that share a capacity."""
        model = self.model
        if model.capacity_factor is None:
            return
        capacity = model.expert_capacity(tokens)
        accepted = (
            f"must leave each expert at least 1 assignment of the {tokens} tokens of {pool} "
            f"(model.capacity_scope={model.capacity_scope}); it leaves {capacity}"
        )
        require(capacity >= 1, "model.capacity_factor", model.capacity_factor, accepted)

    def _check_splits(self, stage: Stage) -> None:
        """Refuse a grid whose axes do not divide what they split, or would split what cannot be."""
        model, parallel = self.model, stage.parallel
        kinds = dict.fromkeys(model.attentions)
        split = {"tp": "heads", "cp": "packed sequences"}
        for axis, kind in itertools.product(split, kinds):
            ranks = parallel.sizes[axis]
            accepted = (
                f"must be 1 with {kind} in model.layer_pattern={model.layer_pattern!r}, "
                f"which cannot split its {split[axis]} over ranks"
            )
            require(ranks == 1 or getattr(kind, axis) is not None, f"parallel.{axis}", ranks, accepted)
        heads = dict.fromkeys(name for kind in kinds for name in kind.tp or ())
        tokens = stage.micro_batch_size * stage.sequence_length // parallel.cp
        micro_batch = f"the {tokens} tokens of a micro-batch on a context-parallel rank"
        for axis, what, size in [
            *(("tp", f"model.{name}={getattr(model, name)}", getattr(model, name)) for name in heads),
            ("tp", f"model.vocab_size={model.vocab_size}", model.vocab_size),
            ("tp", micro_batch, tokens),
            ("ep", f"model.num_experts={model.num_experts}", model.num_experts),
            ("etp", f"model.expert_hidden_size={model.expert_hidden_size}", model.expert_hidden_size),
        ]:
            ranks = parallel.sizes[axis]
            if size % ranks:
                nearest = nearest_divisors(size, ranks)
                raise ConfigError(f"parallel.{axis}={ranks}: must divide {what}; the nearest that do are {nearest}")

    def _check_pipeline(self, parallel: ParallelConfig) -> None:
        """Refuse stages that the engine cannot run, or the layers do not fill."""
        pp, given, layers = parallel.pp, parallel.pp_layers, self.model.num_layers
        accepted = "must be [] with parallel.pp=1: all layers are on every rank"
        require(pp > 1 or not given, "parallel.pp_layers", given, accepted)
        if pp == 1:
            return
        able = [name for name, engine in ENGINES.items() if engine.runs_stages]
        accepted = f"must be 1 with engine={self.engine.name}: pipeline stages run with engine={' or '.join(able)}"
        require(self.engine.name in able, "parallel.pp", pp, accepted)
        fewest, more, *_ = SCHEDULES[parallel.pp_schedule]
        on_rank = f"{fewest} on every rank with parallel.pp_schedule={parallel.pp_schedule}"
        if not given:
            accepted = (
                f"must be at most {layers // fewest}: each stage, {on_rank}, needs one of model.num_layers={layers}"
            )
            require(pp * fewest <= layers, "parallel.pp", pp, accepted)
            return
        fits = len(given) == fewest * pp or (more and len(given) % pp == 0 and len(given) > fewest * pp)
        number = f"{fewest * pp} stages"
        if more:
            number = f"a multiple of parallel.pp={pp} stages, at least {fewest * pp}"
        require(fits, "parallel.pp_layers", given, f"must be the layers of {number}: {on_rank}")
        total = sum(map(int, given))
        require(total == layers, "parallel.pp_layers", given, f"must add up to model.num_layers={layers}, not {total}")

    @property
    def layout(self) -> SequenceLayout:
        """How packed sequences are dealt to context-parallel ranks."""
        return SequenceLayout(self.parallel.layout, self.parallel.cp)

    def check_world_size(self, world_size: int) -> None:
        """Refuse a number of processes that this configuration cannot run on.

        Raises:
            ConfigError: naming the key to change and the values that would do.
        """
        folder, accepted = self.checkpoint.folder, f"is in the memory of one process; this run has {world_size}"
        require(world_size == 1 or not (folder or "").startswith(MEMORY), "checkpoint.folder", folder, accepted)
        streams, parallel = self.data.num_streams, self.parallel
        try:
            check_sizes(world_size, **parallel.sizes)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        for rank in self.logging.profile_ranks:
            accepted = f"must be a rank of the run, from 0 to {world_size - 1}"
            require(int(rank) < world_size, "logging.profile_ranks", rank, accepted)
        self.engine.check_run(self, GridSizes(world_size, **parallel.sizes))
        dp = world_size // (parallel.pp * parallel.cp * parallel.tp)
        ranks = f"{dp} data-parallel ranks"
        for stage, batch in Recipe(self).batches():
            if stage.parallel.sizes == parallel.sizes:  # others run on a number of processes of their own
                with naming(stage):
                    stage.check_batch(batch, dp)
                    number = batch // (stage.sequence_length * stage.micro_batch_size * dp)
                    each = SCHEDULES[parallel.pp_schedule].micro_batches if parallel.pp > 1 else 1
                    more = "; a smaller recipe.micro_batch_size or a larger batch gives more"
                    accepted = f"must be at most {number}, the micro-batches of a step on each of {ranks}{more}"
                    if each > 1:
                        accepted = (
                            f"must be at most {number // each} with parallel.pp_schedule={parallel.pp_schedule}, which "
                            f"takes {each} micro-batches for each: a step has {number} on each of {ranks}{more}"
                        )
                    require(each * parallel.pp <= number, "parallel.pp", parallel.pp, accepted)
        accepted = f"must be a multiple of the {ranks}; with it, {divisors(streams)} of them would do"
        require(streams % dp == 0, "data.num_streams", streams, accepted)
        workers, own = self.data.num_workers, streams // dp
        accepted = f"must be at most {own}, the streams of a data-parallel rank (data.num_streams={streams}), or 0"
        require(workers <= own, "data.num_workers", workers, accepted)
        if self.model.capacity_scope == "global":
            for stage in stages_on_grid(self):
                with naming(stage):
                    tokens = dp * stage.micro_batch_size * stage.sequence_length
                    self._check_capacity(tokens, "all ranks' micro-batches")


def load_config(overrides: Sequence[str] = (), *, config_dirs: Sequence[str | Path] = ()) -> Config:
    """Compose the configuration from the defaults, Hydra overrides, and checks of every group.

    Args:
        overrides: ``model=small``, ``recipe.steps=1000``, ``experiment=demo`` and so on. A string is taken as typed,
            without the quotes around all of it if there are any; of a key given twice the last value counts.
        config_dirs: folders of your own groups and experiments. A file there comes before the package's of the same
            group and name, and before one in a later folder.

    Raises:
        ConfigError: naming the key, its value and what would be accepted.
    """
    groups = [name for name, what in fields_of(Config).items() if dataclasses.is_dataclass(what.kind)]
    tree, given = compose_tree(overrides, config_dirs, groups, _defaults(Config))
    return _build(Config, tree, given)


def read_config(path: str | Path) -> Config:
    """A configuration saved by :func:`save_config`.

    Raises:
        ConfigError: when the file is missing or does not hold a configuration of this version.
    """
    try:
        _, tree = read_yaml(Path(path))
        return _build(Config, _with_new_names(tree), {})
    except ConfigError as error:
        reason = str(error).removeprefix(f"{path}: ")
        raise ConfigError(f"{path}: not a configuration of this version of minimax_train: {reason}") from error


def _with_new_names(saved: Tree) -> Tree:
    """What an earlier version saved, in the words of this one."""
    for old, new in RENAMED_KEYS.items():
        group, _, name = old.rpartition(".")
        if name in (node := _group(saved, group)):
            node[new.rpartition(".")[2]] = node.pop(name)
    recipe, key = _group(saved, "recipe"), "activation_checkpointing"
    if key in recipe:
        recipe[key] = RENAMED_RECOMPUTATIONS.get(str(recipe[key]).lower(), recipe[key])
    for group, renamed in [("kernels", RENAMED), ("model", RENAMED_SCOPES)]:
        node = _group(saved, group)
        for name, value in node.items():
            if (group == "kernels" or name.endswith("_scope")) and isinstance(value, str):
                node[name] = renamed.get(value, value)
    return saved


def _group(tree: Tree, name: str) -> Tree:
    return node if isinstance(node := tree.get(name), dict) else {}


def config_at(config: Config, plan: StepPlan) -> Config:
    """The configuration of a checkpoint, for who uses it on its own: sequence length and RoPE base are those of its
    step; the recipe is kept as the run has it."""
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, rope_base=plan.rope_base),
        data=dataclasses.replace(config.data, sequence_length=plan.sequence_length),
        recipe=_with_own_values(config),
    )


def config_on(config: Config, parallel: ParallelConfig) -> Config:
    """The configuration of a process, when its run has come to a stage with a grid of its own."""
    return dataclasses.replace(config, parallel=parallel, recipe=_with_own_values(config))


def _with_own_values(config: Config) -> RecipeConfig:
    """The recipe with all that its first stage takes from other groups said by itself, so that these may change."""
    if not config.recipe.stages:
        return config.recipe
    (name, first), *others = config.recipe.stages.items()
    first = dataclasses.replace(
        first,
        sequence_length=first.sequence_length or config.data.sequence_length,
        rope_base=first.rope_base or config.model.rope_base,
        parallel={**config.parallel.sizes, **(first.parallel or {})},
    )
    return dataclasses.replace(config.recipe, stages={name: first, **dict(others)})


def save_config(config: Config, path: str | Path) -> None:
    """Write the resolved configuration as YAML."""
    replace_text(Path(path), to_yaml(config))


def to_yaml(config: Config) -> str:
    return OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(config)))


def flatten(config: Config) -> dict[str, Any]:
    """Dotted key to value."""

    def walk(node: Any, prefix: str) -> dict[str, Any]:
        if not isinstance(node, dict):
            return {prefix: node}
        return {k: v for name, child in node.items() for k, v in walk(child, f"{prefix}.{name}".lstrip(".")).items()}

    return walk(dataclasses.asdict(config), "")


def _build(kind: type, tree: Any, given: Mapping[str, str], path: str = "") -> Any:
    """A dataclass from a tree of text.

    Args:
        given: the override that set a key, for messages.
        path: of the tree in the whole.
    """
    fields, values = fields_of(kind), {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}={show(tree)}: is a group of keys: set them, as in {path}.{next(iter(fields))}=...")
    for name in tree:
        if name not in fields:
            key = f"{path}.{name}".lstrip(".")
            of_it = (text for set_key, text in given.items() if f"{set_key}.".startswith(f"{key}."))
            raise ConfigError(unknown_key(Config, key, next(of_it, key), fields))
    for name, what in fields.items():
        key = f"{path}.{name}".lstrip(".")
        if dataclasses.is_dataclass(what.kind):
            values[name] = _build(_group_type(what.kind, tree.get(name)), tree.get(name, {}), given, key)
        elif what.element is not None and dataclasses.is_dataclass(what.element.kind) and name in tree:
            values[name] = _build_named(what.element.kind, tree[name], given, key)
        elif tree.get(name, what.default) in (dataclasses.MISSING, MISSING):
            raise ConfigError(f"{key}: no value given; it has no default, so pass {key}=...")
        elif name in tree:
            values[name] = from_text(key, tree[name], what)
    return kind(**values)


def _build_named(kind: type, tree: Any, given: Mapping[str, str], path: str) -> dict[str, Any]:
    """Dataclasses by name from a tree of text."""
    if not isinstance(tree, dict):
        first = next(iter(fields_of(kind)))
        raise ConfigError(f"{path}={show(tree)}: is a group of names: set their keys, as in {path}.NAME.{first}=...")
    return {name: _build(kind, node, given, f"{path}.{name}") for name, node in tree.items()}


def _group_type(kind: type, tree: Any) -> type:
    """The dataclass of a group: an engine's own by its name."""
    if kind is not EngineConfig:
        return kind
    name = str(tree.get("name", EngineConfig.name)) if isinstance(tree, dict) else EngineConfig.name
    require_choice("engine.name", name, tuple(ENGINES))
    return ENGINES[name].config_type


def _defaults(kind: type) -> Tree:
    """What the dataclasses say where nothing is given."""
    return {
        name: _defaults(what.kind) if dataclasses.is_dataclass(what.kind) else what.default
        for name, what in fields_of(kind).items()
        if dataclasses.is_dataclass(what.kind) or what.default is not dataclasses.MISSING
    }
