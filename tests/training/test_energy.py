"""Energy counters, simulated by a folder and a module."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from tiny_run import train

from data_pipeline.extras import how_to_install
from stlm.training.metrics import energy, throughput
from stlm.training.metrics.energy import Energy

CPU = torch.device("cpu")


def domain(powercap, number, name, value, largest=1_000_000):
    folder = powercap / f"intel-rapl:{number}"
    folder.mkdir(parents=True)
    (folder / "name").write_text(name + "\n")
    (folder / "max_energy_range_uj").write_text(f"{largest}\n")
    (folder / "energy_uj").write_text(f"{value}\n")
    return folder / "energy_uj"


def test_processors_and_their_memory(tmp_path):
    """Each counts once: domains within a package, and domains that contain packages, are not added."""
    files = [
        domain(tmp_path, number, name, 900_000)
        for number, name in (("0", "package-0"), ("0:0", "core"), ("0:1", "dram"), ("1", "psys"), ("2", "package-1"))
    ]
    counters = Energy(CPU, True, tmp_path)
    assert counters.measures and counters.missing == []
    for file in files:
        file.write_text("950000\n")
    assert counters.joules() == pytest.approx(0.15)
    for file in files:  # a counter wraps around at its range
        file.write_text("150000\n")
    assert counters.joules() == pytest.approx(0.6)
    assert counters.joules() == 0
    assert not Energy(CPU, False, tmp_path).measures


def test_unreadable_counters_are_reported(tmp_path, monkeypatch):
    assert Energy(CPU, True, tmp_path).missing == [f"of processors: {tmp_path} has none"]
    file = domain(tmp_path, "0", "package-0", 1)
    file.unlink()
    counters = Energy(CPU, True, tmp_path)
    assert counters.missing == [f"of processors: {file}: No such file or directory"]
    assert not counters.measures
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert Energy(torch.device("cuda"), False, tmp_path).missing == [f"of GPUs: {how_to_install('nvidia-ml-py')}"]


def test_a_gpu(tmp_path, monkeypatch):
    taken = iter([5000, 7500])
    nvml = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID={"GPU-12ab": "handle"}.__getitem__,
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: {"handle": next(taken)}[handle],
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="12ab"))
    counters = Energy(torch.device("cuda"), False, tmp_path)
    assert counters.joules() == 2.5


def test_a_run_reports_the_energy_of_its_steps(make_trainer, tmp_path, monkeypatch):
    """Only steps count; where no counter exists, nothing is reported except the reason, once."""
    from test_watching import timing_of

    file = domain(tmp_path / "powercap", "0", "package-0", 0, largest=10**12)

    def goes_on(microjoules):
        file.write_text(f"{int(file.read_text()) + microjoules}\n")

    monkeypatch.setattr(energy, "POWERCAP", tmp_path / "powercap")
    trainer = make_trainer(tmp_path / "run", "training.log_every_steps=2", "training.eval_every_steps=1")
    rows, windows = trainer.train_loader.rows, trainer.validation_loader.windows
    trainer.train_loader.rows = lambda *given: goes_on(3_000_000) or rows(*given)
    trainer.validation_loader.windows = lambda *given: goes_on(10**9) or windows(*given)
    train(trainer, until=4)
    timings = timing_of(tmp_path / "run")
    assert [timing["joules_per_step"] for timing in timings] == [3.0] * 3
    read = 8 * 32 / 1e6
    assert timings[1]["joules_per_megabyte"] == pytest.approx(3.0 / read, rel=0.02)  # end-of-text ids are no bytes
    assert "no energy" not in (tmp_path / "run/train.log").read_text()

    monkeypatch.setattr(energy, "POWERCAP", tmp_path / "nothing")
    train(make_trainer(tmp_path / "other"), until=1)
    (timing,) = timing_of(tmp_path / "other")
    assert not any("joules" in name for name in timing)
    log = (tmp_path / "other/train.log").read_text()
    assert log.count(f"no energy of processors: {tmp_path / 'nothing'} has none") == 1


def test_the_energy_of_ranks_adds_up():
    watched = object.__new__(throughput.Throughput)
    watched.__dict__.update(_device=CPU, _learns_whole=False, _steps=2, _bytes=4e6, _has_energy=True)
    base = dict.fromkeys((*throughput.PHASES, *throughput.EXTRA), 1.0)
    figures = watched._figures([base | {"joules": 10.0}, base | {"joules": 30.0}])
    assert (figures["joules_per_step"], figures["joules_per_megabyte"]) == (20, 10)
