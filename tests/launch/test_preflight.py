"""What nodes find out about themselves, and which faults a comparison names."""

import json
import os
import time

import pytest

from minimax_train.launch import node
from minimax_train.launch.cli import main
from minimax_train.launch.preflight import FOLDER, find_faults
from support.runs import overrides, tiny_run

GPUS = 4


def _healthy(name, shift=0.0):
    """A node whose rates differ from others' by a part, as those of healthy nodes do."""
    gpu = {"name": "NVIDIA H100", "memory_gib": 79.1, "free_gib": 78.6}
    links = {f"host to GPU {i}": 25 * (1 + shift) for i in range(GPUS)}
    links |= {f"GPU {i} to GPU {(i + 1) % GPUS}": 350 * (1 - shift) for i in range(GPUS)}
    versions = {"driver": "580.1", "CUDA": "13.0", "NCCL": "2.28.9", "torch": "2.11.0", "Python": "3.12.1"}
    return {
        "node": name,
        "started": 1e9 + shift,
        "problems": [],
        "clock_synchronised": True,
        "software": {**versions, "minimax_train": "0.1.0"},
        "host_memory_gib": 900.0,
        "devices": [dict(gpu) for _ in range(GPUS)],
        "data": "abc",
        "disk": {"free_gb": 500.0, "mb_per_s": 800 * (1 + shift)},
        "link_gb_per_s": links,
        "gemm_tflops": [700 * (1 + shift)] * GPUS,
    }


FAULTS = {
    "a GPU less": (lambda r: r["devices"].pop(), "devices: 3 x NVIDIA H100 79 GiB, expected 4 x NVIDIA H100 79 GiB"),
    "another driver": (lambda r: r["software"].update(driver="570.2"), "driver: 570.2, expected 580.1, as 4 of 5"),
    "another NCCL": (lambda r: r["software"].update(NCCL="2.27.3"), "NCCL: 2.27.3, expected 2.28.9"),
    "slow GPU": (lambda r: r["gemm_tflops"].__setitem__(2, 500.0), "GPU 2: GEMM: 500 TFLOP/s, expected at least 0.85"),
    "slow link": (
        lambda r: r["link_gb_per_s"].update({"GPU 3 to GPU 0": 60.0}),
        "GPU 3 to GPU 0: 60 GB/s, expected at least 0.85 of the median, 350",
    ),
    "slow PCIe": (lambda r: r["link_gb_per_s"].update({"host to GPU 1": 6.0}), "host to GPU 1: 6 GB/s, expected"),
    "slow disk": (lambda r: r["disk"].update(mb_per_s=20.0), "run_dir: 20 MB/s written, expected at least 0.2"),
    "full disk": (lambda r: r["disk"].update(free_gb=3.0), "run_dir: 3.0 GB free, expected 40.0"),
    "little memory": (lambda r: r.update(host_memory_gib=400), "memory available on the host: 400 GiB, expected"),
    "other files": (lambda r: r.update(data="abd"), "data: files seen: abd, expected abc"),
    "held memory": (lambda r: r["devices"][1].update(free_gib=40.1), "GPU 1: 39.0 GiB of memory are in use"),
    "clock": (lambda r: r.update(started=1e9 + 60, clock_synchronised=False), "clock: +60.0 s from the others'"),
    "its own": (lambda r: r["problems"].append("data.train_files: gone"), "data.train_files: gone"),
}


def _records():
    return {f"n{i}": _healthy(f"n{i}", 0.02 * (i - 2)) for i in range(5)}


def test_healthy_nodes_have_no_faults():
    records = _records()
    records["n1"]["started"] += 90  # pulled an image first; its clock is synchronised
    assert list(find_faults(records, 0.85, 40)) == []


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named(fault):
    records = _records()
    strike, told = FAULTS[fault]
    strike(records["n3"])
    ((name, line),) = find_faults(records, 0.85, 40)
    assert name == "n3" and line.startswith(told)


def _preflight(capsys, *arguments):
    status = main(["preflight", *arguments])
    told = capsys.readouterr()
    return status, told.out, told.err


def test_this_machine(tmp_path, capsys):
    given = overrides(tmp_path)
    status, out, _ = _preflight(capsys, "--", *given)
    folder = tmp_path / "run" / FOLDER
    (path,) = folder.glob("*.json")
    record = json.loads(path.read_text())
    assert (status, record["problems"], (folder / "unfit").read_text()) == (0, [], ""), out
    assert abs(record["started"] - (time.time() - float(os.popen(f"ps -o etimes= -p {os.getpid()}").read()))) < 3
    assert record["gemm_tflops"][0] > 0 and record["disk"]["mb_per_s"] > 0
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["launch"], "nothing is left of the disk's test"
    # The same record as another node's, slower and elsewhere; a third that has not answered.
    record["gemm_tflops"] = [record["gemm_tflops"][0] / 2]
    (folder / "slow.json").write_text(json.dumps({**record, "node": "slow"}))
    names = f"{path.stem},slow,silent"
    status, out, _ = _preflight(capsys, f"--compare={folder}", f"--nodes={names}", "--world-size=2", "--", *given)
    lines = out.splitlines()
    assert status == 1 and (folder / "unfit").read_text() == "silent,slow"
    assert lines[1].split()[1] == "fit" and lines[2].split()[:2] == ["slow", "unfit"]
    assert lines[3] == "silent: no answer within 120 s" and lines[4].startswith("slow: CPU 0: GEMM: ")
    assert lines[5].startswith("1 of 3 nodes are fit; ")


def test_what_cannot_run_is_told(tmp_path, capsys):
    gone = f"data.train_files=[{tmp_path}/gone.jsonl]"
    assert _preflight(capsys, "--", *overrides(tmp_path), gone)[:1] == (1,)
    status, _, error = _preflight(capsys, "--world-size=3", "--", *overrides(tmp_path))
    assert status == 2 and error.startswith("error: 3 processes: recipe.global_batch_size=4: ")
    status, _, error = _preflight(capsys, "--nodes=a", "--", *overrides(tmp_path))
    assert (status, error) == (2, "error: --nodes='a': needs --compare\n")


def test_local_starts_nothing_on_an_unfit_machine(tmp_path, capsys, monkeypatch):
    started = []
    monkeypatch.setattr(os, "execvpe", lambda name, command, environment: started.append(command))
    main(["local", "--preflight", "--", *overrides(tmp_path)])
    assert len(started) == 1 and "--preflight" not in started[0]
    assert main(["local", "--preflight", "--", *overrides(tmp_path), "data.train_files=[/gone]"]) == 1
    assert len(started) == 1 and "data.train_files=['/gone']" in capsys.readouterr().out


def test_local_preflight_is_for_the_processes_that_torchrun_starts(tmp_path, capsys, monkeypatch):
    started = []
    monkeypatch.setattr(os, "execvpe", lambda name, command, environment: started.append(command))
    run = [*overrides(tmp_path), "parallel.cp=2", "data.sequence_length=64", "recipe.global_batch_size=2"]
    main(["local", "--preflight", "--nproc-per-node=2", "--", *run])
    main(["local", "--preflight", "--nnodes", "2", "--nproc_per_node=2", "--", *run])
    assert len(started) == 2, capsys.readouterr().err
    assert main(["local", "--preflight", "--nproc-per-node=8", "--", *run]) == 2
    assert capsys.readouterr().err.startswith("error: 8 processes: recipe.global_batch_size=2: ")


def test_a_look_that_hangs_is_named_in_time(tmp_path):
    """In a process of its own, which that ends."""
    pid = os.fork()
    if pid == 0:
        node.LIMIT_S = 1.0
        node._PARTS["data"] = lambda config: time.sleep(30)
        node.look(tiny_run(tmp_path), tmp_path / "found")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1
    (path,) = (tmp_path / "found").iterdir()
    assert json.loads(path.read_text())["problems"] == ["data: no result within 1 s"]
