"""Measurement of what activations cost: the memory of a micro-batch, and memory and time of each part of the model.

Activations are what the forward pass keeps for the backward pass, with everything that exists for a moment in the two:
inputs and outputs of operations, gradients of activations, and a weight's gradient until it is added to the others. The
weights, the gradients that are kept, and the optimizer's state do not count.

Measured are allocations: on a GPU by the caching allocator's statistics, on a CPU by the profiler, which is told of
each of PyTorch's allocations. (What a library takes by itself, such as oneDNN for a multiplication, is seen by
neither.) So tensors that share memory count once, weights never, and it does not matter who keeps a tensor: autograd, a
kernel's context, or selective checkpointing. Both also work with compiled blocks.

Nothing that is measured leaves a trace: gradients of weights are dropped as they arrive. Measure before the model is
wrapped for data parallelism, whose hooks would send them.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch._C._profiler import _ExperimentalConfig
from torch.autograd import ProfilerState
from torch.autograd.profiler import record_function

from model.decoder import Block, Decoder, Keeps, Run
from model.recompute import KEEPS, BlockCosts, Costs

_REPEATS = 5
"""Times that each part is timed: the shortest counts."""
_MARK = "zero2all::mark"


@dataclass(frozen=True)
class Span:
    """Allocations between two marks."""

    net: int
    """Bytes allocated less bytes freed."""
    peak: int
    """Most bytes, beyond those at the start, at a time."""


class Meter(Protocol, AbstractContextManager):
    """Context in which allocations are counted, from mark to mark."""

    def mark(self) -> None: ...

    @property
    def spans(self) -> list[Span]:
        """After the context: one for each mark, from the one before or the start."""


class CPUMeter:
    """Counts what PyTorch's allocator tells the profiler. The old profiler, as it lists its events in order; the newer
    one also writes lines of its own to the terminal each time."""

    def __init__(self) -> None:
        self.spans: list[Span] = []

    def __enter__(self) -> "CPUMeter":
        options = (False, True, False, False, False, _ExperimentalConfig())
        torch.autograd._enable_profiler_legacy(torch.autograd.ProfilerConfig(ProfilerState.CPU, *options))
        return self

    def mark(self) -> None:
        with record_function(_MARK):
            pass

    def __exit__(self, *exception: Any) -> None:
        net = peak = 0
        for thread in torch.autograd._disable_profiler_legacy():
            for event in thread:
                if event.kind() == "push" and event.name() == _MARK:
                    self.spans.append(Span(net, peak))
                    net = peak = 0
                elif event.kind() == "memory_alloc":
                    net += event.cpu_memory_usage()
                    peak = max(peak, net)


class CUDAMeter:
    def __init__(self, device: torch.device):
        self._device = device
        self.spans: list[Span] = []

    def __enter__(self) -> "CUDAMeter":
        self._begin()
        return self

    def _begin(self) -> None:
        torch.cuda.reset_peak_memory_stats(self._device)
        self._start = torch.cuda.memory_allocated(self._device)

    def mark(self) -> None:
        net = torch.cuda.memory_allocated(self._device) - self._start
        self.spans.append(Span(net, torch.cuda.max_memory_allocated(self._device) - self._start))
        self._begin()

    def __exit__(self, *exception: Any) -> None:
        pass


def new_meter(device: torch.device) -> Meter:
    return CUDAMeter(device) if device.type == "cuda" else CPUMeter()


class _Leave(torch.autograd.Function):
    """The end of a part that is measured by itself: a scalar, so that the part's outputs live on only where they are
    kept, and the gradients that come from the next part exist only once the backward pass begins."""

    @staticmethod
    def forward(ctx: Any, *outputs: Tensor) -> Tensor:
        ctx.likes = [(x.shape, x.dtype, x.device) if x.requires_grad else None for x in outputs]
        return outputs[0].new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *_grad: Tensor) -> tuple[Tensor | None, ...]:
        return tuple(None if like is None else torch.zeros(like[0], dtype=like[1], device=like[2])
                     for like in ctx.likes)  # fmt: skip


@dataclass
class _Part:
    """A part of the model, with copies of the inputs that it has seen."""

    run: Run
    inputs: tuple[Tensor | None, ...]

    def forward(self) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """Run the part on new inputs, which live on only where they are kept. Returns a scalar at the end of the graph,
        and what the model keeps of the outputs, too: what experts have counted."""
        device = next((x.device for x in self.inputs if x is not None), None)
        # Adding a scalar that has a gradient copies an input and keeps nothing of it.
        leaf = torch.zeros((), device=device, requires_grad=True)
        outputs = self.run(*(None if x is None else x + leaf.to(x.dtype) for x in self.inputs))
        return cast(Tensor, _Leave.apply(*(x for x in outputs if x is not None))), outputs[2:]


class Activations:
    """Measures one model on one micro-batch.

    Args:
        model: in training, not yet wrapped for data parallelism.
        hidden: the forward pass up to the final hidden states.
        loss: what follows it, up to a scalar.
        grad_dtype: dtype in which gradients of weights accumulate.
    """

    def __init__(
        self, model: Decoder, hidden: Callable[[], Tensor], loss: Callable[[Tensor], Tensor], grad_dtype: torch.dtype
    ):
        self._model, self._hidden, self._loss, self._grad_dtype = model, hidden, loss, grad_dtype
        self._device = next(model.parameters()).device

    def peak(self) -> int:
        """Most bytes of activations at a time, in a forward and backward pass with what the blocks keep at present."""
        with new_meter(self._device) as meter:
            self.run_pass()
            meter.mark()
        return meter.spans[0].peak

    def run_pass(self) -> None:
        """Do a forward and backward pass, with what the blocks keep at present."""
        with self._gradients_dropped():
            self._loss(self._hidden()).backward()

    def costs(self, beat: Callable[[], object] = lambda: None) -> Costs:
        """Costs of each part, by runs of the part alone. Afterwards every block keeps nothing.

        Args:
            beat: called now and then.
        """
        count = len(self._model.layers)
        kind_of = _kinds(self._model)
        # The last of each kind: the first block of all has nothing to add.
        last_of = {kind: index for index, kind in enumerate(kind_of)}
        self._keep_in_all("nothing")
        with self._gradients_dropped():
            parts, shared = self._parts([-1, *last_of.values(), count])
            beat()
            embedding_kept, embedding_peak = self._memory(parts[-1])
            last_norm = parts[count]
            loss = _Part(lambda *x: (self._loss(cast(Tensor, last_norm.run(*x)[0])),), last_norm.inputs)
            loss_peak = self._memory(loss)[1]
            loss_time = min(self._microseconds(loss) for _ in range(_REPEATS))
            kinds = [self._block_costs(parts[last_of[kind]], beat) for kind in sorted(last_of)]
        self._keep_in_all("nothing")
        # An adapter may have taken the place of a layer.
        embedding: Any = getattr(self._model.embed_tokens, "weight", None)
        is_tied = embedding is not None and getattr(self._model.lm_head, "weight", None) is embedding
        # autograd converts it before it waits.
        tied = embedding.numel() * self._grad_dtype.itemsize if is_tied and embedding.requires_grad else 0
        return Costs(kinds, kind_of, shared, embedding_kept, embedding_peak, loss_peak, tied, loss_time)

    def _block_costs(self, part: _Part, beat: Callable[[], object]) -> BlockCosts:
        kept_bytes: dict[Keeps, int] = {}
        peaks = []
        times: dict[Keeps, list[int]] = {kept: [] for kept in KEEPS}
        for kept in KEEPS:
            beat()
            self._keep_in_all(kept)
            kept_bytes[kept], peak = self._memory(part)
            peaks.append(peak)
        # In turns, as other programs may need the machine for a while.
        for _ in range(_REPEATS):
            beat()
            for kept in KEEPS:
                self._keep_in_all(kept)
                times[kept].append(self._microseconds(part))
        return BlockCosts(kept_bytes, max(peaks), {kept: min(measured) for kept, measured in times.items()})

    def _keep_in_all(self, kept: Keeps) -> None:
        self._model.set_recompute([kept] * len(self._model.layers))

    def _parts(self, wanted: list[int]) -> tuple[dict[int, _Part], int]:
        """Some parts with their inputs, by a forward pass that keeps only the blocks' inputs; and the bytes that exist
        throughout."""
        parts: dict[int, _Part] = {}
        with new_meter(self._device) as meter:

            def watch(number: int, run: Run, inputs: tuple[Tensor | None, ...]) -> None:
                if number <= 0:
                    # Before the first block: what the blocks share, and the embedded tokens.
                    meter.mark()
                if number in wanted:
                    parts[number] = _Part(run, tuple(x if x is None else x.detach() for x in inputs))
                if number == 0 and inputs[0] is not None:
                    embedded.append(inputs[0].nbytes)

            embedded: list[int] = []
            with self._model.watched(watch):
                self._hidden()
        before, embedding = meter.spans[:2]
        return parts, max(0, before.net + embedding.net - embedded[0])

    def _memory(self, part: _Part) -> tuple[int, int]:
        """(bytes kept, peak in bytes) of a part's forward and backward pass."""
        # The first time compiles, and takes memory for good.
        self._run(part)
        with new_meter(self._device) as meter:
            self._run(part, meter.mark)
        forward, backward = meter.spans
        return forward.net, max(forward.peak, forward.net + backward.peak)

    def _run(self, part: _Part, mark: Callable[[], None] = lambda: None) -> None:
        end, _counted = part.forward()
        mark()
        if end.requires_grad:
            end.backward()
        mark()

    def _microseconds(self, part: _Part) -> int:
        self._wait()
        started = time.perf_counter()
        self._run(part)
        self._wait()
        return round(1e6 * (time.perf_counter() - started))

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    @contextmanager
    def _gradients_dropped(self) -> Iterator[None]:
        """Context in which the gradient of each weight is dropped once it is there."""

        def drop(parameter: Tensor) -> None:
            parameter.grad = None

        trained = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
        handles = []
        for parameter in trained:
            parameter.grad_dtype = self._grad_dtype
            handles.append(parameter.register_post_accumulate_grad_hook(drop))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _kinds(model: Decoder) -> list[int]:
    """Number of each block's kind. Blocks of a kind have the same layers with the same parameters, and see equally
    far."""
    config, kind_of = model.config, []
    numbers: dict[Any, int] = {}
    for index, block in enumerate(cast("list[Block]", model.layers)):
        layers = tuple((name, type(layer).__name__) for name, layer in block.named_modules())
        parameters = tuple((name, x.shape, x.dtype, x.requires_grad) for name, x in block.named_parameters())
        kind = (config.window_of(index), layers, parameters)
        kind_of.append(numbers.setdefault(kind, len(numbers)))
    return kind_of
