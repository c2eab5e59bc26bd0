"""Counters of energy: a made-up /sys/class/powercap, and where there are none."""

from pathlib import Path

import pytest

from training.meter import StepMeter
from utils.energy import Counter, EnergyMeter, gpu_counters, processor_counters


def a_domain(powercap: Path, name: str, called: str, microjoules: int, most: int = 1_000_000_000) -> Path:
    folder = powercap / name
    folder.mkdir(parents=True)
    for file, value in (("name", called), ("max_energy_range_uj", most), ("energy_uj", microjoules)):
        (folder / file).write_text(f"{value}\n")
    return folder / "energy_uj"


def test_packages_and_memory_are_counted_once(tmp_path: Path):
    package = a_domain(tmp_path, "intel-rapl:0", "package-0", 5_000_000)
    memory = a_domain(tmp_path, "intel-rapl:0:1", "dram", 1_000_000)
    a_domain(tmp_path, "intel-rapl:0:0", "core", 77)
    a_domain(tmp_path, "intel-rapl:1", "psys", 99)
    a_domain(tmp_path, "intel-rapl-mmio:0", "package-0", 5)
    meter = EnergyMeter(processor_counters(tmp_path))
    assert meter.names == ["package-0 (intel-rapl:0)", "dram (intel-rapl:0:1)"]
    assert meter.read() == 0
    package.write_text("7500000")
    memory.write_text("1250000")
    assert meter.read() == pytest.approx(2.75)
    # The package's counter begins anew behind its most, 1000 J.
    package.write_text("500000")
    assert meter.read() == pytest.approx(1000 - 7.5 + 0.5)
    # What cannot be read any more is left out.
    package.unlink()
    memory.write_text("2250000")
    assert meter.read() == pytest.approx(1.0) and meter.names == ["dram (intel-rapl:0:1)"]
    memory.write_text("?")
    assert meter.read() is None


def test_without_counters_there_is_no_figure(tmp_path: Path):
    assert EnergyMeter(processor_counters(tmp_path)).read() is None
    assert list(gpu_counters([])) == []
    meter = StepMeter(0, EnergyMeter(()))
    meter.add_step(7, 10, 0, 0.0, 0.0)
    assert "energy_j" not in meter.read()


def test_a_record_has_the_energy_since_the_one_before():
    joules = iter([10.0, 14.0, 3.0, 4.5])
    meter = StepMeter(0, EnergyMeter([Counter("a", lambda: next(joules))]))
    found = []
    for last in (7, 15, 23):
        meter.add_step(last, 10, 0, 0.0, 0.0)
        found.append(meter.read()["energy_j"])
    # A counter that was set back shows nothing once.
    assert found == [4.0, 0.0, 1.5]
