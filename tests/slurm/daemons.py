"""A real Slurm of two nodes on this machine: munged, slurmctld and two slurmd on loopback, in a folder of their own.

Debian's packages slurm-wlm and munge are installed where they are missing and this is root; otherwise `Unavailable` says why not.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

PACKAGES = {"munged": "munge", "slurmctld": "slurmctld", "slurmd": "slurmd", "sbatch": "slurm-client"}
PATH = "/usr/local/sbin:/usr/sbin:/sbin"
NODES = ("n1", "n2")
CPUS = 4

CONFIGURATION = """
ClusterName=tests
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_min_interval=100000,bf_interval=1,sched_interval=1
SlurmdParameters=config_overrides
SlurmctldParameters=preempt_send_user_signal
ReturnToService=2
JobRequeue=1
KillWait=5
SlurmdTimeout=10
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
MinJobAge=300
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
JobAcctGatherType=jobacct_gather/none
{nodes}
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=60 State=UP PriorityTier=1 GraceTime=20
PartitionName=urgent Nodes=n1,n2 MaxTime=60 State=UP PriorityTier=2
"""


class Unavailable(Exception):
    """Why there can be no Slurm here."""


class Daemons:
    """The running daemons. Commands find them through the variable SLURM_CONF, see `environment`."""

    def __init__(self, folder: Path) -> None:
        if os.getuid() != 0:
            raise Unavailable("starting Slurm's daemons needs root")
        _install()
        self.folder = folder
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": f"{os.environ['PATH']}:{PATH}"}
        self._processes: list[subprocess.Popen[bytes]] = []
        self._nodes: dict[str, subprocess.Popen[bytes]] = {}
        try:
            self._start()
        except BaseException:
            self.stop()
            raise

    def _start(self) -> None:
        folder = self.folder
        controller, *ports = _free_ports(1 + len(NODES))
        nodes = [
            f"NodeName={name} NodeHostname=localhost NodeAddr=127.0.0.1 Port={port} CPUs={CPUS} RealMemory=4000 State=UNKNOWN"
            for name, port in zip(NODES, ports, strict=True)
        ]
        (folder / "slurm.conf").write_text(CONFIGURATION.format(controller_port=controller, folder=folder, nodes="\n".join(nodes)))
        (folder / "cgroup.conf").write_text("")
        for name in ("state", *(f"spool-{node}" for node in NODES)):
            (folder / name).mkdir()
        key = folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(1024))
        names = {"socket": "munge.socket", "key-file": "munge.key", "pid-file": "munged.pid", "log-file": "munged.log", "seed-file": "seed"}
        options = [f"--{option}={folder / name}" for option, name in names.items()]
        # --force: its folder may be below one that others can write to, as /tmp is.
        self._run("munged", "--foreground", "--force", "--num-threads=1", *options)
        self._until("munged", (folder / "munge.socket").exists)
        self._run("slurmctld", "-D")
        for node in NODES:
            self.start_node(node)
        self._until("the nodes", lambda: self.call("sinfo", "--noheader", "--partition=main", "--format=%D %t").split() == ["2", "idle"])

    def start_node(self, node: str) -> None:
        """Start the slurmd of a node."""
        self._nodes[node] = self._run("slurmd", "-D", "-N", node)

    def lose_node(self, node: str) -> None:
        """Kill a node's slurmd, its steps and their tasks, as a power cut does: the steps first, which would report the tasks' end."""
        slurmd = self._nodes[node]
        slurmd.kill()
        slurmd.wait()
        self._processes.remove(slurmd)
        steps, tasks = [], []
        log = str(self.folder / f"slurmd-{node}.log")
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError, ValueError):
                if (entry / "comm").read_text().startswith("slurmstepd"):
                    steps += [int(entry.name)] if log in [os.readlink(file) for file in (entry / "fd").iterdir()] else []
                elif f"SLURMD_NODENAME={node}\0".encode() in (entry / "environ").read_bytes():
                    tasks.append(int(entry.name))
        for pid in [*steps, *tasks]:
            with contextlib.suppress(ProcessLookupError):  # a task may end by itself meanwhile
                os.kill(pid, signal.SIGKILL)

    def _run(self, name: str, *arguments: str) -> subprocess.Popen[bytes]:
        with open(self.folder / f"{name}-output.log", "ab") as log:
            command = [_found(name) or name, *arguments]
            self._processes.append(subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | self.environment))
        return self._processes[-1]

    def _until(self, what: str, condition: Callable[[], bool], seconds: float = 60.0) -> None:
        end = time.monotonic() + seconds
        while not condition():
            dead = [process.args for process in self._processes if process.poll() is not None]
            if dead or time.monotonic() > end:
                logs = [line for log in sorted(self.folder.glob("*.log")) for line in log.read_text(errors="replace").splitlines()[-3:]]
                raise Unavailable(f"Slurm's daemons did not start ({what}): {dead or 'timed out'}: {' | '.join(logs)}")
            time.sleep(0.1)

    def call(self, *command: str) -> str:
        """What one of Slurm's commands prints; nothing where it fails."""
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | self.environment, check=False)
        return done.stdout

    def stop(self) -> None:
        """Cancel what runs, and end the daemons."""
        if len(self._processes) > 1:
            self.call("scancel", "--full", "--user=root")
            end = time.monotonic() + 15
            while self.call("squeue", "--noheader") and time.monotonic() < end:
                time.sleep(0.2)
        for process in reversed(self._processes):
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _found(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ['PATH']}:{PATH}")


def _install() -> None:
    """Install what is missing from Debian's packages."""
    missing = sorted({package for command, package in PACKAGES.items() if _found(command) is None})
    if not missing:
        return
    if shutil.which("apt-get") is None:
        raise Unavailable(f"there is no apt-get to install {', '.join(missing)} with")
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    for words in (["update", "-qq"], ["install", "-qq", "--yes", "--no-install-recommends", *missing]):
        done = subprocess.run(["apt-get", *words], capture_output=True, text=True, env=environment, timeout=300, check=False)
        if done.returncode:
            said = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise Unavailable(f"apt-get {words[0]} failed: {said}")


def _free_ports(number: int) -> list[int]:
    """Ports that nobody listens at, of those that no outgoing connection is given."""
    sockets = [socket.socket() for _ in range(number)]
    ports: list[int] = []
    candidates = iter(range(20000 + os.getpid() % 10000, 32000))
    for opened in sockets:
        for port in candidates:
            try:
                opened.bind(("127.0.0.1", port))
            except OSError:
                continue
            ports.append(port)
            break
    for opened in sockets:
        opened.close()
    return ports
