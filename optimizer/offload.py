"""Main parameters and moments in host memory, where the CPU steps them (ZeRO-Offload: Ren et al., USENIX ATC 2021).

Each bucket's gradients are copied to the host, and its new weights back. While the CPU steps one bucket, the gradients
of the next and the weights of the one before are on their way:

    main thread    norm | wait | step bucket 2 | wait | step bucket 1 | wait | step bucket 0 |
    copy stream     [g 2 to host][g 1 to host]  [w 2 to GPU][g 0 to host]  [w 1 to GPU]       [w 0 to GPU]

Only what is on its way lies in pinned memory, which the GPU can reach by itself: twice the largest bucket, for
gradients and for weights. Even and odd buckets take turns in it. On the device remain weights and gradients: of the 18
bytes a parameter of AdamW in bfloat16, 12 go to the host. Without a GPU the same copies are made in the same order, one
after the other.

The rules (rule.py) are those of a CPU, on slices as long as on the device, so that a CPU gives the same bits as
without. ZeRO-1's gather of a bucket follows its weights on the device. Checkpoints hold the same tensors.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from optimizer.mixed_precision import LossScaler, MixedPrecisionOptimizer
from optimizer.rule import Rule, SliceState, Step
from parallel.buffer import ParameterSlice
from parallel.contract import GradientSource

ALIGNMENT = 64
"""Elements, as in parallel/layout.py: a slice begins at a multiple of a cache line."""


class Copied(Protocol):
    """Copies that may still be on their way."""

    def wait(self) -> None:
        """Block the caller until they have arrived."""

    def wait_on_device(self) -> None:
        """Let work that the device is given from now on begin once they have arrived."""


class _AtOnce:
    """Copies that have arrived already."""

    def wait(self) -> None:
        pass

    def wait_on_device(self) -> None:
        pass


class _ByStream:
    """Copies that a stream makes."""

    def __init__(self, stream: torch.cuda.Stream):
        self._event, self._device = stream.record_event(), stream.device

    def wait(self) -> None:
        self._event.synchronize()

    def wait_on_device(self) -> None:
        torch.cuda.current_stream(self._device).wait_event(self._event)


class _Copier:
    """Copies tensors between host and device: on CUDA by a stream of its own, otherwise at once."""

    def __init__(self, device: torch.device):
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def copy(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> Copied:
        """Start to copy, for pairs of (target, source), after all work that the device has been given so far."""
        if self._stream is None:
            for target, source in pairs:
                target.copy_(source)
            return _AtOnce()
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for target, source in pairs:
                target.copy_(source, non_blocking=True)
        return _ByStream(self._stream)


class _Staging:
    """Host memory for tensors on their way, in which even and odd buckets take turns.

    Args:
        lengths: of each bucket's slices.
        is_pinned: whether a GPU is to reach it.
    """

    def __init__(self, lengths: Sequence[Sequence[int]], dtype: torch.dtype, is_pinned: bool):
        self._lengths = lengths
        sizes = [sum(map(_aligned, its)) for its in lengths]
        self._memory = [
            torch.empty(max(sizes[turn::2], default=0), dtype=dtype, pin_memory=is_pinned) for turn in range(2)
        ]

    def of(self, bucket: int) -> list[Tensor]:
        """Memory for each slice of a bucket, until the next bucket but one needs it."""
        lengths = self._lengths[bucket]
        parts = self._memory[bucket % 2][: sum(map(_aligned, lengths))].split([_aligned(n) for n in lengths])
        return [part[:length] for part, length in zip(parts, lengths)]


def _aligned(length: int) -> int:
    return -(-length // ALIGNMENT) * ALIGNMENT


class OffloadedOptimizer(MixedPrecisionOptimizer):
    """The step of a run with all state in host memory.

    Args:
        gradients, grad_clip, scaler: see MixedPrecisionOptimizer.
        rules: rules for a CPU; none may need whole gradients.
        device: the model's.
    """

    def __init__(
        self, gradients: GradientSource, rules: Sequence[Rule], grad_clip: float, scaler: LossScaler,
        device: torch.device,
    ):  # fmt: skip
        assert not any(rule.needs_whole_gradients for rule in rules), "whole gradients lie on the device"
        self._copier, self._is_pinned = _Copier(device), device.type == "cuda"
        self._lengths = [[len(piece.param) for piece in bucket] for bucket in gradients.slices]
        dtypes = {piece.param.dtype for bucket in gradients.slices for piece in bucket} or {torch.float32}
        assert len(dtypes) == 1, "flat buffers have one dtype"
        self._weights = _Staging(self._lengths, dtypes.pop(), self._is_pinned)
        self._gradients: _Staging | None = None
        # Weights on their way from each half of the memory.
        self._sent: dict[int, Copied] = {}
        super().__init__(gradients, rules, grad_clip, scaler)

    def _new_states(self, bucket: int, pieces: Sequence[ParameterSlice]) -> list[SliceState]:
        """States whose weights are those on their way, not the model's."""
        staged = self._weights.of(bucket)
        self._copier.copy(zip(staged, (piece.param for piece in pieces))).wait()
        states = []
        for piece, weights in zip(pieces, staged):
            on_host = ParameterSlice(piece.name, piece.offset, piece.shape, weights, held=piece.held)
            main = weights.to(torch.float32, copy=True)
            states.append(SliceState(on_host, main, self._rule_of(piece).new_tensors(on_host, main)))
        return states

    def _step_all(self, lr: float, grad_divisor: float, after_bucket: Callable[[int], None] | None) -> None:
        step = Step(self.num_steps, lr, grad_divisor, zero_grad=False)
        order = [*reversed(range(len(self._buckets)))]
        on_host, arriving = self._fetch(order[0]) if order else ([], _AtOnce())
        for bucket, following in zip(order, [*order[1:], None]):
            # The source may give the next gradients in the memory of these.
            arriving.wait()
            gradients = on_host
            if following is not None:
                on_host, arriving = self._fetch(following)
            self._make_room(bucket)
            self._step_slices(bucket, gradients, step)
            self._send(bucket)
            if after_bucket is not None:
                after_bucket(bucket)
            self.gradients.release(bucket)

    def _fetch(self, bucket: int) -> tuple[list[Tensor], Copied]:
        """Start to copy a bucket's gradients to the host."""
        taken = self.gradients.take(bucket)
        if self._gradients is None:
            # One hook gives all of them, in one dtype.
            dtype = taken[0].dtype if taken else torch.float32
            self._gradients = _Staging(self._lengths, dtype, self._is_pinned)
        on_host = self._gradients.of(bucket)
        return on_host, self._copier.copy(zip(on_host, taken))

    def _make_room(self, bucket: int) -> None:
        """Wait until the weights that lay in a bucket's memory have left it."""
        if sent := self._sent.pop(bucket % 2, None):
            sent.wait()

    def _send(self, bucket: int) -> None:
        """Start to copy a bucket's weights to the device, whose next work waits for them."""
        targets = (piece.param for piece in self.gradients.slices[bucket])
        sent = self._copier.copy(zip(targets, (state.piece.param for state in self._buckets[bucket])))
        sent.wait_on_device()
        self._sent[bucket % 2] = sent

    @torch.no_grad()
    def weights_from_main(self) -> None:
        for bucket, states in enumerate(self._buckets):
            self._make_room(bucket)
            for state in states:
                state.write_weights()
            self._send(bucket)
