"""The flat buffers behind a model's parameters and gradients.

After construction, every `parameter.data` is a view into one buffer of the model's dtype and every `parameter.grad` a
view into another, float32 unless asked otherwise. Autograd then accumulates into the right place by itself
(`parameter.grad_dtype` lets a gradient be wider than its parameter), a bucket is a slice that goes onto the wire
without copies, and zeroing all gradients is one call.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from parallel.layout import BucketLayout, BufferLayout, ParameterSpec, plan_layout


class FlatBuffers:
    """Moves a model's parameters into flat buffers.

    Args:
        named_parameters: in order of first use in the forward pass, each tensor once; all of one dtype and device.
        bucket_size, world_size: see `plan_layout`.
        grad_dtype: dtype in which gradients accumulate.
    """

    def __init__(
        self,
        named_parameters: list[tuple[str, nn.Parameter]],
        bucket_size: int,
        world_size: int,
        grad_dtype: torch.dtype,
    ):
        specs = [ParameterSpec(name, tuple(parameter.shape)) for name, parameter in named_parameters]
        self.layout: BufferLayout = plan_layout(specs, bucket_size, world_size)
        self.parameters = dict(named_parameters)
        first = named_parameters[0][1]
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
        self.zero_grad()

    def zero_grad(self) -> None:
        """Zero every gradient, and put the views back where somebody set a `grad` to None."""
        self.grad_data.zero_()
        for parameter, view in self._grad_views:
            if parameter.grad is not view:
                parameter.grad = view


class Bucket:
    """One bucket's slice of the buffers, as a hook sees it."""

    def __init__(self, layout: BucketLayout, buffers: FlatBuffers):
        self.layout = layout
        self.index, self.slots = layout.index, layout.slots
        self.grad: Tensor = buffers.grad_data[layout.start : layout.end]
        """1-D, padding included (the padding is zero)."""
        self.param: Tensor = buffers.param_data[layout.start : layout.end]

    def views(self) -> list[tuple[str, Tensor]]:
        """(name, gradient in its parameter's shape) of each parameter in the bucket."""
        start = self.layout.start
        return [
            (s.parameter.name, self.grad[s.start - start : s.end - start].view(s.parameter.shape)) for s in self.slots
        ]


@dataclass(frozen=True)
class ParameterSlice:
    """A flat piece of a parameter that the optimizer steps: elements [offset, offset + len(param)) of `name`."""

    name: str
    offset: int
    is_matrix: bool
    """Whether the whole parameter has two dimensions or more: only such decay."""
    param: Tensor
    """1-D view of the model's weights, in their dtype."""
    grad: Tensor
    """1-D view of the gradients, same length."""
