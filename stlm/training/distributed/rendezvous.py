"""Rendezvous of the ranks, and the sockets that they listen on.

A single rank opens no socket: its process group copies inputs to outputs. Ranks of one machine listen on the loopback
interface only. Ranks of several machines meet by torch's env://, on all interfaces; docs/security.md describes what
that exposes. Where torchrun already keeps a store for its workers, that store is used.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Iterator
from datetime import timedelta
from typing import Any
from urllib.parse import parse_qs, urlsplit

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import _create_work_from_future  # type: ignore[attr-defined]

from stlm.training.distributed.ranks import Ranks

LOOPBACK = "127.0.0.1"
ALONE = "alone"  # name of the backend of a single rank
INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")  # torch's backends listen there; a user's own value is kept


def init_method(ranks: Ranks) -> str:
    """Return the URL for torch's default process group of these ranks. A single rank uses the backend ALONE.

    Every rank calls it before the first process group is made.
    """
    if ranks.world_size == 1:
        return f"{ALONE}://"
    if not on_one_machine(ranks):
        return "env://"
    for name in INTERFACES:
        os.environ.setdefault(name, "lo")  # stays: DeepSpeed makes more groups later
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return "env://"
    return f"loopback://{LOOPBACK}:{ranks.port}"


def on_one_machine(ranks: Ranks) -> bool:
    """Return True if all ranks must be on one machine: the launcher says so, or they meet at a loopback address."""
    if ranks.source != "RANK" and ranks.local_world_size == ranks.world_size:  # RANK: may be a guess
        return True
    try:
        return ipaddress.ip_address(LOOPBACK if ranks.address == "localhost" else ranks.address).is_loopback
    except ValueError:  # a name
        return False


def _loopback(url: str, timeout: timedelta, **_: Any) -> Iterator[tuple[dist.Store, int, int]]:
    """Yield a store hosted by rank 0 on the loopback interface. A TCPStore listens on every interface, whatever address
    it gets, so rank 0 passes a socket that already listens."""
    parts = urlsplit(url)
    assert parts.port is not None
    query = parse_qs(parts.query)
    rank, world_size = int(query["rank"][0]), int(query["world_size"][0])
    listening: dict[str, Any] = {}
    if rank == 0:
        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((LOOPBACK, parts.port))
            listener.listen(world_size)
            listening["master_listen_fd"] = listener.detach()
    yield dist.TCPStore(LOOPBACK, parts.port, world_size, rank == 0, timeout, **listening), rank, world_size


# ---------------------------------------------------------------------- one rank


_ProcessGroup: Any = dist.ProcessGroup  # Any: signatures and names differ between versions


class OneRankGroup(_ProcessGroup):
    """The collectives of a single rank, on any device: every output is the input."""

    def broadcast(self, tensors: list[Tensor], *_: Any, **__: Any) -> dist.Work:
        return _done(tensors)

    allreduce = allreduce_coalesced = reduce = broadcast

    def barrier(self, *_: Any, **__: Any) -> dist.Work:
        return _done([])

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], *_: Any, **__: Any) -> dist.Work:
        return _copied([output for (output,) in outputs], inputs)

    gather = allgather

    def reduce_scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], *_: Any, **__: Any) -> dist.Work:
        return _copied(outputs, [tensor for (tensor,) in inputs])

    scatter = reduce_scatter

    def alltoall(self, outputs: list[Tensor], inputs: list[Tensor], *_: Any, **__: Any) -> dist.Work:
        return _copied(outputs, inputs)

    def all_gather_single(self, output: Tensor, input: Tensor, *_: Any, **__: Any) -> dist.Work:
        return _copied([output], [input])

    # torch 2.13 uses the first names, earlier versions the second ones.
    reduce_scatter_single = all_to_all_single = all_gather_single
    _allgather_base = _reduce_scatter_base = alltoall_base = all_gather_single
    all_gather_single_coalesced = reduce_scatter_single_coalesced = alltoall
    allgather_into_tensor_coalesced = reduce_scatter_tensor_coalesced = alltoall

    def getBackendName(self) -> str:
        return ALONE


@torch.no_grad()
def _copied(outputs: list[Tensor], inputs: list[Tensor]) -> dist.Work:
    for output, input in zip(outputs, inputs, strict=True):
        if output.data_ptr() != input.data_ptr():
            output.copy_(input.view_as(output))
    return _done(outputs)


def _done(result: list[Tensor]) -> dist.Work:
    future: torch.futures.Future[list[Tensor]] = torch.futures.Future()
    future.set_result(result)
    return _create_work_from_future(future)


def _alone(url: str, **_: Any) -> Iterator[tuple[dist.Store, int, int]]:
    yield dist.HashStore(), 0, 1


dist.Backend.register_backend(
    ALONE, lambda store, rank, size, timeout: OneRankGroup(rank, size), devices=["cpu", "cuda"]
)
dist.register_rendezvous_handler(ALONE, _alone)
dist.register_rendezvous_handler("loopback", _loopback)
