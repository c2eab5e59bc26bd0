"""Whether a device still computes after a step that failed."""

import torch


def works(device: torch.device) -> bool:
    """Whether a device computes. Some CUDA errors, such as a failed assertion in a kernel or an illegal address, stay
    with a process until its end, and every later call fails; others concern one call alone."""
    try:
        return torch.ones(1, device=device).sum().item() == 1.0
    except torch.OutOfMemoryError:
        return True
    except RuntimeError:
        return False
