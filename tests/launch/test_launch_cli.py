"""``minimax-launch`` before anything is started: what it refuses, and the script it writes."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from minimax_train.launch import cli
from minimax_train.launch.cli import main
from minimax_train.launch.slurm import LEAVE_WITHIN_S, WARNING_S


def _script(capsys, *arguments):
    assert main(["slurm", "--dry-run", *arguments]) == 0
    return capsys.readouterr().out


def _directives(script):
    return [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH")]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--nodes=0"], "--nodes: '0': must be an integer between 1 and 100000"),
        (["--nodes=1e3"], "--nodes: '1e3': must be an integer"),
        (["--gpus-per-node=many"], "--gpus-per-node: 'many': must be an integer between 0 and 1000"),
        (["--time=3h"], "--time: '3h': must be minutes, HH:MM:SS or days-hours"),
        (["--partition=a b"], "--partition: 'a b': must be a name without spaces"),
        (["--env=1A=b"], "--env: '1A=b': must be NAME=VALUE"),
        (["--sbatch=qos=high"], "--sbatch: 'qos=high': must be an option of sbatch, such as --sbatch=--qos=high"),
        (["--sbatch=--qos=high\nrm -r /"], "--sbatch: '--qos=high\\nrm -r /': must be an option"),
        (["--spares=1"], "--spares=1: needs --preflight"),
        (["--exclude=a b"], "--exclude: 'a b': must be names of nodes as Slurm lists them"),
        (["--container-mounts=/a:/b"], "--container-mounts='/a:/b': needs --container"),
        (["--node=2"], "unrecognized arguments: --node=2; --help"),
        (["model=tiny"], "unrecognized arguments: model=tiny; options come before --, overrides after it; --help"),
        (
            ["--", "--nodes=2"],
            "--nodes=2: must be an override (key=value) or --config-dir; other options come before --",
        ),
        (["--", "recipe.stps=1"], "Did you mean recipe.steps?"),
        (["--nodes=3", "--", "model=tiny"], "--nodes=3 --gpus-per-node=8: 24 processes: recipe.global_batch_size=8: "),
        (["--", "model=tiny", "checkpoint.resume=never"], "checkpoint.resume='never': must be auto"),
        (["--gpus-per-node=1", "--", "model=tiny", 'run_dir=a"b'], "must not hold quotes"),
        (["--multirun", "--", "model=tiny"], "--multirun: needs an override with several values"),
        (["--gpus-per-node=1", "--multirun", "--", "seed=1,-1"], "seed=-1"),
        (["--multirun", "--", f"seed={','.join(map(str, range(1001)))}"], "1001 combinations of values; at most 1000"),
    ],
)
def test_refused_in_one_line(capsys, arguments, error):
    try:
        status = main(["slurm", "--dry-run", *arguments])
    except SystemExit as end:
        status = end.code
    told = capsys.readouterr()
    assert status == 2 and told.out == ""
    assert told.err.startswith("error: ") and told.err.count("\n") == 1 and error in told.err


@pytest.mark.parametrize("arguments", [["--nproc-per-node=2", "model=tiny"], ["model=tiny", "--preflight"]])
def test_options_of_torchrun_without_the_dashes_that_end_them(capsys, arguments):
    assert main(["local", *arguments]) == 2
    (option,) = (each for each in arguments if each.startswith("-"))
    assert capsys.readouterr().err == f"error: {option}: options come before --, overrides after it\n"


def test_a_script_says_what_was_asked(capsys, tmp_path):
    name = f"{tmp_path}/100% of $HOME's"
    options = [
        "--nodes=2",
        "--gpus-per-node=4",
        "--time=1-12",
        "--partition=h100,h200",
        "--account=lab",
        "--job-name=a.b",
    ]
    options += [
        "--sbatch=--qos=high",
        "--env=NCCL_DEBUG=WARN",
        "--env=WHAT=it's $HOME",
        "--container=nvcr.io#nvidia/pytorch",
    ]
    options += ["--container-mounts=/data:/data", "--max-restarts=7"]
    script = _script(capsys, *options, "--", "model=tiny", "recipe.global_batch_size=32", f"run_dir={name}")
    escaped = name.replace("%", "%%")
    expected = ["--job-name=a.b", "--nodes=2", "--ntasks-per-node=4", "--gpus-per-node=4", "--cpus-per-task=8"]
    expected += ["--time=1-12", "--partition=h100,h200", "--account=lab", "--signal=USR1@120", "--qos=high"]
    expected += [f'--output="{escaped}/launch/a.b-%j.out"', "--open-mode=append", "--requeue"]
    assert sorted(_directives(script)) == sorted(expected)
    assert "max_restarts=7 " in script and "@" not in script.replace("USR1@120", "").replace("[@]}", "").replace(
        '"$@"', ""
    )
    # What bash makes of it: the words that srun would get.
    folder = tmp_path / "tools"
    folder.mkdir()
    (folder / "srun").write_text(f'#!/bin/bash\nprintf "%s\\0" "$@" "$WHAT" >{folder}/words; exit 2\n')
    (folder / "srun").chmod(0o700)
    environment = {"PATH": f"{folder}:{os.environ['PATH']}", "SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "n"}
    environment["SLURM_NTASKS_PER_NODE"] = "4"
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, timeout=20)
    assert done.returncode == 2, done.stderr
    words = (folder / "words").read_text().split("\0")[:-1]
    container = ["--container-image=nvcr.io#nvidia/pytorch", f"--container-mounts={name}:{name},/data:/data"]
    assert words[:5] == ["--nodes=2", "--ntasks=8", "--kill-on-bad-exit=1", *container]
    resume = ["checkpoint.resume=auto", f"checkpoint.leave_within_s={LEAVE_WITHIN_S}"]
    assert words[8:-1] == ["minimax-train", *resume, "model=tiny", "recipe.global_batch_size=32", f"run_dir={name}"]
    assert words[-1] == "it's $HOME"
    assert LEAVE_WITHIN_S + 3 < WARNING_S, "the 3 s that a process waits which has saved"


@pytest.mark.parametrize(
    ("image", "options", "words"),
    [
        ("/images/a b.sif", [], ["apptainer", "exec", "--nv", "--bind=RUN:RUN", "/images/a b.sif", "bash"]),
        (
            "docker://lab/x:1",
            ["--gpus-per-node=0"],
            ["apptainer", "exec", "--bind=RUN:RUN", "docker://lab/x:1", "bash"],
        ),
        ("/images/x.sqsh", [], ["--container-image=/images/x.sqsh", "--container-mounts=RUN:RUN", "bash"]),
    ],
)
def test_images_run_by_what_reads_them(capsys, tmp_path, image, options, words):
    run = ["recipe.global_batch_size=32", f"run_dir={tmp_path}"]
    script = _script(capsys, f"--container={image}", *options, "--", *run)
    lines = script.replace("\\\n", " ").splitlines()
    (start,) = (shlex.split(line) for line in lines if 'bash -c "$task"' in line)
    at = start.index("--kill-on-bad-exit=1") + 1
    assert start[at : at + len(words)] == [word.replace("RUN", str(tmp_path)) for word in words]
    assert "/.venv/bin" not in script, "the image has its own"


def test_sweeps_split_at_commas_outside_brackets_and_quotes(capsys, tmp_path):
    sweep = [
        "recipe.adam_beta1=0.8,0.9",
        "data.train_files=[a.jsonl,'b,c'],[d]",
        "data=files",
        f"run_dir={tmp_path}/x,y",
    ]
    script = _script(capsys, "--multirun", "--gpus-per-node=0", "--", *sweep, "data.format=json")
    runs = [line.strip() for line in script.splitlines() if " overrides+=(" in line]
    values = [(beta, files) for beta in ("0.8", "0.9") for files in ("[a.jsonl,'b,c']", "[d]")]
    for i, (line, (beta, files)) in enumerate(zip(runs, values, strict=True)):
        given = [f"recipe.adam_beta1={beta}", f"data.train_files={files}"]
        assert f"overrides+=({shlex.join(given)}) ;;" in line and f"{i}) run_dir=$run_dir/{i}_" in line
    assert "--array=0-3" in _directives(script) and f"run_dir={tmp_path}/x,y" in script


def test_nothing_is_written_where_there_is_no_slurm(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert main(["slurm", "--gpus-per-node=0", "--", "model=tiny", f"run_dir={tmp_path}/run"]) == 2
    assert "sbatch is not on the PATH" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_local_is_torchrun_that_continues(monkeypatch):
    started = []
    monkeypatch.setattr(os, "execvpe", lambda *arguments: started.append(arguments))
    main(["local", "--max-restarts=3", "--", "model=tiny", "run_dir=a b"])
    main(["local", "model=tiny"])
    for (name, command, environment), given in zip(
        started, (["--max-restarts=3", "--", "model=tiny", "run_dir=a b"], ["--", "model=tiny"]), strict=True
    ):
        at = given.index("--") + 1
        assert name == "bash" and command == [
            "bash",
            str(cli.SCRIPT),
            *given[:at],
            "checkpoint.resume=auto",
            *given[at:],
        ]
        assert environment["PATH"].startswith(str(Path(sys.executable).parent))
