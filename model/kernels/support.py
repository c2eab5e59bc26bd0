"""Whether the Triton kernels run on a device. Does not import Triton to find out."""

import importlib.util

import torch


def unavailable_reason(device: torch.device | str) -> str | None:
    """Reason why the kernels cannot be used on a device, for the user; None if they can."""
    device = torch.device(device)
    if device.type != "cuda":
        return f"the Triton kernels need a CUDA device, not {device.type}"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install triton"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"the Triton kernels need an Ampere GPU or a later one; this one has compute capability {major}.{minor}"
    return None


def available(device: torch.device | str) -> bool:
    """Whether the kernels can be used on a device. Never on a CPU: Triton's interpreter is only for tests."""
    return unavailable_reason(device) is None
