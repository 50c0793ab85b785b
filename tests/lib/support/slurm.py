"""A Slurm cluster on this machine: real daemons, each node with network, hostname and processes of its own.

Linux namespaces keep the nodes apart: they meet over a bridge, see no other's processes, and have no name in common.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path

TOOLS = ("slurmctld", "slurmd", "munged", "sbatch", "unshare", "nsenter", "setpriv", "ip")
NODES = ("node1", "node2", "node3")
CONF = """
ClusterName=test
SlurmctldHost=control
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=5
KillWait=15
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,bf_interval=1,sched_interval=1,sched_min_interval=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=node[1-3] CPUs=1
PartitionName=batch Nodes=ALL Default=YES PriorityTier=1
PartitionName=urgent Nodes=ALL PriorityTier=2
"""
# $1: folder. As process 1, each of the shells waits for those that lose their parent.
CONTROL = """
set -e
mount -t tmpfs none /run
mount --bind "$1/hosts" /etc/hosts
hostname control
ip link set lo up
ip link add bridge type bridge
ip addr add 10.0.0.254/24 dev bridge
ip link set bridge up
munged --force --socket="$1/munge.sock" --key-file="$1/munge.key" --pid-file="$1/munged.pid" \
  --log-file="$1/munged.log" --seed-file="$1/munge.seed"
slurmctld -D -c -f "$1/slurm.conf" &
for i in 1 2 3; do
  ip netns add node$i
  ip link add veth$i master bridge up type veth peer name eth0 netns node$i
  ip -n node$i addr add 10.0.0.$i/24 dev eth0
  ip -n node$i link set eth0 up
  ip -n node$i link set lo up
  nsenter --net=/run/netns/node$i unshare --mount --uts --pid --fork --kill-child --mount-proc bash -c \
    "hostname node$i; slurmd -D -f $1/slurm.conf & while :; do wait; sleep 1; done" &
  echo $! >"$1/node$i.pid"
done
set +e
while :; do wait; sleep 1; done
"""


def missing() -> str:
    """Why there can be no cluster here, or nothing."""
    absent = [
        tool for tool in TOOLS if shutil.which(tool, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin") is None
    ]
    if absent:
        return f"{', '.join(absent)} not installed (make slurm)"
    links = "ip link add bridge type bridge && ip link add veth0 type veth peer name veth1"
    isolated = ["unshare", "--net", "--mount", "--uts", "--pid", "--fork", "bash", "-c", links]
    if subprocess.run(isolated, capture_output=True).returncode:
        return "namespaces and links for the nodes of a Slurm cluster need root"
    return ""


class Cluster:
    """Three nodes, their controller and munge; ended by :meth:`close`, or with this process."""

    def __init__(self, folder: Path) -> None:
        self._environment = {**os.environ, "SLURM_CONF": f"{folder}/slurm.conf", "OMP_NUM_THREADS": "1"}
        self._environment["PATH"] += ":/usr/sbin:/sbin"
        self.folder = folder
        folder.chmod(0o755)  # munged takes no socket in a folder that others cannot enter
        (folder / "state").mkdir()
        for name in NODES:
            (folder / f"spool-{name}").mkdir()
        (folder / "slurm.conf").write_text(CONF.format(folder=folder))
        hosts = "".join(f"10.0.0.{i} node{i}\n" for i in (1, 2, 3))
        (folder / "hosts").write_text(f"127.0.0.1 localhost\n10.0.0.254 control\n{hosts}")
        (folder / "munge.key").write_bytes(os.urandom(1024))
        (folder / "munge.key").chmod(0o600)
        isolated = ["unshare", "--net", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
        command = ["setpriv", "--pdeathsig", "KILL", *isolated, "bash", "-c", CONTROL, "bash", str(folder)]
        with open(folder / "daemons.log", "w") as log:
            self._process = subprocess.Popen(command, env=self._environment, stdout=log, stderr=log)
        self.wait(
            lambda: self.run("sinfo", "-h", "-o", "%D %T", check=False).stdout.split() == ["3", "idle"], "nodes", 60
        )

    def run(self, *command: str, check: bool = True, **variables: str) -> subprocess.CompletedProcess[str]:
        """A command on the controller's machine."""
        into = ["nsenter", f"--target={self._inside()}", "--net", "--mount", "--uts", "--pid", f"--wd={Path.cwd()}"]
        environment = {**self._environment, **variables}
        told = subprocess.run([*into, *command], env=environment, capture_output=True, text=True, timeout=180)
        assert not check or told.returncode == 0, f"{command}: {told.returncode}\n{told.stdout}\n{told.stderr}"
        return told

    def job(self, job: str) -> Mapping[str, str]:
        """Slurm's record of a job."""
        shown = self.run("scontrol", "show", "job", "-o", job).stdout
        return dict(field.split("=", 1) for field in shown.split() if "=" in field)

    def end_node(self, name: str) -> None:
        """Kill all of a node's processes, its slurmd among them, at once."""
        self.run("kill", "-KILL", (self.folder / f"{name}.pid").read_text().strip())

    def wait(self, until: Callable[[], bool], what: str, timeout_s: float = 200) -> None:
        deadline = time.monotonic() + timeout_s
        while not until():
            assert time.monotonic() < deadline, f"{what}: not after {timeout_s} s\n{self.logs()}"
            time.sleep(0.1)

    def logs(self) -> str:
        queue = self.run("squeue", "--states=all", "--long", check=False).stdout
        tails = [f"== {path.name}\n{path.read_text()[-3000:]}" for path in sorted(self.folder.glob("*.log"))]
        return "\n".join([queue, *tails])

    def close(self) -> None:
        self._process.kill()
        self._process.wait()

    def _inside(self) -> str:
        """The first process in the namespaces."""
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children")
        while not children.read_text():
            assert self._process.poll() is None, (self.folder / "daemons.log").read_text()
            time.sleep(0.01)
        return children.read_text().split()[0]
