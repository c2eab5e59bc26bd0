"""Our Triton kernels against plain PyTorch, compiled PyTorch, and Liger's kernels if installed.

    python -m benchmarks.kernels [--dtype bfloat16] [--tokens 16384] [--no-compile] [--only rope] [--output FILE]

On CUDA, shapes are those of the 1.1B model. On a CPU they are reduced, and only the plain paths run: Triton's
interpreter does not count as an implementation, so its rows say "not measured". There some or all inputs are in the
caches, so a rate above that of a copy of main memory is possible.

Printed for each operation, for forward alone and forward with backward:

- the median time;
- bytes moved per second, from the formula in the table rather than measured, and their share of a copy's rate on the
  same device in the same run; operations bound by matrix multiplications give operations per second instead;
- the peak memory beyond the inputs (on a CPU: growth of the resident set in one more repetition, so small tensors may
  fit into memory that malloc already has).

On a GPU, the caches are overwritten before each repetition.
"""

import sys

if __name__ == "__main__":
    # Works when the file is run by its path, and by a Python that lacks the packages.
    sys.path[0] = __file__.rsplit("/", 2)[0]
    from utils import environment

    environment.check()

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks.ablation import resident_growth
from model.attend import alibi_slopes, attention_mask
from model.kernels import cross_entropy as ce
from model.kernels import linear_cross_entropy as linear_ce
from model.kernels import rms_norm as norm
from model.kernels import rope as rotary
from model.kernels import swiglu as gated
from model.kernels.attention import plain_attention, sdpa_causal, sdpa_masked
from model.kernels.blocked_attention import blocked_attention
from model.kernels.support import unavailable_reason
from optimizer import adamw_triton
from optimizer.adamw import adamw_flat_reference, adamw_step
from optimizer.config import AdamWConfig
from parallel.buffer import sum_of_squares
from utils.machine import cpu_name
from utils.paths import a_path
from utils.terminal import run_main

EPS = 1e-5


@dataclass(frozen=True)
class Shapes:
    tokens: int
    hidden: int
    intermediate: int
    vocab: int
    heads: int
    kv_heads: int
    head_dim: int
    parameters: int
    """Parameters that the optimizer steps."""


@dataclass
class Case:
    """One operation and its implementations."""

    name: str
    formula: str
    """Formula of the bytes as text; e is the size of an element."""
    inputs: Callable[[], list[Tensor]]
    """Makes fresh inputs; not timed."""
    contenders: dict[str, Callable]
    """Name -> function of the inputs. "ours" needs Triton."""
    forward_bytes: float = 0.0
    backward_bytes: float | None = None
    """None if there is no backward pass."""
    operations: float = 0.0
    """Multiplications and additions of the forward pass, if these take most of the time; the backward pass has twice as
    many."""
    plain: tuple[str, ...] = ("eager",)
    """Contenders that run without Triton."""
    differentiate: tuple[int, ...] = field(default=(0,))
    """Inputs whose gradients are computed."""


def liger(import_path: str, call: Callable) -> dict[str, Callable]:
    """{"Liger": function} if the package is installed."""
    module_name, _, name = import_path.rpartition(".")
    try:
        function = getattr(__import__(module_name, fromlist=[name]), name)
    except (ImportError, AttributeError):
        return {}
    return {"Liger": lambda *inputs: call(function, *inputs)}


def cases(shapes: Shapes, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    n, c, i, v = shapes.tokens, shapes.hidden, shapes.intermediate, shapes.vocab
    e = dtype.itemsize

    def draw(*size: int, kind: torch.dtype = dtype, grad: bool = True) -> Tensor:
        return torch.randn(size, device=device, dtype=kind).requires_grad_(grad)

    def labels() -> Tensor:
        return torch.randint(0, v, (n,), device=device)

    yield Case(
        "rms_norm", "forward 2 N C e, backward 3 N C e", lambda: [draw(n, c), draw(c)],
        {"ours": lambda x, w: norm.rms_norm(x, w, EPS), "eager": lambda x, w: norm.rms_norm_reference(x, w, EPS)}
        | liger("liger_kernel.ops.rms_norm.LigerRMSNormFunction",
                lambda f, x, w: f.apply(x, w, EPS, 0.0, "llama", False)),
        2 * n * c * e, 3 * n * c * e, differentiate=(0, 1),
    )  # fmt: skip
    yield Case(
        "add_rms_norm", "forward 4 N C e, backward 4 N C e", lambda: [draw(n, c), draw(n, c), draw(c)],
        {"ours": lambda h, x, w: norm.add_rms_norm(h, x, w, EPS),
         "eager": lambda h, x, w: norm.add_rms_norm_reference(h, x, w, EPS)},
        4 * n * c * e, 4 * n * c * e, differentiate=(0, 1, 2),
    )  # fmt: skip
    yield Case(
        "add_rms_norm, h float32", "forward N C (8 + 2 e), backward N C (12 + 2 e)",
        lambda: [draw(n, c, kind=torch.float32), draw(n, c), draw(c)],
        {"ours": lambda h, x, w: norm.add_rms_norm(h, x, w, EPS),
         "eager": lambda h, x, w: norm.add_rms_norm_reference(h, x, w, EPS)},
        n * c * (8 + 2 * e), n * c * (12 + 2 * e), differentiate=(0, 1, 2),
    )  # fmt: skip

    channels = (shapes.heads + shapes.kv_heads) * shapes.head_dim
    batch = max(n // 2048, 1)

    def rope_inputs() -> list[Tensor]:
        time_steps = n // batch
        angles = torch.arange(time_steps, device=device)[:, None] * torch.rand(shapes.head_dim // 2, device=device)
        tables = [f(angles)[None, None].expand(batch, -1, -1, -1).contiguous() for f in (torch.cos, torch.sin)]
        q, k = (draw(batch, time_steps, heads, shapes.head_dim) for heads in (shapes.heads, shapes.kv_heads))
        return [q.transpose(1, 2), k.transpose(1, 2), *tables]

    def liger_rope(f, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return f.apply(q, k, *(torch.cat((x, x), dim=-1)[:, 0].to(q.dtype) for x in (cos, sin)))

    yield Case(
        "rope", "2 N (H + K) D e each way", rope_inputs,
        {"ours": rotary.rope, "eager": rotary.rope_reference}
        | liger("liger_kernel.ops.rope.LigerRopeFunction", liger_rope),
        2 * n * channels * e, 2 * n * channels * e, differentiate=(0, 1),
    )  # fmt: skip
    width = n // batch

    def attention_inputs() -> list[Tensor]:
        q, k, v = (
            draw(batch, width, heads, shapes.head_dim) for heads in (shapes.heads, shapes.kv_heads, shapes.kv_heads)
        )
        return [x.transpose(1, 2) for x in (q, k, v)]

    operations = 2.0 * batch * width**2 * shapes.heads * shapes.head_dim
    contenders = {"torch sdpa": sdpa_causal}
    if device.type == "cpu":
        contenders["blocked"] = blocked_attention
        mask = attention_mask(width, width, None, device)
        contenders["eager"] = lambda q, k, v: plain_attention(q, k, v, mask, 0.0, None)
    yield Case(
        "causal attention", "2 B T^2 H D operations forward, 6 in all", attention_inputs, contenders,
        operations=operations, backward_bytes=0.0, plain=("torch sdpa", "blocked", "eager"), differentiate=(0, 1, 2),
    )  # fmt: skip
    # The operations of causal attention, so that a rate above its own is work that was skipped.
    # The window is a sixteenth of the row.
    window, slopes = max(width // 16, 1), alibi_slopes(shapes.heads, device)
    for name, reach in (("a window", (window, None)), ("ALiBi", (0, slopes)), ("both", (window, slopes))):
        limits = attention_mask(width, width, None, device, None, *reach, dtype=dtype)
        contenders = {"torch sdpa": lambda q, k, v, limits=limits: sdpa_masked(q, k, v, limits)}
        if device.type == "cpu":
            contenders["blocked"] = lambda q, k, v, reach=reach: blocked_attention(q, k, v, None, *reach)
        yield Case(
            f"causal attention with {name}", "2 B T^2 H D operations forward, 6 in all, if none is skipped",
            attention_inputs, contenders, operations=operations, backward_bytes=0.0, plain=("torch sdpa", "blocked"),
            differentiate=(0, 1, 2),
        )  # fmt: skip
    yield Case(
        "swiglu_packed", "forward 3 N I e, backward 5 N I e", lambda: [draw(n, 2 * i)],
        {"ours": gated.swiglu_packed, "eager": gated.swiglu_packed_reference}
        | liger("liger_kernel.ops.swiglu.LigerSiLUMulFunction", lambda f, x: f.apply(*x.chunk(2, dim=-1))),
        3 * n * i * e, 5 * n * i * e,
    )  # fmt: skip
    yield Case(
        "cross_entropy", "forward N V e, backward 2 N V e", lambda: [draw(n, v) * 1, labels()],
        {"ours": ce.cross_entropy, "eager": ce.cross_entropy_reference}
        | liger("liger_kernel.transformers.functional.liger_cross_entropy",
                lambda f, x, y: f(x, y, ignore_index=-100, reduction="none")),
        n * v * e, 2 * n * v * e,
    )  # fmt: skip

    def weights() -> list[Tensor]:
        return [draw(n, c), (torch.randn(v, c, device=device) * c**-0.5).to(dtype).requires_grad_(), labels()]

    yield Case(
        "linear_cross_entropy_sum", "2 N C V operations forward, 6 in all", weights,
        {"ours": lambda h, w, y: linear_ce.linear_cross_entropy_sum(h, w, y, use_triton=True),
         "chunked": lambda h, w, y: linear_ce.linear_cross_entropy_sum(h, w, y, use_triton=False),
         "eager": lambda h, w, y: linear_ce.linear_cross_entropy_reference(h, w, y).sum()}
        | liger("liger_kernel.transformers.functional.liger_fused_linear_cross_entropy",
                lambda f, h, w, y: f(h, w, y, reduction="sum")),
        operations=2.0 * n * c * v, backward_bytes=0.0, plain=("eager", "chunked"), differentiate=(0, 1),
    )  # fmt: skip
    yield Case(
        "linear_token_logprobs", "2 N C V operations forward, 6 in all (ours and chunked do 8)", weights,
        {"ours": lambda h, w, y: linear_ce.linear_token_logprobs(h, w, y, use_triton=True),
         "chunked": lambda h, w, y: linear_ce.linear_token_logprobs(h, w, y, use_triton=False),
         "eager": lambda h, w, y: -linear_ce.linear_cross_entropy_reference(h, w, y)},
        operations=2.0 * n * c * v, backward_bytes=0.0, plain=("eager", "chunked"), differentiate=(0, 1),
    )  # fmt: skip

    p, config = shapes.parameters, AdamWConfig()

    def adamw_inputs() -> list[Tensor]:
        main, avg, avg_sq, grad = (draw(p, kind=torch.float32, grad=False) for _ in range(4))
        return [main, avg, avg_sq.abs_(), grad, draw(p, grad=False)]

    def torch_adamw(main: Tensor, avg: Tensor, avg_sq: Tensor, grad: Tensor, weights: Tensor) -> None:
        adamw_step([main], [grad], [avg], [avg_sq], 3, 1e-4, 0.1, 2.0, config)
        weights.copy_(main)

    yield Case(
        "adamw", "(28 + e) a parameter: float32 gradient, weights written", adamw_inputs,
        {"ours": lambda *x: adamw_triton.adamw_flat_step(*x, 3, 1e-4, 0.1, 2.0, config), "torch fused": torch_adamw,
         "eager": lambda *x: adamw_flat_reference(*x, 3, 1e-4, 0.1, 2.0, config)},
        p * (28 + e), plain=("eager", "torch fused"),
    )  # fmt: skip
    yield Case(
        "sum_of_squares", "4 a parameter", lambda: [draw(p, kind=torch.float32, grad=False)],
        {"ours": adamw_triton.sum_of_squares, "eager": lambda x: sum_of_squares([x])}, 4 * p,
    )  # fmt: skip


class Timer:
    """Median seconds and peak bytes of a function on a device."""

    def __init__(self, device: torch.device, repetitions: int):
        self.device, self.repetitions = device, repetitions
        self.is_cuda = device.type == "cuda"
        self._caches = torch.empty(512 << 20 if self.is_cuda else 0, dtype=torch.uint8, device=device)

    def __call__(self, prepare: Callable[[], list[Tensor]], work: Callable) -> tuple[float, int | None]:
        seconds, peak = [], 0
        for repetition in range(-3, self.repetitions):
            inputs = prepare()
            elapsed, used = self._once(inputs, work)
            del inputs
            if repetition >= 0:
                seconds.append(elapsed)
                peak = max(peak, used)
        if not self.is_cuda:
            inputs = prepare()
            peak = resident_growth(lambda: work(*inputs))
        return statistics.median(seconds), peak

    def _once(self, inputs: list[Tensor], work: Callable) -> tuple[float, int]:
        if not self.is_cuda:
            start = time.perf_counter()
            work(*inputs)
            return time.perf_counter() - start, 0
        self._caches.zero_()
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        events[0].record()
        work(*inputs)
        events[1].record()
        torch.cuda.synchronize(self.device)
        used = torch.cuda.max_memory_allocated(self.device) - before
        return events[0].elapsed_time(events[1]) / 1e3, used


def with_backward(function: Callable, differentiate: tuple[int, ...]) -> Callable:
    """Results, then gradients of the named inputs; upstream gradients are ones."""

    def both(*inputs: Tensor) -> None:
        results = function(*inputs)
        results = [results] if isinstance(results, Tensor) else list(results)
        torch.autograd.grad(results, [inputs[k] for k in differentiate], [torch.ones_like(x) for x in results])

    return both


def rows(case: Case, timer: Timer, copy_speed: float, compile_eager: bool) -> Iterator[str]:
    contenders = dict(case.contenders)
    if compile_eager and "eager" in contenders:
        contenders["torch.compile"] = torch.compile(contenders["eager"])
    for name, function in contenders.items():
        for kind in ("forward", "forward + backward"):
            has_backward = kind != "forward"
            if has_backward and case.backward_bytes is None:
                continue
            label = f"| {case.name} | {kind} | {name} |"
            if not timer.is_cuda and name not in (*case.plain, "torch.compile"):
                yield f"{label} not measured: {unavailable_reason(timer.device)} | | | |"
                continue
            work = with_backward(function, case.differentiate) if has_backward else torch.no_grad()(function)
            try:
                seconds, peak = timer(case.inputs, work)
            except Exception as error:  # a contender that fails must not cost the others' figures
                yield f"{label} not measured: {type(error).__name__}: {str(error).splitlines()[0][:80]} | | | |"
                continue
            moved = case.forward_bytes + (case.backward_bytes if has_backward else 0.0)
            if case.operations:
                speed, share = f"{case.operations * (3 if has_backward else 1) / seconds / 1e12:.2f} TFLOP/s", ""
            else:
                speed, share = f"{moved / seconds / 1e9:.1f} GB/s", f"{moved / seconds / copy_speed:.0%}"
            memory = "not measured" if peak is None else f"{peak / 2**20:.1f} MiB"
            yield f"{label} {seconds * 1e3:.3f} | {speed} | {share} | {memory} |"


def measure_copy(timer: Timer) -> float:
    """Bytes per second that a copy reads and writes."""
    size = 1 << 30 if timer.is_cuda else 1 << 27
    source, target = (torch.empty(size, dtype=torch.uint8, device=timer.device).zero_() for _ in range(2))
    return 2 * size / timer(lambda: [source, target], lambda a, b: b.copy_(a))[0]


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.kernels", description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--tokens", type=int, default=0, help="default 16384, on a CPU 512")
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--only", default="", help="names of operations, separated by commas")
    parser.add_argument("--output", type=a_path, help="file for the table instead of stdout")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        shapes = Shapes(args.tokens or 16_384, 2048, 5632, 64_320, 32, 8, 64, 64 << 20)
    else:
        shapes = Shapes(args.tokens or 512, 384, 1024, 8192, 6, 2, 64, 1 << 20)
    timer = Timer(device, args.repetitions)
    copy_speed = measure_copy(timer)
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{cpu_name()} (not measured on a GPU)"
    chosen = [name for name in args.only.split(",") if name]
    lines, formulas = [], []
    for case in cases(shapes, getattr(torch, args.dtype), device):
        if not chosen or case.name in chosen:
            formulas.append(f"- {case.name}: {case.formula}")
            lines += rows(case, timer, copy_speed, args.compile)
    table = "\n".join([
        f"{hardware}, {torch.get_num_threads()} threads, torch {torch.__version__}, {args.dtype}, {shapes}, median of "
        f"{args.repetitions}. A copy moves {copy_speed / 1e9:.1f} GB/s.", "",
        "| operation | pass | who | ms | speed | of a copy | memory beyond inputs |", "|---|---|---|---|---|---|---|",
        *lines, "", "Bytes or operations by formula:", "", *formulas, "",
    ])  # fmt: skip
    if args.output:
        with open(args.output, "w", encoding="utf-8") as file:
            file.write(table)
    else:
        print(table)


if __name__ == "__main__":
    run_main(main)
