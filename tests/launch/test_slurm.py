"""``minimax-launch`` and ``launch/slurm.sbatch`` on a real Slurm: three nodes on this machine."""

import json
import os
import re
import stat
import sys
from pathlib import Path

import pytest

from minimax_train import launch
from minimax_train.launch.slurm import LEAVE_WITHIN_S
from support.commands import Command
from support.runs import overrides
from support.slurm import Cluster, missing

BIN = Path(sys.executable).parent
ON_CPU = ["--gpus-per-node=0", "--cpus-per-task=1"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    if why := missing():
        pytest.skip(why)
    cluster = Cluster(tmp_path_factory.mktemp("cluster"))
    yield cluster
    cluster.close()


@pytest.fixture
def stand_in(tmp_path):
    """A folder for PATH, with a minimax-train that saves a step (0: none) and ends with a status as a line of the run's
    ``plan`` says, a line for each start; its second process leaves a second after the first."""
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "minimax-train").write_text(
        """#!/usr/bin/env bash
[[ $1 == --cfg ]] && exit
for argument in "$@"; do [[ $argument == run_dir=* ]] && cd "${argument#run_dir=}"; done
start=$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}-$SLURM_STEP_ID
echo "$SLURMD_NODENAME" >"nodes-$start-$SLURM_PROCID"
if [[ $SLURM_PROCID == 0 ]]; then
  printf '%s\\n' "$@" >"arguments-$start"
  sed -n 1p plan >"now-$start.draft" && sed -i 1d plan && mv "now-$start.draft" "now-$start"
fi
until [[ -e now-$start ]]; do sleep 0.05; done
read -r step status <"now-$start"
((step)) && mkdir -p "checkpoints/step-$(printf %08d "$step")"
[[ $SLURM_PROCID == 0 ]] || sleep 1
exit "$status"
"""
    )
    (tools / "minimax-train").chmod(stat.S_IRWXU)
    return tools


def _submit(cluster, *arguments):
    told = cluster.run(str(BIN / "minimax-launch"), "slurm", *arguments).stdout
    return re.match(r"job (\d+)", told)[1]


def _ended(cluster, job):
    cluster.wait(lambda: cluster.job(job)["JobState"] not in ("PENDING", "RUNNING", "COMPLETING"), "the job's end", 300)
    return cluster.job(job)["JobState"]


def _losses(run):
    path = run / "metrics.jsonl"
    records = map(json.loads, path.read_text().splitlines()) if path.exists() else ()
    return {record["step"]: record["loss"] for record in records if "loss" in record}


def _output(run):
    return "".join(path.read_text() for path in sorted((run / "launch").glob("*.out")))


def test_what_is_started_again_where(cluster, stand_in, tmp_path):
    """Saved: as a new start of the job. Failed: on the same nodes, until no step is gained."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "plan").write_text("10 3\n20 1\n30 1\n0 7\n")
    job = _submit(cluster, "--nodes=2", *ON_CPU, f"--env=PATH={stand_in}:/usr/bin:/bin", "--", f"run_dir={run}")
    assert _ended(cluster, job) == "FAILED"
    output = _output(run)
    starts = sorted(path.name.split("-", 1)[1] for path in run.glob("arguments-*"))
    assert starts == [f"{job}-0-0", f"{job}-1-0", f"{job}-1-2", f"{job}-1-4"], output
    assert "and no new checkpoint (the newest: 30); not started again" in output
    assert len((run / "launch" / f"restarts-{job}").read_text().splitlines()) == 2, "of failures"
    given = (run / f"arguments-{job}-0-0").read_text().splitlines()
    assert given == ["checkpoint.resume=auto", f"checkpoint.leave_within_s={LEAVE_WITHIN_S}", f"run_dir={run}"]


def test_failures_have_a_limit_and_sweeps_are_arrays(cluster, stand_in, tmp_path):
    runs = [tmp_path / "a b" / f"{i}_recipe.learning_rate={rate}" for i, rate in enumerate(("1e-3", "3e-4"))]
    for i, run in enumerate(runs):
        run.mkdir(parents=True)
        (run / "plan").write_text(["5 0\n", "5 1\n6 1\n7 1\n"][i])
    options = ["--multirun", "--max-restarts=1", *ON_CPU, f"--env=PATH={stand_in}:/usr/bin:/bin", "--"]
    job = _submit(cluster, *options, "recipe.learning_rate=1e-3,3e-4", f"run_dir={tmp_path}/a b")
    assert [_ended(cluster, f"{job}_{i}") for i in (0, 1)] == ["COMPLETED", "FAILED"]
    for run, rate in zip(runs, ("1e-3", "3e-4"), strict=True):
        (given, *_) = run.glob("arguments-*")
        assert f"recipe.learning_rate={rate}" in given.read_text().splitlines()
    assert "after --max-restarts=1" in (tmp_path / "a b" / "launch" / f"minimax-train-{job}_1.out").read_text()
    assert (runs[1] / "plan").read_text() == "7 1\n", "started twice"


def test_an_unfit_node_is_named_and_a_spare_takes_its_place(cluster, stand_in, tmp_path):
    """What a process may write on node2 is limited to 1 MB."""
    run = tmp_path / "run"
    (tmp_path / "given").mkdir()
    (stand_in / "minimax-launch").write_text(
        f"""#!/usr/bin/env bash
for argument in "$@"; do # of the second job, whose nodes have been looked at
  [[ $argument == --look=* && -v FOUND ]] && exec mkdir -p "${{argument#*=}}"
  [[ $argument == --compare=* && -v FOUND ]] && printf node2 >"${{argument#*=}}/unfit" && exit 1
done
[[ $SLURMD_NODENAME == node2 && "$*" == *--look=* ]] && ulimit -f 1024
exec {BIN}/minimax-launch "$1" ${{PART:-}} "${{@:2}}"
"""
    )
    (stand_in / "minimax-launch").chmod(stat.S_IRWXU)
    run.mkdir()
    (run / "plan").write_text("10 0\n")
    path = [f"--env=PATH={stand_in}:/usr/bin:/bin", "--env=PART=--slow=0.01"]  # three nodes on few cores
    given = [argument for argument in overrides(tmp_path / "given") if not argument.startswith("run_dir=")]
    options = ["--nodes=2", *ON_CPU, *path, "--preflight"]
    job = _submit(cluster, *options, "--spares=1", "--", *given, f"run_dir={run}")
    assert _ended(cluster, job) == "COMPLETED", _output(run) + cluster.logs()
    (found,) = (run / "launch" / f"preflight-{job}").iterdir()
    assert sorted(path.name for path in found.iterdir()) == ["node1.json", "node2.json", "node3.json", "unfit"]
    assert (found / "unfit").read_text() == "node2"
    assert re.search(r"^node2: run_dir=.*: cannot be written: .*File too large", _output(run), re.MULTILINE)
    assert "2 of 3 nodes are fit" in _output(run)
    nodes = cluster.run("sh", "-c", f"cat {run}/nodes-*").stdout.split()
    assert sorted(nodes) == ["node1", "node3"]
    # Without a spare nothing is started.
    job = _submit(cluster, *options, "--env=FOUND=", "--sbatch=--nodelist=node[1-2]", "--", *given, f"run_dir={run}")
    assert _ended(cluster, job) == "FAILED"
    assert "too few nodes are fit: 2 of 2 are needed; a job with --exclude=node2 gets others" in _output(run)


def test_a_saved_run_ends_with_3_though_its_processes_leave_at_different_times(cluster, stand_in, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "plan").write_text("10 3\n")
    script = [str(Path(launch.__file__).parent / "slurm.sbatch"), f"run_dir={run}"]
    options = ["--parsable", "--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1"]
    path = f"{stand_in}:{os.environ['PATH']}"
    job = cluster.run("sbatch", *options, f"--output={run}/out", *script, PATH=path).stdout.strip()
    assert _ended(cluster, job) == "FAILED"
    assert cluster.job(job)["ExitCode"] == "3:0", (run / "out").read_text()


def test_a_job_that_is_preempted_and_loses_a_node_trains_as_one_that_is_not(cluster, tmp_path):
    """The last test: the node stays lost."""
    settings = ["engine.precision=float64", "recipe.steps=120", "recipe.eval_interval=0", "logging.interval=1"]
    settings += ["checkpoint.interval=20"]
    run = tmp_path / "slurm" / "run"
    job = _submit(cluster, "--nodes=2", *ON_CPU, "--", *overrides(tmp_path / "slurm", *settings))
    cluster.wait(lambda: len(_losses(run)) >= 3, "steps")
    urgent = ["--nodes=3", "--partition=urgent", "--output=/dev/null", "--wrap=true"]
    cluster.run("sbatch", "--wait", *urgent)
    alone = Command(tmp_path, overrides(tmp_path / "alone", *settings))  # beside what Slurm waits for
    saved = int(re.search(r"SIGTERM after step (\d+)", _output(run))[1])
    assert saved < 120 and (run / "checkpoints" / f"step-{saved:08d}").is_dir(), _output(run)
    cluster.wait(lambda: max(_losses(run)) > max(20, saved), "steps after the pre-emption")
    nodes = cluster.job(job)["NodeList"]
    cluster.end_node("node2" if "2" in nodes else "node1")
    assert _ended(cluster, job) == "COMPLETED", _output(run) + cluster.logs()
    record, output = cluster.job(job), _output(run)
    assert record["Restarts"] == "2" and record["NodeList"] != nodes, record
    assert f"from step {saved}" in output and "DUE TO PREEMPTION" in output, output
    assert alone.finish(300).status == 0
    losses, expected = _losses(run), _losses(tmp_path / "alone" / "run")
    assert losses == pytest.approx(expected, rel=1e-10) and len(losses) == 120
