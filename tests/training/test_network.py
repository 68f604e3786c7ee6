"""Network access of ranks: the sockets they open, and the messages they accept, which hold data and never code."""

from __future__ import annotations

import ast
import os
import pickle
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tiny_run import ROOT, listening, spawn, wait_for_step

from data_pipeline.errors import DataError
from stlm.errors import CheckpointError, NonFinite, StlmError, Stopped
from stlm.training.distributed.messages import decode, describe_error, encode, error_of
from stlm.training.distributed.ranks import Ranks
from stlm.training.distributed.rendezvous import init_method

LONG = ("--set", "training.max_steps=100000", "training.save_every_steps=100000")

# ---------------------------------------------------------------------- no pickles


PICKLING = {
    "broadcast_object_list", "all_gather_object", "gather_object", "scatter_object_list", "send_object_list",
    "recv_object_list",
}  # fmt: skip
SERIALIZERS = {"pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
HARMLESS = {"UnpicklingError", "PicklingError"}  # names of errors
# mpi4py's methods in lower case send pickles; these are the ones that occur on no other objects.
MPI = {"bcast", "allgather", "isend", "irecv", "sendrecv", "alltoall", "allreduce", "iprobe"}


def unsafe(tree: ast.Module) -> list[str]:
    """Return the names with which a module reads or writes pickles."""
    found = []
    modules = set()
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                modules |= {alias.asname or alias.name for alias in names if alias.name in SERIALIZERS}
            case ast.ImportFrom(module=module, names=names) if module in SERIALIZERS:
                found += [f"{module}.{alias.name}" for alias in names if alias.name not in HARMLESS]
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=ast.Name(id=name), attr=attr) if name in modules and attr not in HARMLESS:
                found.append(f"{name}.{attr}")
            case ast.Attribute(attr=attr) if attr in PICKLING:
                found.append(attr)
            case ast.ImportFrom(names=names):
                found += [alias.name for alias in names if alias.name in PICKLING]
            case ast.Call(func=ast.Attribute(value=owner, attr="load"), keywords=words) if (
                ast.unparse(owner) == "torch"
            ):
                if not any(word.arg == "weights_only" and ast.unparse(word.value) == "True" for word in words):
                    found.append("torch.load without weights_only=True")
            case ast.Call(func=ast.Attribute(value=owner, attr=attr)) if attr in MPI and "dist" not in (
                ast.unparse(owner)
            ):
                found.append(f"{ast.unparse(owner)}.{attr}")
            case ast.keyword(arg="allow_pickle", value=ast.Constant(value=True)):
                found.append(node.arg)
    return found


@pytest.mark.parametrize("package", ["stlm", "data_pipeline", "scripts", "benchmarks"])
def test_nothing_reads_or_writes_pickles(package):
    for path in sorted((ROOT / package).rglob("*.py")):
        assert unsafe(ast.parse(path.read_text(encoding="utf-8"))) == [], path


@pytest.mark.parametrize(
    "code",
    [
        "import pickle\npickle.loads(b'')",
        "from pickle import loads",
        "import torch.distributed as dist\ndist.broadcast_object_list([1])",
        "from torch.distributed import all_gather_object",
        "import torch\ntorch.load('x')",
        "import torch\ntorch.load('x', weights_only=False)",
        "comm.bcast(1)",
        "import numpy\nnumpy.load('x', allow_pickle=True)",
    ],
)
def test_pickles_are_found(code):
    assert unsafe(ast.parse(code)) != []


# ---------------------------------------------------------------------- messages


def test_messages_restore_their_values():
    value = {"a": [1, 2.5, None, True, "ü\udcff"], "b": (Path("runs/x"), float("inf"), [])}
    assert decode(encode(value)) == value
    tensors = {"x": torch.arange(6).view(2, 3).T, "y": torch.tensor([1.5], dtype=torch.bfloat16)}
    back, number = decode(encode((tensors, 3)))
    assert number == 3
    assert back.keys() == tensors.keys() and all(torch.equal(back[name], tensors[name]) for name in tensors)
    for refused in (object(), {1: 2}, Ranks(0, 1, 0, 1, "", 0, ""), b"", CheckpointError("x")):
        with pytest.raises(TypeError, match="ranks exchange plain values"):
            encode([refused])


def test_messages_run_no_code():
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(Path("exploded").absolute()),)

    with pytest.raises(ValueError):
        decode(pickle.dumps(Bomb()))
    assert not Path("exploded").exists()


@pytest.mark.parametrize("error", [CheckpointError("a"), DataError("b"), Stopped("c"), NonFinite("d")])
def test_errors_are_reported_by_name(error):
    told = error_of(decode(encode(describe_error(error))))
    assert (type(told), str(told), told.exit_code) == (type(error), str(error), error.exit_code)


def test_errors_of_other_classes_become_stlm_errors():
    told = error_of(describe_error(KeyError("key")))
    assert (type(told), str(told), told.exit_code) == (StlmError, "KeyError: 'key'", 1)
    for name in ("SystemExit", "Popen", "os.system"):
        told = error_of({"name": name, "message": "x", "exit_code": 2})
        assert (type(told), told.exit_code) == (StlmError, 2)


# ---------------------------------------------------------------------- sockets


def test_one_rank_opens_no_socket(pretrain, tmp_path):
    (process,) = pretrain.start(tmp_path / "run", *LONG, stage=2)
    try:
        wait_for_step(tmp_path / "run", 3, [process])
        assert listening(process.pid) == []
    finally:
        process.send_signal(signal.SIGTERM)
        output = process.communicate(timeout=60)
    assert process.returncode == 3, output


# Runs pretrain.py with torch's collectives of Python objects replaced by errors, as each of them reads a pickle.
WITHOUT_OBJECTS = f"""
import runpy, sys
import torch.distributed as dist
def refuse(*_, **__):
    raise AssertionError("a collective of Python objects was called")
for module in (dist, dist.distributed_c10d):
    for name in {sorted(PICKLING)}:
        setattr(module, name, refuse)
sys.argv = sys.argv[1:]
sys.path.insert(0, {str(ROOT / "scripts")!r})
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("stage", [2, 3])
def test_two_ranks_listen_on_loopback_and_exchange_no_objects(data_dir, config_file, tmp_path, stage):
    command = [
        sys.executable, "-c", WITHOUT_OBJECTS, str(ROOT / "scripts/pretrain.py"), "--config", str(config_file),
        "--ds_config", str(ROOT / f"ds_configs/zero{stage}.json"), "--data", str(data_dir),
        "--run", str(tmp_path / "run"), *LONG,
    ]  # fmt: skip
    processes = spawn(command, 2)
    try:
        wait_for_step(tmp_path / "run", 7, processes)  # beyond the first validation
        addresses = [listening(process.pid) for process in processes]
        assert all(address.is_loopback for of_one in addresses for address in of_one), addresses
        assert len(addresses[0]) > 1  # the store, and the sockets of gloo
    finally:
        for process in processes:
            process.send_signal(signal.SIGTERM)
        output = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [3, 3], output


def test_the_address_where_ranks_meet(monkeypatch):
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    nodes = Ranks(0, 4, 0, 2, "10.0.0.1", 29500, "deepspeed")
    assert init_method(nodes) == "env://"
    assert init_method(replace(nodes, source="RANK", local_world_size=4)) == "env://"  # unknown number of nodes
    assert init_method(replace(nodes, world_size=1, local_world_size=1)) == "alone://"
    assert "GLOO_SOCKET_IFNAME" not in os.environ
    assert init_method(replace(nodes, local_world_size=4, source="Slurm")) == "loopback://127.0.0.1:29500"
    assert os.environ["GLOO_SOCKET_IFNAME"] == os.environ["NCCL_SOCKET_IFNAME"] == "lo"
    for address in ("127.0.0.1", "localhost", "::1"):
        assert init_method(replace(nodes, address=address, source="RANK")) == "loopback://127.0.0.1:29500"
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    assert init_method(replace(nodes, address="127.0.0.1", source="torchrun")) == "env://"


def test_collectives_of_one_rank(make_trainer, tmp_path):
    make_trainer(tmp_path / "run")
    x, y = torch.arange(4.0), torch.empty(4)
    for collective in (dist.all_reduce, lambda x: dist.broadcast(x, 0), lambda x: dist.reduce(x, 0)):
        collective(x)
        assert x.tolist() == [0, 1, 2, 3]
    for collective in (
        dist.all_gather_into_tensor, dist.reduce_scatter_tensor, dist.all_to_all_single,
        lambda output, input: dist.all_gather([output], input), lambda output, input: dist.gather(input, [output]),
        lambda output, input: dist.reduce_scatter(output, [input]), lambda output, input: dist.scatter(output, [input]),
        lambda output, input: dist.all_to_all([output], [input]),
        lambda output, input: dist.all_gather_into_tensor(output, input, async_op=True).wait(),
    ):  # fmt: skip
        collective(y.zero_(), x)
        assert torch.equal(x, y)
    dist.barrier()
    assert dist.get_world_size(dist.new_group([0])) == 1
