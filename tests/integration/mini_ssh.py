"""Two nodes that are this machine: a sshd of our own, which answers on 127.0.0.1 and 127.0.0.2, as any user.

`ssh node1` works with `environment`: the first ssh on its PATH knows the names and the key.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from daemons import Daemons, wait_until

from stlm.training.distributed.ranks import free_port

NODES = {"node1": "127.0.0.1", "node2": "127.0.0.2"}
PROGRAMS = ("sshd", "ssh", "ssh-keygen")

SERVER = """
Port {port}
{addresses}
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/authorized_keys
StrictModes no
UsePAM no
PermitRootLogin prohibit-password
PasswordAuthentication no
PidFile none
"""
CLIENT = """
Host *
  Port {port}
  IdentityFile {folder}/key
  IdentitiesOnly yes
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
"""


class Ssh:
    """The nodes; they live from construction to `stop`."""

    def __init__(self, folder: Path) -> None:
        self.daemons = Daemons(folder)
        for key in ("host_key", "key"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / key], check=True)
        shutil.copy(folder / "key.pub", folder / "authorized_keys")
        port = free_port()
        addresses = "\n".join(f"ListenAddress {address}" for address in NODES.values())
        (folder / "sshd_config").write_text(SERVER.format(port=port, addresses=addresses, folder=folder))
        hosts = [f"Host {node}\n  HostName {address}\n" for node, address in NODES.items()]
        (folder / "ssh_config").write_text("".join(hosts) + CLIENT.format(port=port, folder=folder))
        (folder / "bin").mkdir()
        ssh = folder / "bin/ssh"
        ssh.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {folder}/ssh_config "$@"\n')
        ssh.chmod(0o755)
        self.environment = os.environ | {"PATH": f"{folder}/bin{os.pathsep}{os.environ['PATH']}"}

        if os.geteuid() == 0:
            Path("/run/sshd").mkdir(exist_ok=True)  # a sshd of root needs this folder
        self.daemons.start("sshd", "-D", "-e", "-f", folder / "sshd_config")
        wait_until(lambda: all(self.answers(node) for node in NODES), "answer from sshd", self.daemons)

    def answers(self, node: str) -> bool:
        return subprocess.run(["ssh", node, "true"], env=self.environment, stderr=subprocess.DEVNULL).returncode == 0

    def stop(self) -> None:
        self.daemons.stop()
