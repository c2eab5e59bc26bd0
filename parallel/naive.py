"""Data parallelism, ZeRO-1 and PowerSGD at their plainest: each is the whole idea, but slow. Tests compare the fast
versions with these.

    NaiveDDP         all ranks sum their gradients; ddp.py does it in buckets, under the backward pass
    NaiveZero1       each rank keeps the optimizer state of some parameters; zero1.py cuts every bucket into even shares
    naive_powersgd   a matrix travels as two thin factors; powersgd.py sends a bucket's factors at once
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.buffer import SliceWithGrad
from parallel.context import DistContext
from parallel.observer import Observer
from parallel.spans import span


def broadcast_parameters(module: nn.Module, group: dist.ProcessGroup | None) -> None:
    """Give every rank the first rank's weights and buffers. Main thread only, before the comm stream has work."""
    if group is not None:
        for tensor in [*module.parameters(), *module.buffers()]:
            dist.broadcast(tensor.detach(), src=0, group=group)


class NaiveDDP(nn.Module):
    """All-reduce each gradient after the backward pass."""

    def __init__(self, module: nn.Module, context: DistContext, grad_dtype: torch.dtype = torch.float32):
        super().__init__()
        self.module, self.context = module, context
        self.trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.grads = {name: torch.zeros_like(p, dtype=grad_dtype) for name, p in self.trained.items()}
        for name, parameter in self.trained.items():
            parameter.grad_dtype, parameter.grad = grad_dtype, self.grads[name]
        self.observer = Observer(context)
        broadcast_parameters(module, context.grad_group)

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)

    def zero_grad(self, set_to_none: bool = False) -> None:
        assert not set_to_none, "the optimizer's slices are views of the gradients"
        for grad in self.grads.values():
            grad.zero_()

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        yield

    def finish_grad_sync(self) -> None:
        if self.context.grad_group is not None:
            with self.observer.waiting("wait for gradients"), span("gradients"):
                for grad in self.grads.values():
                    dist.all_reduce(grad, group=self.context.grad_group)

    def nonfinite_parameters(self) -> list[str]:
        """Names of the parameters whose gradients are not finite now."""
        are_finite = torch.stack([torch.isfinite(grad).all() for grad in self.grads.values()]).tolist()
        return [name for name, is_finite in zip(self.grads, are_finite) if not is_finite]

    def slices(self) -> list[list[SliceWithGrad]]:
        """Slices for the optimizer: every parameter whole, in a single list, as there are no buckets."""
        return [
            [
                SliceWithGrad(name, 0, tuple(p.shape), p.detach().view(-1), grad.view(-1), grad.view(-1))
                for (name, p), grad in zip(self.trained.items(), self.grads.values())
            ]
        ]


class NaiveZero1:
    """ZeRO stage 1 (Rajbhandari et al., SC 2020): parameter i belongs to rank i modulo N, which alone keeps its
    optimizer state and steps it, then broadcasts it.

    Args:
        parameters: the model's, with summed gradients when `step` is called.
        new_optimizer: makes a torch optimizer for this rank's parameters.
    """

    def __init__(
        self,
        parameters: list[nn.Parameter],
        context: DistContext,
        new_optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
    ):
        self.parameters, self.context = parameters, context
        self.optimizer = new_optimizer(parameters[context.rank :: context.world_size])

    def step(self) -> None:
        self.optimizer.step()
        if self.context.grad_group is not None:
            for index, parameter in enumerate(self.parameters):
                dist.broadcast(parameter.detach(), src=index % self.context.world_size, group=self.context.grad_group)


def naive_powersgd(
    gradient: Tensor, residual: Tensor, q: Tensor, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor, Tensor]:
    """One step of PowerSGD with warm start and error feedback (Vogels, Karimireddy and Jaggi, NeurIPS 2019).

    Args:
        gradient: this rank's, (m, n).
        residual: the part of this rank's gradients that earlier steps did not send, (m, n).
        q: (n, r), the same on all ranks.
    Returns:
        an approximation of the sum of all ranks' gradients (m, n), the same on all ranks; this rank's next residual;
        the next q.
    """

    def summed(factor: Tensor) -> Tensor:
        factor = factor.clone()
        if group is not None:
            dist.all_reduce(factor, group=group)
        return factor

    matrix = gradient + residual
    p = torch.linalg.qr(summed(matrix @ q)).Q
    own_q = matrix.T @ p
    next_q = summed(own_q)
    return p @ next_q.T, matrix - p @ own_q.T, next_q / next_q.norm(dim=0)
