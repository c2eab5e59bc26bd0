"""How the optimizers' kernel files launch Triton, which is imported at the first step: a CPU need not spend the second
that this takes."""

import importlib.util
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor


class constexpr:  # noqa: N801
    """Marks a compile-time argument of a kernel. Triton looks at the annotation's name; its own class of that name
    replaces this one when a module's kernels are compiled."""


tl: Any = None
"""triton.language once kernels are compiled."""


def write_main(main, main_ptr, grad_ptr, weights_ptr, offsets, inside, WRITE_WEIGHTS: constexpr, ZERO_GRAD: constexpr):
    """The end of every step, called by kernels: store the main parameters, and the weights; zero the gradients."""
    tl.store(main_ptr + offsets, main, mask=inside)
    if WRITE_WEIGHTS:
        if weights_ptr.dtype.element_ty == tl.float16:
            # Same as `within_range`.
            main = tl.where(main > 65504.0, 65504.0, tl.where(main < -65504.0, -65504.0, main))
        tl.store(weights_ptr + offsets, main, mask=inside)
    if ZERO_GRAD:
        tl.store(grad_ptr + offsets, tl.zeros_like(main), mask=inside)


def compiled(*functions: Callable) -> dict[str, Any]:
    """Plain functions, written in Triton's language (`tl` in their modules), for Triton's compiler or its interpreter:
    by name, also in the module of the last one, so that its kernels can call them."""
    import triton

    for function in functions:
        function.__globals__.update(tl=triton.language, constexpr=triton.language.constexpr)
    kernels = {function.__name__: triton.jit(function) for function in functions}
    functions[-1].__globals__.update(kernels)
    return kernels


def unavailable_reason(device: torch.device) -> str | None:
    """Reason why the kernels cannot be used on a device, as a sentence; None if they can."""
    if device.type != "cuda":
        return f"Triton's optimizer step needs a CUDA device, not {device.type}"
    return None if importlib.util.find_spec("triton") is not None else "Triton is not installed: pip install triton"


@cache
def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter on a CPU, for tests. The environment decides, at the first step."""
    if importlib.util.find_spec("triton") is None:
        return False
    import triton

    return triton.knobs.runtime.interpret


def check(tensors: dict[str, Tensor | None], float32: tuple[str, ...] = ()) -> None:
    """Check that kernels can run on flat tensors, and would not silently compute something else.

    Args:
        tensors: name -> tensor; None: there is none.
        float32: names of those that must have this dtype; the others have it, or a 16-bit one.
    Raises:
        ValueError: they cannot.
    """
    present = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    first = next(iter(present.values()))
    if (reason := unavailable_reason(first.device)) and not (first.device.type == "cpu" and interpreted()):
        raise ValueError(f"{reason}: use the plain step")
    for name, tensor in present.items():
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"{name} must be float32, bfloat16 or float16, not {tensor.dtype}")
        if name in float32 and tensor.dtype != torch.float32:
            raise ValueError(f"{name} must be float32, not {tensor.dtype}")
        if not tensor.is_contiguous() or tensor.numel() != first.numel() or tensor.device != first.device:
            raise ValueError(f"{name} must be contiguous, as long as the others and on their device")
