"""Device and error rule shared by the tests of Triton kernels.

With a GPU the kernels are compiled. Without one they run in Triton's interpreter, on CPU tensors. Triton reads
TRITON_INTERPRET when a function is decorated, for its own functions when they are imported. So this module sets the
variable, imports Triton, loads the kernels, and restores it: no child process inherits it. If something has imported
Triton before, that is too late; then the tests that import this module are skipped, and
tests/unit/test_kernels_support.py fails.
"""

import dataclasses
import functools
import importlib
import importlib.util
import inspect
import os
import pkgutil
import sys
import types
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from model import kernels
from model.kernels import launch
from optimizer import adamw_triton, blockwise_triton, lion_triton, triton_launch


def _kernel_modules() -> list[types.ModuleType]:
    """Files of model/kernels/ that hold Triton kernels."""
    names = [found.name for found in pkgutil.iter_modules(kernels.__path__)]
    modules = [importlib.import_module(f"model.kernels.{name}") for name in names]
    return [module for module in modules if any(isinstance(x, launch.LazyKernel) for x in vars(module).values())]


KERNEL_MODULES = _kernel_modules()
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _load_interpreted() -> None:
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        # Triton imports this module at the first launch, and it must be interpreted like the rest.
        importlib.import_module("triton.experimental.gluon")
        for module in KERNEL_MODULES:
            launch.load_kernels(vars(module))
        for module in (adamw_triton, lion_triton, blockwise_triton):
            module.load_kernels()
        assert launch.interpreted() and triton_launch.interpreted()
    finally:
        if before is None:
            del os.environ["TRITON_INTERPRET"]
        else:
            os.environ["TRITON_INTERPRET"] = before


def _round_to_bfloat16() -> None:
    """Make Triton's interpreter round from float32 to bfloat16, as a GPU does; it truncates, and errors are judged
    here."""
    interpreter = sys.modules["triton.runtime.interpreter"]
    convert = interpreter._convert_float

    def rounding(data, source, target, mode):
        if (source.name, target.name) != ("fp32", "bf16"):
            return convert(data, source, target, mode)
        return torch.from_numpy(data).bfloat16().view(torch.uint16).numpy()

    interpreter._convert_float = rounding


def _multiply_bfloat16() -> None:
    """Make Triton's interpreter multiply matrices of bfloat16, whose bits it takes for integers. A product of two such
    numbers is exact in float32."""
    interpreter = sys.modules["triton.runtime.interpreter"]
    multiply = interpreter.InterpreterBuilder.create_dot

    def widened(handle):
        if handle.dtype.scalar.name != "bf16":
            return handle
        data = (handle.data.astype("uint32") << 16).view("float32")
        return interpreter.TensorHandle(data, interpreter.tl.float32)

    def multiply_widened(self, a, b, *others):
        return multiply(self, widened(a), widened(b), *others)

    interpreter.InterpreterBuilder.create_dot = multiply_widened


def _be_quick() -> None:
    """Remove repeated work of Triton's interpreter.

    Before each call of a function it searches all of triton.language for things to replace, which takes a millisecond:
    here the replacements stay. For each operation it builds a table of dtypes: here the table is kept. And it computes
    each sum and product of integers twice, to detect overflow: here once.
    """
    interpreter = sys.modules["triton.runtime.interpreter"]
    options = interpreter.interpreter_builder.options
    interpreter.interpreter_builder.options = dataclasses.replace(options, sanitize_overflow=False)
    numpy_dtype = interpreter._get_np_dtype
    of_scalar = functools.cache(numpy_dtype)
    # Pointer types cannot be looked up.
    interpreter._get_np_dtype = lambda kind: (of_scalar if type(kind) is interpreter.tl.dtype else numpy_dtype)(kind)
    patch, patched, known = interpreter._patch_lang, set(), set()

    class KeepPatched:
        def restore(self) -> None:
            pass

    def patch_once(function) -> KeepPatched:
        if id(function.__globals__) in known:
            return KeepPatched()
        known.add(id(function.__globals__))
        languages = {value.__name__ for value in function.__globals__.values() if inspect.ismodule(value)}
        if not languages <= patched:
            patch(function)
            patched.update(languages)
            # Triton 3.6 gives int() a one-dimensional array, which numpy no longer accepts.
            interpreter.tl.tensor.__index__ = lambda self: self.handle.data.item()
        return KeepPatched()

    interpreter._patch_lang = patch_once


if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)
if torch.cuda.is_available():
    DEVICE = "cuda"
else:
    DEVICE = "cpu"
    if "triton" in sys.modules:
        pytest.skip("Triton was imported too early to be interpreted: run these tests alone", allow_module_level=True)
    _load_interpreted()
    _round_to_bfloat16()
    _multiply_bfloat16()
    _be_quick()


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * scale).to(dtype).to(DEVICE)


def unit_in_the_last_place(exact: Tensor, dtype: torch.dtype) -> float:
    """Unit in the last place of `dtype`, at the largest magnitude in `exact`."""
    limits = torch.finfo(dtype)
    largest = exact.abs().max().clamp(min=limits.smallest_normal)
    return limits.eps * 2.0 ** largest.log2().floor().item()


def root_mean_square(ours: Tensor, exact: Tensor) -> float:
    """Root mean square of the errors, in units in the last place of the largest element."""
    return (ours.double() - exact).square().mean().sqrt().item() / unit_in_the_last_place(exact, ours.dtype)


def error_ratio(ours: Tensor, eager: Tensor, exact: Tensor) -> float:
    """Our largest error over the allowed one: twice the eager path's, or one unit in the last place if that is more."""
    assert ours.dtype == eager.dtype and ours.shape == eager.shape == exact.shape
    assert ours.isfinite().all()
    if not exact.numel():
        return 0.0
    error, eager_error = ((x.double() - exact).abs().max().item() for x in (ours, eager))
    return error / max(2.0 * eager_error, unit_in_the_last_place(exact, ours.dtype))


def results_and_gradients(function: Callable, leaves: Sequence[Tensor], upstream: Sequence[Tensor] | None):
    """(results, gradients of the leaves that require them) for given gradients of the results; None draws random
    ones."""
    results = function(*leaves)
    results = [results] if isinstance(results, Tensor) else list(results)
    if upstream is None:
        upstream = [draw(*result.shape, dtype=result.dtype, seed=99 + i) for i, result in enumerate(results)]
    needing = [leaf for leaf in leaves if leaf.requires_grad]
    gradients = torch.autograd.grad(results, needing, [u.to(r.dtype) for u, r in zip(upstream, results)])
    return [result.detach() for result in results], list(gradients), upstream


def row_ratios(ours: Tensor, eager: Tensor, exact: Tensor) -> list[float]:
    """`error_ratio` of each row as if it were a tensor by itself: hundreds of small tensors in one launch.

    In tensors this small the eager path's largest float32 error is luck and excuses nothing, so the allowed error is
    one unit in the last place.
    """
    tensors = [x.reshape(len(x), -1) for x in (ours, eager, exact)]
    if ours.dtype == torch.float32:
        tensors[1] = tensors[2].float()
    return [error_ratio(*rows) for rows in zip(*tensors)]


def compare(
    ours: Callable, eager: Callable, exact: Callable, inputs: Sequence[Tensor],
    upstream: Sequence[Tensor] | None = None, by_row: bool = False,
) -> None:  # fmt: skip
    """Require that the error of `ours`, in results and gradients, is not larger than allowed.

    Args:
        ours, eager, exact: take the inputs; `exact` gets them in float64.
        inputs: leaves, of which the functions may make views. Gradients of all floating ones are compared.
        by_row: judge each row by itself, see `row_ratios`.
    """

    # The fixture that guards all tests restores it. On tensors this small, further threads only wait for each other.
    torch.set_num_threads(1)

    def fresh(wide: bool) -> list[Tensor]:
        leaves = [x.detach().clone() for x in inputs]
        leaves = [x.double() if wide and x.is_floating_point() else x for x in leaves]
        return [x.requires_grad_() if x.is_floating_point() else x for x in leaves]

    *of_eager, upstream = results_and_gradients(eager, fresh(False), upstream)
    *of_ours, _ = results_and_gradients(ours, fresh(False), upstream)
    *of_exact, _ = results_and_gradients(exact, fresh(True), upstream)
    for kind, a, b, c in zip(("result", "gradient"), of_ours, of_eager, of_exact):
        for index, tensors in enumerate(zip(a, b, c)):
            ratio = max(row_ratios(*tensors)) if by_row else error_ratio(*tensors)
            assert ratio <= 1.0, f"{kind} {index}: {ratio:.2f} of the error allowed"
