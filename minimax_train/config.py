"""The configuration of a run: Hydra's groups, typed, checked as a whole before any process is started."""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from minimax_train import configs
from minimax_train.checkpoint.config import CheckpointConfig
from minimax_train.data.config import DataConfig
from minimax_train.engines import ENGINES, EngineConfig
from minimax_train.errors import ConfigError, require, require_choice, require_positive
from minimax_train.files import replace_text
from minimax_train.kernels.dispatch import AUTO, RENAMED
from minimax_train.metrics.config import LoggingConfig
from minimax_train.model import KernelConfig, ModelConfig
from minimax_train.model.attention import ATTENTIONS
from minimax_train.model.config import RENAMED_SCOPES
from minimax_train.parallel.context.layout import LAYOUTS, SequenceLayout
from minimax_train.parallel.grid import check_sizes, nearest_divisors
from minimax_train.recipe import RecipeConfig, StepPlan

# Refused on the command line and in configuration files, naming the new; translated in what a run has saved.
RENAMED_KEYS = {"recipe.eval_rows": "recipe.eval_sequences"}
CONFIG_DIR = Path(configs.__file__).parent
Tree = DictConfig | ListConfig


@dataclass
class ParallelConfig:
    """How ranks work together.

    Attributes:
        tp: tensor-parallel size: how many ranks share the heads of an attention, and the vocabulary.
        cp: context-parallel size: how many ranks share each packed sequence.
        ep: expert-parallel size: how many ranks share the experts of a layer.
        etp: expert-tensor-parallel size: how many ranks share each expert's hidden size. What is left over of the
            number of processes is data-parallel, for the dense part and for the experts each by itself.
        token_groups: in how many groups a rank's tokens go through the experts, so that one group's communication
            runs beside another's computation; 1 where nothing is communicated (``ep * etp`` = 1), and never more
            than the rank has tokens, or there would be groups of none. How many: docs/expert-parallelism.md.
        layout: which tokens each of them holds, ``zigzag`` or ``contiguous`` (docs/context-parallelism.md).
        linear_cp: how lightning attention crosses ranks: ``lasp_plus``, ``scan``, ``ring``, or ``auto`` by cost.
        softmax_cp: how softmax attention does: ``ring``, ``allgather``, or ``auto`` by cost.
        timeout_s: seconds after which a collective that has not finished ends the run with an error.
    """

    tp: int = 1
    cp: int = 1
    ep: int = 1
    etp: int = 1
    token_groups: int = 1
    layout: str = "zigzag"
    linear_cp: str = "auto"
    softmax_cp: str = "auto"
    timeout_s: float = 600.0

    def __post_init__(self) -> None:
        require_positive("parallel", self, *self.sizes, "token_groups", "timeout_s")
        alone = self.ep * self.etp == 1
        accepted = "must be 1 with parallel.ep=1 and parallel.etp=1: no transfer to run beside the GEMMs"
        require(not alone or self.token_groups == 1, "parallel.token_groups", self.token_groups, accepted)
        require_choice("parallel.layout", self.layout, LAYOUTS)
        for kind in ATTENTIONS.values():
            for key, methods in (kind.cp or {}).items():
                require_choice(f"parallel.{key}", getattr(self, key), (AUTO, *methods))

    @property
    def sizes(self) -> dict[str, int]:
        """Of the axes of the process grid."""
        return {"tp": self.tp, "cp": self.cp, "ep": self.ep, "etp": self.etp}


@dataclass
class Config:
    """Everything a run is.

    Attributes:
        run_dir: where the run keeps its configuration, tokenizer, checkpoints, metrics and pictures.
        seed: of initial weights and data order.
        device: ``cuda``, ``cpu``, or ``auto`` for the GPU where there is one.
        kernels: which implementation of each op runs.
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
    run_dir: str = "runs/default"
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        require_choice("device", self.device, ("auto", "cpu", "cuda"))
        require(bool(self.run_dir), "run_dir", self.run_dir, "must be a path")
        try:
            self.layout.check_length(self.data.sequence_length)
        except ValueError as error:
            raise ConfigError(str(error)) from error

        self._check_splits()
        accepted = f"must be at most {self.tokens_per_rank}, the tokens of a rank's micro-batch"
        groups = self.parallel.token_groups
        require(groups <= self.tokens_per_rank, "parallel.token_groups", groups, accepted)
        # Of all ranks' tokens: in check_world_size, for how many they are is not known before.
        if self.model.capacity_scope == "sequence":
            self._check_capacity(self.data.sequence_length, "a packed sequence")
        elif self.model.capacity_scope == "rank":
            self._check_capacity(self.tokens_per_rank, "a rank's micro-batch")

    @property
    def tokens_per_rank(self) -> int:
        """Tokens of a micro-batch that a rank holds between attention layers."""
        tokens, parallel = self.recipe.micro_batch_size * self.data.sequence_length, self.parallel
        return tokens // (parallel.cp * parallel.tp)

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

    def _check_splits(self) -> None:
        """Refuse a grid whose axes do not divide what they split, or would split what cannot be."""
        model, parallel = self.model, self.parallel
        kinds = dict.fromkeys(model.attentions)
        for axis, kind in itertools.product(("tp", "cp"), kinds):
            ranks = parallel.sizes[axis]
            accepted = f"must be 1 with {kind} in model.layer_pattern={model.layer_pattern!r}: it cannot be split"
            require(ranks == 1 or getattr(kind, axis) is not None, f"parallel.{axis}", ranks, accepted)
        heads = dict.fromkeys(name for kind in kinds for name in kind.tp or ())
        tokens = self.recipe.micro_batch_size * self.data.sequence_length // parallel.cp
        micro_batch = f"the {tokens} tokens of a micro-batch on a context-parallel rank"
        for axis, what, size in [
            *(("tp", f"model.{name}={getattr(model, name)}", getattr(model, name)) for name in heads),
            ("tp", f"model.vocab_size={model.vocab_size}", model.vocab_size),
            ("tp", micro_batch, tokens),
            ("ep", f"model.num_experts={model.num_experts}", model.num_experts),
            ("etp", f"model.expert_hidden_size={model.expert_hidden_size}", model.expert_hidden_size),
        ]:
            ranks = parallel.sizes[axis]
            accepted = f"must divide {what}; the nearest that do are {nearest_divisors(size, ranks)}"
            require(size % ranks == 0, f"parallel.{axis}", ranks, accepted)

    @property
    def layout(self) -> SequenceLayout:
        """How packed sequences are dealt to context-parallel ranks."""
        return SequenceLayout(self.parallel.layout, self.parallel.cp)

    def check_world_size(self, world_size: int) -> None:
        """Refuse a number of processes that this configuration cannot run on.

        Raises:
            ConfigError: naming the key to change and the values that would do.
        """
        recipe, streams, parallel = self.recipe, self.data.num_streams, self.parallel
        try:
            check_sizes(world_size, **parallel.sizes)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        dp = world_size // (parallel.cp * parallel.tp)
        together = dp * recipe.micro_batch_size
        size, ranks = recipe.global_batch_size, f"{dp} data-parallel ranks"
        accepted = f"must be a multiple of {together}: {ranks} x recipe.micro_batch_size={recipe.micro_batch_size}"
        require(size % together == 0, "recipe.global_batch_size", size, accepted)
        fitting = [number for number in range(1, streams + 1) if streams % number == 0]
        accepted = f"must be a multiple of the {ranks}; with it, {fitting} of them would do"
        require(streams % dp == 0, "data.num_streams", streams, accepted)
        workers, own = self.data.num_workers, streams // dp
        accepted = f"must be at most {own}, the streams of a data-parallel rank (data.num_streams={streams}), or 0"
        require(workers <= own, "data.num_workers", workers, accepted)
        if self.model.capacity_scope == "global":
            self._check_capacity(together * self.data.sequence_length, "all ranks' micro-batches")


ConfigStore.instance().store(name="schema", node=Config)
for _name, _engine in ENGINES.items():
    ConfigStore.instance().store(group="engine_schema", name=_name, node=_engine.config_type)


def load_config(overrides: Sequence[str] = (), *, config_dir: str | Path | None = None) -> Config:
    """Compose the configuration from the defaults, Hydra overrides, and checks of every group.

    Args:
        overrides: ``model=small``, ``recipe.steps=100``, ``experiment=demo`` and so on.
        config_dir: a folder of your own groups and experiments, searched besides the package's.

    Raises:
        ConfigError: naming the key, its value and what would be accepted.
    """
    for override in overrides:
        if re.match(r"[+~]*hydra[./=@]", override):
            raise ConfigError(f"{override}: Hydra's own settings are not read here; --config-dir adds a search path")
    if config_dir is not None:
        require(Path(config_dir).is_dir(), "--config-dir", str(config_dir), "must be a folder")
        overrides = [*overrides, f"hydra.searchpath=[file://{Path(config_dir).resolve()}]"]
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(CONFIG_DIR), version_base="1.3", job_name="minimax-train"):
            return _instantiate(compose("config", list(overrides)))
    except ConfigError:
        raise
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise ConfigError(_explain(error, overrides)) from error


def read_config(path: str | Path) -> Config:
    """A configuration saved by :func:`save_config`.

    Raises:
        ConfigError: when the file is missing or does not hold a configuration of this version.
    """
    try:
        saved, schema = _with_new_names(OmegaConf.load(path)), OmegaConf.structured(Config)
        name = OmegaConf.select(saved, "engine.name", default=EngineConfig.name)
        schema.engine = OmegaConf.structured(ENGINES[name].config_type if name in ENGINES else EngineConfig)
        return _instantiate(OmegaConf.merge(schema, saved))
    except (OSError, OmegaConfBaseException, YAMLError) as error:
        raise ConfigError(f"{path}: not a configuration: {_first_line(error)}") from error


def _with_new_names(saved: Tree) -> Tree:
    """What an earlier version saved, in the words of this one."""
    for old, new in RENAMED_KEYS.items():
        group, _, name = old.rpartition(".")
        if name in (node := OmegaConf.select(saved, group, default={})):
            node[new.rpartition(".")[2]] = node.pop(name)
    for group, renamed in [("kernels", RENAMED), ("model", RENAMED_SCOPES)]:
        node = OmegaConf.select(saved, group, default={})
        for name, value in node.items():
            if (group == "kernels" or name.endswith("_scope")) and value in renamed:
                node[name] = renamed[value]
    return saved


def config_at(config: Config, plan: StepPlan) -> Config:
    """The configuration that a run at this step would begin with: a checkpoint's, for who uses it on its own."""
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, rope_base=plan.rope_base),
        data=dataclasses.replace(config.data, sequence_length=plan.sequence_length),
        recipe=dataclasses.replace(
            config.recipe, global_batch_size=plan.global_batch_size, micro_batch_size=plan.micro_batch_size
        ),
    )


def save_config(config: Config, path: str | Path) -> None:
    """Write the resolved configuration as YAML."""
    replace_text(Path(path), to_yaml(config))


def to_yaml(config: Config) -> str:
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def flatten(config: Config) -> dict[str, Any]:
    """Dotted key to value."""

    def walk(node: Any, prefix: str) -> dict[str, Any]:
        if not isinstance(node, dict):
            return {prefix: node}
        return {k: v for name, child in node.items() for k, v in walk(child, f"{prefix}.{name}".lstrip(".")).items()}

    return walk(dataclasses.asdict(config), "")


def _instantiate(tree: Tree) -> Config:
    require_choice("engine.name", tree.engine.name, tuple(ENGINES))
    _refuse_unknown(OmegaConf.to_container(tree), tree.engine.name)
    missing = sorted(OmegaConf.missing_keys(tree))
    if missing:
        raise ConfigError(f"{missing[0]}: no value given; it has no default, so pass {missing[0]}=...")
    config: Any = OmegaConf.to_object(tree)
    return config


def _explain(error: Exception, overrides: Sequence[str]) -> str:
    """One message from Hydra's or OmegaConf's: key, value, what is accepted."""
    causes: list[BaseException] = [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    text = "\n".join(str(cause) for cause in causes)
    match = re.search(r"full_key: (\S+)", text)
    if match is None:
        return "\n".join(dict.fromkeys(line for line in str(error).splitlines() if line.strip()))
    key = re.sub(r"\[.*", "", match[1])  # of a list, not of its element
    given = next((item for item in overrides if re.split(r"=", item.lstrip("+~"), maxsplit=1)[0] == key), key)
    parent, _, name = key.rpartition(".")
    engines = [item.partition("=")[2] for item in overrides if item.startswith("engine=")]
    engine = engines[-1] if engines else EngineConfig.name
    fields = _fields_of(parent, engine)
    if fields and name not in fields:
        return _unknown_key(key, given, fields)
    wanted = f" (accepted: {fields[name]})" if fields else ""
    return f"{given}: {_first_line(causes[-1])}{wanted}"


def _fields_of(path: str, engine: str) -> dict[str, str]:
    """Field names and types of the group at a dotted path; nothing when there is no such group.

    Args:
        engine: the name of the run's.
    """
    kind: Any = Config
    for name in filter(None, path.split(".")):
        kind = get_type_hints(kind).get(name)
        if kind is EngineConfig:
            kind = ENGINES[engine].config_type if engine in ENGINES else EngineConfig
        if not dataclasses.is_dataclass(kind):
            return {}
    return {field.name: str(field.type) for field in dataclasses.fields(kind)}


def _refuse_unknown(tree: Any, engine: str, path: str = "") -> None:
    """Hydra's ``+key=value`` adds keys past the types; none of them would be read."""
    fields = _fields_of(path, engine)
    for name, value in tree.items():
        key = f"{path}.{name}".lstrip(".")
        if fields and name not in fields:
            raise ConfigError(_unknown_key(key, key, fields))
        if isinstance(value, dict):
            _refuse_unknown(value, engine, key)


def _unknown_key(key: str, given: str, fields: Iterable[str]) -> str:
    parent, _, name = key.rpartition(".")
    if key in RENAMED_KEYS:
        return f"{given}: renamed: use {RENAMED_KEYS[key]}"
    close = difflib.get_close_matches(name, fields, n=1)
    hint = f" Did you mean {f'{parent}.{close[0]}'.lstrip('.')}?" if close else ""
    return f"{given}: there is no key {name!r} in {parent or 'the configuration'}.{hint} Accepted: {', '.join(fields)}"


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0]
