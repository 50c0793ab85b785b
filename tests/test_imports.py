"""Imports point downwards: launch -> minimax_train -> parallel -> kernels -> minimax_train.documents -> torch.

Read from the sources, so that an import inside a function or for type hints counts like any other.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# From the bottom up: each may import itself and those before it. A module belongs to the longest name that fits.
LAYERS = (
    "minimax_train.documents",
    "minimax_train.kernels",
    "minimax_train.parallel",
    "minimax_train",
    "minimax_train.launch",
)
# Beyond that, what a layer must not know.
FORBIDDEN = {
    "minimax_train.documents": {"torch.distributed": "process groups"},
    "minimax_train.kernels": {"torch.distributed": "process groups"},
    "minimax_train.parallel": {
        **dict.fromkeys(("hydra", "omegaconf", "yaml"), "configuration"),
        **dict.fromkeys(("datasets", "tokenizers", "transformers"), "models and data"),
        **dict.fromkeys(("json", "pathlib", "safetensors", "torch.distributed.checkpoint", "open"), "files"),
    },
}


def _is_in(name, package):
    return name == package or name.startswith(package + ".")


def _layer(name):
    return max((layer for layer in LAYERS if _is_in(name, layer)), key=len, default=None)


def _modules():
    """(import name, path) of every module of the package, through the links to the top-level folders."""
    folders = [ROOT / "minimax_train", *(path for path in (ROOT / "minimax_train").iterdir() if path.is_symlink())]
    for path in sorted(path for folder in folders for path in folder.rglob("*.py")):
        relative = path.relative_to(ROOT)
        name = ".".join(relative.with_suffix("").parts)
        yield name.removesuffix(".__init__"), path


def _dotted(node):
    """``a.b.c`` as written, or None if it is no chain of names."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (owner := _dotted(node.value)):
        return f"{owner}.{node.attr}"
    return None


def _names_used(source, package):
    """(line, full name) of what a module imports, of attributes of imported modules, and of calls of built-ins."""
    tree = ast.parse(source)
    bound = {}  # local name -> what it was imported as
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
                first = alias.name.split(".")[0]
                bound[alias.asname or first] = alias.name if alias.asname else first
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:  # from . import x
                parents = package.split(".")[: -node.level + 1 or None]
                module = ".".join([*parents, module]).rstrip(".")
            for alias in node.names:
                yield node.lineno, f"{module}.{alias.name}"
                bound[alias.asname or alias.name] = f"{module}.{alias.name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and (name := _dotted(node)):
            first, _, rest = name.partition(".")
            if first in bound:
                yield node.lineno, f"{bound[first]}.{rest}"
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id not in bound:
            yield node.lineno, node.func.id


def violations(name, source, *, is_package=False):
    """What a module of that import name must not use: a list of ``line: reason``."""
    layer = _layer(name)
    package = name if is_package else name.rpartition(".")[0]
    found = {}
    for line, used in _names_used(source, package):
        target = _layer(used)
        if target and LAYERS.index(target) > LAYERS.index(layer) and used != "minimax_train":
            found.setdefault(f"{line}: {layer} must not import {used}: it lies above, in {target}", None)
        for forbidden, what in FORBIDDEN.get(layer, {}).items():
            if _is_in(used, forbidden):
                found.setdefault(f"{line}: {layer} must not know {what}: {forbidden}", None)
    return list(found)


def test_imports_point_downwards():
    modules = dict(_modules())
    for layer in LAYERS:
        assert any(_layer(name) == layer for name in modules), f"no module of {layer} found"
    found = [
        f"{path.relative_to(ROOT)}:{violation}"
        for name, path in modules.items()
        for violation in violations(name, path.read_text(), is_package=path.name == "__init__.py")
    ]
    assert not found, "\n".join(["imports that do not point downwards:", *found])


@pytest.mark.parametrize(
    ("name", "source", "reason"),
    [
        ("minimax_train.documents", "from minimax_train.kernels import norm", "must not import minimax_train.kernels"),
        ("minimax_train.documents", "import torch.distributed", "process groups"),
        (
            "minimax_train.kernels.norm.naive",
            "import minimax_train.parallel.grid",
            "must not import minimax_train.parallel",
        ),
        (
            "minimax_train.kernels.norm.naive",
            "from minimax_train import parallel",
            "must not import minimax_train.parallel",
        ),
        ("minimax_train.kernels.norm.naive", "from ...parallel import grid", "must not import minimax_train.parallel"),
        ("minimax_train.kernels.norm.naive", "def f():\n  import torch.distributed as dist", "process groups"),
        ("minimax_train.kernels.norm.naive", "from torch import distributed", "process groups"),
        ("minimax_train.kernels.norm.naive", "import torch\ntorch.distributed.all_reduce(x)", "process groups"),
        (
            "minimax_train.parallel.grid",
            "from minimax_train.model.config import ModelConfig",
            "must not import minimax",
        ),
        (
            "minimax_train.parallel.grid",
            "if TYPE_CHECKING:\n  from minimax_train.config import Config",
            "must not impo",
        ),
        ("minimax_train.parallel.grid", "from omegaconf import DictConfig", "configuration"),
        ("minimax_train.parallel.grid", "with open(path) as file: pass", "files"),
        ("minimax_train.trainer", "from minimax_train.launch import plan", "must not import minimax_train.launch"),
    ],
)
def test_a_planted_violation_is_found(name, source, reason):
    (violation,) = violations(name, source)
    assert reason in violation


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("minimax_train.kernels.norm.naive", "import torch\nfrom minimax_train.documents import Documents"),
        ("minimax_train.kernels.norm.naive", "from ..dispatch import choose\nfrom minimax_train import documents"),
        ("minimax_train.parallel.grid", "import torch.distributed as dist\nfrom minimax_train.kernels import norm"),
        ("minimax_train.trainer", "from minimax_train.parallel.grid import ProcessGrid\nopen(path)"),
        ("minimax_train.launch.plan", "from minimax_train.trainer import Trainer"),
    ],
)
def test_what_points_downwards_is_allowed(name, source):
    assert violations(name, source) == []
