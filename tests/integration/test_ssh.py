"""The script multinode.sh over a real sshd: DeepSpeed's launcher and pdsh on two nodes."""

from __future__ import annotations

import signal
import socket
import subprocess
import time

import pytest
from daemons import need
from mini_ssh import PROGRAMS, Ssh
from tiny_project import OPTIONS, processes_with, read_metrics, wait_for_step

from stlm.training.distributed.ranks import free_port

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ssh(tmp_path_factory):
    need("openssh-server pdsh", *PROGRAMS, "pdsh")
    nodes = Ssh(tmp_path_factory.mktemp("ssh"))
    (nodes.daemons.folder / "deepspeed_env").write_text("OMP_NUM_THREADS=1\n")
    nodes.environment["DS_ENV_FILE"] = str(nodes.daemons.folder / "deepspeed_env")
    yield nodes
    nodes.stop()


@pytest.fixture
def multinode(ssh, project, tmp_path):
    """Return a function that starts scripts/multinode.sh for the tiny run; `hostfile` is the text of the hostfile."""

    def start(*options, hostfile="node1 slots=1\nnode2 slots=1\n"):
        (tmp_path / "hostfile").write_text(hostfile)
        command = ["bash", "scripts/multinode.sh", "--hostfile", tmp_path / "hostfile", *options]
        return subprocess.Popen(
            command, cwd=project, env=ssh.environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            start_new_session=True,
        )  # fmt: skip

    return start


def test_two_nodes_train_as_one(project, multinode, uninterrupted):
    port = free_port()
    process = multinode("--master_port", str(port), *OPTIONS, "--run", "runs/ssh")
    output, errors = process.communicate(timeout=400)
    assert process.returncode == 0, output + errors
    command = output.splitlines()[0]
    assert command.startswith("deepspeed --hostfile ")
    assert f"--launcher pdsh --master_addr 127.0.0.1 --master_port {port} {project}/scripts/pretrain.py" in command
    assert f"2 ranks on 2 nodes, started by deepspeed, meeting at 127.0.0.1:{port}" in output
    assert read_metrics(project / "runs/ssh") == uninterrupted


def test_the_end_of_the_command_is_the_end_of_the_ranks(project, multinode, uninterrupted):
    """They save first, and the rerun command resumes."""
    run = project / "runs/ssh-stopped"
    options = ("--master_port", str(free_port()), *OPTIONS, "--run", str(run))
    process = multinode(*options)
    wait_for_step(run, 20)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode != 0
    deadline = time.monotonic() + 60
    while left := processes_with(str(run)):
        assert time.monotonic() < deadline, left
        time.sleep(0.2)
    step = read_metrics(run)[-1]["step"]
    assert (run / f"checkpoints/step_{step:08d}/COMPLETE").is_file()

    process = multinode(*options)
    output, errors = process.communicate(timeout=400)
    assert process.returncode == 0, output + errors
    assert f"continuing from {run}/checkpoints/step_{step:08d}" in output
    assert read_metrics(run) == uninterrupted


@pytest.mark.parametrize(
    ("hostfile", "message"),
    [
        (
            "node1 slots=1\nnosuch.invalid slots=1\n",
            "nosuch.invalid cannot be reached: ssh: Could not resolve",
        ),
        ("node1 slots=1\n127.0.0.3 slots=1\n", "127.0.0.3 cannot be reached: ssh: connect to host 127.0.0.3 port"),
        ("node1 slots=1\nnode2 slot=1\n", ":2: got 'node2 slot=1', expected a name and its number of ranks"),
        ("node1 slots=1\nnode1 slots=1\n", ":2: node1 is listed twice"),
        ("# nothing\n", "hostfile lists no node"),
    ],
    ids=["unknown", "unreachable", "misspelt", "twice", "empty"],
)
def test_unusable_hostfiles_are_named(project, multinode, hostfile, message):
    process = multinode(*OPTIONS, "--run", "runs/none", hostfile=hostfile)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2, errors
    assert errors.count("error: ") == 1 and message in errors
    assert not (project / "runs/none").exists()


def test_a_port_in_use_is_named(project, multinode):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        process = multinode("--master_port", str(port), *OPTIONS, "--run", "runs/none")
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert errors == f"error: port {port} of node1 is in use, maybe by another run; choose another with --master_port\n"


def test_ranks_that_do_not_divide_the_batch_are_refused(project, multinode):
    options = ("--set", "training.batch_size=9", "--run", "runs/none")
    process = multinode("--master_port", str(free_port()), *OPTIONS, *options)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 2, errors
    (error,) = (line for line in (output + errors).splitlines() if "error: training" in line)
    assert "got 9 on 2 ranks, expected a multiple of the ranks; training.batch_size=8 or 10 would work" in error
    assert error.endswith("or 1 or 3 ranks")


def test_a_dry_run_contacts_no_node(project, multinode):
    process = multinode("--dry-run", *OPTIONS, hostfile="nosuch.invalid slots=8\n")
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert output.split()[:2] == ["deepspeed", "--hostfile"] and len(output.splitlines()) == 1
    assert "--master_addr nosuch.invalid" in output
