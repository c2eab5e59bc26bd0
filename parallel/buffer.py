"""The flat buffers behind a model's parameters and gradients.

After construction, every `parameter.data` is a view into one buffer of the model's dtype and every `parameter.grad` a
view into another, in float32 by default. Autograd then accumulates in place (`parameter.grad_dtype` lets a gradient be
wider than its parameter), a bucket is a slice that can be sent without a copy, and one call zeroes all gradients.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from checkpoint.named import Piece
from parallel.collectives import Collectives
from parallel.layout import ALIGNMENT, BucketLayout, BufferLayout, ParameterSpec, Slot, plan_layout

_CHUNK = 1 << 18
"""Elements squared at once on a CPU: two megabytes in float64, which stay in the cache."""


class FlatBuffers:
    """Moves a model's parameters into flat buffers.

    Args:
        named_parameters: in order of first use in the forward pass, each tensor once; all of one dtype and device.
        bucket_size, world_size, alignment: see `plan_layout`.
        grad_dtype: dtype in which gradients accumulate.
        spec_of: what the layout needs to know of a parameter, by its name and shape.
    """

    def __init__(
        self,
        named_parameters: list[tuple[str, nn.Parameter]],
        bucket_size: int,
        world_size: int,
        grad_dtype: torch.dtype,
        alignment: int = ALIGNMENT,
        spec_of: Callable[[str, tuple[int, ...]], ParameterSpec] = ParameterSpec,
    ):
        specs = [spec_of(name, tuple(parameter.shape)) for name, parameter in named_parameters]
        self.layout: BufferLayout = plan_layout(specs, bucket_size, world_size, alignment)
        self.parameters = dict(named_parameters)
        # A stage of a pipeline may train nothing, as one without adapters.
        first = named_parameters[0][1] if named_parameters else torch.empty(0, dtype=grad_dtype)
        if any(p.dtype != first.dtype or p.device != first.device for _, p in named_parameters):
            raise ValueError("all parameters must have one dtype and lie on one device")
        self.param_data = torch.zeros(self.layout.numel, dtype=first.dtype, device=first.device)
        self.grad_data = torch.zeros(self.layout.numel, dtype=grad_dtype, device=first.device)
        self._grad_views: list[tuple[nn.Parameter, Tensor]] = []
        for slot in self.layout.slots:
            parameter = self.parameters[slot.parameter.name]
            data = self.param_data[slot.start : slot.end].view(parameter.shape)
            data.copy_(parameter.detach())
            parameter.data = data
            self._grad_views.append((parameter, self.grad_data[slot.start : slot.end].view(parameter.shape)))
            parameter.grad_dtype = grad_dtype
        self.restore_grad_views()

    def require_grad_views(self) -> None:
        """
        Raises:
            RuntimeError: somebody has set a `grad` to None, and the gradient that came after it is not in the buffer.
        """
        for (parameter, view), slot in zip(self._grad_views, self.layout.slots):
            if parameter.grad is not view:
                raise RuntimeError(
                    f"the gradient of {slot.parameter.name} is not in its buffer, as after the model's zero_grad(): "
                    f"call zero_grad() of the DDP instead"
                )

    def restore_grad_views(self) -> None:
        """Restore the view of every parameter whose `grad` was set to None."""
        for parameter, view in self._grad_views:
            if parameter.grad is not view:
                parameter.grad = view


class Bucket:
    """A bucket's slice of the buffers, as a hook sees it."""

    def __init__(self, layout: BucketLayout, grad: Tensor, param: Tensor, collectives: Collectives | None = None):
        self.layout, self.collectives = layout, collectives
        """Collectives of the ranks that add its gradients; None: those of the hook."""
        self.index, self.slots = layout.index, layout.slots
        self.grad = grad
        """1-D, padding included (the padding is zero)."""
        self.param = param

    @staticmethod
    def of(layout: BucketLayout, buffers: FlatBuffers, collectives: Collectives | None = None) -> "Bucket":
        start, end = layout.start, layout.end
        return Bucket(layout, buffers.grad_data[start:end], buffers.param_data[start:end], collectives)

    def with_grad(self, grad: Tensor) -> "Bucket":
        """The same bucket with its gradients in other memory, such as a narrower copy."""
        return Bucket(self.layout, grad, self.param, self.collectives)

    def place(self, slot: Slot) -> slice:
        """Elements of the bucket that a slot takes up."""
        return slice(slot.start - self.layout.start, slot.end - self.layout.start)

    def piece(self, flat: Tensor, slot: Slot) -> Tensor:
        """A slot's part of `flat`, a tensor as long as the bucket: 1-D."""
        return flat[self.place(slot)]

    def views(self) -> list[tuple[str, Tensor]]:
        """(name, gradient in its parameter's shape) of each parameter in the bucket."""
        return [(s.parameter.name, self.piece(self.grad, s).view(s.parameter.shape)) for s in self.slots]

    def slices(self, start: int, end: int) -> list["ParameterSlice"]:
        """The pieces of parameters in elements [start, end) of the bucket."""
        found = []
        for slot in self.slots:
            place, parameter = self.place(slot), slot.parameter
            first, last = max(start, place.start), min(end, place.stop)
            if first < last:
                found.append(
                    ParameterSlice(
                        parameter.name, first - place.start, parameter.shape, self.param[first:last],
                        held=parameter.held,
                    )  # fmt: skip
                )
        return found


@dataclass(frozen=True)
class ParameterSlice:
    """A flat piece of a parameter that the optimizer steps: elements [offset, offset + len(param)) of what this rank
    holds of `name`."""

    name: str
    offset: int
    shape: tuple[int, ...]
    """Shape of what this rank holds of the parameter."""
    param: Tensor
    """1-D view of the model's weights, in their dtype."""
    held: Piece | None = field(default=None, kw_only=True)
    """What this rank holds of the whole parameter; None: all."""

    @property
    def part(self) -> Piece:
        """The same for a checkpoint."""
        held = Piece.whole(self.name, self.shape) if self.held is None else self.held
        return held.part(self.offset, self.offset + len(self.param))


@dataclass(frozen=True)
class SliceWithGrad(ParameterSlice):
    """A slice together with its gradients."""

    grad: Tensor
    """1-D view of the summed gradients, as long as the slice."""
    whole_grad: Tensor
    """1-D view of the whole parameter's gradients."""


def sum_of_squares(tensors: Iterable[Tensor]) -> Tensor:
    """Sum of the squares of all elements, float64 scalar on the tensors' device.

    In float64 the sum depends on how gradients are cut into slices only far below float32's resolution. So the clipping
    factor, rounded to float32, has the same bits for every layout of the buffers (almost surely: two float64 values
    would have to lie on either side of a rounding boundary of float32).
    """
    total: Tensor | None = None
    for tensor in tensors:
        if tensor.device.type == "cuda":
            part = torch.linalg.vector_norm(tensor, dtype=torch.float64).square()
        else:
            part = torch.zeros((), dtype=torch.float64)
            for chunk in tensor.split(_CHUNK):
                wide = chunk.double()
                part += torch.dot(wide, wide)
        total = part if total is None else total + part
    return torch.zeros((), dtype=torch.float64) if total is None else total
