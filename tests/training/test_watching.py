"""Speed figures of a run: phases, utilization, memory. Clocks are simulated; no test asserts a real time."""

from __future__ import annotations

import json
import math
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from tiny_run import train, update

from stlm.model import account
from stlm.stlm import STLM
from stlm.training.distributed.stopwatch import PHASES, CudaClock, HostClock, Stopwatch
from stlm.training.metrics import throughput
from stlm.training.metrics.mfu import Peak, measure_peak, readable_flops
from stlm.training.metrics.throughput import peak_memory


class FakeClock(HostClock):
    """A clock that advances only on request."""

    def __init__(self):
        self.time = 0.0

    def now(self):
        return self.time

    def takes(self, seconds, function):
        """Return `function`, which then takes so many seconds more."""

        def call(*arguments, **options):
            self.time += seconds
            return function(*arguments, **options)

        return call


def timing_of(run_dir, split="train"):
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [record["timing"] for record in records if record["split"] == split]


def test_every_moment_belongs_to_one_phase():
    watch, clock = Stopwatch(), FakeClock()
    watch._clock = clock
    with watch.phase("forward"):  # outside of a step
        clock.time += 100
    for _ in range(2):
        with watch.step():
            clock.time += 1
            with watch.phase("backward"):
                clock.time += 2
                with watch.phase("communication"):
                    clock.time += 4
                clock.time += 8
            with watch.phase("data"):
                clock.time += 16
        clock.time += 100
    expected = dict.fromkeys(PHASES, 0.0) | {"other": 2, "backward": 20, "communication": 8, "data": 32}
    assert watch.read() == expected
    assert watch.read() == dict.fromkeys(PHASES, 0.0)
    with pytest.raises(KeyError), watch.step(), watch.phase("data"):
        clock.time += 3
        raise KeyError
    assert watch.read()["data"] == 3


def test_the_time_of_a_gpu_is_measured_by_events(monkeypatch):
    """Events stay in the queue of the step's stream and are read later; work of other streams is not counted."""
    queue = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self, stream):
            assert stream == "main"
            self.number, self.waited = len(queue), False
            queue.append(self)

        def synchronize(self):
            self.waited = True

        def elapsed_time(self, end):
            assert end.waited
            return 1000.0 * (end.number - self.number)

    streams = ["main"]
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: streams[-1])
    watch = Stopwatch()
    watch.use(torch.device("cuda"))
    assert isinstance(watch._clock, CudaClock)
    for _ in range(2):
        with watch.step(), watch.phase("forward"):
            streams.append("beside")
            with watch.phase("communication"):
                pass
            streams.pop()
        assert not any(event.waited for event in queue[-4:]), "a step waits for nothing"
    assert len(queue) == 8
    assert watch.read() == dict.fromkeys(PHASES, 0.0) | {"other": 4.0, "forward": 2.0}


def slow_to_end(clock, seconds, context):
    @contextmanager
    def inside():
        with context():
            yield
            clock.time += seconds

    return inside


# Functions of torch's process groups; every collective ends in one of these, whoever calls it.
SENDING = (
    "allreduce", "allreduce_coalesced", "allgather", "_allgather_base", "allgather_into_tensor_coalesced", "broadcast",
    "reduce", "reduce_scatter", "_reduce_scatter_base", "reduce_scatter_tensor_coalesced", "allgather_coalesced",
    "all_gather_single", "reduce_scatter_single", "alltoall", "alltoall_base", "barrier",
)  # fmt: skip


@pytest.mark.parametrize("micro_batch_size", [8, 2])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_phases_of_a_run(make_trainer, tmp_path, monkeypatch, stage, micro_batch_size):
    """Each moment is counted for its phase at every stage, also in collectives that DeepSpeed calls itself."""
    settings = (
        f"training.micro_batch_size={micro_batch_size}",
        "training.log_every_steps=2",
        "training.optimizer=muon",
    )
    trainer = make_trainer(tmp_path / "run", *settings, stage=stage)
    trainer.engine.native.enable_backward_allreduce = True  # off at stage 0, where a rank is alone
    clock, sent = FakeClock(), []
    monkeypatch.setattr(trainer.distributed.stopwatch, "_clock", clock)
    for owner, name in [*((dist.ProcessGroup, name) for name in SENDING), (dist.Work, "wait")]:
        function = clock.takes(1, getattr(owner, name))
        monkeypatch.setattr(owner, name, lambda *a, f=function, **o: sent.append(trainer.step) or f(*a, **o))
    trainer.train_loader.rows = clock.takes(1e3, trainer.train_loader.rows)
    trainer.objective.loss = clock.takes(1e5, trainer.objective.loss)
    deepspeed = trainer.engine.native
    deepspeed.coalesce_grad_reduction = slow_to_end(clock, 1e8, deepspeed.coalesce_grad_reduction)
    monkeypatch.setattr(torch.autograd, "backward", clock.takes(1e7, torch.autograd.backward))
    trainer.engine.optimizer.step = clock.takes(1e9, trainer.engine.optimizer.step)
    train(trainer, until=2)
    first, second = timing_of(tmp_path / "run")
    for timing in (first, second):
        assert math.fsum(timing["phases"].values()) == timing["seconds_per_step"]
        assert list(timing["phases"]) == list(PHASES)
    phases, forwards = second["phases"], 8 / micro_batch_size
    assert (phases["data"], phases["forward"], phases["other"]) == (1e3, forwards * 1e5, 0)
    assert phases["backward"] == forwards * 1e7 + (1e8 if stage and forwards > 1 else 0)
    assert phases["optimizer"] % 1e9 == 0 and phases["optimizer"] > 0
    assert phases["communication"] == sent.count(1) > 0


def test_background_work_counts_only_while_the_step_waits_for_it():
    clock, stopwatch = FakeClock(), Stopwatch()
    stopwatch._clock = clock

    class Work:
        name = "a gather"

        def wait(self, timeout=0):
            clock.time += 10 + timeout

    with stopwatch.step(), stopwatch.phase("forward"):
        work = stopwatch.timed(clock.takes(1, Work))()
        clock.time += 100
        work.wait()
        work.wait(1000)
        assert work.name == "a gather"
        assert stopwatch.timed(lambda: None)() is None
    assert stopwatch.read() == dict.fromkeys(PHASES, 0.0) | {"communication": 1021, "forward": 100}


def test_the_work_of_a_step_is_that_of_the_model(make_trainer, tmp_path, monkeypatch):
    """FLOPs of a step are three forward passes, counted as describe.py does; MFU is their share of the peak."""
    monkeypatch.setattr(throughput, "measure_peak", lambda device, precision: Peak(1e9, 1024))
    settings = ["training.micro_batch_size=2", "training.activation_checkpointing=true", "training.log_every_steps=3"]
    trainer = make_trainer(tmp_path / "run", *settings, stage=2)
    expected = account(lambda: STLM(trainer.config.model, trainer.model.tokenizer), 256, 32, 2).forward_flops
    clock = FakeClock()
    monkeypatch.setattr(trainer.distributed.stopwatch, "_clock", clock)
    trainer.train_loader.rows = clock.takes(0.5, trainer.train_loader.rows)
    train(trainer, until=3)
    first, second = timing_of(tmp_path / "run")
    assert second["seconds_per_step"] == 0.5
    assert second["flops_per_second"] == pytest.approx(3 * expected * 8 * 32 / 0.5)
    assert second["mfu"] == pytest.approx(second["flops_per_second"] / 1e9) == first["mfu"]


def test_counting_work_does_not_change_training(make_trainer, tmp_path):
    counted = make_trainer(tmp_path / "counted", stage=1)
    plain = make_trainer(tmp_path / "plain", stage=1)
    plain.throughput._forward_flops = 1.0
    losses = [[update(trainer), update(trainer)] for trainer in (counted, plain)]
    assert losses[0] == losses[1]
    assert counted.throughput._forward_flops > 1


def test_frozen_parts_have_no_mfu(make_trainer, tmp_path):
    trainer = make_trainer(tmp_path / "run", "model.head.tied=false", "training.frozen_parts=head")
    train(trainer, until=1)
    (timing,) = timing_of(tmp_path / "run")
    assert not {"mfu", "flops_per_second"} & set(timing)
    assert "no MFU, for parts of the model are frozen" in (tmp_path / "run/train.log").read_text()


def test_figures_of_several_ranks():
    """Means over the ranks, the work of all of them, and the rank for which the others wait."""
    watched = object.__new__(throughput.Throughput)
    watched.__dict__.update(_device=torch.device("cpu"), _learns_whole=True, _steps=2, _bytes=120.0, _has_energy=False)
    base = dict.fromkeys(PHASES, 0.0) | {"flops": 30.0, "memory": 5.0, "cuda_memory": 0.0}
    everyone = [
        base | {"forward": 2.0, "communication": 4.0, "peak": 10.0},
        base | {"forward": 5.0, "communication": 1.0, "peak": 20.0, "memory": 7.0},
    ]
    figures = watched._figures(everyone)
    assert figures == {
        "bytes_per_second": 20.0,
        "seconds_per_step": 3.0,
        "phases": dict.fromkeys(PHASES, 0.0) | {"forward": 1.75, "communication": 1.25},
        "flops_per_second": 10.0,
        "mfu": 60 / (6 * 10 + 6 * 20),
        "slowest_rank": {"rank": 1, "seconds_per_step": 2.5},
        "memory_bytes": 7,
    }


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_peak_is_measured_by_matrix_products(precision):
    state = torch.get_rng_state()
    peak = measure_peak(torch.device("cpu"), precision)
    assert peak.flops > 0 and peak.size in (1024, 2048, 4096, 8192)
    assert torch.equal(state, torch.get_rng_state())


def test_units_of_work():
    assert [readable_flops(flops) for flops in (61.34e9, 1.2e12, 9.9e14, 2e15)] == [
        "61.3 GFLOP/s", "1.2 TFLOP/s", "990 TFLOP/s", "2 PFLOP/s",
    ]  # fmt: skip


def test_peak_memory_includes_freed_memory():
    before, on_gpu = peak_memory(torch.device("cpu"))
    held = b"x" * (int(before) + 100_000_000)  # more than other tests of this process held
    del held
    after, _ = peak_memory(torch.device("cpu"))
    assert on_gpu == 0
    assert after == peak_memory(torch.device("cpu"))[0] > before
