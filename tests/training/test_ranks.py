"""Ranks from the environments of launchers, and the division of batches among them."""

from __future__ import annotations

import sys

import pytest
from tiny_run import spawn

from stlm.config import TrainingConfig
from stlm.errors import ConfigError, EngineError
from stlm.training.distributed.agreement import code_files
from stlm.training.distributed.ranks import BatchSplit, Ranks, find_ranks, first_host

ADDRESS = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29501"}
OMPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
SLURM = {
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_STEP_NODELIST": "node[03-04]",
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "0",
}


def test_ranks_of_deepspeed_and_torchrun():
    env = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", **ADDRESS}
    assert find_ranks(env | {"LOCAL_SIZE": "2", "CROSS_SIZE": "2"}) == Ranks(1, 4, 1, 2, "10.0.0.1", 29501, "deepspeed")
    torchrun = find_ranks(env | {"LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "x", **OMPI})
    assert torchrun == Ranks(1, 4, 1, 2, "10.0.0.1", 29501, "torchrun")  # the nearer launcher counts
    assert str(torchrun) == "4 ranks on 2 nodes, started by torchrun, meeting at 10.0.0.1:29501"


def test_ranks_of_open_mpi():
    assert find_ranks(OMPI | ADDRESS) == Ranks(3, 4, 1, 2, "10.0.0.1", 29501, "Open MPI")
    here = OMPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "4", "PMIX_NAMESPACE": "1234"}
    assert find_ranks(here).address == "127.0.0.1"
    assert find_ranks(here).port == find_ranks(here | {"OMPI_COMM_WORLD_RANK": "0"}).port


def test_open_mpi_on_several_nodes_where_mpi4py_does_not_work(monkeypatch):
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(EngineError, match=r"mpi4py, but it does not work here .*`-x MASTER_ADDR"):
        find_ranks(OMPI)


def test_slurm_tasks_but_not_the_batch_script():
    found = find_ranks(SLURM)
    assert (found.rank, found.world_size, found.local_world_size, found.address) == (2, 4, 2, "node03")
    assert (
        found.port == find_ranks(SLURM | {"SLURM_PROCID": "0"}).port != find_ranks(SLURM | {"SLURM_JOB_ID": "78"}).port
    )
    one_node = SLURM | {"SLURM_STEP_TASKS_PER_NODE": "4", "SLURM_STEP_NODELIST": "node03"}
    assert find_ranks(one_node).address == "127.0.0.1"
    batch_script = {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_ID": "77"}
    assert find_ranks(batch_script).world_size == 1


@pytest.mark.parametrize(
    ("nodelist", "first"),
    [("n1,n2", "n1"), ("node[03-05,9],login", "node03"), ("gpu[7,9]-ib", "gpu7-ib"), ("a-b-1", "a-b-1")],
)
def test_the_first_host_of_a_list(nodelist, first):
    assert first_host(nodelist) == first


def test_a_process_without_a_launcher_is_one_rank():
    ranks = find_ranks({})
    assert (ranks.rank, ranks.world_size) == (0, 1)
    assert str(ranks) == "1 rank, started by python"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"WORLD_SIZE": None}, "without WORLD_SIZE"),
        ({"RANK": "4"}, "RANK=4 with WORLD_SIZE=4, expected 0 to 3"),
        ({"RANK": "one"}, "'one'"),
        ({"MASTER_PORT": "99999"}, "got the port 99999, expected 1 to 65535"),
    ],
)
def test_contradictions_are_named(change, message):
    env = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", **ADDRESS} | change
    with pytest.raises(EngineError, match=message):
        find_ranks({name: value for name, value in env.items() if value is not None})


def test_batches_are_shared_out():
    training = TrainingConfig(batch_size=24)
    assert BatchSplit.of(training, 1) == BatchSplit(24, 24, 1)
    assert BatchSplit.of(training, 3) == BatchSplit(8, 8, 1)
    assert BatchSplit.of(TrainingConfig(batch_size=24, micro_batch_size=2), 3) == BatchSplit(8, 2, 4)


def test_numbers_that_do_not_divide_name_those_that_would():
    with pytest.raises(ConfigError, match=r"batch_size=20 or 25 would work, or 4 or 6 ranks"):
        BatchSplit.of(TrainingConfig(batch_size=24), 5)
    with pytest.raises(ConfigError, match=r"8 rows of a rank .* 2 or 4 would work"):
        BatchSplit.of(TrainingConfig(batch_size=24, micro_batch_size=3), 3)


def test_the_code_of_both_packages_is_compared_between_nodes():
    names = {name for name, _ in code_files()}
    assert {"stlm/model/network.py", "stlm/training/trainer.py", "stlm/presets/quickstart.yaml"} <= names
    assert {"data_pipeline/loading/order.py", "stlm/__init__.py"} <= names


EXCHANGES = """
from stlm.errors import ConfigError
from stlm.training.distributed.connection import Distributed

first, second = Distributed.join(), Distributed.join()
for joined in (first, second, first):  # each reads its own messages, whoever exchanged some before
    assert joined.gather([joined.rank, id(joined) == id(first)]) == [[rank, joined is first] for rank in (0, 1)]
    assert joined.sum_over_ranks([1.0, joined.rank]) == [2.0, 1.0]
    assert joined.of_every_rank([joined.rank]) == [[0.0], [1.0]]


def fail():
    raise ConfigError("wrong")


for exchange, where in ((first.on_rank_zero, 0), (first.on_every_rank, 1)):
    try:
        exchange(fail if first.rank == where or where == 0 else lambda: None)
    except ConfigError as error:  # one rank reports it
        assert str(error).endswith("wrong") and first.reported_by_another(error) == (first.rank == 1)
        assert not second.reported_by_another(error)
    else:
        raise AssertionError
second.leave()
"""


def test_two_ranks_exchange_values_and_errors():
    processes = spawn([sys.executable, "-c", EXCHANGES], ranks=2)
    ends = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], ends
