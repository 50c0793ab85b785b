"""From files and overrides to one tree of text: Hydra puts it together, the dataclasses give it types.

Every scalar stays as it was typed, so that no value changes its meaning on the way to a field that takes a string
(``run_dir: 2024_05_01``, ``revision: 7e53211``, ``wandb: off``). Hydra decides which files there are and in which
order they are merged. Values of the command line do not pass through its grammar: they are set last, as typed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import yaml
from hydra import compose, initialize
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.core.plugins import Plugins
from hydra.errors import HydraException, MissingConfigException
from hydra.plugins.config_source import ConfigResult, ConfigSource
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from minimax_train import configs
from minimax_train.errors import ConfigError, require
from minimax_train.fields import show, split_list, unquote

PACKAGED = Path(configs.__file__).parent
EXPERIMENT = "experiment"
Tree = dict[str, Any]
# `recipe.steps=1000`, `run_dir=x`, `model=tiny`; Hydra's `+` and `++` before it make no difference here.
_OVERRIDE = re.compile(r"\+{0,2}(?P<key>\w[\w-]*(?:[./]\w[\w-]*)*)=(?P<value>.*)", re.DOTALL)
# `${now:...}`, `${oc.env:...}`: not `${recipe.steps}`.
_RESOLVER = re.compile(r"\$\{[^{}]*:")


class _TextLoader(yaml.SafeLoader):
    """Leaves scalars as they were typed, but for null; refuses tags of other types, and a key given twice."""

    yaml_implicit_resolvers: ClassVar = {
        letter: [(tag, expression) for tag, expression in resolvers if tag.endswith((":null", ":merge"))]
        for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    yaml_constructors: ClassVar = {
        tag: constructor
        for tag, constructor in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or tag.endswith((":null", ":str", ":seq", ":map"))
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be one word", key.start_mark)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} is given twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


def read_yaml(path: Path) -> tuple[str, Tree]:
    """A YAML file as text and as a tree, whose scalars are text, or None for null.

    Raises:
        ConfigError: naming file, line and problem.
    """
    try:
        text = path.read_bytes().decode()
        tree = yaml.load(text, _TextLoader)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        raise ConfigError(f"{path}, line {mark.line + 1 if mark else '?'}: {error.problem}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{path}: not YAML: {_root_cause(error)}") from error
    except RecursionError:
        raise ConfigError(f"{path}: has too many levels") from None
    require(tree is None or isinstance(tree, dict), str(path), tree, "must hold keys and values, key: value")
    return text, tree or {}


class TextSource(ConfigSource):
    """A folder of groups, for Hydra: ``model/tiny.yaml`` and so on."""

    @staticmethod
    def scheme() -> str:
        return "text"

    def load_config(self, config_path: str) -> ConfigResult:
        path = self._file(config_path)
        text, tree = read_yaml(path)
        if "hydra" in tree:
            raise ConfigError(f"{path}: hydra: Hydra's own settings are not read here")
        try:
            header, tree = self._get_header_dict(text), OmegaConf.create(tree)
        except (ValueError, OmegaConfBaseException) as error:
            raise ConfigError(f"{path}: {_root_cause(error)}") from error
        except RecursionError:
            raise ConfigError(f"{path}: a part of it contains itself") from None
        if config_path.startswith(f"{EXPERIMENT}/"):
            header["package"] = header["package"] or "_global_"
        return ConfigResult(self.provider, f"{self.scheme()}://{self.path}", tree, header)

    def available(self) -> bool:
        return os.path.isdir(self.path)

    def is_group(self, config_path: str) -> bool:
        return os.path.isdir(Path(self.path, config_path))

    def is_config(self, config_path: str) -> bool:
        if "/" not in config_path:
            return False  # only groups: the file that names them all is no folder's
        path = self._file(config_path)
        other = path.with_suffix(".yml")
        if os.path.isfile(other) and not os.path.isfile(path):
            raise ConfigError(f"{other}: is not read; call it {path.name}")
        return os.path.isfile(path)

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        found: list[str] = []
        for path in Path(self.path, config_path).iterdir():
            self._list_add_result(found, f"{config_path}/{path.name}", path.name, results_filter)
        return sorted(set(found))

    def _file(self, config_path: str) -> Path:
        return Path(self.path, self._normalize_file_name(config_path))


Plugins.instance().register(TextSource)
ConfigStore.instance().store("config", read_yaml(PACKAGED / "config.yaml")[1])


def compose_tree(
    overrides: Sequence[str], config_dirs: Sequence[str | Path], groups: Sequence[str], defaults: Mapping[str, Any]
) -> tuple[Tree, dict[str, str]]:
    """The tree of a run, references ``${recipe.steps}`` filled in, and the override that set each key.

    Args:
        config_dirs: searched before the package's own files, the first one first.
        groups: names of the configuration's groups, which files are picked for.
        defaults: what references find where nothing is given.

    Raises:
        ConfigError: naming the override, the key or the file.
    """
    folders = []
    for name in config_dirs:
        folder = Path(os.path.expanduser(name))
        require(name != "" and os.path.isdir(folder), "--config-dir", str(name), "must be a folder")
        in_groups = any(folder.glob("*/*.yaml")) or not any(folder.glob("*.y*ml"))
        accepted = f"files are read from its groups' folders: {folder / 'model' / 'mine.yaml'} for model=mine"
        require(in_groups, "--config-dir", str(name), accepted)
        folders.append(folder.resolve())
    folders.append(PACKAGED)
    choices, values, given = {}, {}, {}
    for override in overrides:
        shown = show(override)
        if re.match(r"[+~]*hydra([./=@]|$)", override):
            raise ConfigError(f"{shown}: Hydra's own settings are not read here; --config-dir adds a search path")
        if override.startswith("~"):
            raise ConfigError(f"{shown}: keys cannot be removed; null stands for none where a key takes it")
        match = _OVERRIDE.fullmatch(override)
        if match is None:
            raise ConfigError(f"{shown}: must be key=value, such as recipe.steps=1000")
        key = match["key"]
        if "." in key or not any(os.path.isdir(folder / key) for folder in folders):
            values[key], given[key] = unquote(match["value"]), shown
        else:
            plus = "" if key in (*groups, EXPERIMENT) else "+"  # a group of one's own is new to the list of defaults
            choices[key] = f"{plus}{key}={_choice(shown, match['value'])}"
    tree = _files(list(choices.values()), folders)
    for key, value in values.items():
        _set(tree, key, value)
    return _resolve(tree, defaults, given), given


def _files(choices: Sequence[str], folders: Sequence[Path]) -> Tree:
    """The files that defaults and overrides pick, merged."""
    path = ",".join(_quote(f"{TextSource.scheme()}://{folder}") for folder in folders)
    GlobalHydra.instance().clear()
    try:
        with initialize(config_path=None, version_base="1.3", job_name="minimax-train"):
            tree: Any = OmegaConf.to_container(compose("config", [f"hydra.searchpath=[{path}]", *choices]))
            return tree
    except ConfigError:
        raise
    except MissingConfigException as error:
        there = f"; there are {', '.join(error.options)}" if error.options else ""
        raise ConfigError(f"{show(error.missing_cfg_file)}: there is no such file of configuration{there}") from error
    except (HydraException, OmegaConfBaseException, OSError, ValueError, TypeError, AssertionError) as error:
        raise ConfigError(_root_cause(error)) from error
    except RecursionError:
        raise ConfigError(f"{' '.join(choices)}: files that name each other in their defaults") from None


def _choice(override: str, value: str) -> str:
    """The name of a group's file, or a list of them, such that Hydra takes it as typed."""
    names = split_list(value)
    if names is None and "," in value:
        raise ConfigError(f"{override}: must be one file's name: there are no sweeps over several")
    quoted = [_quote(name) for name in names or [unquote(value)] if name]
    if len(quoted) != len(names or [value]):
        raise ConfigError(f"{override}: must be the name of a file in this group")
    return quoted[0] if names is None else f"[{','.join(quoted)}]"


def _quote(text: str) -> str:
    """For Hydra's grammar: backslashes count only before a quote."""
    return "'" + re.sub(r"(\\*)('|\Z)", lambda m: m[1] * 2 + ("\\'" if m[2] else ""), text) + "'"


def _set(tree: Tree, key: str, value: str | None) -> None:
    *parents, name = key.split(".")
    for parent in parents:
        if not isinstance(tree.get(parent), dict):
            tree[parent] = {}
        tree = tree[parent]
    tree[name] = value


def _resolve(tree: Tree, defaults: Mapping[str, Any], given: Mapping[str, str]) -> Tree:
    def check(node: Any, key: str) -> None:
        if isinstance(node, dict):
            for name, child in node.items():
                check(child, f"{key}.{name}".lstrip("."))
        elif isinstance(node, list):
            for child in node:
                check(child, key)
        elif isinstance(node, str) and _RESOLVER.search(node):
            raise ConfigError(
                f"{given.get(key, f'{key}={node}')}: only other keys are filled in, as in ${{recipe.steps}}; "
                "leave what could differ between ranks to the shell: $(date +%H%M%S), $HOME"
            )

    check(tree, "")
    try:
        resolved: Any = OmegaConf.to_container(OmegaConf.create(_merged(defaults, tree)), resolve=True)
        return resolved
    except (OmegaConfBaseException, RecursionError) as error:
        key = str(getattr(error, "full_key", None) or "")
        raise ConfigError(f"{given.get(key, key)}: {_root_cause(error)}".removeprefix(": ")) from error


def _merged(below: Mapping[str, Any], above: Tree) -> Tree:
    def both(name: str) -> Any:
        if isinstance(below.get(name), dict) and isinstance(above.get(name, {}), dict):
            return _merged(below[name], above.get(name, {}))
        return above[name] if name in above else below[name]

    return {name: both(name) for name in {**below, **above}}


def _root_cause(error: BaseException) -> str:
    """The message of an error that led to others, on one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error).split("\n    full_key:")[0]
    return " ".join(text.split()) or type(error).__name__
