"""How a kernel file declares what it implements; model/ops.py chooses among the declarations.

The file of an operation ends with a tuple `IMPLEMENTATIONS`. Each entry names its operation and itself, says where it
can be used (and, elsewhere, why not), and builds its functions only once it has been chosen. So a package that may be
missing is imported only by those who use it.
"""

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from model.kernels import support

NEEDS = {
    "window": "sliding windows",
    "alibi": "ALiBi",
    "interleaved": "interleaved rotary channels",
    "partial": "heads of which only a part is rotated",
}
"""What a model may need of an implementation beyond the common case -> words for the user; see model.ops.needs_of."""

Where = Callable[[torch.device, torch.dtype], bool]
WhyNot = Callable[[torch.device, torch.dtype], str | None]


@dataclass(frozen=True)
class Implementation:
    """One way to compute an operation of the model."""

    op: str
    """The operation; the flag --OP_kernel chooses among those of one name."""
    name: str
    """The flag's value."""
    build: Callable[[], Mapping[str, Any]]
    """Field of model.ops.Ops -> function. Called once the implementation has been chosen."""
    why_not: WhyNot = lambda device, dtype: None
    """Reason why it cannot be used on a device in a dtype, as the end of a sentence for the user; None if it can."""
    is_fastest: Where = lambda device, dtype: False
    """Whether it was measured to be the fastest there, so that --kernels=auto takes it wherever it can be used."""
    is_plain: bool = False
    """Whether --kernels=reference takes it, and auto if nothing is faster. True for one implementation an operation,
    which lacks nothing."""
    lacks: frozenset[str] = frozenset()
    """What it cannot do, of NEEDS."""

    def reason_against(self, device: torch.device, dtype: torch.dtype, needs: frozenset[str]) -> str | None:
        """Reason why it cannot serve a model with these needs, as the end of a sentence; None if it can."""
        if reason := self.why_not(device, dtype):
            return reason
        lacking = [words for need, words in NEEDS.items() if need in self.lacks & needs]
        return f"it lacks {' and '.join(lacking)}, which this model needs" if lacking else None


def needs_triton(device: torch.device, dtype: torch.dtype) -> str | None:
    """`why_not` of our Triton kernels."""
    return support.unavailable_reason(device)


def runs_triton(device: torch.device, dtype: torch.dtype) -> bool:
    """`is_fastest` of our Triton kernels."""
    return support.unavailable_reason(device) is None


def needs_package(name: str, package: str) -> WhyNot:
    """`why_not` of a package's CUDA kernels.

    Args:
        name: name of the implementation.
        package: what has to be importable.
    """

    def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
        if importlib.util.find_spec(package) is None:
            return f"the package {package} is not installed"
        return None if device.type == "cuda" else f"{name} needs a CUDA device"

    return why_not


def needs_half(name: str, dtype: torch.dtype) -> str | None:
    """Reason why an implementation that takes only 16-bit numbers cannot be used in a dtype; None if it can."""
    if dtype in (torch.bfloat16, torch.float16):
        return None
    return f"{name} takes bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
