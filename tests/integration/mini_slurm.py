"""A Slurm cluster of two nodes on this machine: munged, slurmctld and two slurmd, in one folder, as any user.

Both nodes claim four cores, whatever the machine has."""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import time
from pathlib import Path

from daemons import Daemons, wait_until

from stlm.training.distributed.ranks import free_port

NODES = ("127.0.0.1", "127.0.0.2")  # names that resolve on every machine
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")

CONFIG = """
ClusterName=mini
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_interval=2
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
"""


class Slurm:
    """The cluster, from construction to `stop`. Requeued jobs wait five seconds (cred_expire), not two minutes."""

    def __init__(self, folder: Path) -> None:
        self.daemons = Daemons(folder)
        user = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
        host = socket.gethostname().partition(".")[0]
        lines = [CONFIG.format(host=host, port=free_port(), user=user, folder=folder)]
        for node in NODES:
            address = f"NodeName={node} NodeHostname={host} NodeAddr={node} Port={free_port()}"
            lines.append(f"{address} CPUs=4 RealMemory=1000 State=UNKNOWN\n")
        (folder / "slurm.conf").write_text("".join(lines))
        (folder / "state").mkdir()
        (folder / "munge.key").write_bytes(secrets.token_bytes(128))
        (folder / "munge.key").chmod(0o600)
        folder.chmod(0o755)
        self.environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}

        files = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munged.pid", "seed-file": "munge.seed"}
        options = [f"--{option}={folder / file}" for option, file in files.items()]
        # --force: parent folders may be writable by others, as those for temporary files are.
        self.daemons.start("munged", "--foreground", "--force", *options)
        wait_until(lambda: (folder / "munge.socket").exists(), "munged", self.daemons)
        self.daemons.start("slurmctld", "-D", environment=self.environment)
        for node in NODES:
            self.daemons.start("slurmd", "-D", "-N", node, environment=self.environment)
        wait_until(lambda: self.run("sinfo", "-h", "-o", "%D %t").split() == ["2", "idle"], "two nodes", self.daemons)

    def run(self, *command: str | Path) -> str:
        """Return the output of one of Slurm's commands; empty if it failed."""
        return subprocess.run(command, env=self.environment, stdout=subprocess.PIPE, text=True).stdout

    def submit(self, folder: Path, *arguments: str | Path) -> str:
        """Submit a job that starts in `folder`, and return its number."""
        command = ["sbatch", "--parsable", "--chdir", folder, *arguments]
        result = subprocess.run(command, env=self.environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return result.stdout.strip()

    def state(self, job: str) -> dict[str, str]:
        """Return the fields that scontrol reports for a job: JobState, Restarts, ExitCode, …"""
        words = self.run("scontrol", "show", "job", "--oneliner", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_for(self, job: str, *states: str, timeout_s: float = 180) -> dict[str, str]:
        """Wait until the job is in one of the states, and return its fields."""
        wait_until(lambda: self.state(job).get("JobState") in states, f"job {job} {states}", self.daemons, timeout_s)
        return self.state(job)

    def stop(self) -> None:
        for job in self.run("squeue", "-h", "-o", "%i").split():
            self.run("scancel", job)
        time.sleep(1)
        self.daemons.stop()
