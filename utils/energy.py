"""Energy that counters of this machine show. Nothing is estimated: without a counter there is no figure.

    processors   RAPL: packages, and memory where it is counted apart; of all that runs on the machine. Linux lets only
                 root read it
    GPUs         NVML's count since its driver was loaded (Volta and later)
"""

import ctypes
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

POWERCAP = Path("/sys/class/powercap")


class Counter(NamedTuple):
    name: str
    read: Callable[[], float | None]
    """Joules since some moment; None: it cannot be read."""
    most: float | None = None
    """At which it begins anew; None: it never does."""


class EnergyMeter:
    """Joules between two readings, over some counters."""

    def __init__(self, counters: Iterable[Counter]):
        self._last = {counter: found for counter in counters if (found := counter.read()) is not None}

    @property
    def names(self) -> list[str]:
        return [counter.name for counter in self._last]

    def read(self) -> float | None:
        """Joules since the last reading, or since the beginning; None: there are no counters. One that cannot be read
        any more is left out from now on."""
        total = 0.0
        for counter, before in list(self._last.items()):
            now = counter.read()
            if now is None:
                del self._last[counter]
                continue
            # A counter without an end that falls was set back, by a driver for instance.
            total += now - before if now >= before else now - before + counter.most if counter.most else 0.0
            self._last[counter] = now
        return total if self._last else None


def processor_counters(powercap: Path = POWERCAP) -> Iterator[Counter]:
    """Those of this machine's processors; none where they cannot be read."""
    for domain in sorted(powercap.glob("intel-rapl:*")):
        try:
            name = (domain / "name").read_text().strip()
            most = int((domain / "max_energy_range_uj").read_text()) / 1e6
        except (OSError, ValueError):
            continue
        # Other domains lie within a package (core, uncore), or hold it (psys).
        if name.startswith("package-") or name == "dram":
            yield Counter(f"{name} ({domain.name})", partial(_microjoules, domain / "energy_uj"), most)


def _microjoules(path: Path) -> float | None:
    try:
        return int(path.read_text()) / 1e6
    except (OSError, ValueError):
        return None


def gpu_counters(uuids: Iterable[str]) -> Iterator[Counter]:
    """Those of GPUs, by their UUIDs ("GPU-..."); GPUs of other machines are passed over."""
    uuids = list(uuids)
    if not uuids:
        return
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
        if nvml.nvmlInit_v2() != 0:
            return
    except (OSError, AttributeError):
        return
    for uuid in uuids:
        handle = ctypes.c_void_p()
        if nvml.nvmlDeviceGetHandleByUUID(uuid.encode(), ctypes.byref(handle)) == 0:
            yield Counter(uuid, partial(_millijoules, nvml, handle))


def _millijoules(nvml: ctypes.CDLL, handle: ctypes.c_void_p) -> float | None:
    total = ctypes.c_ulonglong()
    found = nvml.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(total))
    return total.value / 1e3 if found == 0 else None
