"""The folder of compiled kernels: where it is, what the libraries are told, and that one process compiles for all."""

import json
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from minimax_train import cache
from minimax_train.cache import find_cache, use_kernel_cache
from minimax_train.kernels import compile_cache
from minimax_train.kernels.compile_cache import keep_compiled, one_at_a_time
from minimax_train.startup import Startup, process_age
from support.runs import overrides

VARIABLES = ("TRITON_CACHE_DIR", "TRITON_CACHE_MANAGER", "QUACK_CACHE_DIR", "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR")


@pytest.fixture(autouse=True)
def untold(monkeypatch):
    """Whatever the machine's own environment says, and undone afterwards."""
    for name in (*VARIABLES, "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    cache._problem.cache_clear()


def test_where_it_is(tmp_path, monkeypatch):
    assert find_cache(None) is None
    assert find_cache(str(tmp_path / "a" / "b")) == tmp_path / "a" / "b"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_cache("auto") == tmp_path / ".cache" / "minimax_train"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert find_cache("auto") == tmp_path / "xdg" / "minimax_train"
    assert (tmp_path / "xdg" / "minimax_train").is_dir()


def test_a_folder_that_cannot_be_used_is_said_and_the_run_goes_on(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert find_cache(f"{tmp_path}/file/x", says=False) is None
    assert capsys.readouterr().err == ""
    assert find_cache(f"{tmp_path}/file/x") is None
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"note: cache_dir='{tmp_path}/file/x': {tmp_path}/file/x cannot be used (Not a directory)")


def test_a_file_system_without_locks(tmp_path, monkeypatch, capsys):
    def no_locks(file, operation):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(compile_cache.fcntl, "flock", no_locks)
    assert find_cache(str(tmp_path)) is None
    assert "(Operation not supported)" in capsys.readouterr().err


@pytest.fixture
def on_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    return torch.device("cuda", 0)


def test_libraries_are_told_before_they_are_imported(tmp_path, monkeypatch, on_a_gpu):
    monkeypatch.setenv("QUACK_CACHE_DIR", "/own")
    use_kernel_cache(tmp_path, on_a_gpu)
    assert os.environ["TRITON_CACHE_DIR"] == f"{tmp_path}/kernels/sm90/triton"
    assert os.environ["FLASH_ATTENTION_CUTE_DSL_CACHE_DIR"] == f"{tmp_path}/kernels/sm90/flash_attn"
    assert os.environ["FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED"] == "1"
    assert os.environ["QUACK_CACHE_DIR"] == "/own"


def test_null_leaves_the_libraries_alone(tmp_path, monkeypatch, on_a_gpu):
    monkeypatch.setenv("HOME", str(tmp_path))
    use_kernel_cache(None, on_a_gpu)
    use_kernel_cache(tmp_path, torch.device("cpu"))
    assert not any(name in os.environ for name in VARIABLES)


def test_triton_has_somewhere_to_write_without_a_home(monkeypatch, on_a_gpu):
    monkeypatch.setenv("HOME", "/no/such/home")
    use_kernel_cache(None, on_a_gpu)
    assert os.access(os.environ["TRITON_CACHE_DIR"], os.W_OK)


def test_triton_takes_the_manager_from_the_environment(tmp_path):
    environ = {}
    keep_compiled(tmp_path, environ)
    script = """
import sys
assert "triton" not in sys.modules
from triton.runtime.cache import get_cache_manager
manager = get_cache_manager("0a")
print(type(manager).__name__, manager.cache_dir)
"""
    told = subprocess.run([sys.executable, "-c", script], env={**os.environ, **environ}, capture_output=True, text=True)
    name, folder = told.stdout.split()
    assert name == "OncePerMachine" and folder.startswith(f"{tmp_path}/triton/"), told.stderr


def managed(folder, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(folder))
    from minimax_train.kernels.triton_cache import OncePerMachine

    return OncePerMachine


@pytest.mark.parametrize("grouped", [True, False])
def test_of_those_that_miss_a_kernel_one_compiles(grouped, tmp_path, monkeypatch):
    """As Triton's compiler does for kernels (groups of files) and for launchers in C (files)."""
    Manager, compiled = managed(tmp_path, monkeypatch), []

    def compile_kernel(i):
        manager = Manager("kernel")
        if found := manager.get_group("k.json") if grouped else manager.get_file("k.so"):
            return found
        time.sleep(0.1)  # long enough that without a lock all of them compile
        compiled.append(i)
        if grouped:
            path = manager.put("code", "k.cubin", binary=False)
            manager.put_group("k.json", {"k.cubin": path})
        else:
            manager.put(b"code", "k.so")
        return None

    with ThreadPoolExecutor(5) as pool:
        results = list(pool.map(compile_kernel, range(5)))
    assert len(compiled) == 1 and sum(result is not None for result in results) == 4


def test_a_compiler_that_raises_frees_the_lock(tmp_path, monkeypatch):
    Manager = managed(tmp_path, monkeypatch)

    def fail():
        assert Manager("kernel").get_group("k.json") is None
        raise RuntimeError

    for _ in range(2):  # the second would wait for ever
        with pytest.raises(RuntimeError):
            fail()


def test_flash_attention_is_called_first_by_one_process(tmp_path, monkeypatch):
    keep_compiled(tmp_path)
    inside, most = 0, 0

    def call(i):
        nonlocal inside, most
        monkeypatch.setattr(compile_cache, "_used", set())  # as another process
        with one_at_a_time("forward", torch.bfloat16, 64):
            inside += 1
            most = max(most, inside)
            time.sleep(0.02)
            inside -= 1

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(call, range(4)))
    assert most == 1
    before = sorted(tmp_path.rglob("*"))
    with one_at_a_time("forward", torch.bfloat16, 64), one_at_a_time("forward", torch.bfloat16, 64):
        pass  # known: not locked again
    assert sorted(tmp_path.rglob("*")) == before


def test_seconds_since_the_process_started():
    script = "import time; time.sleep(0.5); from minimax_train.startup import process_age; print(process_age())"
    before = time.perf_counter()
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    tick = 1 / os.sysconf("SC_CLK_TCK")  # what the system rounds the start down to
    assert 0.5 <= float(told.stdout) <= time.perf_counter() - before + tick
    startup = Startup()
    startup.mark("first step")
    whole, *phases = map(float, re.findall(r"\d+\.\d", str(startup)))
    assert len(phases) == 2 and abs(whole - sum(phases)) <= 0.15 and abs(whole - process_age()) < 1


def test_a_run_tells_where_its_start_went_and_keeps_its_tokenizer(tmp_path, capsys):
    from minimax_train.cli import main

    seen = []
    for name in ("first", "second"):
        folder = tmp_path / name
        arguments = overrides(folder, "recipe.steps=2", "recipe.warmup_steps=0", "recipe.decay_steps=0")
        assert main([*arguments, "recipe.eval_interval=0", f"cache_dir={tmp_path}/cache"]) == 0
        out, err = capsys.readouterr()
        # Before it starts: what is trained, on what, by what, and a step: four packed sequences of 63 tokens.
        assert re.search(r"^[\d,]+ parameters, [\d,]+ active .*; CPU, float32, engine=zero1; steps of 252 tokens", out)
        told = [line for line in out.splitlines() if line.startswith("started in ")]
        assert len(told) == 1 and "first step" in told[0] and "imports" in told[0]
        assert ("reusing the tokenizer" in err) == (name == "second")
        seen.append(json.loads((folder / "run" / "tokenizer" / "tokenizer.json").read_text()))
    assert seen[0] == seen[1]
