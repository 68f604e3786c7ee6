"""Open MPI itself: mpirun on one node, on two by ssh, and under DeepSpeed's launcher."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from daemons import need
from mini_ssh import PROGRAMS, Ssh
from tiny_project import OPTIONS, read_metrics

from stlm.training.distributed.ranks import free_port

pytestmark = pytest.mark.slow

# Works anywhere: as root, with more ranks than cores, over the loopback network.
SETTINGS = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_rmaps_base_oversubscribe": "1",
    "OMPI_MCA_hwloc_base_binding_policy": "none",
    "OMPI_MCA_btl_tcp_if_include": "lo",
    "OMPI_MCA_oob_tcp_if_include": "lo",
}


@pytest.fixture(scope="module")
def ssh(tmp_path_factory):
    need("openmpi-bin openssh-server", "mpirun", *PROGRAMS)
    nodes = Ssh(tmp_path_factory.mktemp("ssh"))
    folder = nodes.daemons.folder
    (folder / "hostfile").write_text("node1 slots=1\nnode2 slots=1\n")
    (folder / "deepspeed_env").write_text("OMP_NUM_THREADS=1\n")
    nodes.environment |= SETTINGS | {"DS_ENV_FILE": str(folder / "deepspeed_env")}
    yield nodes
    nodes.stop()


@pytest.fixture
def run(ssh, project):
    """Return a function that runs a command in the project's folder to its end and returns its output."""

    def run(*command, expect=0):
        result = subprocess.run(
            command, cwd=project, env=ssh.environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            timeout=400,
        )  # fmt: skip
        assert result.returncode == expect, result.stdout
        return result.stdout

    return run


def test_mpirun_on_one_node(run, project, uninterrupted):
    output = run("mpirun", "-n", "2", sys.executable, "scripts/pretrain.py", *OPTIONS, "--run", "runs/mpi")
    assert "2 ranks on 1 node, started by Open MPI, meeting at 127.0.0.1:" in output
    assert read_metrics(project / "runs/mpi") == uninterrupted


def test_mpirun_on_two_nodes_that_find_each_other_by_mpi4py(run, project, ssh, uninterrupted):
    """Only mpi4py tells the ranks the address of rank 0."""
    mpirun = ["mpirun", "-n", "2", "--hostfile", ssh.daemons.folder / "hostfile", "-x", "OMP_NUM_THREADS"]
    output = run(*mpirun, sys.executable, "scripts/pretrain.py", *OPTIONS, "--run", "runs/mpi4py")
    assert re.search(r"2 ranks on 2 nodes, started by Open MPI, meeting at [\d.]+:\d+;", output)
    assert read_metrics(project / "runs/mpi4py") == uninterrupted


def test_deepspeed_on_two_nodes_by_mpirun(run, project, ssh, uninterrupted):
    port = free_port()
    multinode = ["bash", "scripts/multinode.sh", "--hostfile", ssh.daemons.folder / "hostfile"]
    output = run(*multinode, "--launcher", "openmpi", f"--master_port={port}", *OPTIONS, "--run", "runs/openmpi")
    assert f"2 ranks on 2 nodes, started by Open MPI, meeting at 127.0.0.1:{port};" in output
    assert read_metrics(project / "runs/openmpi") == uninterrupted


def test_a_user_error_ends_mpirun_with_2(run, project):
    mistake = ("--set", "training.batch_size=9", "--run", "runs/none")
    output = run("mpirun", "-n", "2", sys.executable, "scripts/pretrain.py", *OPTIONS, *mistake, expect=2)
    (error,) = (line for line in output.splitlines() if line.startswith("error: "))
    assert "got 9 on 2 ranks, expected a multiple of the ranks; training.batch_size=8 or 10 would work" in error
