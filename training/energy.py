"""Counters of a run's energy: the processors of the first rank's machine, and its GPUs that the run uses."""

import torch

from parallel.context import DistContext
from utils.energy import EnergyMeter, gpu_counters, processor_counters


def open_energy(context: DistContext) -> EnergyMeter:
    """The meter. It has counters on the first rank alone. Collective."""
    own = f"GPU-{torch.cuda.get_device_properties(context.device).uuid}" if context.device.type == "cuda" else ""
    uuids = context.gather(own)
    if not context.is_main:
        return EnergyMeter(())
    return EnergyMeter([*processor_counters(), *gpu_counters(dict.fromkeys(filter(None, uuids)))])
