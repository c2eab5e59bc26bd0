"""How the kernel files launch Triton, which is imported at the first launch: on a CPU the second it takes is wasted.

A launch is registered as a torch operator, which torch.compile takes into its graph as one opaque node, without a graph
break, on a GPU and under Triton's interpreter on a CPU. Autograd functions around the operators give the gradients.
"""

import importlib.util
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

tl: Any = None
"""Becomes triton.language in each module that imports it, once the module's kernels are loaded."""

if TYPE_CHECKING:
    # Kernels are written in Triton's language, for which there are no types to check.
    constexpr = Any
else:

    class constexpr:  # noqa: N801
        """Annotation of an argument for whose value a kernel is compiled. Triton goes by the annotation's name; its own
        class of that name replaces this one together with `tl`."""


class LazyKernel:
    """Placeholder of a kernel, or of a function that kernels call, until the first launch in its module."""

    def __init__(self, function: Callable, options: dict):
        self.function, self.options = function, options

    def __getitem__(self, grid: tuple[int, ...]) -> Callable:
        load_kernels(self.function.__globals__)
        return self.function.__globals__[self.function.__name__][grid]


def jit(function: Callable | None = None, **options: object) -> Any:
    """triton.jit, but at the first launch."""
    return LazyKernel(function, options) if function is not None else lambda function: LazyKernel(function, options)


def load_kernels(module: dict[str, object]) -> None:
    """Replace a module's lazy kernels by Triton's functions; `module` is its namespace."""
    import triton

    module["tl"], module["constexpr"] = triton.language, triton.language.constexpr
    for name, value in list(module.items()):
        if isinstance(value, LazyKernel):
            module[name] = triton.jit(value.function, **value.options)


@cache
def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on a CPU, as the environment was at the first launch."""
    if importlib.util.find_spec("triton") is None:
        return False
    import triton

    return triton.knobs.runtime.interpret


_LIBRARY = torch.library.Library("zero2all", "DEF")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def kernel_op(schema: str, fake: Callable) -> Callable[[Callable], Callable]:
    """Register the decorated function, which launches kernels, as the operator zero2all::<schema>.

    Args:
        schema: name, arguments and results in torch's notation. It has no gradient formula.
        fake: takes the same arguments and returns tensors of the same shapes, dtypes and strides, contents unset.
    Returns:
        a decorator; the name then stands for the operator.
    """
    name = schema[: schema.index("(")]

    def register(launch: Callable) -> Callable:
        def launch_interpreted(*args):
            if not interpreted():
                raise ValueError(
                    f"{name} needs a CUDA device (or TRITON_INTERPRET=1 in the environment, to test it on a CPU): use "
                    "the plain function"
                )
            return launch(*args)

        _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(name, launch, "CUDA")
        _LIBRARY.impl(name, launch_interpreted, "CPU")
        torch.library.register_fake(f"zero2all::{name}", fake, lib=_LIBRARY)
        return getattr(torch.ops.zero2all, name).default

    return register


@cache
def num_multiprocessors(device: torch.device) -> int:
    """Number of a GPU's multiprocessors; a small number for a CPU, so that interpreted programs get several rows."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


def next_power_of_2(number: int) -> int:
    return 1 << max(number - 1, 0).bit_length()


def as_rows(x: Tensor) -> Tensor:
    """x (..., C) as (N, C), its columns side by side in memory: a view if its strides allow."""
    rows_NC = x.reshape(-1, x.shape[-1])
    return rows_NC if rows_NC.stride(1) == 1 or rows_NC.shape[1] == 1 else rows_NC.contiguous()


def work_dtype(result: torch.dtype) -> torch.dtype:
    """Dtype in which kernels compute a result of dtype `result`: float32, and float64 for float32.

    So each result is rounded once, and is off by at most half a unit in its last place. Computed in float32, a norm or
    a SwiGLU would be a chain of four to ten roundings, as in eager PyTorch. Which of two such chains comes out closer
    is luck, and in a tensor of a few elements a factor of two between their largest errors is not rare. In bfloat16 and
    float16 the last rounding hides all others.

    float32 results belong to runs in float32, where matrix products take the time; runs in bfloat16 compute in float32.
    By instruction counts, a data-center GPU with half or a quarter as many float64 units as float32 ones is still bound
    by memory; a GPU with a 64th takes several times as long (neither measured yet).
    """
    return torch.float64 if result == torch.float32 else torch.float32


def check_dtypes(*tensors: Tensor) -> None:
    """
    Raises:
        ValueError: a dtype that the kernels would silently round.
    """
    for tensor in tensors:
        if tensor.dtype not in DTYPES:
            raise ValueError(f"the kernels take float32, bfloat16 and float16, not {tensor.dtype}")
