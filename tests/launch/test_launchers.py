"""The launch scripts, run for real; Slurm's srun by a stand-in that starts the tasks with srun's variables."""

import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from minimax_train import launch
from minimax_train.parallel.environment import ProcessEnvironment, share_processors
from support.runs import overrides

SCRIPTS = Path(launch.__file__).parent
SRUN = """#!/usr/bin/env bash
# srun --kill-on-bad-exit=1 COMMAND: two tasks
shift
for task in 0 1; do
  SLURM_PROCID=$task SLURM_LOCALID=$task SLURM_NTASKS=2 SLURM_JOB_ID=$$ SLURM_STEP_ID=0 \\
    SLURM_STEP_NODELIST=localhost "$@" &
  pids[$task]=$!
done
wait "${pids[0]}" && wait "${pids[1]}"
"""


def _start(script, arguments, folder, tools=None):
    path = [str(tools)] if tools else []
    path = os.pathsep.join([*path, str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"}
    command = ["bash", SCRIPTS / script, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=180)


def _losses(folder):
    records = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if "loss" in record]


def test_torchrun_and_slurm_train_the_same_model(tmp_path):
    result = _start("torchrun.sh", overrides(tmp_path / "one"), tmp_path)
    assert result.returncode == 0, result.stderr
    two = ["--standalone", "--nproc-per-node=2", "--", *overrides(tmp_path / "two", "checkpoint.interval=2")]
    result = _start("torchrun.sh", two, tmp_path)
    assert result.returncode == 0, result.stderr
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "srun").write_text(SRUN)
    (tools / "srun").chmod(stat.S_IRWXU)
    result = _start("slurm.sbatch", overrides(tmp_path / "slurm"), tmp_path, tools)
    assert result.returncode == 0, result.stderr
    assert "recipe:\n" in result.stdout, "the job's output keeps the configuration"
    assert _losses(tmp_path / "two") == pytest.approx(_losses(tmp_path / "one"), rel=1e-5)
    assert _losses(tmp_path / "slurm") == _losses(tmp_path / "two")


def test_a_bad_override_is_refused_before_torchrun_starts(tmp_path):
    result = _start("torchrun.sh", ["--standalone", "--nproc-per-node=2", "--", "recipe.stps=1"], tmp_path)
    assert result.returncode == 2
    assert result.stderr.strip().count("\n") == 0
    assert "Did you mean recipe.steps?" in result.stderr


@pytest.mark.parametrize(
    ("options", "override", "message"),
    [
        (["--nproc-per-node=2"], "parallel.cp=4", "parallel.cp=4: must divide the number of processes, 2"),
        (["--nproc_per_node", "3"], "data.num_streams=8", "recipe.global_batch_size=8: "),
        (["--nnodes=2", "--nproc-per-node=8", "--rdzv-endpoint=a:1"], "recipe.micro_batch_size=1", "batch_size=8: "),
        ([], "parallel.cp=2", "parallel.cp=2: must divide the number of processes, 1"),
    ],
)
def test_a_number_of_processes_that_does_not_fit_is_refused_before_torchrun_starts(
    tmp_path, monkeypatch, options, override, message
):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    result = _start("torchrun.sh", [*options, "--", override], tmp_path)
    assert result.returncode == 2 and message in result.stderr
    assert result.stderr.strip().count("\n") == 0


def test_a_number_of_processes_that_torchrun_finds_out_is_left_to_it(tmp_path):
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "torchrun").write_text("#!/usr/bin/env bash\nexit 7\n")
    (tools / "torchrun").chmod(stat.S_IRWXU)
    for options in (["--nproc-per-node=gpu"], ["--nnodes=1:4", "--nproc-per-node=2"]):
        assert _start("torchrun.sh", [*options, "--", "parallel.tp=2"], tmp_path, tools).returncode == 7


def test_processes_that_are_started_again_have_a_store_of_their_own(tmp_path):
    """In the old one is what the processes before left: why they ended, and where they met."""
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "minimax-train").write_text(
        f"""#!/usr/bin/env bash
[[ $1 == --cfg ]] && exit
echo "$TORCHELASTIC_USE_AGENT_STORE $MASTER_PORT" >{tmp_path}/start-$TORCHELASTIC_RESTART_COUNT-$RANK
exit $((TORCHELASTIC_RESTART_COUNT == 0 && RANK == 1))
"""
    )
    (tools / "minimax-train").chmod(stat.S_IRWXU)
    result = _start("torchrun.sh", ["--nproc-per-node=2", "--max-restarts=1", "--", "seed=1"], tmp_path, tools)
    assert result.returncode == 0, result.stderr
    stores = [(tmp_path / f"start-{start}-1").read_text().split() for start in (0, 1)]
    assert [of_agent for of_agent, _ in stores] == ["False", "False"] and stores[0] != stores[1]


def test_restarts_over_machines_need_a_rendezvous_that_they_share(tmp_path):
    static = ["--nnodes=2", "--node-rank=0", "--master-addr=localhost", "--nproc-per-node=1", "--max-restarts=1"]
    result = _start("torchrun.sh", [*static, "--", "seed=1"], tmp_path)
    assert result.returncode == 2 and result.stderr.startswith("error: --max-restarts: over several machines needs")
    assert result.stderr.count("\n") == 1


def test_overrides_arrive_unchanged(tmp_path):
    arguments = ["run_dir=with space/$HOME '*'", "data=files", "data.train_files=[a b.txt,c*]"]
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("torchrun", "minimax-train", "srun"):
        (tools / name).write_text(f'#!/usr/bin/env bash\nprintf "%s\\n" "$@" > {tmp_path}/{name}.args\n')
        (tools / name).chmod(stat.S_IRWXU)
    assert _start("torchrun.sh", arguments, tmp_path, tools).returncode == 0
    given = (tmp_path / "torchrun.args").read_text().splitlines()
    assert given[-3:] == arguments and "SIGUSR1" in given[0], "a signal to torchrun that it does not handle ends it"
    assert _start("slurm.sbatch", arguments, tmp_path, tools).returncode == 0
    given = (tmp_path / "srun.args").read_text().splitlines()
    assert given[-3:] == arguments
    (within_s,) = (value.partition("=")[2] for value in given if value.startswith("checkpoint.leave_within_s="))
    (warning_s,) = re.findall(r"^#SBATCH --signal=USR1@(\d+)$", (SCRIPTS / "slurm.sbatch").read_text(), re.MULTILINE)
    assert float(within_s) < float(warning_s)


@pytest.mark.parametrize(("visible", "processes"), [(None, 4), ("", 1), ("3", 1), ("0,2", 2)])
def test_one_process_per_visible_gpu(tmp_path, monkeypatch, visible, processes):
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "torchrun").write_text(f'#!/usr/bin/env bash\nprintf "%s\\n" "$@" > {tmp_path}/torchrun.args\n')
    (tools / "nvidia-smi").write_text('#!/usr/bin/env bash\nprintf "GPU %s\\n" 0 1 2 3\n')
    (tools / "minimax-train").write_text("#!/usr/bin/env bash\n")
    for tool in tools.iterdir():
        tool.chmod(stat.S_IRWXU)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert _start("torchrun.sh", ["model=tiny"], tmp_path, tools).returncode == 0
    assert f"--nproc-per-node={processes}" in (tmp_path / "torchrun.args").read_text().splitlines()


def test_processes_share_a_machine(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 100)
    for given, expected in [
        ({}, {}),
        ({"LOCAL_WORLD_SIZE": "1"}, {}),
        ({"LOCAL_WORLD_SIZE": "many"}, {}),
        ({"LOCAL_WORLD_SIZE": "8"}, {"RAYON_NUM_THREADS": "12"}),
        ({"LOCAL_WORLD_SIZE": "300"}, {"RAYON_NUM_THREADS": "1"}),
        ({"LOCAL_WORLD_SIZE": "8", "RAYON_NUM_THREADS": "5"}, {"RAYON_NUM_THREADS": "5"}),
    ]:
        environ = dict(given)
        share_processors(environ)
        assert environ == given | expected


def test_environments():
    torchrun = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "n0", "MASTER_PORT": "29400"}
    assert ProcessEnvironment.detect(torchrun) == ProcessEnvironment(3, 4, 1, "tcp://n0:29400")
    slurm = {
        "SLURM_PROCID": "5",
        "SLURM_NTASKS": "8",
        "SLURM_LOCALID": "1",
        "SLURM_JOB_ID": "123456",
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NODELIST": "gpu[007-012,020],login1",
    }
    assert ProcessEnvironment.detect(slurm) == ProcessEnvironment(5, 8, 1, "tcp://gpu007:24192")
    for nodes, first in [("n1", "n1"), ("n1,n2", "n1"), ("rack[1-2]-n", "rack1-n"), ("a-[3,5].local,b", "a-3.local")]:
        assert ProcessEnvironment.detect({**slurm, "SLURM_STEP_NODELIST": nodes}).init_method == f"tcp://{first}:24192"
    assert ProcessEnvironment.detect({}) == ProcessEnvironment()
    six = ProcessEnvironment.detect({**torchrun, "MASTER_ADDR": "fd00::1"})
    assert six.init_method == "tcp://[fd00::1]:29400"
    # Inside a batch script, but not started by srun: a run of its own.
    assert ProcessEnvironment.detect({"SLURM_PROCID": "0", "SLURM_JOB_ID": "1"}) == ProcessEnvironment()
    del torchrun["MASTER_PORT"]
    with pytest.raises(ValueError, match="MASTER_PORT not set"):
        ProcessEnvironment.detect(torchrun)
