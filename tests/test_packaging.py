"""What is installed: one package, whose files lie where their import names say, whichever way it gets there."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("configs", "kernels", "launch", "parallel")


def _build(kind, source, folder):
    """Build a ``wheel`` or an ``sdist`` of a source tree as pip does, with the setuptools that is installed."""
    folder.mkdir(exist_ok=True)
    code = f"from setuptools import build_meta; build_meta.build_{kind}({str(folder)!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = folder.iterdir()
    return built


def _members(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return sorted(archive.namelist())


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of what packaging reads, as git clone would leave it: links are links, nothing has been built."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("minimax_train", *ROOMS):
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture(scope="module")
def wheel(checkout, tmp_path_factory):
    return _build("wheel", checkout, tmp_path_factory.mktemp("wheel"))


def test_the_packages_are_relative_links_in_the_package():
    for room in ROOMS:
        assert os.readlink(ROOT / "minimax_train" / room) == os.path.join("..", room)


def test_a_wheel_holds_every_file_once_and_nothing_beside_the_package(wheel):
    members = [name for name in _members(wheel) if ".dist-info/" not in name]
    sources = [
        path.relative_to(ROOT).as_posix()
        for folder in (ROOT / "minimax_train", *(ROOT / "minimax_train" / room for room in ROOMS))
        for path in folder.rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    ]
    assert members == sorted(set(sources))


def test_a_wheel_carries_commands_and_licence(wheel):
    with zipfile.ZipFile(wheel) as archive:
        texts = {name.partition(".dist-info/")[2]: archive.read(name).decode() for name in archive.namelist()}
    assert "License-Expression: Apache-2.0" in texts["METADATA"]
    assert texts["licenses/LICENSE"] == (ROOT / "LICENSE").read_text()
    assert texts["top_level.txt"].split() == ["minimax_train"]
    assert "minimax-train = minimax_train.__main__:main" in texts["entry_points.txt"]


def test_a_source_distribution_builds_the_same_wheel(checkout, wheel, tmp_path):
    with tarfile.open(_build("sdist", checkout, tmp_path / "sdist")) as archive:
        assert not [member.name for member in archive if member.issym() or member.islnk()]
        archive.extractall(tmp_path, filter="data")
    (source,) = (path for path in tmp_path.iterdir() if path.name != "sdist")
    assert _members(_build("wheel", source, tmp_path / "wheel")) == _members(wheel)


def test_installed_packages_are_importable_only_inside_the_package(tmp_path):
    names = [*ROOMS, *(f"minimax_train.{room}" for room in ROOMS)]
    code = f"import importlib.util as u; [print(s and s.origin) for s in map(u.find_spec, {names!r})]"
    # -I: what is installed, without the current directory and PYTHONPATH
    run = subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    origins = run.stdout.splitlines()
    for room, outside, inside in zip(ROOMS, origins[: len(ROOMS)], origins[len(ROOMS) :], strict=True):
        assert inside.endswith(os.path.join("minimax_train", room, "__init__.py"))
        assert not outside.startswith(str(ROOT)), f"{room} is importable by itself, from {outside}"
