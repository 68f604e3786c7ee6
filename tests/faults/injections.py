"""Faults inside a rank, by name: each function prepares the fault in the process that calls it.

The tiny run has 12 steps, saves after 4, 8 and 12, and validates after 6 and 12.
"""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

FAULTS: dict[str, Callable[[int], None]] = {}


def fault(function: Callable[[int], None]) -> Callable[[int], None]:
    FAULTS[function.__name__] = function
    return function


def before(owner, name, action, when=lambda *args: True):
    """Call `action` before a method or function, once, when `when` is true of its arguments."""
    original, done = getattr(owner, name), []

    def inside(*args, **kwargs):
        if not done and when(*args):
            done.append(True)
            action(*args)
        return original(*args, **kwargs)

    setattr(owner, name, inside)


def at_step(step, action):
    from stlm.training.trainer import Trainer

    before(Trainer, "train_step", lambda trainer, _: action(trainer), lambda _, number: number == step)


def in_validation(action):
    from stlm.training.deepspeed.engine import Engine

    before(Engine, "forward", lambda engine, *_: action(engine), lambda engine, *_: not engine.model.training)


def in_save_of(step, action):
    """Call `action` after a checkpoint's weights are written and before the optimizer's state is."""
    from stlm.training.run import checkpoint

    before(checkpoint, "save_file", lambda *_: action(None), lambda _, path: f"step_{step:08d}" in str(path))


def me(number):
    return lambda _: os.kill(os.getpid(), number)


def spoil(steps, change):
    """Change the logits of some steps."""
    from stlm.training.deepspeed.engine import Engine
    from stlm.training.trainer import Trainer

    forward, train_step, now = Engine.forward, Trainer.train_step, [0]

    def noting_train_step(trainer, step):
        now[:] = [step]
        return train_step(trainer, step)

    def spoilt_forward(engine, *inputs, **named):
        output = forward(engine, *inputs, **named)
        return output._replace(logits=change(output.logits)) if now[0] in steps and engine.model.training else output

    Trainer.train_step, Engine.forward = noting_train_step, spoilt_forward


# ---------------------------------------------------------------------- lost ranks


@fault
def kill_rank_0(rank):
    if rank == 0:
        at_step(7, me(signal.SIGKILL))


@fault
def kill_rank_1(rank):
    if rank == 1:
        at_step(7, me(signal.SIGKILL))


@fault
def kill_all(rank):
    at_step(7, me(signal.SIGKILL))


@fault
def kill_rank_0_in_save(rank):
    if rank == 0:
        in_save_of(8, me(signal.SIGKILL))


@fault
def kill_rank_1_in_save(rank):
    from stlm.training.run import saver

    if rank == 1:
        before(saver, "full_state", me(signal.SIGKILL), lambda _: saved_once())


_saved: list[int] = []


def saved_once():
    """Return whether this is the second call."""
    _saved.append(1)
    return len(_saved) == 2


@fault
def kill_rank_0_in_validation(rank):
    if rank == 0:
        in_validation(me(signal.SIGKILL))


@fault
def kill_rank_1_in_validation(rank):
    if rank == 1:
        in_validation(me(signal.SIGKILL))


@fault
def stop_rank_0(rank):
    if rank == 0:
        at_step(7, me(signal.SIGSTOP))


@fault
def stop_rank_1(rank):
    if rank == 1:
        at_step(7, me(signal.SIGSTOP))


@fault
def stop_rank_1_in_validation(rank):
    if rank == 1:
        in_validation(me(signal.SIGSTOP))


@fault
def pause_rank_1(rank):
    if rank == 1:
        at_step(7, lambda _: time.sleep(1.0))


@fault
def clock_skew(rank):
    now = time.time
    if rank == 1:
        time.time = lambda: now() + 86_400


# ---------------------------------------------------------------------- requests to stop


@fault
def terminate_rank_1(rank):
    if rank == 1:
        at_step(7, me(signal.SIGTERM))


@fault
def terminate_rank_0_twice(rank):
    if rank == 0:
        at_step(7, lambda _: (me(signal.SIGTERM)(_), me(signal.SIGTERM)(_)))


@fault
def interrupt_rank_0(rank):
    if rank == 0:
        at_step(7, me(signal.SIGINT))


@fault
def usr1_to_rank_1(rank):
    if rank == 1:
        at_step(7, me(signal.SIGUSR1))


@fault
def hang_up(rank):
    if rank == 0:
        at_step(7, me(signal.SIGHUP))


@fault
def terminate_rank_1_in_validation(rank):
    if rank == 1:
        in_validation(me(signal.SIGTERM))


@fault
def terminate_the_group(rank):
    if rank == 0:
        at_step(7, lambda _: os.killpg(0, signal.SIGTERM))


@fault
def terminate_the_launcher(rank):
    if rank == 0:
        at_step(7, lambda _: os.kill(os.getppid(), signal.SIGTERM))


@fault
def kill_the_launcher(rank):
    if rank == 0:
        at_step(7, lambda _: os.kill(os.getppid(), signal.SIGKILL))


# ---------------------------------------------------------------------- numbers


@fault
def nan_loss(rank):
    if rank == 1:
        spoil([7], lambda logits: logits * float("nan"))


@fault
def infinite_gradient(rank):
    import torch

    class Explosive(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * torch.inf

    if rank == 0:
        spoil([7], Explosive.apply)


@fault
def nan_losses(rank):
    if rank == 0:
        spoil([6, 7, 8, 9], lambda logits: logits * float("nan"))


@fault
def nan_for_good(rank):
    if rank == 0:
        spoil(range(6, 13), lambda logits: logits * float("nan"))


@fault
def spike(rank):
    spoil([7, 8, 9], lambda logits: logits * -50)


# ---------------------------------------------------------------------- errors


@fault
def out_of_memory_on_rank_1(rank):
    import torch

    def out_of_memory(_):
        raise torch.OutOfMemoryError("tried to allocate 2.00 GiB")

    if rank == 1:
        at_step(7, out_of_memory)


@fault
def exception_on_rank_0(rank):
    def fail(_):
        raise RuntimeError("something that nobody thought of")

    if rank == 0:
        at_step(7, fail)


# ---------------------------------------------------------------------- disks


@fault
def disk_full_in_save(rank):
    """The kernel refuses to write beyond 20 kB of a file, like a full disk or a quota."""
    if rank == 0:
        at_step(7, lambda _: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY)))


@fault
def disk_full_in_log(rank):
    def limit(trainer):
        size = (trainer.run_dir / "metrics.jsonl").stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, resource.RLIM_INFINITY))

    if rank == 0:
        at_step(7, limit)


@fault
def read_only_in_save(rank):
    from stlm.training.run import checkpoint

    def refuse(*_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), "checkpoints")

    if rank == 0:
        before(checkpoint, "atomic_directory", refuse, lambda path: "step_00000008" in str(path))


@fault
def slow_disk(rank):
    """Writing a checkpoint takes longer than the hang timeout of a rank."""
    if rank == 0:
        in_save_of(4, lambda _: time.sleep(6))


@fault
def data_deleted_while_running(rank):
    def delete(trainer):
        data = Path(sys.argv[sys.argv.index("--data") + 1])
        shutil.move(data, f"{data}-away")

    if rank == 0:
        at_step(7, delete)
