"""Compile every kernel for a Hopper GPU without one: Triton's compiler refuses code that the interpreter accepts.

    python -m tests.compile_kernels

Prints for each kernel the registers per thread, and the bytes of stack (spilled registers) and of shared memory.
Tensors stay on the CPU; nothing is launched.
"""

import os
import re
import subprocess
import tempfile

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from model.dropout import DropoutKey
from model.kernels import cross_entropy as ce
from model.kernels import launch, paged_decoding, rms_norm, rope, swiglu
from model.kernels.paged_attention import Single
from optimizer import adamw_triton, blockwise_triton, lion_triton, triton_launch
from optimizer.blockwise import BLOCK, Quantized
from optimizer.config import AdamWConfig, LionConfig

CUOBJDUMP = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")


class Hopper:
    """The part of a driver that compiling needs."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


def compile_only(run):
    def wrapped(kernel: JITFunction, *args, grid, warmup: bool, **options) -> None:
        compiled = run(kernel, *args, grid=grid, warmup=True, **options)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            usage = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True).stdout
        numbers = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", usage)
        flags = {name: value for name, value in options.items() if name.isupper()}
        print(kernel.__name__, *(numbers.groups() if numbers else ("?", "?", "?")), flags, flush=True)

    return wrapped


def backward(*results: Tensor) -> None:
    torch.autograd.backward(results, [torch.empty_like(result) for result in results])


def call_every_kernel(dtype: torch.dtype, hidden: int, head_dim: int, intermediate: int, vocab: int) -> None:
    def new(*size: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.empty(size, dtype=kind, requires_grad=True)

    weight = new(hidden)
    backward(rms_norm.rms_norm(new(8, hidden), weight, 1e-5))
    backward(*rms_norm.add_rms_norm(new(2, 4, hidden), new(2, 4, hidden), weight, 1e-5))
    wide = new(2, 4, hidden, kind=torch.float32)
    for layer in (None, torch.tensor(3)):
        key = DropoutKey(5, torch.arange(2), 0, layer)
        backward(*rms_norm.add_rms_norm(wide, new(2, 4, hidden), weight, 1e-5, 0.1, key, 1))
    q, k = (new(2, 4, heads, head_dim).transpose(1, 2) for heads in (32, 8))
    table = torch.empty(2, 1, 4, head_dim // 2)
    backward(*rope.rope(q, k, table, table))
    backward(swiglu.swiglu_packed(new(8, 2 * intermediate)))
    backward(swiglu.swiglu(new(8, intermediate), new(8, intermediate)))
    keys, values = new(2, 8, 64, head_dim).detach()
    for window, slopes in ((0, None), (40, torch.empty(32))):
        table = paged_decoding.table_of([Single(0, 33, [1, 3, 0])], 1, 16, window, slopes, keys.device)
        paged_decoding.attend_table(new(1, 32, head_dim).detach(), keys, values, table)
    labels = torch.zeros(8, dtype=torch.int64)
    backward(ce.cross_entropy(new(8, vocab) * 1, labels))
    ce.cross_entropy_with_gradient_(new(8, vocab).detach(), labels, torch.ones(()), -100, 0.0)
    main, exp_avg, exp_avg_sq = (torch.empty(4096) for _ in range(3))
    grad = torch.empty(4096, dtype=dtype)
    half = torch.empty(4096, dtype=torch.float16)
    for weights, zero_grad in ((torch.empty(4096, dtype=dtype), True), (None, False), (half, False)):
        adamw_triton.adamw_flat_step(
            main, exp_avg, exp_avg_sq, grad, weights, 2, 1e-3, 0.1, 2.0, AdamWConfig(), zero_grad
        )
        lion_triton.lion_flat_step(main, exp_avg, grad, weights, 1e-3, 0.1, 2.0, LionConfig(), zero_grad)
        mean, square = (
            Quantized(torch.empty(4096, dtype=torch.uint8), torch.empty(4096 // BLOCK), signed)
            for signed in (True, False)
        )
        blockwise_triton.adamw8bit_flat_step(
            main, mean, square, grad, weights, 2, 1e-3, 0.1, 2.0, AdamWConfig(), zero_grad
        )
        blockwise_triton.lion8bit_flat_step(main, mean, grad, weights, 1e-3, 0.1, 2.0, LionConfig(), zero_grad)
    adamw_triton.sum_of_squares(grad)


def main() -> None:
    triton.runtime.driver.set_active(Hopper())
    JITFunction.run = compile_only(JITFunction.run)
    # Lets the operators take CPU tensors; the kernels themselves are not interpreted.
    launch.interpreted = triton_launch.interpreted = lambda: True
    call_every_kernel(torch.bfloat16, 2048, 64, 5632, 64_320)
    call_every_kernel(torch.float32, 30, 10, 33, 50_257)


if __name__ == "__main__":
    main()
