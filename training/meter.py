"""Figures about the steps since the last log line."""

import time

from utils.energy import EnergyMeter


class StepMeter:
    """Counts steps, seconds, samples and their digest between two log lines.

    Args:
        first_sample: position of the next sample in the stream.
        energy: counts the whole time, of validations and saves, too.
    """

    def __init__(self, first_sample: int, energy: EnergyMeter | None = None):
        self._energy = energy
        self._restart(first_sample)

    def _restart(self, first_sample: int) -> None:
        self._started = time.perf_counter()
        self._steps, self._tokens, self._digest = 0, 0, 0
        self._data_wait, self._comm_wait = 0.0, 0.0
        self._first, self._next = first_sample, first_sample

    def add_step(self, last_sample: int, tokens: int, digest: int, data_wait: float, comm_wait: float) -> None:
        """A step ended with the sample at position `last_sample`.

        Args:
            tokens, digest: sums over all ranks; the digest modulo 2**64.
            data_wait, comm_wait: seconds that this rank waited for data and for communication.
        """
        self._steps += 1
        self._tokens += tokens
        self._next = last_sample + 1
        self._digest = (self._digest + digest) % (1 << 64)
        self._data_wait += data_wait
        self._comm_wait += comm_wait

    def leave_out(self, seconds: float) -> None:
        """Leave seconds out: validation and saves are not training time."""
        self._started += seconds

    def read(self) -> dict:
        """Means a step since the last reading (dt, data_wait and comm_wait, seconds; tokens), samples and digest, and
        the energy of all these steps (joules) if there are counters; then start anew."""
        reading = {
            "dt": (time.perf_counter() - self._started) / self._steps,
            "tokens": self._tokens / self._steps,
            "data_wait": self._data_wait / self._steps,
            "comm_wait": self._comm_wait / self._steps,
            "samples": [self._first, self._next - 1],
            "digest": f"{self._digest:016x}",
        }
        if self._energy is not None and (joules := self._energy.read()) is not None:
            reading["energy_j"] = joules
        self._restart(self._next)
        return reading
